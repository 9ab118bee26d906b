"""Suite x engine -> run: draw what is missing, judge it as it comes, append both, and measure at the end.

    result = run(suite, suite.load(None), engine, sandbox, Settings(results=Path("results/runs")))
    result.metrics.metrics["pass@1"].value

The run directory is the only memory. Asking again for a run that is complete only reads it; one that was stopped or
killed goes on where it stood: completions that were drawn are not drawn again, verdicts are not judged again, and the
metrics come out as they would have without the interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from rich.console import Console

from plt_benchmarks.protocols import (
    Answer,
    Metric,
    Prompt,
    Sample,
    Sandbox,
    SandboxError,
    Score,
    Scorer,
    Suite,
    SuiteData,
    SuiteError,
)
from plt_eval.engines.base import Completion, Decoding, Engine, GenerationRequest, Revisable, health_lines
from plt_eval.errors import UserError, one_line
from plt_eval.journal import DiskFull
from plt_eval.progress import RunProgress
from plt_eval.records import (
    PROMPT_TAIL,
    CompletionRecord,
    DecodingRecord,
    Identity,
    JudgeRecord,
    Key,
    Metrics,
    SampleRecord,
    storable,
)
from plt_eval.sandbox.none import NoSandbox
from plt_eval.store import Run, RunRequest, RunWriter, open_run
from plt_eval.workers import WorkerPool

GRACE_S = 2.0
"""How long judgements under way may take to end after Ctrl-C, in seconds."""


@dataclass(frozen=True)
class Settings:
    """How to run. `limit` takes the first so many problems; `scoring_workers` None means one a core; `sandbox` is the
    sandbox's name for the record."""

    results: Path
    decoding: Decoding = field(default_factory=Decoding)
    n_samples: int = 1
    limit: int | None = None
    scoring_workers: int | None = None
    run_id: str | None = None
    command: tuple[str, ...] = ()
    sandbox: str = ""
    opened: Callable[[Path, Collection[str]], None] | None = None
    """Told the run's folder, and the samples without a verdict, before work on it begins."""
    elsewhere: Callable[[Suite], RemoteScorer] | None = None
    """Opens what judges in place of the suite's own scorer in this process."""


class RemoteScorer(Scorer, Protocol):
    """A scorer that has others judge. `at_once` is how many answers they judge at a time; when that changes, it calls
    `grown`, if set."""

    grown: Callable[[int], None] | None

    @property
    def at_once(self) -> int: ...

    def place(self) -> str:
        """Where they are now, for the progress."""
        ...

    def judges(self) -> tuple[JudgeRecord, ...]:
        """Who they are, and how much each has judged."""
        ...


@dataclass(frozen=True)
class Result:
    """A run that has ended by itself. `reused` says that it was complete already and only read."""

    run: Run
    metrics: Metrics
    reused: bool


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C; what was done is stored, and the message says how far it got."""


def run(
    suite: Suite,
    data: SuiteData,
    engine: Engine,
    open_sandbox: Callable[[], Sandbox],
    settings: Settings,
    *,
    console: Console | None = None,
) -> Result:
    """Evaluate `engine` on `suite`, or go on with, or just read, the run that did.

    `open_sandbox` is called when there is something to judge and the suite runs code for that. Progress and warnings
    go to `console` (stderr). Raises UserError, SuiteError, SandboxError (all: one line for the user) and
    RunInterrupted; what was done until then is stored.
    """
    console = console or Console(stderr=True)
    samples = data.samples[: settings.limit]
    request = _request(suite, data, samples, engine, settings)
    with RunWriter.open(settings.results, request) as writer:
        outdated = _outdated(engine, writer)
        if writer.complete and not outdated and writer.manifest.status == "complete":
            stored = open_run(writer.path)
            metrics = stored.metrics()
            if metrics is not None:
                return Result(stored, metrics, reused=True)
        session = _Session(suite, samples, engine, writer, settings, console)
        writer.begin(request)
        for record in outdated:
            writer.add_sample(record)
        if outdated:
            writer.forget(record.key for record in outdated)
        try:
            if settings.opened is not None:
                settings.opened(writer.path, session.open_samples())
            session.work(open_sandbox)
            session.finish()
        except BaseException as error:
            session.abandon()
            if isinstance(error, KeyboardInterrupt):
                done, total = len(writer.samples), writer.manifest.total
                raise RunInterrupted(
                    f"{writer.path}: stopped with {done} of {total} samples done; run the same command again to go on"
                ) from error
            raise
        stored = open_run(writer.path)
        metrics = stored.metrics()
        assert metrics is not None
        return Result(stored, metrics, reused=False)


def _outdated(engine: Engine, writer: RunWriter) -> list[SampleRecord]:
    """What replaces verdicts on answers that the engine would not give any more: only engines that read answers from
    somewhere, and say which (`current`), have such."""
    if not isinstance(engine, Revisable):
        return []
    stored = {key: record.text for key, record in writer.completions.items()}
    stored |= {key: record.judged for key, record in writer.samples.items()}
    return [
        _broken(key, "the answer has changed since; it is judged again")
        for key, text in stored.items()
        if not engine.current(key, text)
    ]


class _Session:
    """One process' work on a run: what is left to do, and the threads that judge."""

    def __init__(
        self,
        suite: Suite,
        samples: tuple[Sample, ...],
        engine: Engine,
        writer: RunWriter,
        settings: Settings,
        console: Console,
    ) -> None:
        self._suite = suite
        self._samples = {sample.id: sample for sample in samples}
        self._engine = engine
        self._writer = writer
        self._settings = settings
        self._console = console
        self._errors: dict[Key, str] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._scorer: Scorer | None = None
        self._remote: RemoteScorer | None = None
        self._pool: WorkerPool[CompletionRecord] | None = None
        identity = writer.manifest.identity
        title = identity.suite + ("" if identity.loops is None else f" r{identity.loops}")
        self._progress = RunProgress(console, title, total=writer.manifest.total, below=partial(health_lines, engine))

    # --- drawing and judging ------------------------------------------------------------------------------

    def work(self, open_sandbox: Callable[[], Sandbox]) -> None:
        """Judge what was drawn before, draw what is missing, and judge that as it comes."""
        requests = self._open_requests()
        waiting = list(self._writer.completions.values())
        if not requests and not waiting:
            return
        workers = self._open_scorer(open_sandbox)
        self._pool = WorkerPool(self._judge, workers=workers, backlog=4 * workers)
        if self._remote is not None and self._settings.scoring_workers is None:
            self._remote.grown = self._pool.grow
        with self._progress:
            self._progress.resume(list(self._writer.samples.values()), drawn=len(waiting))
            for completion in waiting:
                self._pool.submit(completion)
            if requests:
                self._draw(requests)
            self._pool.drain()
        self._pool.stop()

    def _open_scorer(self, open_sandbox: Callable[[], Sandbox]) -> int:
        """Make the scorer; how many answers it is to judge at a time."""
        if self._settings.elsewhere is None:
            self._scorer = self._suite.scorer(open_sandbox() if self._suite.runs_code else NoSandbox(self._suite.name))
            return self._settings.scoring_workers or len(os.sched_getaffinity(0))
        self._scorer = self._remote = self._settings.elsewhere(self._suite)
        self._progress.place = self._remote.place
        self._writer.judged_by(self._remote.judges())
        return self._settings.scoring_workers or max(1, self._remote.at_once)  # those that have just gone may come back

    def open_samples(self) -> list[str]:
        """Ids of the samples that have an answer without a verdict, in the order of the data."""
        indices = range(self._settings.n_samples)
        return [s for s in self._samples if any((s, index) not in self._writer.samples for index in indices)]

    def _open_requests(self) -> dict[str, tuple[Key, GenerationRequest]]:
        """By request id: every (sample, index) that has neither a completion nor a verdict."""
        requests = {}
        for sample in self._samples.values():
            for index in range(self._settings.n_samples):
                key = (sample.id, index)
                if key in self._writer.samples or key in self._writer.completions:
                    continue
                request = GenerationRequest(f"{sample.id}#{index}", self._suite.prompt(sample), self._settings.decoding)
                requests[request.id] = (key, request)
        return requests

    def _draw(self, requests: dict[str, tuple[Key, GenerationRequest]]) -> None:
        assert self._pool is not None
        for completion in self._engine.generate([request for _, request in requests.values()]):
            key, request = requests.pop(completion.request_id)
            record = _completion_record(key, request.prompt, completion)
            self._writer.add_completion(record)
            if record.error is not None:
                self._note_error(key, record.error)
                self._progress.missed()
                continue
            self._progress.drew()
            self._pool.submit(record)
        for key, _ in requests.values():
            self._note_error(key, "the engine returned no completion")

    def _judge(self, completion: CompletionRecord) -> None:
        """Runs in the pool. A broken sandbox or suite ends the run; any other fault is this sample's error."""
        assert self._scorer is not None
        answer = Answer(completion.text, chat=completion.chat, solution=completion.solution, detail=completion.detail)
        try:
            score = self._scorer.score(self._samples[completion.sample_id], answer)
            record = _sample_record(completion.key, score)
        except (SandboxError, SuiteError, UserError):
            raise
        except Exception as error:
            record = _broken(completion.key, f"judging raised {type(error).__name__}: {error}")
        with self._lock:
            if self._stopping:  # it may have been judged under the signal that ends us
                return
        try:
            self._writer.add_sample(record)
        except DiskFull:
            raise
        except (TypeError, ValueError) as error:
            record = _broken(completion.key, f"the verdict cannot be stored: {error}")
            self._writer.add_sample(record)
        if record.error is not None:
            self._note_error(completion.key, record.error)
        self._progress.judged(record)

    def _note_error(self, key: Key, error: str) -> None:
        with self._lock:
            self._errors[key] = error

    # --- the end ------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Measure what is on disk, and warn of what is missing."""
        self._close_scorer()
        self._writer.seal()
        scores = _complete_problems(self._writer.samples, self._samples, self._settings.n_samples)
        metrics: Mapping[str, Metric] = self._suite.metrics(scores) if scores else {}
        missing = [f"{key[0]}#{key[1]}: {one_line(error)}" for key, error in sorted(self._errors.items())]
        self._writer.end(metrics, len(scores), missing)
        count = self._writer.manifest.missing
        if count:
            total = self._writer.manifest.total
            first = f"; first: {missing[0]}" if missing else ""
            self._warn(
                f"{count} of {total} samples are missing and not counted; run the same command again to "
                f"try them again{first}"
            )

    def abandon(self) -> None:
        """Stop in good order after an exception: nothing is judged any more, and the manifest says incomplete."""
        with self._lock:
            self._stopping = True
        if self._pool is not None:
            self._pool.stop(GRACE_S)
        # The first error is the one to report: a full disk may well refuse this write too.
        with suppress(DiskFull, OSError, UserError):
            self._writer.seal()
            self._writer.end(None, 0, [])
        with suppress(Exception):
            self._close_scorer()

    def _close_scorer(self) -> None:
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
        if self._remote is not None:
            self._writer.judged_by(self._remote.judges())
            self._remote = None

    def _warn(self, message: str) -> None:
        self._console.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


# --- records from what suites and engines say -----------------------------------------------------------


def _request(
    suite: Suite, data: SuiteData, samples: tuple[Sample, ...], engine: Engine, settings: Settings
) -> RunRequest:
    prompts = hashlib.sha256()
    for sample in samples:
        row = [sample.id, dataclasses.asdict(suite.prompt(sample))]
        prompts.update(json.dumps(row, sort_keys=True).encode("ascii"))
    if len({sample.id for sample in samples}) != len(samples):
        raise UserError(f"{data.source}: suite {suite.name} has two problems with one id")
    identity = Identity(
        suite=suite.name,
        suite_version=suite.version,
        data_sha256=data.sha256,
        prompts_sha256=prompts.hexdigest(),
        engine=engine.name,
        engine_identity=dict(engine.identity()),
        decoding=DecodingRecord(**dataclasses.asdict(settings.decoding)),
        n_samples=settings.n_samples,
        problems=len(samples),
    )
    return RunRequest(
        identity=identity,
        total=len(samples) * settings.n_samples,
        data_revision=data.revision,
        data_source=data.source,
        command=settings.command,
        sandbox=settings.sandbox if suite.runs_code else "",
        engine_facts=engine.facts(),
        run_id=settings.run_id,
    )


def _completion_record(key: Key, prompt: Prompt, completion: Completion) -> CompletionRecord:
    asked = prompt.text
    if completion.chat and prompt.messages:
        asked = prompt.messages[-1].content + prompt.prefill
    return CompletionRecord(
        sample_id=key[0],
        index=key[1],
        text=storable(completion.text),
        finish_reason=completion.finish_reason,
        chat=completion.chat,
        solution=completion.solution,
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        seconds=completion.seconds,
        error=None if completion.error is None else storable(completion.error),
        prompt_tail=storable(asked[-PROMPT_TAIL:]),
        detail=dict(completion.detail),
    )


def _sample_record(key: Key, score: Score) -> SampleRecord:
    return SampleRecord(
        sample_id=key[0],
        index=key[1],
        values=dict(score.values),
        judged=storable(score.judged),
        detail=dict(score.detail),
        error=None if score.error is None else storable(score.error),
    )


def _broken(key: Key, error: str) -> SampleRecord:
    return SampleRecord(sample_id=key[0], index=key[1], values={}, judged="", detail={}, error=storable(error))


def _complete_problems(
    done: Mapping[Key, SampleRecord], samples: Mapping[str, Sample], n_samples: int
) -> dict[str, list[Score]]:
    """Scores of the problems whose every sample has one, in the order of the data and of the indices."""
    scores = {}
    for sample_id in samples:
        records = [done.get((sample_id, index)) for index in range(n_samples)]
        whole = [record for record in records if record is not None]
        if len(whole) == n_samples:
            scores[sample_id] = [
                Score(values=record.values, judged=record.judged, detail=record.detail) for record in whole
            ]
    return scores
