"""Which machines of a cluster judge: each is asked what it has before it gets work, and left out, with a note, where it
would judge differently or not at all."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plt_eval.cluster import worker
from plt_eval.cluster.connection import Connection
from plt_eval.cluster.orders import DOCKER, Introduction, Order
from plt_eval.errors import UserError
from plt_eval.records import Hardware, JudgeRecord
from plt_eval.swe.containers import GIB, disk_of_images

INTRODUCTION_S = 180.0
"""How long a machine may take to introduce itself: it starts a process, imports, and tries its sandbox."""
MOST_NAMED = 4


@dataclass(frozen=True)
class Needs:
    """What one judgement takes of a machine, as Ray counts: cores, bytes of memory, and places for Docker."""

    cpus: int = 1
    memory: int = GIB
    docker: int = 0

    def options(self) -> dict[str, Any]:
        """For a task."""
        own = {"resources": {DOCKER: self.docker}} if self.docker else {}
        return {"num_cpus": self.cpus, "memory": self.memory, **own}

    def slots(self, has: Mapping[str, float]) -> int:
        """How many judgements at a time fit on a machine that has these resources."""
        return min(math.floor(has.get(name, 0) / need) for name, need in self._named().items())

    def lacking(self, has: Mapping[str, float]) -> str:
        """Why none fits, as a reader puts it; "" where one does."""
        for name, need in self._named().items():
            if has.get(name, 0) < need:
                return _LACKING[name].format(need=need / GIB if name == "memory" else need)
        return ""

    def _named(self) -> dict[str, float]:
        needs = {DOCKER: self.docker, "CPU": self.cpus, "memory": self.memory}
        return {name: need for name, need in needs.items() if need}


_LACKING = {
    DOCKER: "it declares no Docker (ray start --resources '{{\"docker\": 4}}')",
    "CPU": "it has fewer than {need} CPUs for Ray",
    "memory": "it has less than {need:.1f} GiB of memory for Ray",
}


@dataclass
class Machine:
    """One node of the cluster. `left_out` says why it does not judge."""

    id: str
    name: str
    resources: Mapping[str, float]
    introduction: Introduction | None = None
    left_out: str = ""
    alive: bool = True
    judged: int = 0

    def record(self) -> JudgeRecord:
        """For the run's manifest."""
        told = self.introduction
        return JudgeRecord(
            machine=self.name,
            packages={} if told is None else dict(told.packages),
            hardware=None if told is None else Hardware(**told.hardware),
            judged=self.judged,
            left_out=self.left_out,
        )


@dataclass
class Machines:
    """The machines that judge by `order`; thread-safe. `images` are those that the work needs, by environment."""

    connection: Connection
    order: Order
    order_ref: Any
    needs: Needs
    notify: Callable[[str], None]
    images: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._meeting = threading.Lock()
        self._known: dict[str, Machine] = {}
        self._introduce = self.connection.ray.remote(max_retries=0)(worker.introduce)
        self._sweep = self.connection.ray.remote(max_retries=0)(worker.sweep)

    # --- who is there -------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Look who is there: new machines introduce themselves, and gone ones are taken off."""
        with self._meeting:
            alive = {node["NodeID"]: node for node in self.connection.ray.nodes() if node["Alive"]}
            with self._lock:
                known = list(self._known.values())
            for machine in known:
                if machine.alive and machine.id not in alive:
                    machine.alive = False
                    if not machine.left_out:
                        self.notify(f"{machine.name} is gone; others judge what it had")
            new = [_machine(alive[name]) for name in alive if name not in self._known]
            if new:
                self._welcome(new)

    def _welcome(self, new: Sequence[Machine]) -> None:
        asked = []
        for machine in new:
            machine.left_out = self.needs.lacking(machine.resources)
            if not machine.left_out:
                asked.append(machine)
        for machine, told in zip(asked, self._introductions(asked), strict=True):
            machine.introduction = None if isinstance(told, str) else told
            machine.left_out = told if isinstance(told, str) else told.refused
        self._leave_out_full(asked)
        with self._lock:
            self._known |= {machine.id: machine for machine in new}
        for machine in new:
            if not machine.left_out:
                self.notify(f"{machine.name} judges, {self.needs.slots(machine.resources)} at a time")
            elif machine.resources.get("CPU", 0) > 0:
                self.notify(f"{machine.name} is left out: {machine.left_out}")

    def _introductions(self, machines: Sequence[Machine]) -> list[Introduction | str]:
        """What each says, or why it says nothing."""
        ray = self.connection.ray
        images = tuple(self.images)
        refs = [
            self._introduce.options(num_cpus=0, scheduling_strategy=self._on(machine.id)).remote(self.order_ref, images)
            for machine in machines
        ]
        ray.wait(refs, num_returns=len(refs), timeout=INTRODUCTION_S) if refs else None
        told: list[Introduction | str] = []
        for ref in refs:
            try:
                told.append(ray.get(ref, timeout=0))
            except ray.exceptions.GetTimeoutError:
                ray.cancel(ref, force=True)
                told.append(f"it does not answer within {INTRODUCTION_S:.0f} s")
            except ray.exceptions.RayError as error:
                told.append(_why(error))
        return told

    def _leave_out_full(self, machines: Iterable[Machine]) -> None:
        """Take off those whose disk has no room for their share of the images."""
        patches, others = self.order.patches, len(self.fit())
        staying = [machine for machine in machines if not machine.left_out]
        while patches is not None and staying:
            full = []
            for machine in staying:
                told = machine.introduction
                assert told is not None
                missing = [name for name in self.images if name not in told.images]
                share = math.ceil(len(missing) / (others + len(staying)))
                environments = min(share, len({self.images[name] for name in missing}))
                need = disk_of_images(share, environments, patches.keep, self.needs.slots(machine.resources))
                if share and told.free_disk is not None and need > told.free_disk:
                    machine.left_out = (
                        f"its share of the missing images, {share}, needs about {need / GIB:.0f} GiB with "
                        f"--keep-images {patches.keep}, and {told.free_disk / GIB:.0f} GiB are free"
                    )
                    full.append(machine)
            if not full:
                return
            staying = [machine for machine in staying if machine not in full]

    def _on(self, node: str) -> Any:
        strategies = self.connection.ray.util.scheduling_strategies
        return strategies.NodeAffinitySchedulingStrategy(node, soft=False)

    # --- who judges ---------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Machine]:
        """By id, those that judge."""
        with self._lock:
            return {name: it for name, it in self._known.items() if it.alive and not it.left_out}

    def all(self) -> list[Machine]:
        """Everybody who was ever there, except those that offer nothing."""
        with self._lock:
            return [it for it in self._known.values() if it.resources.get("CPU", 0) > 0]

    def leave_out(self, node: str, why: str) -> None:
        """Give `node` nothing more."""
        with self._lock:
            machine = self._known.get(node)
            if machine is None or machine.left_out:
                return
            machine.left_out = why
        self.notify(f"{machine.name} is left out from now on: {why}")

    def count(self, node: str) -> None:
        """One more verdict came from `node`."""
        with self._lock:
            if node in self._known:
                self._known[node].judged += 1

    def none_fit(self) -> UserError:
        """Why nobody judges, in one line."""
        reasons: dict[str, list[str]] = {}
        for machine in self.all():
            reasons.setdefault(machine.left_out or "it is gone", []).append(machine.name)
        told = "; ".join(f"{', '.join(names[:MOST_NAMED])}: {why}" for why, names in reasons.items())
        why = told or "it has no machine with CPUs for Ray"
        return UserError(f"--ray {self.connection.address}: no machine can judge suite {self.order.suite}: {why}")

    def sweep(self, *, over: bool) -> list[Any]:
        """Have all machines remove what dead processes left; the tasks."""
        strategy = {"num_cpus": 0}
        return [
            self._sweep.options(**strategy, scheduling_strategy=self._on(name)).remote(self.order_ref, over=over)
            for name in self.fit()
        ]


def _machine(node: Mapping[str, Any]) -> Machine:
    name = f"{node['NodeManagerHostname']}/{node['NodeID'][:6]}"
    return Machine(node["NodeID"], name, node.get("Resources", {}))


def _why(error: Exception) -> str:
    """The line of a task's failure that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = next((line for line in lines if line.startswith("ModuleNotFoundError")), None)
    if missing is not None:
        return f"plt-eval, or what it needs, is not installed in the Python that runs Ray there ({missing})"
    return (lines or [type(error).__name__])[-1][:300]
