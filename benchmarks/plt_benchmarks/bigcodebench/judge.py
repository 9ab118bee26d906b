"""Verdicts: the official check in the sandbox, by the environment's Python (see driver.py), and what it told."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from plt_benchmarks.bigcodebench.driver import CANARY, WALL_FACTOR
from plt_benchmarks.bigcodebench.environments import FULL, ONLY_FULL, SMALL
from plt_benchmarks.datafiles import cache_folder
from plt_benchmarks.environments import Environment
from plt_benchmarks.outcomes import how_it_ended, told_by
from plt_benchmarks.protocols import (
    Answer,
    Sample,
    Sandbox,
    SandboxJob,
    SandboxLimits,
    SandboxOutcome,
    Score,
    SuiteError,
)

TIMEOUT_S = 241.0
"""What the official command gives all tests of a problem; it never has a reason to give another. There it is real
time, here processor time."""
MEMORY_MB, STACK_MB = 30 * 1024, 10
"""The official limits of a process' address space and data, and of its stack."""
SANITIZE_S = 60
"""Post-processing is quadratic in the number of lines; what takes longer is judged as it is."""
JOB_MEMORY = 8 << 30
"""What a job may really use, where the official command has no limit."""
_MISSING = re.compile(r"No module named '(\w+)")
MOST_CHARACTERS = 200_000
"""Longer answers are wrong without being looked at."""


class BigCodeBenchScorer:
    """Judges answers in `environment`. Thread-safe. Raises SuiteError where the environment is not installed."""

    def __init__(
        self,
        environment: Environment,
        sandbox: Sandbox,
        *,
        begins_with_prompt: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`begins_with_prompt`: a base model's answer goes on with the code that it was shown."""
        self._folder = environment.python.parent.parent
        self._small = environment.name == SMALL.name
        self._sandbox = sandbox
        self._begins_with_prompt = begins_with_prompt
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._fonts: dict[str, bytes] | None = None

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Value "right"; the detail says why not."""
        row = sample.data
        text = raw_solution(row, answer, self._begins_with_prompt)
        if len(text) > MOST_CHARACTERS:
            return Score({"right": False}, detail={"why": f"the answer has {len(text)} characters"})
        request = {
            "text": text,
            "sanitize": not answer.solution,
            "sanitize_s": SANITIZE_S,
            "sanitize_wall_s": 3 * SANITIZE_S,
            "prefix": row["code_prompt"] + "\n    pass\n",
            "entry_point": row["entry_point"],
            "test": row["test"],
            "timeout_s": self._timeout_s,
            "memory_mb": MEMORY_MB,
            "stack_mb": STACK_MB,
        }
        try:
            score = _score(self._run(request, self._font_files()), row["test"])
        except SuiteError as error:
            return Score(error=str(error))
        lacking = _lacking(score) if self._small else None
        return score if lacking is None else Score(error=f"it imports {lacking}: plt-eval install {FULL.name}")

    def close(self) -> None:
        """Nothing is held."""

    def _font_files(self) -> dict[str, bytes]:
        """Matplotlib's list of fonts, which takes it seconds to make: kept for each environment."""
        with self._lock:
            if self._fonts is None:
                kept = cache_folder() / "bigcodebench" / f"{self._folder.name}-fonts.json"
                told = _kept(kept) or told_by(outcome := self._run("fonts", {}), dict)
                if told is None:
                    raise SuiteError(f"environment {self._folder}: {how_it_ended(outcome)}")
                with suppress(OSError):
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
                    partial.write_text(json.dumps(told))
                    os.replace(partial, kept)
                self._fonts = {name: text.encode() for name, text in told.items()}
            return self._fonts

    def _run(self, request: Mapping[str, Any] | str, files: Mapping[str, bytes]) -> SandboxOutcome:
        limits = SandboxLimits(
            wall_s=3 * SANITIZE_S + WALL_FACTOR * self._timeout_s + 120,
            cpu_s=SANITIZE_S + self._timeout_s + 60,
            memory=JOB_MEMORY,
            processes=256,
            file_bytes=256 << 20,
            tmp_bytes=1 << 30,
        )
        return self._sandbox.run(
            SandboxJob(_driver(), json.dumps(request).encode(), files, limits, environment=self._folder)
        )


def raw_solution(row: Mapping[str, Any], answer: Answer, begins_with_prompt: bool) -> str:
    """The text before post-processing: a base model's prompt and completion, or all that a chat model wrote, with tabs
    as the official decoders turn them; a solution as it is."""
    if answer.solution:
        return answer.text
    text = answer.text.replace("\t", "    ")
    return text if answer.chat or not begins_with_prompt else f"{row['complete_prompt']}{text}"


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@functools.cache
def _driver() -> str:
    return Path(__file__).with_name("driver.py").read_text()


def _score(outcome: SandboxOutcome, test: str) -> Score:
    told = told_by(outcome, dict)
    if told is None:
        if outcome.status == "exited" and (outcome.exit_code or 0) > 0:  # an exception in our own process
            return Score(error=f"judging: {how_it_ended(outcome)}")
        return Score({"right": False}, detail={"why": how_it_ended(outcome)})
    detail: dict[str, Any] = {"post_processing": told["post_processing"]}
    report = told.get("report")
    detail |= {"why": told["ended"]} if report is None else _verdict(report, number_of_tests(test))
    return Score({"right": "why" not in detail}, judged=told["program"], detail=detail)


def _lacking(score: Score) -> str | None:
    """A module for want of which a program fails that only the full environment has."""
    if score.values.get("right"):
        return None
    told = json.dumps(score.detail)
    return next((name for name in _MISSING.findall(told) if name in ONLY_FULL), None)


def _verdict(report: Mapping[str, Any], tests: int) -> dict[str, Any]:
    """Nothing where the official function and what was watched meanwhile say that all is well; or "why" not."""
    details = dict(report["details"])
    canary = details.pop(CANARY, None)
    if report["stat"] != 0:
        return {"why": f"it does not load: {details.get('ALL', 'no reason was given')}"}
    if details:
        return {"why": "tests failed", "tests": details}
    changed = [*report.get("changed", ()), *report.get("weak", ())]
    if changed or canary is None:
        return {"why": "it interferes with the tests", "changed": changed}
    if report["loaded"] != tests or report["ran"] != tests + 1 or report["bad"] != 1:
        return {"why": f"it interferes with the tests: {report['ran'] - 1} of {tests} ran"}
    if report["skipped"]:
        return {"why": f"{report['skipped']} of {tests} tests were skipped"}
    return {}


@functools.cache
def number_of_tests(test: str) -> int:
    """How many tests a problem's own source has."""
    tree = parsed(test)
    cases = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TestCases"]
    names = {
        node.name
        for case in cases[-1:]
        for node in case.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    }
    return len(names)


def parsed(source: str) -> ast.Module:
    """The tree of a problem's own code, some of which has escapes that Python warns of. Raises SyntaxError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)
