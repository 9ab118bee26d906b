"""Code execution (what does a function give?) and test-output prediction (what should a test expect?).

Answers are read as the official scripts read them. There they are pasted into an assertion, or evaluated beside the
expected output, and anything that is true then is right. Here both sides are plain data: an output of code execution
has to be a literal, as its prompt demands; an expression for a test's output is evaluated in the sandbox first, and all
that leaves it is plain data.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plt_benchmarks.literals import MOST_CHARACTERS, evaluated, expression, is_literal, source
from plt_benchmarks.livecodebench.generation import SEEN, window_note
from plt_benchmarks.livecodebench.releases import EXECUTION, FOLDERS, TEST_OUTPUT, HubFile
from plt_benchmarks.livecodebench.rows import OPEN, Place, Reader, Window, dates_of, digest_of, find_files, read_data
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
from plt_benchmarks.statistics import pass_metrics

JUDGE_VERSION = 1
EXECUTION_SYSTEM = "You are an expert at Python programming, code execution, test case generation, and fuzzing."
TEST_SYSTEM = (
    "You are a helpful programming assistant and an expert Python programmer. You are helping a user to write a test "
    "case to help to check the correctness of the function. The user has written a input for the testcase. You will "
    "calculate the output of the testcase and write the whole assertion statement in the markdown code block with the "
    "correct output."
)


@dataclass
class _PredictionSuite:
    """What both have in common: one small data file, within a window of dates, and pass@k of "right"."""

    window: Window = OPEN
    extra: str | None = None
    cost: str = "seconds"
    release: HubFile = field(init=False)
    name: str = field(init=False)
    summary: str = field(init=False)
    problems: int = field(init=False)
    version: str = field(init=False)
    _about: str = field(init=False, default="")

    def _set(self, release: HubFile, name: str, summary: str) -> None:
        self.release, self.name, self.problems = release, name, release.problems
        self.version = f"{release.dataset.rpartition('/')[2]}{self.window.tag}+judge-{JUDGE_VERSION}"
        self.summary = f"LiveCodeBench {summary}"

    def needs(self) -> Sequence[Need]:
        """Nothing besides what runs its code, if any."""
        return ()

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """pass@k for each k up to the fewest answers that any problem has; scores with an error count for nothing."""
        words = f"{self.summary}: problems{self._about} with the right output; {SEEN}"
        return pass_metrics(self.name, "right", scores, words)

    def _load(self, source: Path | None, reader: Reader, patterns: Sequence[str]) -> SuiteData:
        if source is None:
            path = self.release.fetch()
            data_set = self.release.dataset.rpartition("/")[2]
            revision = f"{data_set}-{self.release.revision[:12]}"
        else:
            path = _local(source, patterns, self.release)
            revision = f"local:{path.name}"
        data = read_data([path], reader, self.window, revision, digest_of([path]))
        if source is None and not self.window.flags and len(data.samples) != self.problems:
            raise SuiteError(
                f"{self.release.url}: expected {self.problems} problems, found {len(data.samples)}: the data has "
                "changed; pass --data PATH to use it as it is"
            )
        self._about = f" of {data.revision}, {dates_of(data.samples)},"
        return replace(data, notes=(window_note(self.name, data.samples),))


def _local(source: Path, patterns: Sequence[str], release: HubFile) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise SuiteError(f"data {source}: no such file or folder")
    folders = (*FOLDERS, release.dataset.rpartition("/")[2])
    for pattern in patterns:
        found = find_files(source, [pattern], folders)
        if found:
            return found[0]
    raise SuiteError(f"data {source}: expected {' or '.join(patterns)} in it or in a folder livecodebench")


# --- code execution -----------------------------------------------------------------------------------


@dataclass
class LcbExecutionSuite(_PredictionSuite):
    """With the direct prompt or with the one for a chain of thought; a Suite."""

    thinks: bool = False
    runs_code: bool = False

    def __post_init__(self) -> None:
        how = "chain of thought" if self.thinks else "direct"
        name = "lcb-execution-cot" if self.thinks else "lcb-execution"
        self._set(EXECUTION, name, f"code execution: the output of 479 calls of short Python functions ({how})")

    def load(self, source: Path | None) -> SuiteData:
        """Read the calls from `source` (file or folder), or from the official file when None. Raises SuiteError."""
        reader = Reader(("id", "code", "input", "output"), _execution_sample, _execution_order)
        return self._load(source, reader, ("execution-v2*", "execution*", "lcb_execution*"))

    def prompt(self, sample: Sample) -> Prompt:
        """The official prompt with its examples; a chat model gets the same text after the system message."""
        name = "lcb_execution_cot.txt" if self.thinks else "lcb_execution.txt"
        template = (Path(__file__).parents[1] / "data" / name).read_text()
        text = template.format(code=sample.data["code"], input=sample.data["input"])
        return Prompt(
            text=text,
            stop=("[PYTHON]",),
            messages=(Message("system", EXECUTION_SYSTEM), Message("user", text)),
            chat_stop=("[PYTHON]",),
            max_new_tokens=2000,
        )

    def gold(self, sample: Sample) -> Answer | None:
        """The assertion with the data's own output."""
        return Answer(f"[ANSWER]\nassert {sample.data['input']} == {sample.data['output']}\n[/ANSWER]", solution=True)

    def scorer(self, sandbox: Sandbox) -> Scorer:  # noqa: ARG002
        """Compares literals; nothing is run."""
        return LcbExecutionScorer(self.thinks)


def _execution_sample(place: str, _: Place | None, row: dict[str, Any]) -> Sample:
    if expression(row["output"]) is None:
        raise SuiteError(f"{place}: expected 'output' to be an expression, found {row['output'][:80]!r}")
    return Sample(row["id"], row)


def _execution_order(sample: Sample) -> tuple[int, str]:
    """The official order is that of the numbers in "sample_17"."""
    number = sample.id.rpartition("_")[2]
    return (int(number) if number.isascii() and number.isdigit() else -1, sample.id)


class LcbExecutionScorer:
    """Judges outputs. Thread-safe."""

    def __init__(self, thinks: bool) -> None:
        self._thinks = thinks

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Value "right"; the detail says why not."""
        found = executed_output(answer.text, self._thinks) if len(answer.text) <= MOST_CHARACTERS else ""
        if sample.data["input"] in found:
            return _wrong(found, "the output repeats the call")
        why = _differs(found, sample.data["output"])
        return _wrong(found, why) if why else Score({"right": True}, judged=found)

    def close(self) -> None:
        """Nothing is held."""


def executed_output(text: str, thinks: bool) -> str:
    """The output that an answer names, read as the official script reads it."""
    if thinks and "[ANSWER]" in text:
        text = text.split("[ANSWER]")[1].strip()
    if "==" in text:
        text = text.split("==")[1].strip()
    return text.split("[/ANSWER]" if "[/ANSWER]" in text else "\n")[0].strip()


def _differs(found: str, expected: str) -> str:
    """Why `found` is not `expected`, both being source; empty if it is."""
    if not found:
        return "no output was found in the answer"
    if not is_literal(found):
        theirs = _normal(expected)
        same = theirs is not None and not is_literal(expected) and _normal(found) == theirs
        return "" if same else "the output is no literal"
    if not is_literal(expected):
        return "it is another output"
    return "" if _equal(ast.literal_eval(expected), ast.literal_eval(found)) else "it is another output"


def _normal(text: str) -> str | None:
    """An expression without what its writer chose; None where it is none."""
    node = expression(text)
    return None if node is None else source(node)


def _equal(ours: Any, theirs: Any) -> bool:
    try:
        return bool(ours == theirs)
    except RecursionError:
        return False


def _wrong(found: str, why: str) -> Score:
    return Score({"right": False}, judged=found, detail={"why": why})


# --- test-output prediction -----------------------------------------------------------------------------


@dataclass
class LcbTestOutputSuite(_PredictionSuite):
    """Complete an assertion for a function that is only described; a Suite."""

    runs_code: bool = True

    def __post_init__(self) -> None:
        self._set(
            TEST_OUTPUT, "lcb-test-output", "test-output prediction: what 442 tests of described functions expect"
        )

    def load(self, source: Path | None) -> SuiteData:
        """Read the tests from `source` (file or folder), or from the official file when None. Raises SuiteError."""
        keys = ("question_id", "question_content", "starter_code", "test")
        reader = Reader(keys, _test_sample, lambda sample: (sample.data["question_id"], sample.data["test_id"]))
        return self._load(source, reader, ("test_generation*", "lcb_test_output*"))

    def prompt(self, sample: Sample) -> Prompt:
        """The official question; there is no form of it for base models, so they get the instructions before it."""
        row = sample.data
        call = f"{row['function']}({', '.join(row['input'].split(chr(10)))})"
        text = (
            f"Problem:\n{row['question_content']}Function:\n```\n{row['starter_code']}\n```\n"
            f"Please complete the following test case:\n\n```\nassert {call} == # TODO\n```\n"
        )
        return Prompt(
            text=f"{TEST_SYSTEM}\n{text}",
            messages=(Message("system", TEST_SYSTEM), Message("user", text)),
            max_new_tokens=2000,
        )

    def gold(self, sample: Sample) -> Answer | None:
        """The assertion with the data's own output."""
        return Answer(f"assert f() == {json.loads(sample.data['output'])!r}", solution=True)

    def scorer(self, sandbox: Sandbox) -> Scorer:
        """Compares plain data; expressions are evaluated in `sandbox` first."""
        return LcbTestOutputScorer(sandbox)


def _test_sample(place: str, _: Place | None, row: dict[str, Any]) -> Sample:
    number = row.get("test_id")
    if not isinstance(number, int) or isinstance(number, bool):
        raise SuiteError(f"{place}: expected 'test_id' to be a number, found {str(number)[:80]!r}")
    try:
        test = json.loads(row["test"])[0]
        asked, output = test["input"], test["output"]
        json.loads(output)
    except (ValueError, TypeError, LookupError, RecursionError):
        raise SuiteError(f"{place}: expected 'test' to be a JSON list with a test, its output being JSON") from None
    function = _function_in(row["starter_code"])
    if function is None or not isinstance(asked, str):
        raise SuiteError(f"{place}: expected 'starter_code' with one function, found {row['starter_code'][:80]!r}")
    kept = {key: row[key] for key in ("question_id", "question_content", "starter_code", "contest_date")}
    data = {**kept, "test_id": number, "function": function, "input": asked, "output": output}
    return Sample(f"{row['question_id']}/{number}", data)


def _function_in(starter: str) -> str | None:
    """The one function that starter code begins; it may lack a body."""
    for text in (starter, starter.rstrip() + " pass\n"):
        try:
            names = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return names[0] if len(names) == 1 else None
    return None


class LcbTestOutputScorer:
    """Judges assertions. Thread-safe."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Value "right"; the detail says why not. Raises DriverEnded."""
        found = asserted_output(answer.text) if len(answer.text) <= MOST_CHARACTERS else None
        if found is None:
            return _wrong("", "no output was found in the answer")
        plain = found if is_literal(found) else self._evaluated(found)
        if plain is None:
            return _wrong(found, "the output cannot be evaluated to plain data")
        right = _equal(ast.literal_eval(plain), json.loads(sample.data["output"]))
        return Score({"right": True}, judged=found) if right else _wrong(found, "it is another output")

    def _evaluated(self, text: str) -> str | None:
        normal = _normal(text)
        plain = None if normal is None else evaluated(self._sandbox, normal)
        return plain if plain is not None and is_literal(plain) else None

    def close(self) -> None:
        """Nothing is held."""


def asserted_output(text: str) -> str | None:
    """The right side of the assertion in an answer, or the bare output there, read as the official script reads it."""
    said = _statement(text)
    lines = said.splitlines()
    if len(lines) > 1:
        said = next((line for line in lines if "assert" in line and not line.startswith("#")), said)
    said = said.strip()
    if "assert" not in said:
        return said or None
    try:
        statement = ast.parse(said).body[0]
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
        return None
    test = statement.test if isinstance(statement, ast.Assert) else None
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq):
        return None
    return ast.get_source_segment(said, test.comparators[0])


def _statement(text: str) -> str:
    """The last line that begins an assertion, else the first block of code, one of Python before others."""
    lines = text.split("\n")
    asserted = [line for line in lines if line.startswith("assert")]
    if asserted:
        return asserted[-1]
    fences = [number for number, line in enumerate(lines) if "```" in line]
    python = [number for number in fences if "```python" in lines[number] or "```Python" in lines[number]]
    if python:
        fences = [number for number in fences if number >= python[0]]
    return "\n".join(lines[fences[0] + 1 : fences[1]]) if len(fences) > 1 else ""
