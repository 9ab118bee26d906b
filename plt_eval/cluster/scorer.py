"""The runner's Scorer whose judgements are Ray tasks.

Ray's own retries are off. A task that died with its process or machine goes to others, after a pause; TRIES times, for
what kills its judge each time must not go on for ever. What a machine refuses to judge leaves that machine out.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from plt_benchmarks.protocols import Answer, Sample, SandboxError, Score
from plt_eval.cluster import worker
from plt_eval.cluster.machines import Machines
from plt_eval.cluster.orders import Judgement
from plt_eval.records import JudgeRecord

PAUSES_S = (0.5, 5.0, 20.0)
"""Between tries: Ray may take a while to notice that a machine is gone, and give it more work until then."""
TRIES = len(PAUSES_S) + 1
LOOK_S = 5.0
"""How often is looked for machines that came or went, in seconds."""
ALONE_S = 60.0
"""How long is waited for a machine when none is left that can judge."""
SWEEP_S = 20.0


class Lost(Exception):
    """A judgement died with its process or its machine."""

    def __init__(self, why: str, node: str = "") -> None:
        super().__init__(why)
        self.node = node


@dataclass
class ClusterScorer:
    """Judges on `machines`, which have met; a Scorer. `carried` makes a sample whole for others, `keep` gets the files
    of each judgement, `began` hears of each sample that is sent, and `grown` of how many judgements fit at a time, now
    and then."""

    machines: Machines
    carried: Callable[[Sample], Sample] = lambda sample: sample
    keep: Callable[[bytes], None] | None = None
    began: Callable[[Sample], None] | None = None
    grown: Callable[[int], None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _under_way: set[Any] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _unclean: bool = False

    def __post_init__(self) -> None:
        self._ray = self.machines.connection.ray
        self._task = self._ray.remote(max_retries=0)(worker.judge)
        self._samples = _Samples(self._ray.put)
        self._watcher = threading.Thread(target=self._watch, name="cluster-watch", daemon=True)
        self._watcher.start()

    @property
    def at_once(self) -> int:
        """Judgements that fit on the machines at a time."""
        needs = self.machines.needs
        return sum(needs.slots(machine.resources) for machine in self.machines.fit().values())

    def place(self) -> str:
        """As in "on 3 machines"."""
        count = len(self.machines.fit())
        return f"on {count} machine{'' if count == 1 else 's'}"

    def judges(self) -> tuple[JudgeRecord, ...]:
        """The machines, and how much each has judged."""
        return tuple(machine.record() for machine in self.machines.all())

    def score(self, sample: Sample, answer: Answer) -> Score:
        """The verdict of some machine. Raises SandboxError and UserError when none is left."""
        if self.began is not None:
            self.began(sample)
        deaths: list[str] = []
        avoided: set[str] = set()
        with self._samples.sent(sample, self.carried) as sent:
            while not self._stopped.is_set():
                try:
                    judgement = self._ask(sent, answer, avoided)
                except Lost as lost:
                    deaths.append(str(lost))
                    if len(deaths) == TRIES:
                        return Score(error=f"its judge died {TRIES} times; the last time: {lost}")
                    avoided.add(lost.node)
                    self._clean_up()
                    self._stopped.wait(PAUSES_S[len(deaths) - 1])
                    continue
                if judgement.refused:
                    self.machines.leave_out(judgement.node, judgement.refused)
                    continue
                if judgement.files and self.keep is not None:
                    self.keep(judgement.files)
                self.machines.count(judgement.node)
                assert judgement.score is not None
                return judgement.score
        return Score(error="the judging was stopped")

    def close(self) -> None:
        """Cancel what is under way, and have what it leaves removed."""
        with self._lock:
            self._stopped.set()
            left = list(self._under_way)
        for ref in left:
            with suppress(Exception):
                self._ray.cancel(ref, force=True)
        self._watcher.join(1.0)
        if left or self._unclean:
            with suppress(Exception):
                sweeps = self.machines.sweep(over=True)
                self._ray.wait(sweeps, num_returns=len(sweeps), timeout=SWEEP_S)

    # --- one try ------------------------------------------------------------------------------------------

    def _ask(self, sent: Any, answer: Answer, avoided: Collection[str]) -> Judgement:
        """Raises Lost, and SandboxError or UserError when no machine is left."""
        nodes = self._choice(avoided)
        errors = self._ray.exceptions
        ref = self._submitted(nodes, sent, answer)
        try:
            while not self._ray.wait([ref], timeout=LOOK_S)[0]:
                if not nodes & self.machines.fit().keys():
                    self._ray.cancel(ref, force=True)
                    raise Lost("all machines that it could have gone to are gone")
            judgement: Judgement = self._ray.get(ref)
            return judgement
        except errors.TaskCancelledError:
            raise Lost("it was cancelled") from None
        except errors.RayTaskError as error:
            return Judgement("", Score(error=f"judging failed: {' '.join(str(error).split())[-300:]}"))
        except errors.RayError as error:  # its process or machine died, or what it needs was lost with one
            raise Lost(_one_line(error), _node_in(error)) from None
        finally:
            with self._lock:
                self._under_way.discard(ref)

    def _submitted(self, nodes: Collection[str], sent: Any, answer: Answer) -> Any:
        options = self.machines.needs.options()
        where = {"ray.io/node-id": f"in({','.join(sorted(nodes))})"}
        task = self._task.options(**options, label_selector=where, scheduling_strategy="SPREAD")
        with self._lock:
            if self._stopped.is_set():
                raise Lost("the judging was stopped")
            ref = task.remote(self.machines.order_ref, sent, answer)
            self._under_way.add(ref)
            return ref

    def _choice(self, avoided: Collection[str]) -> set[str]:
        """The machines that may judge, those that a judgement was lost on only if there are no others."""
        deadline = time.monotonic() + ALONE_S
        while not self._stopped.is_set():
            fit = set(self.machines.fit())
            if fit:
                return fit - set(avoided) or fit
            if all(machine.left_out for machine in self.machines.all()) or time.monotonic() > deadline:
                raise SandboxError(f"{self.machines.none_fit()}; the same command goes on")
            self._stopped.wait(1.0)
        raise Lost("the judging was stopped")

    # --- around it ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_S):
            with suppress(Exception):  # the cluster does not answer: those who wait find out
                self.machines.meet()
                if self.grown is not None:
                    self.grown(self.at_once)

    def _clean_up(self) -> None:
        self._unclean = True
        with suppress(Exception):
            self.machines.sweep(over=False)


class _Samples:
    """Samples in the cluster's store: each once, as long as a judgement of it is under way."""

    def __init__(self, put: Callable[[Any], Any]) -> None:
        self._put = put
        self._lock = threading.Lock()
        self._refs: dict[str, tuple[Any, int]] = {}

    @contextmanager
    def sent(self, sample: Sample, carried: Callable[[Sample], Sample]) -> Iterator[Any]:
        """A reference to `sample`, as `carried` makes it."""
        with self._lock:
            ref, users = self._refs.get(sample.id, (None, 0))
            if ref is None:
                ref = self._put(carried(sample))
            self._refs[sample.id] = ref, users + 1
        try:
            yield ref
        finally:
            with self._lock:
                ref, users = self._refs[sample.id]
                if users == 1:
                    del self._refs[sample.id]
                else:
                    self._refs[sample.id] = ref, users - 1


def _one_line(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}"


def _node_in(error: Exception) -> str:
    """The machine that an error names; "" if it names none."""
    found = re.search(r"\bnode ID: ([0-9a-f]{20,})", str(error))
    return found[1] if found else ""
