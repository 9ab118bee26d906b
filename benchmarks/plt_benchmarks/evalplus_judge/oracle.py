"""Expected outputs and reference times: what the reference solution returns, and how long it takes, in the very sandbox
and by the very driver that candidates run with.

Computed when a task is first judged, and kept in files. A file is used again only for the same problem, codec,
scorer and Python, and, because of the times in it, on the same kind of processor. A damaged file is computed again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_benchmarks.datafiles import cache_folder
from plt_benchmarks.evalplus_judge.candidate import Candidate, InputSet, JudgingError, run_candidate
from plt_benchmarks.evalplus_judge.check import read_expected_head, write_expected
from plt_benchmarks.evalplus_judge.decoding import decode
from plt_benchmarks.evalplus_judge.encoding import CODEC_VERSION, Kind, encode, kind_of
from plt_benchmarks.evalplus_judge.official import EVALPLUS_VERSION
from plt_benchmarks.evalplus_judge.problem import Problem
from plt_benchmarks.protocols import Sandbox

REFERENCE_CALL_S = 300.0
REFERENCE_SET_S = 900.0


@dataclass(frozen=True)
class Expected:
    """The file with the expected outputs of one set, their size in bytes, and the reference times in seconds."""

    path: Path
    size: int
    times: Sequence[float]


class Oracle:
    """Expected outputs by task. Thread-safe; a task is computed once, while others wait for it."""

    def __init__(self, sandbox: Sandbox, folder: Path | None = None) -> None:
        self._sandbox = sandbox
        self._folder = folder or cache_folder() / "expected"
        self._fallback: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._known: dict[str, dict[str, Expected]] = {}
        self._python: str | None = None

    def expected(self, problem: Problem) -> dict[str, Expected]:
        """By name of the set. Raises JudgingError when the reference solution does not run."""
        key = problem.digest
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._known:
                self._known[key] = self._find(problem) or self._compute(problem)
            return self._known[key]

    def forget(self, problem: Problem) -> None:
        """Have the files of this task looked at again when it is next asked for."""
        with self._lock:
            self._known.pop(problem.digest, None)

    def close(self) -> None:
        if self._fallback is not None:
            self._fallback.cleanup()

    def _path(self, problem: Problem, name: str, folder: Path) -> Path:
        key = [problem.digest, name, self._sandbox.name, self._sandbox_python(), EVALPLUS_VERSION, CODEC_VERSION]
        digest = hashlib.sha256(json.dumps([*key, _processor()]).encode()).hexdigest()
        return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', problem.task_id)[:40]}.{name}.{digest[:32]}"

    def _sandbox_python(self) -> str:
        """The Python version inside the sandbox."""
        with self._lock:
            if self._python is None:
                self._python = run_candidate(self._sandbox, Candidate("", "none"), []).python
            return self._python

    def _find(self, problem: Problem) -> dict[str, Expected] | None:
        found = {}
        for name, inputs in problem.inputs.items():
            path = self._path(problem, name, self._folder)
            try:
                sizes, times, _ = read_expected_head(path)
            except (OSError, ValueError, KeyError):
                return None
            if not len(sizes) == len(times) == len(inputs):
                return None
            found[name] = Expected(path, sum(sizes), times)
        return found

    def _compute(self, problem: Problem) -> dict[str, Expected]:
        candidate = Candidate(problem.prompt + problem.canonical_solution, problem.entry_point, iterate=problem.iterate)
        sets = [
            InputSet(name, inputs, [REFERENCE_CALL_S] * len(inputs), REFERENCE_SET_S)
            for name, inputs in problem.inputs.items()
        ]
        transcript = run_candidate(self._sandbox, candidate, sets)
        computed = {}
        for name, outcome in transcript.sets.items():
            if outcome.ended != "complete":
                raise JudgingError(f"{problem.task_id}: its reference solution does not run on {name} ({outcome.why})")
            values = [_expected_value(problem, output) for output in outcome.outputs]
            path = self._store(problem, name, values, outcome.times)
            computed[name] = Expected(path, sum(map(len, values)), outcome.times)
        return computed

    def _store(self, problem: Problem, name: str, values: list[bytes | memoryview], times: list[float]) -> Path:
        path = self._path(problem, name, self._folder)
        try:
            write_expected(path, values, times)
        except OSError:
            # No room or no right to keep it: it lives as long as we do.
            with self._lock:
                self._fallback = self._fallback or tempfile.TemporaryDirectory(prefix="plt-eval-expected-")
            path = Path(self._fallback.name) / path.name
            write_expected(path, values, times)
        return path


def _expected_value(problem: Problem, output: memoryview) -> bytes | memoryview:
    kind = kind_of(output)
    if problem.not_none:
        return encode(kind != Kind.NONE)
    if kind == Kind.OPAQUE:
        name = decode(output).type_name
        raise JudgingError(f"{problem.task_id}: its reference solution returns {name}, which cannot be compared")
    return output


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"{platform.machine()} {found[1] if found else platform.processor()}"
