"""The measurements that estimates rest on: those that come along, and those of this machine.

    constants = load_constants()
    constants.devices["h200"].bandwidth, constants.measured["h200"].decode[0].seconds
    own = load_own()                   # what `plt-eval estimate --calibrate` left here, or None

A range is (low, middle, high). Seconds, bytes, FLOP/s and bytes a second everywhere.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plt_benchmarks.datafiles import cache_folder
from plt_eval.errors import UserError

CALIBRATION = "estimate-cpu.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Range(_Record):
    """What is not known better than that."""

    low: float = Field(ge=0)
    middle: float = Field(ge=0)
    high: float = Field(ge=0)

    def scenario(self, index: int) -> float:
        """0 the low end, 1 the middle, 2 the high end."""
        return (self.low, self.middle, self.high)[index]

    @classmethod
    def exactly(cls, value: float) -> Range:
        return cls(low=value, middle=value, high=value)


class DeviceRecord(_Record):
    """What can be chosen with --gpu. `own` says that `measured` is of this very device, not of a relative."""

    name: str
    memory_gib: float | None
    bandwidth: float
    flops: float
    cores: int
    measured: str
    own: bool
    source: str


class Point(_Record):
    """One measured time: a decoding step of `batch` texts with `context` tokens each, the reading of such prompts, or a
    training step on them. `low` and `high` are the rounds' extremes, where they are known."""

    shape: str
    dtype: str
    loops: int
    batch: int
    context: int
    seconds: float = Field(gt=0)
    low: float | None = None
    high: float | None = None


class MuonPoint(_Record):
    """Seconds of Muon's step for one matrix."""

    rows: int
    columns: int
    seconds: float = Field(gt=0)


class Measured(_Record):
    """All of one machine. `bandwidth` and `flops` are what times are compared with: a GPU's data sheet, or what a CPU
    did on one long array and one large matrix product. `start`: before the first token, as `start_source` says: a CPU's
    process with its imports, a GPU's compiling alone."""

    machine: str
    when: str
    cores: int
    source: str
    bandwidth: float
    flops: float
    read_share: float = Field(default=1.0, gt=0, le=1)
    """Of the bandwidth, what a plain streaming read reached."""
    decode: tuple[Point, ...]
    prefill: tuple[Point, ...]
    train: tuple[Point, ...]
    muon: tuple[MuonPoint, ...] = ()
    start: Range
    start_source: str = "a process with its imports"


class TextRecord(_Record):
    """Problems of a suite, characters of its mean prompt and gold answer, and the most tokens of an answer. `plain` is
    what a model without a chat template is given, and how it goes on."""

    problems: int
    prompt: int
    gold: int | None
    plain_prompt: int
    plain_gold: int | None
    limit: int

    def characters(self, *, chat: bool) -> tuple[int, int | None]:
        """Of the prompt and the gold answer, for models with a chat template or without."""
        return (self.prompt, self.gold) if chat else (self.plain_prompt, self.plain_gold)


class Known(_Record):
    """A number with where it comes from."""

    value: float
    source: str


class Loading(_Record):
    """Bytes a second of reading weights and putting them on a GPU."""

    rate: Range
    source: str


class Texts(_Record):
    characters_per_token: Known
    source: str
    suites: dict[str, TextRecord]


class Judging(_Record):
    """Processor seconds of judging one answer, and, once on each machine, of running the problem's own solution."""

    cpu_seconds: Range
    first: Range = Range.exactly(0)
    source: str
    assumed: bool = False


class AgentSuite(_Record):
    """`issue`: characters; `environments`: of images, None where nobody counted."""

    problems: int
    images: int
    environments: int | None
    issue: int


class Agents(_Record):
    """What an agent's work is made of; the ranges are assumed."""

    suites: dict[str, AgentSuite]
    source: str
    system_characters: int
    steps: Range
    new_tokens: Range
    observation_tokens: Range
    tool_seconds: Range
    assumed: str


class Constants(_Record):
    trainer: Known
    """Seconds that a training step takes besides the step itself: transformers' Trainer and a line of the log."""
    loading: Loading
    devices: dict[str, DeviceRecord]
    measured: dict[str, Measured]
    texts: Texts
    judging: dict[str, Judging]
    agents: Agents


@cache
def load_constants() -> Constants:
    """Those that come along."""
    return Constants.model_validate_json((files("plt_eval.estimate") / "constants.json").read_text(encoding="utf-8"))


def calibration_file() -> Path:
    """Where this machine's own measurements are kept."""
    return cache_folder() / CALIBRATION


def load_own() -> Measured | None:
    """This machine's measurements, None where it was not calibrated. Raises UserError for a damaged file."""
    path = calibration_file()
    if not path.is_file():
        return None
    try:
        return Measured.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, ValueError) as damaged:
        raise UserError(f"{path}: damaged: run plt-eval estimate --calibrate again") from damaged


__all__ = [
    "AgentSuite",
    "Agents",
    "Constants",
    "DeviceRecord",
    "Judging",
    "Known",
    "Loading",
    "Measured",
    "MuonPoint",
    "Point",
    "Range",
    "TextRecord",
    "calibration_file",
    "load_constants",
    "load_own",
]
