"""Model x loop count x samples -> a diagnosis: measure what is missing, batch by batch, and put the tables together.

    subject = Subject.of(resolve_model("plt-tiny:r3"))
    drawn = draw([open_corpus("trace")], tokenizer=str(subject.folder), samples=500, sequence_length=512)
    result = diagnose(subject, drawn, Settings(results=Path("results/runs")))
    result.diagnosis.summary()

The run directory is the only memory, as for evaluations: asking again for what is complete only reads it (the weights
are hashed, not loaded), and what was stopped or killed goes on where it stood.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from plt_diagnostics import default_variant, measure, select
from plt_diagnostics.adapters.protocol import LoopedModel
from plt_diagnostics.registry import VERSION
from plt_eval import provenance
from plt_eval.diagnosis.memory import PeakMemory
from plt_eval.diagnosis.progress import DiagnosisProgress
from plt_eval.diagnosis.records import (
    DataRecord,
    DiagnosedSample,
    DiagnosisIdentity,
    DiagnosisManifest,
    ModelRecord,
)
from plt_eval.diagnosis.samples import Drawn, Sample
from plt_eval.diagnosis.store import Diagnosis, open_diagnosis
from plt_eval.diagnosis.subject import Subject
from plt_eval.diagnosis.writer import DiagnosisWriter
from plt_eval.engines.hf_batches import out_of_memory
from plt_eval.errors import UserError
from plt_eval.journal import DiskFull
from plt_eval.records import Session
from plt_eval.store import now

MOST_SAMPLES, MOST_TOKENS = {"cpu": 8, "cuda": 64}, {"cpu": 4096, "cuda": 32768}
"""Of one batch, padding included, where no batch size is asked for; one sample may be longer."""


class DiagnosisInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; what was done is stored, and the message says how far it got."""


# --- the run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to run. `measurements` None means all; `batch_size` None: as many samples at a time as fit."""

    results: Path
    measurements: Sequence[str] | None = None
    batch_size: int | None = None
    run_id: str | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A diagnosis that is complete. `reused` says that it was so already and only read."""

    diagnosis: Diagnosis
    reused: bool


def diagnose(subject: Subject, drawn: Drawn, settings: Settings, *, console: Console | None = None) -> Result:
    """Measure every loop of `subject` on the samples `drawn`, or go on with, or just read, the run that did.

    Progress goes to `console` (stderr). Raises UserError, the CheckpointError of plt_model, the MeasurementError of
    plt_diagnostics (all: one line for the user) and DiagnosisInterrupted; what was done until then is stored.
    """
    console = console or Console(stderr=True)
    names = tuple(measurement.name for measurement in select(settings.measurements))
    opened = _OpenedOnce(subject)
    identity = _identity(subject, drawn, names, opened)
    with DiagnosisWriter.open(settings.results, identity, run_id=settings.run_id) as writer:
        if writer.complete:
            return Result(open_diagnosis(writer.path), reused=True)
        model = opened()
        _check_ids(drawn, model.shape.vocab)
        memory = PeakMemory(subject.device)
        writer.begin(_manifest(subject, drawn, identity, settings, model, writer.path.name))
        try:
            with _stop_signals():
                _measure(model, drawn, names, writer, settings.batch_size, memory, subject.notify, console)
                writer.finish(memory.peak())
        except BaseException as error:
            # The first error is the one to report: a full disk may well refuse this write too.
            with suppress(DiskFull, OSError, UserError):
                writer.abandon(memory.peak())
            if isinstance(error, KeyboardInterrupt):
                done, total = len(writer.done), len(drawn.samples)
                raise DiagnosisInterrupted(
                    f"{writer.path}: stopped with {done} of {total} samples done; run the same command again to go on"
                ) from error
            raise
        return Result(open_diagnosis(writer.path), reused=False)


class _OpenedOnce:
    """The model, loaded when it is first asked for."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._model: LoopedModel | None = None

    def __call__(self) -> LoopedModel:
        if self._model is None:
            self._model = self._subject.open()
        return self._model


def _identity(subject: Subject, drawn: Drawn, names: tuple[str, ...], opened: _OpenedOnce) -> DiagnosisIdentity:
    loops = subject.loops or subject.trained_loops or opened().shape.loops
    return DiagnosisIdentity(
        model=subject.label,
        weights_sha256=subject.weights_sha256,
        config_sha256=subject.config_sha256,
        loops=loops,
        loop_mode=subject.loop_mode or subject.config.get("plt_loop_mode"),
        dtype=str(subject.dtype).removeprefix("torch."),
        measurements=names,
        measurements_version=VERSION,
        data=drawn.name,
        data_sha256=drawn.sha256,
        tokenizer_sha256=drawn.tokenizer_sha256,
        sequence_length=drawn.sequence_length,
        samples=len(drawn.samples),
        seed=drawn.seed,
    )


def _manifest(
    subject: Subject,
    drawn: Drawn,
    identity: DiagnosisIdentity,
    settings: Settings,
    model: LoopedModel,
    run_id: str,
) -> DiagnosisManifest:
    """That of a first session."""
    started = now()
    session = Session(
        started=started,
        ended=None,
        command=settings.command,
        packages=provenance.packages(),
        git=provenance.git_state(),
        hardware=provenance.hardware(),
        sandbox="",
    )
    return DiagnosisManifest(
        run_id=run_id,
        identity=identity,
        identity_sha256=identity.sha256(),
        model=ModelRecord(
            label=subject.label,
            folder=str(subject.folder),
            family=subject.family,
            trained_loops=subject.trained_loops,
            weights_sha256=subject.weights_sha256,
            parameters=subject.parameters(),
        ),
        adapter=model.name,
        shifts=model.shifts,
        defaults={name: default_variant(name, model.hands_on) for name in identity.measurements},
        data=DataRecord(
            name=drawn.name,
            source=drawn.source,
            sha256=drawn.sha256,
            tokenizer=drawn.tokenizer,
            tokenizer_sha256=drawn.tokenizer_sha256,
            sequence_length=drawn.sequence_length,
            candidates=drawn.candidates,
            windows=drawn.windows,
        ),
        device=str(subject.device) if subject.device.type == "cpu" else torch.cuda.get_device_name(subject.device),
        batch_size=settings.batch_size,
        status="running",
        started=started,
        ended=None,
        total=len(drawn.samples),
        done=0,
        tokens=drawn.tokens,
        seconds=0.0,
        peak_memory_bytes=None,
        sessions=(session,),
    )


def _check_ids(drawn: Drawn, vocab: int) -> None:
    for sample in drawn.samples:
        highest = int(sample.ids.max())
        if highest >= vocab:
            raise UserError(
                f"--data {drawn.source}: sample {sample.id} has token {highest}, the model's vocabulary is {vocab}: "
                f"tokenizer ({drawn.tokenizer}) and model do not belong together"
            )


# --- batches ------------------------------------------------------------------------------------------


def _measure(
    model: LoopedModel,
    drawn: Drawn,
    names: Sequence[str],
    writer: DiagnosisWriter,
    batch_size: int | None,
    memory: PeakMemory,
    notify: Callable[[str], None],
    console: Console,
) -> None:
    """Measure and store what is missing. The batches are the same after an interruption: whole ones were taken away."""
    waiting = [sample for sample in drawn.samples if sample.index not in writer.done]
    waiting.sort(key=lambda sample: (-len(sample.ids), sample.index))  # memory runs out at once or never
    kind = model.device.type
    most = MOST_SAMPLES[kind] if batch_size is None else batch_size
    title = f"{writer.path.name} r{model.shape.loops}"
    with DiagnosisProgress(console, title, total=len(drawn.samples), done=len(writer.done)) as progress:
        while waiting:
            fit = MOST_TOKENS[kind] // len(waiting[0].ids) if batch_size is None else most
            batch = waiting[: max(1, min(most, fit))]
            try:
                _measure_batch(model, batch, names, writer)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if batch_size is not None or len(batch) == 1:
                    hint = "" if len(batch) == 1 else "a smaller --batch-size or "
                    raise UserError(
                        f"out of memory at batch size {len(batch)} on {model.device}; try {hint}--sequence-length"
                    ) from error
                most = len(batch) // 2
                notify(f"out of memory at batch size {len(batch)}: going on with {most}")
                _free_memory(model.device)
                continue
            memory.look()
            waiting = waiting[len(batch) :]
            progress.measured(len(batch), sum(len(sample.ids) for sample in batch))


def _measure_batch(model: LoopedModel, batch: Sequence[Sample], names: Sequence[str], writer: DiagnosisWriter) -> None:
    ids, mask = _pad(batch)
    began = time.perf_counter()
    findings = measure(model, ids, mask, [sample.index for sample in batch], names)
    seconds = (time.perf_counter() - began) / len(batch)
    nonfinite = _nonfinite(findings.rows)
    lines = [
        DiagnosedSample(
            index=sample.index,
            id=sample.id,
            tokens=len(sample.ids),
            sha256=sample.sha256,
            nonfinite=nonfinite.get(sample.index, {}),
            seconds=seconds,
            part="",
        )
        for sample in batch
    ]
    writer.add_batch(findings.rows, findings.heads.table(), lines)


def _pad(batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B, S], zeros behind the end of each, and where they are real, bool [B, S]."""
    width = max(len(sample.ids) for sample in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.from_numpy(sample.ids)
        mask[row, : len(sample.ids)] = True
    return ids, mask


def _nonfinite(rows: Any) -> dict[int, dict[str, int]]:
    """By sample, the measurements with values that are not finite, and how many over all loops and variants."""
    import pyarrow.compute as pc

    whole = pc.and_(pc.is_null(rows["layer"]), pc.is_null(rows["position"]))
    found: dict[int, dict[str, int]] = {}
    for row in rows.filter(pc.and_(whole, pc.greater(rows["nonfinite"], 0))).to_pylist():
        counts = found.setdefault(row["sample"], {})
        counts[row["measurement"]] = counts.get(row["measurement"], 0) + row["nonfinite"]
    return found


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
