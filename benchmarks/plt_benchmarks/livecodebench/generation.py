"""Code generation: a program that reads and prints, or the method of a class, for the text of a contest problem."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plt_benchmarks.livecodebench.cases import function_name, read_cases
from plt_benchmarks.livecodebench.judge import JudgingError, judge
from plt_benchmarks.livecodebench.releases import FOLDERS, REVISION, LiteRelease
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
MOST_CHARACTERS = 1_000_000
"""Longer answers are wrong without being looked at."""
LOCAL = "lcb*.jsonl"
"""What another file with problems may be called in a folder that lacks the official ones."""
DIFFICULTIES = ("easy", "medium", "hard")
KEYS = (
    "question_id",
    "question_content",
    "starter_code",
    "platform",
    "difficulty",
    "public_test_cases",
    "metadata",
)
SEEN = "a model may have seen problems of contests before the end of its training data"
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)


@dataclass
class LcbGenerationSuite:
    """A release, within a window of dates; a Suite. `chosen` says that the user named the release."""

    release: LiteRelease
    window: Window = OPEN
    chosen: bool = False
    name: str = "lcb-generation"
    extra: str | None = None
    runs_code: bool = True
    cost: str = "2 min on 2 cores for the public tests of release_v1; hidden tests take longer"
    problems: int = field(init=False)
    version: str = field(init=False)
    summary: str = field(init=False)
    _about: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.problems = self.release.problems
        self.version = f"{self.release.tag}{self.window.tag}+judge-{JUDGE_VERSION}"
        self.summary = f"LiveCodeBench code generation: {self.problems:,} contest problems ({self.release.tag})"

    def needs(self) -> Sequence[Need]:
        """Nothing but the sandbox."""
        return ()

    def load(self, source: Path | None) -> SuiteData:
        """Read the problems from `source` (file or folder), or from the official release when None. Raises
        SuiteError."""
        reader = Reader(KEYS, _sample, lambda sample: sample.id)
        official = f"code_generation_lite-{REVISION[:12]}-{self.release.tag}"
        if source is None:
            data = read_data(self.release.fetch(), reader, self.window, official, self.release.sha256)
        else:
            paths = self._local(source)
            digest = digest_of(paths)
            revision = official if digest == self.release.sha256 else f"local:{paths[0].name}"
            data = read_data(paths, reader, self.window, revision, digest)
        self._about = f" of {data.revision}, {dates_of(data.samples)}"
        public = sum(not sample.data["hidden"] for sample in data.samples)
        if public:
            self._about += f", {public:,} with public tests alone"
        return replace(data, notes=self._notes(data, public))

    def prompt(self, sample: Sample) -> Prompt:
        """The official prompts: for a base model one solved example before the question, for a chat model the
        instructions."""
        return Prompt(
            text=base_prompt(sample.data),
            stop=("###",),
            messages=(Message("system", SYSTEM), Message("user", chat_prompt(sample.data))),
            max_new_tokens=2000,
        )

    def gold(self, sample: Sample) -> Answer | None:  # noqa: ARG002
        """The data has no solutions."""
        return None

    def scorer(self, sandbox: Sandbox) -> Scorer:
        """Runs the programs in `sandbox`, and compares what comes out here."""
        return LcbGenerationScorer(sandbox)

    def carried(self, sample: Sample) -> Sample:
        """With its tests, which may be large, in place of where they are to be read. Raises SuiteError."""
        return Sample(sample.id, {**sample.data, "place": None, "row": _tests_of(sample)})

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """pass@k for each k up to the fewest answers that any problem has, of all problems and by their difficulty;
        scores with an error count for nothing."""
        words = f"LiveCodeBench code generation: problems{self._about}, all of whose tests pass; {SEEN}"
        metrics = pass_metrics(self.name, "right", scores, words)
        for difficulty in DIFFICULTIES:
            part = {
                sample: found
                for sample, found in scores.items()
                if any(score.detail.get("difficulty") == difficulty for score in found)
            }
            if part:
                metrics |= pass_metrics(f"{self.name}/{difficulty}", "right", part, f"{difficulty} ones of {words}")
        return metrics

    def _local(self, source: Path) -> list[Path]:
        names = [file.name for file in self.release.files]
        if source.is_file():
            if self.chosen and [source.name] != names:
                raise SuiteError(f"--release {self.release.tag} has no effect on --data {source}: it is a single file")
            return [source]
        if not source.is_dir():
            raise SuiteError(f"data {source}: no such file or folder")
        found = find_files(source, names, FOLDERS)
        if len(found) == len(names):
            return found
        if found:
            missing = sorted(set(names) - {path.name for path in found})
            raise SuiteError(
                f"data {source}: {self.release.tag} is {', '.join(names)}, and {', '.join(missing)} is missing"
            )
        other = [] if self.chosen else find_files(source, [LOCAL], FOLDERS)
        if not other:
            raise SuiteError(
                f"data {source}: expected {', '.join(names)}, or {LOCAL}, in it or in a folder livecodebench"
            )
        return other

    def _notes(self, data: SuiteData, public: int) -> tuple[str, ...]:
        said = [window_note(self.name, data.samples)]
        if public:
            said.append(
                f"{self.name}: {public:,} of {len(data.samples):,} problems come with public tests alone, so wrong "
                "programs may pass: their scores do not compare with published ones"
            )
        return tuple(said)


def window_note(name: str, samples: Sequence[Sample]) -> str:
    """What the user should know about the dates of the problems."""
    count = f"{len(samples):,} problem{'' if len(samples) == 1 else 's'}"
    return f"{name}: {count} of {dates_of(samples)}; {SEEN}: --since leaves earlier ones out"


def _sample(place: str, again: Place | None, row: dict[str, Any]) -> Sample:
    """What a prompt needs, and where the tests are to be read when they are needed: they are too large to be held."""
    if again is None:
        raise SuiteError(f"{place}: expected JSON lines, found parquet")
    function_name(place, row)
    kept = ("question_id", "question_content", "starter_code", "platform", "difficulty", "contest_date")
    hidden = bool(row.get("private_test_cases"))
    return Sample(row["question_id"], {**{key: row[key] for key in kept}, "hidden": hidden, "place": again})


def _tests_of(sample: Sample) -> dict[str, Any]:
    """The row with the tests. Raises SuiteError when it is not there any more."""
    place: Place = sample.data["place"]
    row = place.read()
    if row.get("question_id") != sample.id:
        raise SuiteError(f"{place}: expected problem {sample.id}; the file has changed")
    return row


class LcbGenerationScorer:
    """Judges programs. Thread-safe."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Value "right"; the detail says how many tests passed before the first that did not, and why it did not."""
        about = {key: sample.data[key] for key in ("platform", "difficulty", "contest_date")}
        code = code_in(answer)
        if not code.strip() or len(answer.text) > MOST_CHARACTERS:
            why = f"the answer has {len(answer.text)} characters" if code.strip() else "no code was found in the answer"
            return Score({"right": False}, judged=code[:MOST_CHARACTERS], detail={**about, "why": why})
        row = sample.data.get("row") or _tests_of(sample)
        cases = read_cases(str(sample.data["place"] or f"problem {sample.id}"), row)
        try:
            verdict = judge(self._sandbox, code, cases)
        except JudgingError as error:
            return Score(error=str(error))
        detail = {**about, "tests": len(cases.inputs), "public": cases.public, "passed": verdict.passed}
        return Score({"right": verdict.right}, code, {**detail, "why": verdict.why} if verdict.why else detail)

    def close(self) -> None:
        """Nothing is held."""


# --- prompts and answers ------------------------------------------------------------------------------


def chat_prompt(row: Mapping[str, Any]) -> str:
    """The question with the format that its answer should have."""
    how = WITH_STARTER if row["starter_code"] else WITHOUT_STARTER
    code = row["starter_code"] or "# YOUR CODE HERE"
    form = f"### Format: {how}\n```python\n{code}\n```\n\n"
    return f"### Question:\n{row['question_content']}\n\n{form}### Answer: (use the provided format with backticks)\n\n"


def base_prompt(row: Mapping[str, Any]) -> str:
    """A solved problem of the same kind, then the question."""
    example = _examples()["functional" if row["starter_code"] else "stdin"]
    solved = _asked(example["question"], example["sample_code"] if row["starter_code"] else "") + example["answer"]
    return f"{solved}\n\n{_asked(row['question_content'], row['starter_code'])}"


def _asked(question: str, starter: str) -> str:
    return f"### Question\n{question}\n\n" + (f"### Starter Code\n{starter}\n\n" if starter else "") + "### Answer\n\n"


@functools.cache
def _examples() -> dict[str, dict[str, str]]:
    path = Path(__file__).parents[1] / "data" / "lcb_examples.json"
    examples: dict[str, dict[str, str]] = json.loads(path.read_text())
    return examples


def code_in(answer: Answer) -> str:
    """The program in an answer: of a chat model what stands between the last two fences, of a base model all."""
    if answer.solution:
        return answer.text
    if not answer.chat:
        return answer.text.strip()
    lines = answer.text.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""
