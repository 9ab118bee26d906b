"""The suite `trace`: predict what a small generated program gives, with a dial for how many steps must be followed.

    plt-eval run --suite trace --model CHECKPOINT --loops 1-4

In the spirit of CRUXEval's output prediction (Gu et al. 2024, "CRUXEval: A Benchmark for Code Reasoning, Understanding
and Execution"), but generated (see families.py), for models of less than a million parameters, and held out by
construction from what `training_documents` in programs.py gives. Nothing is executed to score an answer.

The standard set is 40 problems for each family and k, generated at every load and checked against its hash, in turns,
so that any beginning of it is balanced. Another set can be given as a file of such lines (.jsonl or .jsonl.gz):

    {"task_id": "my-1", "family": "chase", "k": 1, "prompt": "q=7\\na=q\\nassert a==", "canonical_solution": "7"}

A base model continues the prompt, and its line must be the expected literal, white space around it apart. A chat model
is asked to complete the assertion, and is read leniently: what follows the last `EXPRESSION==` on its line, or without
one the last line of the last code block, or without one the last line of all; and any literal of the same value and
type is right ("abc" for 'abc').

What the most frequent answer would give is in the definition of each metric, measured on the problems themselves: of
the standard set 2% (chase 4%, arith 6%, call 7%, string 2%). A guesser who reads the program does better, in `chase`
50%: families.py has the numbers. And what is held out is the text of a program, not what it computes: of the 40 arith
problems at k=2, 3 and 4 there are 21, 11 and 4 that the training text has with their steps in another order, of the
call problems 30, 40 and 25; and nearly every problem has a program there that begins with the same number and comes to
the same sum (counted in `training_documents(0, 110000)`). So a model can do well here that has learned sums of digits
by heart, and how to put them together.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_benchmarks.datafiles import DataFile, Release, open_data, suite_data
from plt_benchmarks.protocols import (
    Answer,
    Message,
    Metric,
    Need,
    Prompt,
    Sample,
    Sandbox,
    Score,
    Scorer,
    SuiteData,
    SuiteError,
)
from plt_benchmarks.statistics import mean, wilson_interval
from plt_benchmarks.trace.programs import FAMILIES, GENERATOR_VERSION, Problem, test_problems

STANDARD_SEED, STANDARD_PER_K = 0, 40
SCORING_VERSION = 1
INSTRUCTION = (
    "Complete the last line of this Python program with the literal value for which the assertion holds. "
    "Answer with that line alone."
)
MAX_NEW_TOKENS = 24
"""Bytes enough for the longest answer; the rest is for an endpoint that writes the whole assertion again."""

_LAST_LINE = re.compile(r"assert (?P<expression>[^\n]+)==\Z")
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass
class TraceSuite:
    """Output prediction on generated programs; a Suite."""

    release: Release
    summary: str
    name: str = "trace"
    extra: str | None = None
    runs_code: bool = False
    problems: int = 600
    cost: str = "seconds"
    version: str = f"trace-v{GENERATOR_VERSION}+scoring-{SCORING_VERSION}"

    def load(self, source: Path | None) -> SuiteData:
        """The standard problems, or those of the file `source` (or of the trace*.jsonl in that folder).
        Raises SuiteError."""
        file = self._standard() if source is None else open_data(self.release, source)
        return suite_data(file, _check_row)

    def prompt(self, sample: Sample) -> Prompt:
        """The program up to the missing value; for a chat model an instruction, with the beginning of its answer."""
        program = sample.data["prompt"]
        return Prompt(
            text=program,
            stop=("\n",),
            messages=(Message("user", f"{INSTRUCTION}\n```python\n{program}\n```"),),
            prefill=f"```python\n{_last_line(program)}",
            chat_stop=("\n",),
            max_new_tokens=MAX_NEW_TOKENS,
        )

    def needs(self) -> Sequence[Need]:
        """Nothing."""
        return ()

    def gold(self, sample: Sample) -> Answer | None:
        """The program with the value that it gives."""
        return Answer(sample.data["prompt"] + sample.data["canonical_solution"], solution=True)

    def scorer(self, sandbox: Sandbox) -> Scorer:  # noqa: ARG002
        """Compares texts; nothing runs in the sandbox."""
        return TraceScorer()

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """The share of exact answers: of all, `exact/FAMILY`, and `exact/FAMILY/kN`. Several answers to a problem
        count as their mean; scores with an error count for nothing."""
        shares: dict[str, list[float]] = {}
        expected: dict[str, Counter[str]] = {}
        for found in scores.values():
            counted = [score for score in found if score.error is None]
            for key in counted[0].values if counted else ():
                shares.setdefault(key, []).append(mean([float(score.values[key]) for score in counted]))
                expected.setdefault(key, Counter())[counted[0].detail["expected"]] += 1
        return {f"{self.name}.{key}": _metric(key, shares[key], expected[key]) for key in sorted(shares, key=_rank)}

    def _standard(self) -> DataFile:
        content = standard_problems()
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.release.sha256:
            raise SuiteError(
                f"{self.release.name}: expected to generate problems of sha256 {self.release.sha256}, found {digest}: "
                "this Python's random numbers are not those that the set is defined by"
            )
        return DataFile(content, self.release.url, self.release.name, digest)


class TraceScorer:
    """Judges answers by their text; stateless."""

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Right or wrong, under the keys of all, of the family, and of the family at this k."""
        expected = sample.data["canonical_solution"]
        value = answered(sample.data["prompt"], answer)
        right = value == expected or (answer.chat and _same_literal(value, expected))
        family, k = sample.data["family"], sample.data["k"]
        keys = ("exact", f"exact/{family}", f"exact/{family}/k{k}")
        return Score(dict.fromkeys(keys, right), judged=value, detail={"expected": expected})

    def close(self) -> None:
        """Nothing is held."""


def answered(prompt: str, answer: Answer) -> str:
    """The value that `answer` gives for the end of `prompt`, as text; empty if there is none."""
    if answer.solution or answer.chat:
        expression = _last_line(prompt).removeprefix("assert ").removesuffix("==")
        found = list(re.finditer(rf"{re.escape(expression)}\s*==", answer.text))
        if found:
            return _tidy(answer.text[found[-1].end() :])
        return "" if answer.solution else _last_value(answer.text)
    return answer.text.partition("\n")[0].strip()


def standard_problems() -> bytes:
    """The standard set as JSON lines, one of every family and k in turn."""
    problems = test_problems(STANDARD_SEED, STANDARD_PER_K)
    in_turns = (problems[start::STANDARD_PER_K] for start in range(STANDARD_PER_K))
    found = (_row(problem, number) for number, turn in enumerate(in_turns) for problem in turn)
    return "".join(json.dumps(row) + "\n" for row in found).encode("ascii")


def _row(problem: Problem, number: int) -> dict[str, Any]:
    family, k = problem.program.family, problem.program.k
    return {
        "task_id": f"{family}/k{k}/{number}",
        "family": family,
        "k": k,
        "prompt": problem.prompt,
        "canonical_solution": problem.answer,
    }


# --- checking and reading -------------------------------------------------------------------------------


def _check_row(place: str, row: dict[str, Any]) -> None:
    """Raises SuiteError for a row that is not in the format of the module's docstring."""
    for key, (kind, words) in _KEYS.items():
        if key not in row:
            raise SuiteError(f"{place}: expected the key {key!r}, found {', '.join(sorted(row)) or 'no key'}")
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise SuiteError(f"{place}: expected {key!r} to be {words}, found {type(row[key]).__name__}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", row["family"]):
        raise SuiteError(f"{place}: expected 'family' to be a lower-case word, found {row['family']!r}")
    if row["k"] < 0:
        raise SuiteError(f"{place}: expected 'k' to be 0 or more, found {row['k']}")
    if not _LAST_LINE.search(row["prompt"]):
        last = row["prompt"].rpartition("\n")[2]
        raise SuiteError(f"{place}: expected 'prompt' to end in a line 'assert EXPRESSION==', found {last!r}")
    answer = row["canonical_solution"]
    if answer != answer.strip() or "\n" in answer or _literal(answer) is _NO_LITERAL:
        raise SuiteError(f"{place}: expected 'canonical_solution' to be a Python literal on one line, found {answer!r}")
    try:
        ast.parse(row["prompt"] + answer)
    except (SyntaxError, ValueError) as error:
        raise SuiteError(f"{place}: expected 'prompt' to be the beginning of a Python program, found {error}") from None


_KEYS: dict[str, tuple[type, str]] = {
    "task_id": (str, "a string"),
    "family": (str, "a string"),
    "k": (int, "a whole number"),
    "prompt": (str, "a string"),
    "canonical_solution": (str, "a string"),
}
_NO_LITERAL = object()


def _literal(text: str) -> Any:
    """The value of a Python literal, _NO_LITERAL for anything else. Whatever the text, it does not raise."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _NO_LITERAL


def _same_literal(text: str, expected: str) -> bool:
    value, wanted = _literal(text), _literal(expected)
    return type(value) is type(wanted) and bool(value == wanted)


def _last_line(prompt: str) -> str:
    return prompt.rpartition("\n")[2]


def _last_value(text: str) -> str:
    """The last line of the last code block, or of everything, without what is not the value."""
    blocks = [block for block in _BLOCK.findall(text) if block.strip()]
    lines = [line for line in (blocks[-1] if blocks else text).splitlines() if line.strip(" \t`")]
    return _tidy(lines[-1]) if lines else ""


def _tidy(text: str) -> str:
    """The first line, without white space, backticks or a full stop around it."""
    return text.partition("\n")[0].lstrip(" \t`").rstrip(" \t\r`.")


# --- metrics --------------------------------------------------------------------------------------------


def _metric(key: str, shares: Sequence[float], expected: Counter[str]) -> Metric:
    value = mean(shares)
    low, high = wilson_interval(value, len(shares))
    _, *group = key.split("/")
    problems = " ".join(["problems", *(f"of {part}" for part in group[:1]), *(f"at {part}" for part in group[1:])])
    guess = max(expected.values()) / len(shares)
    words = (
        f"{problems} whose value is predicted exactly; mean over problems, 95% Wilson interval over problems; "
        f"the most frequent answer would give {100 * guess:.1f}%"
    )
    return Metric(value, len(shares), low, high, words)


def _rank(key: str) -> tuple[int, int, str, int]:
    """All first, then the families in their order, then each at every k."""
    _, family, k = f"{key}//".split("/")[:3]
    place = list(FAMILIES).index(family) if family in FAMILIES else len(FAMILIES)
    return key.count("/"), place, family, int(k.removeprefix("k") or 0)


TRACE = TraceSuite(
    release=Release(
        stem="trace",
        version=f"v{GENERATOR_VERSION}",
        url="generated",
        md5="a16ef8523cc87dff7af62a769660add3",
        sha256="acd89e8cf9fc229d756e91de2c8407eed8fd1915fcad746a555fe3566ed3269d",
    ),
    summary="600 generated programs: predict a value behind 1 to 4 steps of copying, arithmetic, calls or string edits",
)
