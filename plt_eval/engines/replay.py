"""Answers read from files instead of drawn: score what another program generated, or the data's own solutions.

    {"task_id": "HumanEval/0", "completion": "    return 1\\n"}     continues the problem's prompt
    {"task_id": "HumanEval/0", "solution": "def f(x):\\n ..."}      is the whole program (evalplus' samples format)

One JSON object a line (.jsonl, or .jsonl.gz); other fields are ignored. Several lines for one task are its samples
0, 1, ... in the order of the files. A line with both fields counts as a solution.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_benchmarks.protocols import Suite, SuiteData
from plt_eval.engines.base import Completion, GenerationRequest, Loglikelihood, LoglikelihoodRequest
from plt_eval.errors import UserError


@dataclass(frozen=True)
class Replayed:
    """One answer of a file. `solution` says that `text` is the whole program."""

    text: str
    solution: bool


class ReplayEngine:
    """Gives back stored answers by task id. `label` names their origin in run names and listings."""

    name = "replay"

    def __init__(self, answers: Mapping[str, Sequence[Replayed]], *, label: str) -> None:
        self._answers = {task: tuple(texts) for task, texts in answers.items()}
        self._label = label

    @classmethod
    def from_files(cls, paths: Sequence[Path]) -> ReplayEngine:
        """Read one or more files. Raises UserError naming file and line."""
        answers: dict[str, list[Replayed]] = {}
        for path in paths:
            for task, answer in _read(path):
                answers.setdefault(task, []).append(answer)
        names = [path.name.removesuffix(".gz").removesuffix(".jsonl") for path in paths]
        return cls(answers, label="+".join(names))

    @classmethod
    def gold(cls, jobs: Iterable[tuple[Suite, SuiteData]]) -> ReplayEngine:
        """The answers that the data itself carries. Raises UserError when a problem carries none."""
        answers = {}
        for suite, data in jobs:
            for sample in data.samples:
                answer = suite.gold(sample)
                if answer is None:
                    raise UserError(f"--completions gold: problem {sample.id} of {suite.name} carries no answer")
                answers[sample.id] = [Replayed(answer.text, answer.solution)]
        return cls(answers, label="gold")

    def select(self, tasks: Collection[str], n_samples: int) -> ReplayEngine:
        """The same, with the first `n_samples` answers to `tasks` alone: what one run uses."""
        kept = {task: texts[:n_samples] for task, texts in self._answers.items() if task in tasks}
        return ReplayEngine(kept, label=self._label)

    def check(self, known: Collection[str], wanted: Sequence[str], n_samples: int | None) -> int:
        """Make sure that every task of `wanted` has its answers and that none is for a task outside `known`.

        Returns how many samples each task gets: `n_samples`, or when None the number that all tasks have.
        Raises UserError.
        """
        unknown = [task for task in self._answers if task not in known]
        if unknown:
            raise UserError(
                f"{self._label}: {len(unknown)} of {len(self._answers)} task ids are not in the data, "
                f"first {unknown[0]!r}"
            )
        needed = 1 if n_samples is None else n_samples
        short = [task for task in wanted if len(self._answers.get(task, ())) < needed]
        if short:
            raise UserError(
                f"{self._label}: {len(short)} of {len(wanted)} problems have fewer than {needed} completions, "
                f"first {short[0]!r} with {len(self._answers.get(short[0], ()))}"
            )
        counts = {task: len(self._answers[task]) for task in wanted}
        if n_samples is not None or not counts:
            return needed
        fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[fewest] != counts[most]:
            raise UserError(
                f"{self._label}: {counts[fewest]} completions for {fewest} but {counts[most]} for {most}; "
                f"pass --n-samples {counts[fewest]} to use the first of each"
            )
        return counts[fewest]

    def identity(self) -> dict[str, Any]:
        """The hash of the answers themselves: tasks, order within each, and what kind they are."""
        digest = hashlib.sha256()
        for task in sorted(self._answers):
            rows = [[answer.solution, answer.text] for answer in self._answers[task]]
            digest.update(json.dumps([task, rows]).encode("ascii"))
        return {"model": self._label, "completions_sha256": digest.hexdigest()}

    def facts(self) -> dict[str, str]:
        """Nothing is computed."""
        return {}

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """Raises UserError for a request that the files do not answer."""
        for request in requests:
            task, _, index = request.id.rpartition("#")
            answers = self._answers.get(task, ())
            if int(index) >= len(answers):
                raise UserError(f"{self._label}: no completion {index} for {task}")
            answer = answers[int(index)]
            yield Completion(request.id, answer.text, "stop", solution=answer.solution)

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:  # noqa: ARG002
        """Stored texts have no likelihoods: raises UserError."""
        raise UserError("--engine replay has texts only: use --engine hf or openai for log-likelihoods")

    def close(self) -> None:
        """Nothing is held."""


def _read(path: Path) -> Iterator[tuple[str, Replayed]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _parse(f"{path}:{number}", line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"--completions {path}: damaged after line {number}: {error}") from error
    except OSError as error:
        raise UserError(f"--completions {path}: {error.strerror or error}") from error


def _parse(where: str, line: bytes) -> tuple[str, Replayed]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: broken line, not JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("task_id"), str):
        raise UserError(f'{where}: expected an object with "task_id" and "completion" or "solution"')
    for field in ("solution", "completion"):
        if field in value:
            if not isinstance(value[field], str):
                raise UserError(f'{where}: "{field}" is {type(value[field]).__name__}, expected a string')
            return value["task_id"], Replayed(value[field], solution=field == "solution")
    raise UserError(f'{where}: {value["task_id"]} has neither "completion" nor "solution"')
