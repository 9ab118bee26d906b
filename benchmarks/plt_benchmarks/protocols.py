"""What a suite is made of, and what it asks of the world around it.

A suite knows its data, its prompts and its scores. It never meets a model: the runner turns each
:class:`Prompt` into text with whatever engine the user chose and hands the text back for scoring.
It never runs model-written code itself either: it describes a :class:`SandboxJob`, and the sandbox
it was given runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Role = Literal["system", "user", "assistant", "tool"]


class SuiteError(ValueError):
    """The data or the installation of a suite is not usable; the message is one line for the user."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """One question, in both of the forms a model may want.

    A base model continues `text`. A chat model gets `messages` through its chat template, followed by
    `prefill` as the beginning of the assistant's answer (so the model continues the prefill). `stop`
    and `chat_stop` end the respective form; a stop string is not part of the completion.
    """

    text: str
    stop: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    prefill: str = ""
    chat_stop: tuple[str, ...] = ()
    max_new_tokens: int = 768


@dataclass(frozen=True)
class Sample:
    """One problem of a suite; `data` is the suite's own record."""

    id: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class SuiteData:
    """The loaded problems, in the official order, and what identifies them.

    `revision` is the official release, or "local:<file name>" for data given by path; `sha256` is of
    the uncompressed bytes; `source` says where they came from. `notes` are lines for the user: what was left out, and
    why. `left_out` names problems of the data that the user's choice leaves out: stored answers may be for them too.
    """

    samples: tuple[Sample, ...]
    revision: str
    sha256: str
    source: str
    notes: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Answer:
    """What a model wrote for one sample. `chat` says which form of the prompt it answered; `solution` true
    means that `text` is already the complete program (replayed from a file) and needs no post-processing. `detail` is
    what else is known of how it came about, in JSON types (an agent's exit status)."""

    text: str
    chat: bool = False
    solution: bool = False
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The verdict on one answer.

    `values` maps a metric's key to its value for this answer (True/False or a float). `judged` is what was
    really judged (the program after post-processing). `detail` says why, in JSON types. `error` is set
    when the judging itself broke: such a score is never counted, and is tried again on resume.
    """

    values: Mapping[str, bool | float] = field(default_factory=dict)
    judged: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Metric:
    """One number of a run: value in [0, 1], the number of problems behind it, a 95% interval over problems,
    and the definition in words. A value of another kind says so by `share` false; `stderr` is its standard error, where
    the official scorer gives one. Without an interval, `low` and `high` are the value."""

    value: float
    n: int
    low: float
    high: float
    definition: str
    share: bool = True
    stderr: float | None = None
    lower_is_better: bool = False
    has_interval: bool = True


# --- the sandbox, as a suite sees it ------------------------------------------------------------------


@dataclass(frozen=True)
class SandboxLimits:
    """What a job may use. Seconds, bytes, and counts, for the whole job (all its processes together),
    except `address_space`, which is the limit of each process (None: no such limit)."""

    wall_s: float = 60.0
    cpu_s: float = 60.0
    memory: int = 4 << 30
    address_space: int | None = None
    processes: int = 32
    file_bytes: int = 64 << 20
    tmp_bytes: int = 256 << 20
    output_bytes: int = 16 << 20


@dataclass(frozen=True)
class SandboxJob:
    """A Python program to run in isolation.

    `program` is the source of a trusted driver, run as `python -I driver.py` in a private, empty, writable
    working directory with `stdin` as its standard input. `files` are extra read-only files, by base name, in the
    folder named by the environment variable SANDBOX_FILES. `limits` holds for everything it starts. `environment` is
    the folder of a virtual environment whose Python runs the driver, instead of the one that runs us; the job sees it
    read-only.
    """

    program: str
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    limits: SandboxLimits = SandboxLimits()
    environment: Path | None = None


SandboxStatus = Literal["exited", "wall_limit", "cpu_limit", "memory_limit", "output_limit"]


@dataclass(frozen=True)
class SandboxOutcome:
    """How a job ended. `exit_code` is negative for a signal, None when it was killed at a limit. The streams hold at
    most `output_bytes` each. `cpu_s` and `peak_memory` (bytes) cover all the job's processes, None if unknown."""

    status: SandboxStatus
    exit_code: int | None
    stdout: bytes
    stderr: bytes
    wall_s: float
    cpu_s: float | None = None
    peak_memory: int | None = None


class Sandbox(Protocol):
    """Where untrusted code runs. `run` is thread-safe and raises SandboxError (an OSError) only when the sandbox
    itself is broken, never for anything the job did."""

    name: str

    def run(self, job: SandboxJob) -> SandboxOutcome: ...


class SandboxError(OSError):
    """The sandbox could not run a job at all; the message is one line for the user."""


# --- what a suite needs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """One thing besides Python packages that a suite cannot do without, or not do all of its work without: a program,
    an environment of its own, Docker. `mend` is what a user types to have it."""

    what: str
    present: bool
    mend: str = ""


# --- the suite ----------------------------------------------------------------------------------------


class Scorer(Protocol):
    """Judges answers; thread-safe; holds whatever helpers the judging needs until closed."""

    def score(self, sample: Sample, answer: Answer) -> Score: ...

    def close(self) -> None: ...


class Suite(Protocol):
    """One benchmark. `version` names data and scoring together: it changes when either would change a score.
    `summary` is one line for listings; `extra` is the pip extra that it needs. `runs_code` says whether answers are
    run to judge them: a suite that says no gets a sandbox that refuses every job, and needs none to be installed.
    `problems` is how many the official data has, and `cost` what judging them all takes, roughly, for listings."""

    name: str
    version: str
    summary: str
    extra: str | None
    runs_code: bool
    problems: int
    cost: str

    def needs(self) -> Sequence[Need]:
        """What it needs besides its extra and its data, and what of it is here. Quick, and asks no network."""
        ...

    def load(self, source: Path | None) -> SuiteData:
        """Read the problems from `source` (file or folder), or from the official release when None.
        Raises SuiteError."""
        ...

    def prompt(self, sample: Sample) -> Prompt: ...

    def gold(self, sample: Sample) -> Answer | None:
        """The data's own answer, as a model would have given it (or as a `solution`); None where it carries none."""
        ...

    def scorer(self, sandbox: Sandbox) -> Scorer:
        """Raises SuiteError when the official scorer is not installed."""
        ...

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """Metrics from the scores of every sample, by sample id (n >= 1 answers each). Does not depend on order."""
        ...


@runtime_checkable
class Portable(Protocol):
    """A suite whose samples refer to files of this machine."""

    def carried(self, sample: Sample) -> Sample:
        """`sample` with all that judging reads, for another machine. Raises SuiteError."""
        ...
