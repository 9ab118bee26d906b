"""Verdicts on patches: processes of the official harness, a folder for each patch, and its files kept.

    judged/<instance>/<hash of the patch>/     order, row, prediction, the harness' logs and reports, verdict.json

Outcomes that count against the patch are told apart from faults of the infrastructure, which count for nothing and
are tried again.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from plt_benchmarks.protocols import Answer, Sample, Score
from plt_benchmarks.swe.child import DONE, HARNESS_LOG, VERDICT
from plt_benchmarks.swe.rows import Harness, Task, task_of

OUTCOMES = {
    "resolved": "all tests that should pass do",
    "unresolved": "the patch applies and some test fails",
    "empty_patch": "the answer changes nothing",
    "patch_failed": "the patch does not apply",
    "tests_timed_out": "the tests did not end in time",
    "gave_up_steps": "the agent used up its steps",
    "gave_up_time": "the agent used up its time",
    "gave_up_format": "the agent's answers held no action, several times in a row",
    "gave_up_context": "the problem itself does not fit the model's context",
}
"""What can become of an answer; faults of the infrastructure are none of these."""
RETRY_WAITS_S = (1.0, 5.0)
"""Waits before another try after a fault of the infrastructure, in seconds."""
MODEL = "plt-eval"
"""What the harness is told of the model: it makes file names of it. The true name is in the predictions."""
LATE_S = 900
"""How long a harness may take besides the tests (creating a container, copying, stopping), in seconds."""


class Host(Protocol):
    """What the judging needs of its surroundings; thread-safe. `ensure` makes an image available and raises OSError
    (one line) where it cannot; `release` says that a task's image is not needed any more."""

    def ensure(self, task: Task) -> None: ...

    def release(self, task: Task) -> None: ...

    def container_options(self, task: Task) -> dict[str, Any]:
        """Arguments of docker.containers.create: labels, limits, network, environment, volumes."""
        ...

    def remove_containers(self, labels: Mapping[str, str]) -> None:
        """Remove our containers that have `labels` besides the run's own."""
        ...


@dataclass
class PatchScorer:
    """Judges patches with `harness` in `folder`. `merge_streams` puts `exec 2>&1` before a swebench script."""

    harness: Harness
    folder: Path
    host: Host
    token: str
    test_timeout: int
    merge_streams: bool
    _children: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _idle: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Without the harness where there is nothing to run: an agent that gave up, an empty patch."""
        task, status = task_of(sample), str(answer.detail.get("exit_status") or "Submitted")
        detail = {name: value for name, value in answer.detail.items() if name != "model"}
        gave_up = _GAVE_UP.get(status)
        if gave_up is not None or not answer.text.strip():
            self.host.release(task)
            return _score(answer.text, {"outcome": gave_up or "empty_patch", **detail})
        told: dict[str, Any] = {}
        for wait in (*RETRY_WAITS_S, None):
            told = self._judged(task, answer.text)
            if "error" not in told or self._closed or wait is None:
                break
            time.sleep(wait)
        self.host.release(task)
        if "error" in told:
            return Score(error=f"infrastructure: {told['error']}")
        return _score(answer.text, {**told, **detail})

    def _judged(self, task: Task, patch: str) -> dict[str, Any]:
        """The verdict, or {"error": what is wrong with the infrastructure}."""
        started = time.monotonic()
        try:
            self.host.ensure(task)
        except OSError as error:
            return {"error": " ".join(str(error).split())}
        pulled = time.monotonic()
        digest = hashlib.sha256(patch.encode()).hexdigest()[:12]
        folder = self.folder / task.id / digest
        shutil.rmtree(folder, ignore_errors=True)  # what a killed judgement left; the harness would believe it
        folder.mkdir(parents=True)
        run_id = f"{self.token}-{digest}"
        options = self.host.container_options(task)
        own = {"plt-eval.judged": f"{task.id}-{run_id}"}
        options["labels"] = {**options.get("labels", {}), **own}
        order = {
            "harness": self.harness, "folder": str(folder.resolve()), "row": self._row(task), "patch": patch,
            "model": MODEL, "run_id": run_id, "test_timeout": self.test_timeout, "container": options,
        }  # fmt: skip
        try:
            ended = self._run(order)
            verdict = self._read(folder, ended)
        finally:
            self.host.remove_containers(own)
        done = time.monotonic()
        seconds = {"image": round(pulled - started, 2), "judging": round(done - pulled, 2)}
        return {**verdict, "judge_seconds": seconds, "log": str(folder.relative_to(self.folder.parent))}

    def _row(self, task: Task) -> dict[str, Any]:
        row = dict(task.row)
        if self.harness == "swebench" and self.merge_streams:
            row["eval_script"] = with_merged_streams(row["eval_script"])
        return row

    def _run(self, order: Mapping[str, Any]) -> str:
        """Let a child judge; returns what is wrong with how it ended, or ""."""
        child = self._child(Path(order["folder"]))
        if child is None:
            return "the judging was stopped"
        assert child.stdin is not None
        assert child.stdout is not None
        well = False
        try:
            child.stdin.write(json.dumps(order).encode() + b"\n")
            child.stdin.flush()
            limit = self.test_timeout + LATE_S
            if not select.select([child.stdout], [], [], limit)[0]:
                return f"the harness did not end within {limit} s"
            well = child.stdout.readline() == DONE
            return "" if well else f"the harness ended with exit code {child.wait()}"
        except BrokenPipeError:
            return "the harness ended before it began"
        finally:
            if well and self.harness == "swebench":
                with self._lock:
                    self._idle.append(child)
            else:
                self._end(child)

    def _child(self, folder: Path) -> subprocess.Popen[bytes] | None:
        """A process that waits for an order; None when we are closed. What a new one says goes to `folder`."""
        with self._lock:
            if self._closed:
                return None
            if self._idle:
                return self._idle.pop()
            with (folder / HARNESS_LOG).open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", "plt_benchmarks.swe.child"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"},
                    start_new_session=True,  # Ctrl-C is for us: we end it ourselves
                )
            self._children.add(child)
            return child

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        child.kill()
        child.wait()
        with suppress(BrokenPipeError):  # what it did not read any more
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()
        with self._lock:
            self._children.discard(child)

    def _read(self, folder: Path, ended: str) -> dict[str, Any]:
        path = folder / VERDICT
        if path.is_file():
            verdict: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return verdict
        said = (folder / HARNESS_LOG).read_text(errors="replace").strip().splitlines()
        return {"error": f"{ended or 'the harness left no verdict'}: {(said or ['it said nothing'])[-1][:300]}"}

    def close(self) -> None:
        """End what is under way, with its containers."""
        with self._lock:
            self._closed = True
            idle, busy = list(self._idle), self._children - set(self._idle)
            self._idle.clear()
        for child in idle:
            self._end(child)
        for child in busy:  # whoever waits for it ends it
            child.kill()
        self.host.remove_containers({})


_GAVE_UP = {
    "LimitsExceeded": "gave_up_steps",
    "TimeExceeded": "gave_up_time",
    "RepeatedFormatError": "gave_up_format",
    "ContextExceeded": "gave_up_context",
}
"""mini-swe-agent's exit statuses, and our own of an overfull context."""


def with_merged_streams(script: str) -> str:
    """`script` with both streams in one from its first command on. The harness reads them as two streams that Docker
    may hand over in the wrong order, and looks for its markers and the tests' lines in the result
    (https://github.com/SWE-bench/SWE-bench/issues/377)."""
    lines = script.split("\n")
    at = next((i for i, line in enumerate(lines) if line and not line.startswith(("#!", "set "))), len(lines))
    return "\n".join([*lines[:at], "exec 2>&1", *lines[at:]])


def _score(patch: str, detail: Mapping[str, Any]) -> Score:
    return Score(values={"resolved": detail["outcome"] == "resolved"}, judged=patch, detail=detail)
