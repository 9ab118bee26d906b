"""The results store: one directory a run, written by one process at a time, read by anybody.

Reading, for reports:

    for run in list_runs(Path("results/runs")):
        print(run.manifest.run_id, run.state(), run.metrics())
        for sample in run.samples():
            ...

Writing is the runner's: RunWriter.open finds or makes the directory of an identity, holds its lock, knows what is
already done, and appends. The files' schema is plt_eval.records; how they survive kills is plt_eval.journal.

Diagnoses are runs too, in the same folder; plt_eval.diagnosis.store reads those.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import filelock
from pydantic import ValidationError

from plt_benchmarks.protocols import Metric
from plt_eval import provenance
from plt_eval.errors import UserError
from plt_eval.journal import Journal, naming_full_disk, read_journal, sync_folder, write_atomically
from plt_eval.records import (
    SCHEMA_VERSION,
    CompletionRecord,
    Identity,
    IdentityRecord,
    JudgeRecord,
    Key,
    Manifest,
    MetricRecord,
    Metrics,
    Record,
    SampleRecord,
    Session,
)

MANIFEST = "manifest.json"
COMPLETIONS = "completions.jsonl"
SAMPLES = "samples.jsonl"
METRICS = "metrics.json"
LOCK = "lock"
HOLDER = "lock.json"
"""Who holds the lock: the lock file itself belongs to filelock, which may empty it."""

EVALUATION = "evaluation"
"""The kind of a run whose manifest names none: other kinds name themselves."""

State = Literal["running", "complete", "incomplete", "killed"]
_Line = TypeVar("_Line", bound=Record)
_Key = TypeVar("_Key", bound=Hashable)
_File = TypeVar("_File", bound=Record)
_Run = TypeVar("_Run")


# --- reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run directory, opened for reading. Its journals may still be growing."""

    path: Path
    manifest: Manifest

    def completions(self) -> Iterator[CompletionRecord]:
        """The last attempt at each completion, in the order of first attempts. Raises UserError."""
        yield from _completions(self.path).values()

    def samples(self) -> Iterator[SampleRecord]:
        """The last verdict on each sample, in the order of first verdicts. Raises UserError."""
        yield from _verdicts(self.path).values()

    def metrics(self) -> Metrics | None:
        """None until a session has ended by itself. Raises UserError."""
        path = self.path / METRICS
        return read_record(path, Metrics) if path.exists() else None

    def state(self) -> State:
        """The manifest's status, or "killed" for a run that says "running" while nobody holds its lock."""
        status = self.manifest.status
        return "killed" if status == "running" and not is_held(self.path) else status

    def done(self) -> int:
        """Samples judged; counted in the journal while the run has not ended by itself. Raises UserError."""
        if self.manifest.status == "running":
            return sum(sample.error is None for sample in self.samples())
        return self.manifest.done


def run_kind(path: Path) -> str:
    """What kind of run the directory `path` holds: EVALUATION, or what its manifest calls itself. A damaged manifest
    counts as an evaluation's, whose reader says what is wrong with it. Raises UserError when there is none."""
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is not a run directory: it has no {MANIFEST}")
    try:
        value = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return EVALUATION
    return str(value.get("kind", EVALUATION)) if isinstance(value, dict) else EVALUATION


def open_run(path: Path) -> Run:
    """Open the run directory `path` for reading. Raises UserError when it is none or cannot be understood."""
    kind = run_kind(path)
    if kind != EVALUATION:
        raise UserError(f"{path} is a {kind}: it has no verdicts on a suite's problems")
    return Run(path, read_record(path / MANIFEST, Manifest))


def list_runs(root: Path, *, problem: Callable[[UserError], None] | None = None) -> list[Run]:
    """All evaluations below `root`, oldest first; none when `root` does not exist. A run that cannot be read raises
    UserError, or is handed to `problem` and left out."""
    return sorted(
        open_folders(root, EVALUATION, open_run, problem), key=lambda run: (run.manifest.started, run.manifest.run_id)
    )


def open_folders(
    root: Path, kind: str, opened: Callable[[Path], _Run], problem: Callable[[UserError], None] | None
) -> Iterator[_Run]:
    """The run directories of one kind below `root`, by name. One that cannot be read raises UserError, or is handed to
    `problem` and left out."""
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        try:
            if run_kind(manifest.parent) == kind:
                yield opened(manifest.parent)
        except UserError as error:
            if problem is None:
                raise
            problem(error)


def _completions(folder: Path) -> dict[Key, CompletionRecord]:
    return last_lines(folder / COMPLETIONS, CompletionRecord, lambda line: line.key)


def _verdicts(folder: Path) -> dict[Key, SampleRecord]:
    return last_lines(folder / SAMPLES, SampleRecord, lambda line: line.key)


def last_lines(path: Path, kind: type[_Line], key: Callable[[_Line], _Key]) -> dict[_Key, _Line]:
    """A journal by `key`: a later line with the same one replaces an earlier. Raises UserError."""
    lines: dict[_Key, _Line] = {}
    for number, value in read_journal(path):
        try:
            line = kind.model_validate(value)
        except ValidationError as error:
            raise UserError(f"{path}:{number}: {_first_fault(error)}") from error
        lines[key(line)] = line
    return lines


def read_record(path: Path, kind: type[_File], schema_version: int = SCHEMA_VERSION) -> _File:
    """A whole file as a record of `schema_version`. Raises UserError for a file that is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != schema_version:
        raise UserError(f"{path}: schema version {version!r}, but this plt-eval reads {schema_version}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {_first_fault(error)}") from error


def _first_fault(error: ValidationError) -> str:
    """What is wrong with a record, in one line."""
    fault = error.errors(include_url=False)[0]
    return f"field {'.'.join(map(str, fault['loc']))}: {fault['msg']}"


# --- the lock -----------------------------------------------------------------------------------------


def hold_folder(folder: Path) -> filelock.BaseFileLock:
    """Hold `folder` until released or dead. Waits a second: listing runs probes locks for an instant. Raises UserError
    that names the process that holds it."""
    lock = filelock.FileLock(folder / LOCK, thread_local=False)
    try:
        with naming_full_disk(folder / LOCK):
            lock.acquire(timeout=1.0, poll_interval=0.05)
    except filelock.Timeout:
        raise UserError(
            f"{folder} is being written by another process ({_holder(folder)}); wait for it or stop it"
        ) from None
    try:
        with naming_full_disk(folder / HOLDER):
            (folder / HOLDER).write_text(json.dumps({"pid": os.getpid(), "host": os.uname().nodename}))
    except BaseException:
        lock.release()
        raise
    return lock


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_text())
        return f"pid {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "pid unknown"


def is_held(folder: Path) -> bool:
    """Whether a process holds `folder`."""
    import fcntl

    try:
        stream = (folder / LOCK).open("rb")
    except OSError:
        return False
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# --- writing ------------------------------------------------------------------------------------------


class HeldFolder:
    """A run directory that this process holds, with the journals it writes there.

    Use as a context manager: leaving it closes the journals and lets go of the lock, whatever happened.
    """

    def __init__(self, path: Path, lock: filelock.BaseFileLock) -> None:
        self.path = path
        self._lock = lock
        self._journals: tuple[Journal, ...] = ()
        """None of them before a session begins."""

    def close(self) -> None:
        """Close the journals and let go of the lock; harmless when closed already."""
        try:
            self._close_journals()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _close_journals(self) -> None:
        for journal in self._journals:
            journal.close()


@contextmanager
def holding(folder: Path) -> Iterator[filelock.BaseFileLock]:
    """Make `folder` and hold it; let go only if the block fails. Raises what hold_folder does, and DiskFull."""
    with naming_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = hold_folder(folder)
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


@dataclass(frozen=True)
class RunRequest:
    """Which run a writer is for. `total` counts samples; `run_id` overrides the readable default name."""

    identity: Identity
    total: int
    data_revision: str
    data_source: str
    command: tuple[str, ...] = ()
    sandbox: str = ""
    engine_facts: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None


class RunWriter(HeldFolder):
    """A run directory held for writing: what is done already, and the two journals. Thread-safe appends."""

    def __init__(self, path: Path, lock: filelock.BaseFileLock, manifest: Manifest) -> None:
        super().__init__(path, lock)
        self.manifest = manifest
        self.completions: dict[Key, CompletionRecord] = {}
        """Finished completions that await a verdict."""
        self.samples: dict[Key, SampleRecord] = {}
        """Verdicts; errors are not among them."""
        self._read()

    @classmethod
    def open(cls, root: Path, request: RunRequest) -> RunWriter:
        """Find or make the directory of `request` below `root` and hold it.

        Raises UserError when another process holds it, when it holds another run, or when it is damaged.
        """
        run_id = request.identity.default_run_id() if request.run_id is None else check_run_id(request.run_id)
        path = root / run_id
        with holding(path) as lock:
            if (path / MANIFEST).exists():
                manifest = open_run(path).manifest
                check_same_run(path, manifest.identity, request.identity)
            else:
                manifest = _new_manifest(run_id, request)
            return cls(path, lock, manifest)

    @property
    def complete(self) -> bool:
        """True when every sample has its verdict."""
        return len(self.samples) == self.manifest.total

    def begin(self, request: RunRequest) -> None:
        """Start a session: say so in the manifest and open the journals. Old metrics go: they are out of date."""
        session = Session(
            started=now(),
            ended=None,
            command=request.command,
            packages=provenance.packages(),
            git=provenance.git_state(),
            hardware=provenance.hardware(),
            sandbox=request.sandbox,
            engine_facts=dict(request.engine_facts),
        )
        sessions = (*self.manifest.sessions, session)
        changes = {"sessions": sessions, "resumed": len(sessions) - 1, "status": "running", "ended": None}
        if len(sessions) == 1:
            changes["started"] = session.started
        (self.path / METRICS).unlink(missing_ok=True)
        self._save_manifest(changes)
        self._journals = (Journal(self.path / COMPLETIONS), Journal(self.path / SAMPLES))
        with naming_full_disk(self.path):
            sync_folder(self.path)

    def judged_by(self, judges: tuple[JudgeRecord, ...]) -> None:
        """Say in the manifest which machines judge in this session, and how much they have. Raises DiskFull."""
        *before, session = self.manifest.sessions
        self._save_manifest({"sessions": (*before, session.model_copy(update={"judges": judges}))})

    def add_completion(self, record: CompletionRecord) -> None:
        """Append to completions.jsonl. Raises DiskFull."""
        assert self._journals, "begin() comes first"
        self._journals[0].append(record.model_dump(mode="json"))

    def add_sample(self, record: SampleRecord) -> None:
        """Append to samples.jsonl. Raises DiskFull; ValueError for a verdict that JSON cannot hold."""
        assert self._journals, "begin() comes first"
        self._journals[1].append(record.model_dump(mode="json"))

    def forget(self, keys: Iterable[Key]) -> None:
        """Let these be drawn and judged again; what the journals say of them is replaced when they are."""
        for key in keys:
            self.samples.pop(key, None)
            self.completions.pop(key, None)

    def seal(self) -> None:
        """Close the journals and read them again, so that what is counted is what is on disk."""
        self._close_journals()
        self._read()

    def end(self, metrics: Mapping[str, Metric] | None, problems: int, missing: list[str]) -> None:
        """After seal(): write metrics.json (None: the session was cut short, there are none), then the manifest.
        `missing` names what has no verdict, with the reason. Raises DiskFull."""
        done, total = len(self.samples), self.manifest.total
        if metrics is not None:
            text = Metrics(
                run_id=self.manifest.run_id,
                total=total,
                done=done,
                missing=total - done,
                problems=problems,
                metrics={name: _metric_record(metric) for name, metric in metrics.items()},
            )
            write_atomically(self.path / METRICS, as_json(text))
        ended = now()
        sessions = self.manifest.sessions
        if sessions and sessions[-1].ended is None:
            sessions = (*sessions[:-1], sessions[-1].model_copy(update={"ended": ended}))
        self._save_manifest(
            {
                "sessions": sessions,
                "ended": ended,
                "status": "complete" if done == total and metrics is not None else "incomplete",
                "done": done,
                "missing": total - done if metrics is not None else 0,
                "missing_examples": tuple(missing[:5]),
            }
        )

    def _read(self) -> None:
        self.samples = {key: sample for key, sample in _verdicts(self.path).items() if sample.error is None}
        self.completions = {
            key: completion
            for key, completion in _completions(self.path).items()
            if completion.error is None and key not in self.samples
        }

    def _save_manifest(self, changes: Mapping[str, object]) -> None:
        manifest = self.manifest.model_copy(update=dict(changes))
        write_atomically(self.path / MANIFEST, as_json(manifest))
        self.manifest = manifest


def check_run_id(name: str) -> str:
    """`name` itself when it can name a directory; raises UserError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,149}", name):
        raise UserError(
            f"--run-id {name!r}: expected letters, digits and . + _ - only, beginning with a letter or digit"
        )
    return name


def _new_manifest(run_id: str, request: RunRequest) -> Manifest:
    return Manifest(
        run_id=run_id,
        identity=request.identity,
        identity_sha256=request.identity.sha256(),
        data_revision=request.data_revision,
        data_source=request.data_source,
        status="running",
        started=now(),
        ended=None,
        resumed=0,
        total=request.total,
        done=0,
        missing=0,
        missing_examples=(),
        sessions=(),
    )


def check_same_run(path: Path, found: IdentityRecord, asked: IdentityRecord) -> None:
    """Refuse the directory of another run. Raises UserError that says what differs."""
    differences = found.differences(asked)
    if differences:
        raise UserError(f"{path} holds another run; what differs: {'; '.join(differences)}; choose another --run-id")


def _metric_record(metric: Metric) -> MetricRecord:
    return MetricRecord(**dataclasses.asdict(metric))


def as_json(record: Record) -> str:
    """A record as the text of its file."""
    return json.dumps(record.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"


def now() -> datetime:
    """The time, as records hold it."""
    return datetime.now(UTC)
