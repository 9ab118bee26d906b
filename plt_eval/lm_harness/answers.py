"""What a model has answered to lm-eval's requests, by request: kept in memory, and in a journal that survives kills.

A request is known by the hash of its kind and its arguments, so an answer serves whoever asks the same again. Where
text is drawn at random, the second of two equal requests is one of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from plt_eval.errors import UserError
from plt_eval.journal import Journal
from plt_eval.records import Record
from plt_eval.store import last_lines

FILE_NAME = "answers.jsonl"
Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
KINDS: tuple[Kind, ...] = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class AnswerRecord(Record):
    """One line of answers.jsonl: what the model said to one request. `logprob` (None: minus infinity, or no such
    request) and `greedy` of a likelihood; the other fields of a text."""

    request: str
    kind: Kind
    logprob: float | None = None
    greedy: bool = False
    text: str = ""
    finish_reason: Literal["stop", "length"] = "stop"
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None

    @property
    def value(self) -> Any:
        """As lm-eval wants it: (log-likelihood, greedy), log-likelihood, or text."""
        if self.kind == "generate_until":
            return self.text
        total = -math.inf if self.logprob is None else self.logprob
        return (total, self.greedy) if self.kind == "loglikelihood" else total


class Answers:
    """Answers by request. `told` hears of each new one."""

    def __init__(self, told: Callable[[AnswerRecord], None] | None = None) -> None:
        self.told = told
        self._known: dict[str, AnswerRecord] = {}

    def __contains__(self, request: str) -> bool:
        return request in self._known

    def __getitem__(self, request: str) -> AnswerRecord:
        return self._known[request]

    def add(self, record: AnswerRecord) -> None:
        """Keep it. Raises DiskFull where it goes to a file."""
        self._known[record.request] = record
        if self.told is not None:
            self.told(record)

    def close(self) -> None:
        """Nothing is added any more."""


class JournaledAnswers(Answers):
    """Answers in a file of `folder`: those of earlier processes are there, and new ones stay."""

    def __init__(self, folder: Path, told: Callable[[AnswerRecord], None] | None = None) -> None:
        super().__init__(told)
        self._journal = Journal(folder / FILE_NAME)
        self._known = last_lines(folder / FILE_NAME, AnswerRecord, lambda line: line.request)

    def add(self, record: AnswerRecord) -> None:
        self._journal.append(record.model_dump(mode="json"))
        super().add(record)

    def close(self) -> None:
        self._journal.close()


class Unanswered(UserError):
    """The engine gave up on requests; the others are answered."""

    def __init__(self, count: int, total: int, first: str) -> None:
        super().__init__(f"{count} of {total} requests got no answer; first: {first}")
        self.count = count


def request_keys(kind: str, arguments: Iterable[Sequence[Any]]) -> list[str]:
    """A name for each request, from its arguments as lm-eval has them."""
    seen: Counter[str] = Counter()
    keys = []
    for own in arguments:
        text = json.dumps([kind, *own], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:40]
        if kind == "generate_until" and samples_text(own[1]):
            seen[key] += 1
            key = f"{key}-{seen[key]}"
        keys.append(key)
    return keys


def samples_text(wanted: Any) -> bool:
    """Whether generation options ask for text drawn at random, as lm-eval reads them."""
    chosen, temperature = wanted.get("do_sample"), wanted.get("temperature")
    warm = temperature is None or float(temperature) > 0
    return warm if chosen else chosen is None and temperature is not None and warm
