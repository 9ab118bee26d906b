"""What the files of a diagnosis hold. Its run directory lies in results/runs beside those of evaluations:

    manifest.json      DiagnosisManifest   what was measured, on what, how far it got
    samples.jsonl      DiagnosedSample     one line a measured sample; the resume point
    parts/             rows and head similarities of one batch each, until all samples are there
    loops.parquet      tidy rows, one for each sample, loop, measurement, variant, layer or bin of positions
    heads.parquet      cosines between the attention of heads, means over samples
    summary.parquet    means over samples with 95% intervals
    metrics.json       DiagnosisMetrics    the summary without layers and positions

In the journal a later line for the same sample replaces an earlier one.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from plt_eval.records import IdentityRecord, Record, Session, Status, slug

SCHEMA_VERSION = 1
"""Raised whenever a reader of the earlier version would misread a file."""

DIAGNOSIS = "diagnosis"
"""The kind of these runs."""


class DiagnosisIdentity(IdentityRecord):
    """What decides the results of a diagnosis."""

    model: str
    """The model's name in tables: "plt-tiny:r3", or its folder's own name."""
    weights_sha256: str
    config_sha256: str
    """Of the model's configuration as it was run."""
    loops: int = Field(ge=1)
    loop_mode: str | None
    """None for a model that can be wired in one way only."""
    dtype: str
    measurements: tuple[str, ...]
    measurements_version: int
    """plt_diagnostics.registry.VERSION."""
    data: str
    """What the samples were drawn from, in a few words."""
    data_sha256: str
    """Over the token ids of every sample, in order."""
    tokenizer_sha256: str
    sequence_length: int = Field(ge=1)
    """Tokens a sample at most."""
    samples: int = Field(ge=1)
    seed: int

    def default_run_id(self) -> str:
        """`diagnosis-<data>-<model>-r<loops>-<8 hex of the hash>`."""
        return slug("-".join([DIAGNOSIS, self.data[:40], self.model, f"r{self.loops}", self.sha256()[:8]]))


class ModelRecord(Record):
    """The model that was opened. `family` is None for a folder that a user gave, `trained_loops` None where the
    checkpoint does not say; `parameters` counts a tied head once."""

    label: str
    folder: str
    family: str | None
    trained_loops: int | None
    weights_sha256: str
    parameters: int


class DataRecord(Record):
    """The samples. `source` is the file, folder or set in full; `name` the same in a few words; `tokenizer` "bytes", a
    folder, or what the data folder was built with; `candidates` is how many texts the samples were drawn from;
    `windows` says that long texts were cut into samples, not shortened to one."""

    name: str
    source: str
    sha256: str
    tokenizer: str
    tokenizer_sha256: str
    sequence_length: int
    candidates: int
    windows: bool


class DiagnosisManifest(Record):
    """manifest.json. `total` counts samples, `done` those measured; `tokens` are those of all samples, without padding;
    `seconds` is the time of measuring, over all sessions; `peak_memory_bytes` is the most that a session took above the
    loaded model, of the GPU's allocator or of the process without one (None: could not be measured)."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["diagnosis"] = "diagnosis"
    run_id: str
    identity: DiagnosisIdentity
    identity_sha256: str
    model: ModelRecord
    adapter: str
    """Which family of models plt_diagnostics took it for."""
    shifts: bool
    """Whether a loop reads the state of the token before, so that there is an effective offset cost."""
    defaults: dict[str, str]
    """By measurement: the variant that tables show."""
    data: DataRecord
    device: str
    batch_size: int | None
    """Samples at a time; None: as many as fit."""
    status: Status
    started: datetime
    ended: datetime | None
    total: int
    done: int
    tokens: int
    seconds: float
    peak_memory_bytes: int | None
    sessions: tuple[Session, ...]

    @property
    def loops(self) -> int:
        """R: the loop count that was run."""
        return self.identity.loops

    @property
    def loop_mode(self) -> str | None:
        return self.identity.loop_mode

    @property
    def dtype(self) -> str:
        return self.identity.dtype

    @property
    def measurements(self) -> tuple[str, ...]:
        return self.identity.measurements

    @property
    def seed(self) -> int:
        return self.identity.seed

    @property
    def resumed(self) -> int:
        """How often it was gone on with."""
        return max(0, len(self.sessions) - 1)


class DiagnosedSample(Record):
    """One line of samples.jsonl. `id` says where the text is; `sha256` is of its token ids; `nonfinite` counts the
    values of each measurement that were not finite (absent: none); `seconds` is its share of its batch's time; `part`
    the file in parts/ that holds its rows until the end."""

    index: int
    id: str
    tokens: int
    sha256: str
    nonfinite: dict[str, int]
    seconds: float
    part: str


class LoopMetric(Record):
    """One measurement at one loop: its mean over `n` samples, each the mean of its tokens, and the 95% interval.
    `value` is None where no sample had a finite one, `low` and `high` where there are too few for an interval."""

    measurement: str
    variant: str
    loop: int
    value: float | None
    low: float | None
    high: float | None
    n: int
    nonfinite: int


class DiagnosisMetrics(Record):
    """metrics.json, in the order of the registry of measurements, then variants, then loops."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    loops: int
    samples: int
    tokens: int
    rows: tuple[LoopMetric, ...]
