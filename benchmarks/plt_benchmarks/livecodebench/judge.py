"""Judging a program: driver.py runs it in the sandbox, and what came out is compared here.

The comparison is the official one. What a program prints: as many lines as expected, each the same but for whitespace
around it, or the same numbers. What a function returns: equal to the expected JSON, an outer tuple counting as a list.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from plt_benchmarks.livecodebench.cases import Cases
from plt_benchmarks.outcomes import how_it_ended
from plt_benchmarks.protocols import Sandbox, SandboxJob, SandboxLimits, SandboxOutcome

LIMIT_S, EXTRA_S = 6, 5
"""The official limit of a test, which has a second more of all tests' time, and what is added to that."""
WALL_FACTOR, WALL_EXTRA_S = 10, 10
"""Real time for so much processor time: only those who sleep or wait ever meet it."""
MEMORY = 4 << 30
FIRST_TESTS = 3
"""Tests that a program has to pass before it is run on all, which may be many and large."""
OUTPUT_BYTES, OUTPUT_FACTOR = 16 << 20, 8
"""What a program may send, besides so many times what is expected."""


class JudgingError(RuntimeError):
    """The judging itself broke, whatever the answer was; one line."""


@dataclass(frozen=True)
class Verdict:
    """Whether all tests passed; how many did until the first that did not, and why that one did not."""

    right: bool
    passed: int
    why: str = ""


def judge(sandbox: Sandbox, code: str, cases: Cases) -> Verdict:
    """Run `code` on the tests. Raises JudgingError."""
    total = len(cases.inputs)
    if total > 2 * FIRST_TESTS:
        verdict = _judge_on(sandbox, code, cases, FIRST_TESTS)
        if not verdict.right:
            return verdict
    return _judge_on(sandbox, code, cases, total)


def _judge_on(sandbox: Sandbox, code: str, cases: Cases, count: int) -> Verdict:
    expected = [_Expected.of(cases.function, text) for text in cases.outputs[:count]]
    outcome = sandbox.run(_job(code, cases, count))
    records = _records(outcome)
    if next(records, None) != {"ready": True}:
        raise JudgingError(f"the driver did not come to run the program in the sandbox ({how_it_ended(outcome)})")
    for number, wanted in enumerate(expected):
        record = next(records, None)
        if record is None:
            return Verdict(False, number, f"test {number}: {_how_it_died(outcome)}")
        if "ended" in record:
            return Verdict(False, number, f"test {number}: {str(record['ended'])[:200]}")
        if record.get("test") != number or not wanted.met_by(record):
            return Verdict(False, number, f"test {number}: wrong answer")
    return Verdict(True, count)


def _job(code: str, cases: Cases, count: int) -> SandboxJob:
    plan = {
        "code": code,
        "function": cases.function,
        "inputs": cases.inputs[:count],
        "limit_s": LIMIT_S,
        "wall_s": WALL_FACTOR * LIMIT_S + WALL_EXTRA_S,
    }
    cpu_s = (LIMIT_S + 1.0) * (count + 1) + EXTRA_S  # the official limit of all tests, and one more for loading
    output = OUTPUT_BYTES + OUTPUT_FACTOR * sum(map(len, cases.outputs[:count]))
    limits = SandboxLimits(WALL_FACTOR * cpu_s, cpu_s, MEMORY, output_bytes=output)
    return SandboxJob(_driver(), json.dumps(plan).encode(), limits=limits)


@functools.cache
def _driver() -> str:
    """Read once, so that all of a run is by one version."""
    return Path(__file__).with_name("driver.py").read_text()


def _records(outcome: SandboxOutcome) -> Iterator[dict[str, Any]]:
    """What was sent, up to the first that is no record. All after the first may be the program's own doing: it can
    claim an output, which is compared like any other."""
    for line in outcome.stdout.split(b"\n")[:-1]:
        try:
            record = json.loads(line, parse_int=_whole)
        except (ValueError, RecursionError):
            return
        if not isinstance(record, dict):
            return
        yield record


def _how_it_died(outcome: SandboxOutcome) -> str:
    if outcome.status != "exited":
        return outcome.status.replace("_", " ")
    return "the program ended its process" if outcome.exit_code == 0 else f"exit code {outcome.exit_code}"


# --- comparing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Expected:
    """What a test should give: text, or a value."""

    prints: bool
    value: Any

    @classmethod
    def of(cls, function: str | None, text: str) -> _Expected:
        if function is None:
            return cls(True, text)
        try:
            return cls(False, json.loads(text, parse_int=_whole))
        except (ValueError, RecursionError):
            raise JudgingError(f"the data's own output is no JSON: {text[:80]!r}") from None

    def met_by(self, record: dict[str, Any]) -> bool:
        """Whether what the program sent is it."""
        try:
            if self.prints:
                return isinstance(record.get("printed"), str) and same_lines(record["printed"], self.value)
            return "returned" in record and bool(_restored(record["returned"]) == self.value)
        except (ArithmeticError, ValueError, TypeError, LookupError, RecursionError):
            return False  # what was sent is no output of the driver's


MOST_DIGITS = 50_001
"""Of a whole number in JSON, its sign included: as many as the driver sends."""


def _whole(text: str) -> int:
    """As many digits as the driver sends; Python's own limit holds for the whole process."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"{len(text)} digits")
    return int(text) if len(text) < 4000 else int(Decimal(text))


class _Nothing:
    """Equals nothing, not even itself."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


def _restored(data: Any) -> Any:
    """What driver.py wrote as JSON."""
    if isinstance(data, list):
        return [_restored(item) for item in data]
    if not isinstance(data, dict):
        return data
    if "items" in data:
        return {key: _restored(item) for key, item in data["items"]}
    if "ratio" in data:
        over, under = data["ratio"]
        return Fraction(over, under) if type(over) is type(under) is int else _Nothing()
    return _Nothing()


def same_lines(found: str, expected: str) -> bool:
    """Whether a program printed what it should."""
    ours, theirs = _lines(found), _lines(expected)
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_line(found: str, expected: str) -> bool:
    if found == expected:
        return True
    ours, theirs = _numbers(found), _numbers(expected)
    return ours is not None and theirs is not None and ours == theirs


def _numbers(line: str) -> list[Decimal] | None:
    try:
        return [Decimal(word) for word in line.split()]
    except ArithmeticError:
        return None
