"""study.json: what was trained and measured, one Variant for each model and one LoopSummary for each loop count.

    study = read_study(Path("results/studies/quick"))
    {row.loops: row.heldout["python"].bits_per_byte.value for row in study.summary}

Paths are relative to the study's folder, memory and caches in bytes, times in seconds.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from plt_eval.errors import UserError
from plt_eval.records import MetricRecord, Record, Session
from plt_eval.store import read_record

SCHEMA_VERSION = 1
"""Raised whenever a reader of the earlier version would misread a file."""

STUDY = "study.json"
SUMMARY = "summary.md"


class HeldOutRecord(Record):
    """Held-out text of one entry of the recipe's data; see plt_eval.heldout. Intervals are of 95%, over `units`
    (documents, or packages where documents come from packages); None where there are too few of them: fewer than
    plt_eval.heldout.MIN_UNITS."""

    bits_per_byte: float
    low: float | None
    high: float | None
    nats_per_token: float
    tokens: int
    bytes: int
    documents: int
    units: int


class SuiteRecord(Record):
    """One suite's run in runs/."""

    run_id: str
    total: int
    missing: int
    metrics: dict[str, MetricRecord]


class TrainingRecord(Record):
    """What training took. `loss` is the mean of the last steps, in nats per token; `step_seconds` the median of an
    optimizer step; `peak_memory_bytes` of the GPU's allocator, or of the process without one."""

    steps: int
    tokens: int
    loss: float
    seconds: float
    step_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int | None


class CacheRecord(Record):
    """What one sequence's cache holds after `context` tokens, in `dtype`: `shared` is the full cache that all loops
    read, `windows` and `carry` are what the loops after the first keep of their own."""

    context: int
    dtype: str
    shared: int
    windows: int
    carry: int

    @property
    def total(self) -> int:
        return self.shared + self.windows + self.carry


class DecodeRecord(Record):
    """How long a new token of one sequence takes after `context` tokens: the median of `tokens` steps, in seconds, on
    `device` in `dtype`."""

    seconds: float
    context: int
    tokens: int
    device: str
    dtype: str


class Variant(Record):
    """One trained model and everything measured on it. `heldout` is by entry of the recipe's data, `suites` by suite.
    `diagnosis` is the run directory of its per-loop measurements, None where there are none."""

    loops: int
    seed: int
    model: str
    weights_sha256: str
    parameters: int
    embedding_parameters: int
    training: TrainingRecord
    cache: CacheRecord
    decode: DecodeRecord
    heldout: dict[str, HeldOutRecord]
    suites: dict[str, SuiteRecord]
    diagnosis: str | None

    @property
    def name(self) -> str:
        """As in "r2-s0"."""
        return f"r{self.loops}-s{self.seed}"


class Estimate(Record):
    """A number over seeds. With one seed, `low` and `high` are its 95% interval over what was tested (None where there
    is none) and `spread` is None; with several, `value` is their mean and `spread` their standard deviation."""

    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None


class HeldOutSummary(Record):
    """Held-out text at one loop count. `against_first` is the difference in bits per byte from the first loop count of
    the study, on the same documents; None for the first itself."""

    bits_per_byte: Estimate
    nats_per_token: Estimate
    against_first: Estimate | None


class LoopSummary(Record):
    """One loop count, over its seeds. `metrics` is by suite metric; those of a suite's parts are in the variants."""

    loops: int
    seeds: tuple[int, ...]
    heldout: dict[str, HeldOutSummary]
    metrics: dict[str, Estimate]
    step_seconds: Estimate
    tokens_per_second: Estimate
    decode_seconds: Estimate
    peak_memory_bytes: int | None
    parameters: int
    embedding_parameters: int
    cache: CacheRecord


class Study(Record):
    """study.json. `status` "running" means that variants are still missing: the same command goes on. `sessions` are
    the processes that worked on it, in order; one that was stopped has not `ended`."""

    schema_version: int = SCHEMA_VERSION
    status: Literal["running", "complete"]
    recipe: dict[str, Any]
    recipe_sha256: str
    loops: tuple[int, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    suites: tuple[str, ...]
    limit: int | None
    heldout_tokens: int
    diagnosis_samples: int | None = None
    """Held-out texts on which each model's loops were opened; 0: none, None: written by a version that could not."""
    context: int
    data: str
    started: datetime
    ended: datetime | None
    sessions: tuple[Session, ...]
    variants: tuple[Variant, ...]
    summary: tuple[LoopSummary, ...]


def read_study(folder: Path) -> Study:
    """The study in `folder`. Raises UserError when there is none, or none that this version understands."""
    path = folder / STUDY
    if not path.is_file():
        raise UserError(f"{folder} is no study: it has no {STUDY}")
    return read_record(path, Study, SCHEMA_VERSION)
