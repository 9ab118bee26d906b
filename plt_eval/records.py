"""The results store's schema: what every file of a run directory holds.

    manifest.json      Manifest            what was run, on what, how far it got
    completions.jsonl  CompletionRecord    one line a completion, appended as the engine yields it
    samples.jsonl      SampleRecord        one line a judged sample, appended as each finishes; the resume point
    metrics.json       Metrics             written when a run has ended, from samples.jsonl alone

In the two journals a later line for the same sample and index replaces an earlier one; lines with `error` set
are attempts that broke: they never count as done.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1
"""Raised whenever a reader of the earlier version would misread a file."""

Status = Literal["running", "complete", "incomplete"]
Key = tuple[str, int]
"""Which completion: (sample id, sample index from 0)."""


def storable(text: str) -> str:
    """`text` without lone surrogates, which neither UTF-8 nor a program on disk can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Record(BaseModel):
    """What all records share: unknown fields are an error, as are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DecodingRecord(Record):
    """How text was drawn; see plt_eval.engines.base.Decoding."""

    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int | None


class IdentityRecord(Record):
    """Exactly what decides a run's results. Equal identities share one run directory; others never do."""

    def sha256(self) -> str:
        """Hash of all fields, independent of their order."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: IdentityRecord) -> list[str]:
        """What `other` has instead, one `name: own value -> other value` an item."""
        mine = dict(_flatten(self.model_dump(mode="json")))
        theirs = dict(_flatten(other.model_dump(mode="json")))
        names = sorted(mine.keys() | theirs.keys())
        return [
            f"{name}: {_brief(mine.get(name))} -> {_brief(theirs.get(name))}"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]


class Identity(IdentityRecord):
    """What decides the results of an evaluation."""

    suite: str
    suite_version: str
    data_sha256: str
    """Of the problems' uncompressed bytes."""
    prompts_sha256: str
    """Of every prompt of the selected problems, so that a changed prompt is never mixed with an older one."""
    engine: str
    engine_identity: dict[str, Any]
    """The engine's own account: model and weights hash, loops, loop mode, dtype, chat template hash..."""
    decoding: DecodingRecord
    n_samples: int = Field(ge=1)
    problems: int = Field(ge=0)
    """The first so many problems of the data, in its order."""

    @property
    def model(self) -> str:
        """The model's readable name: the last part of its path or repository."""
        name = str(self.engine_identity.get("model") or self.engine)
        return PurePath(name).name or name

    @property
    def loops(self) -> int | None:
        """The loop count, None for an engine that has none."""
        loops = self.engine_identity.get("loops")
        return loops if isinstance(loops, int) else None

    def default_run_id(self) -> str:
        """`<suite>-<model>-r<loops>-<8 hex of the hash>`; without the loops part for engines that have none."""
        loops = [] if self.loops is None else [f"r{self.loops}"]
        return slug("-".join([self.suite, self.model, *loops, self.sha256()[:8]]))


class GitState(Record):
    """The project's own checkout."""

    commit: str
    dirty: bool


class Hardware(Record):
    """The machine; `ram` in bytes, `gpus` by name."""

    cpu: str
    cores: int
    ram: int
    gpus: tuple[str, ...]


class JudgeRecord(Record):
    """A machine of the cluster that judged, or was left out. `judged` counts verdicts of this session."""

    machine: str
    packages: dict[str, str]
    hardware: Hardware | None
    """None, and no packages, of one that never told."""
    judged: int
    left_out: str
    """Why it does not judge; empty for one that does."""


class Session(Record):
    """One process that worked on the run: the first start, or a resumption."""

    started: datetime
    ended: datetime | None
    """None while it works, and for ever when it was killed."""
    command: tuple[str, ...]
    packages: dict[str, str]
    git: GitState | None
    hardware: Hardware
    sandbox: str
    """The sandbox's name; empty for a suite that was judged without one."""
    engine_facts: dict[str, str] = {}
    """How the engine computed, as far as that is not part of the identity: its decoder, its attention."""
    judges: tuple[JudgeRecord, ...] = ()
    """The machines that judged, where it was not this one."""


class Manifest(Record):
    """What was run. `total` counts samples (problems x n_samples); `done` those judged; `missing` those that broke
    in the engine or in the judging (only known once a session ended by itself)."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    identity: Identity
    identity_sha256: str
    data_revision: str
    data_source: str
    status: Status
    started: datetime
    ended: datetime | None
    resumed: int
    total: int
    done: int
    missing: int
    missing_examples: tuple[str, ...]
    """The first few, each with its error."""
    sessions: tuple[Session, ...]


class CompletionRecord(Record):
    """One line of completions.jsonl: plt_eval.engines.base.Completion, and the end of the prompt it answers
    (PROMPT_TAIL characters), for people who look at it later. `seconds` is the engine's own measure."""

    sample_id: str
    index: int
    text: str
    finish_reason: Literal["stop", "length", "error"]
    chat: bool
    solution: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float | None
    error: str | None
    prompt_tail: str
    detail: dict[str, Any] = {}

    @property
    def key(self) -> Key:
        return (self.sample_id, self.index)


PROMPT_TAIL = 1000
"""Characters of the prompt that a completion's line keeps."""


class SampleRecord(Record):
    """One line of samples.jsonl: the verdict on one completion; see plt_benchmarks.protocols.Score."""

    sample_id: str
    index: int
    values: dict[str, bool | float]
    judged: str
    detail: dict[str, Any]
    error: str | None

    @property
    def key(self) -> Key:
        return (self.sample_id, self.index)

    def failed(self) -> bool:
        """True when it was judged and any yes-or-no value is no."""
        return self.error is None and any(value is False for value in self.values.values())


class MetricRecord(Record):
    """One metric; see plt_benchmarks.protocols.Metric."""

    value: float
    n: int
    low: float
    high: float
    definition: str
    share: bool = True
    stderr: float | None = None
    lower_is_better: bool = False
    has_interval: bool = True


class Metrics(Record):
    """metrics.json. `problems` counts the problems whose every sample was judged: only those are in the metrics."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    total: int
    done: int
    missing: int
    problems: int
    metrics: dict[str, MetricRecord]


def slug(text: str) -> str:
    """`text` as a file name: letters, digits and `.+_-` stay, anything else becomes `-`."""
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", text).strip(".-") or "run"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as (dotted name, value)."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _brief(value: Any) -> str:
    text = "(none)" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
