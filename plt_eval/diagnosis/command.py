"""What `plt-eval diagnose` does with its options: check them, draw the samples, measure every loop count, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from plt_eval.errors import UserError
from plt_eval.words import count_of

if TYPE_CHECKING:
    from rich.console import Console

    from plt_eval.diagnosis.run import Result, Settings
    from plt_eval.diagnosis.samples import Drawn, TextCorpus, TokenCorpus
    from plt_eval.diagnosis.subject import Subject

MOST_TOKENS = 2048
"""Of a sample, where no other length is asked for and the model can read more."""


@dataclass(frozen=True)
class DiagnoseOptions:
    """The options of `plt-eval diagnose`, by name. None means: not given."""

    model: str | None = None
    loops: str | None = None
    data: tuple[str, ...] = ()
    field: str | None = None
    windows: bool | None = None
    samples: int = 500
    sequence_length: int | None = None
    measure: str | None = None
    seed: int = 0
    loop_mode: str | None = None
    batch_size: str | None = None
    dtype: str | None = None
    device: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    results: Path = Path("results/runs")
    run_id: str | None = None


def report_diagnoses(options: DiagnoseOptions, *, as_json: bool) -> None:
    """Do it all, and print the tables of loops (or JSON) to stdout. Raises what diagnose_all does; on Ctrl-C says how
    far it got, and exits with 130."""
    import typer
    from rich.console import Console

    from plt_eval.diagnosis.table import result_json

    try:
        results = diagnose_all(options, Console(stderr=True, highlight=False))
    except KeyboardInterrupt as stop:
        typer.echo(f"plt-eval: interrupted: {str(stop) or 'the same command goes on'}", err=True)
        raise typer.Exit(130) from None
    found = [result.diagnosis for result in results]
    if as_json:
        print(json.dumps([result_json(diagnosis) for diagnosis in found], indent=2))
    else:
        from plt_eval.diagnosis.table import loop_tables, notes
        from plt_eval.tables import output_console

        console = output_console()
        for table in loop_tables(found):
            console.print(table)
        for note in notes(found):
            console.print(note, markup=False, soft_wrap=True)


def diagnose_all(options: DiagnoseOptions, console: Console) -> list[Result]:
    """One result for every loop count; progress and notes go to `console`. Raises UserError, SuiteError, ShardError,
    CheckpointError and DiagnosisInterrupted."""
    from plt_diagnostics import MeasurementError, select
    from plt_eval.cli.evaluate import chosen_models
    from plt_eval.cli.options import parse_batch_size
    from plt_eval.diagnosis.run import Settings, diagnose
    from plt_eval.diagnosis.samples import DEFAULT_SET, open_corpus
    from plt_eval.diagnosis.subject import Subject
    from plt_eval.store import check_run_id

    notify = _notes(console)
    if options.run_id is not None:
        check_run_id(options.run_id)
    batch_size = parse_batch_size(options.batch_size)
    settings = Settings(
        results=options.results,
        measurements=parse_measurements(options.measure),
        batch_size=None if batch_size == "auto" else batch_size,
        command=("plt-eval", *sys.argv[1:]),
    )
    try:
        select(settings.measurements)
    except MeasurementError as error:
        raise UserError(f"--measure {options.measure}: {error}") from error
    models = chosen_models(options.model, options.loops, "opening", notify)
    if not options.data:
        notify(f"no --data: reading the set {DEFAULT_SET}")
    corpora = [open_corpus(name, field=options.field) for name in options.data or (DEFAULT_SET,)]
    if options.tokenizer is not None and not any(_is_text(corpus) for corpus in corpora):
        raise UserError("--tokenizer has no effect with token data: they have their own")
    results: list[Result] = []
    drawn: dict[tuple[str | None, int], Drawn] = {}
    for model in models:
        subject = Subject.of(
            model,
            loop_mode=options.loop_mode,
            dtype=options.dtype or "auto",
            device=options.device or "auto",
            trust_remote_code=options.trust_remote_code,
            notify=notify,
        )
        key = _tokenizer_hash(options, subject, corpora), _length(options, subject)
        if key not in drawn:
            drawn[key] = _draw(options, subject, corpora, notify)
        named = _named(settings, options.run_id, model.loops, several=len(models) > 1)
        result = diagnose(subject, drawn[key], named, console=console)
        _say_done(console, result)
        results.append(result)
    _warn(console, results)
    return results


def parse_measurements(text: str | None) -> tuple[str, ...] | None:
    """ "a,b" as names; None for all. Raises UserError for an empty list."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"--measure {text!r}: expected names with commas between them, as step_size,gate")
    return names


# --- samples ------------------------------------------------------------------------------------------


def _draw(
    options: DiagnoseOptions,
    subject: Subject,
    corpora: Sequence[TextCorpus | TokenCorpus],
    notify: Callable[[str], None],
) -> Drawn:
    from plt_eval.diagnosis.samples import draw

    length = _length(options, subject)
    if subject.most_tokens is not None and length > subject.most_tokens:
        notify(f"--sequence-length {length} is past the model's context of {subject.most_tokens} tokens")
    drawn = draw(
        corpora,
        tokenizer=_tokenizer(options, subject, corpora),
        samples=options.samples,
        sequence_length=length,
        seed=options.seed,
        windows=options.windows,
        trust_remote_code=options.trust_remote_code,
    )
    if len(drawn.samples) < options.samples:
        has = count_of(len(drawn.samples), "window" if drawn.windows else "text")
        notify(f"{drawn.name} has {has}, fewer than --samples {options.samples}: every one is read")
    for reason, count in sorted(drawn.left_out.items()):
        notify(f"{drawn.name}: {count_of(count, 'record')} left out: {reason}")
    return drawn


def _length(options: DiagnoseOptions, subject: Subject) -> int:
    return options.sequence_length or min(subject.most_tokens or MOST_TOKENS, MOST_TOKENS)


def _tokenizer(options: DiagnoseOptions, subject: Subject, corpora: Sequence[TextCorpus | TokenCorpus]) -> str | None:
    """What was asked for, or the checkpoint's folder where texts need it. Raises UserError when there is no tokenizer
    in it."""
    from plt_eval.corpus.encoders import has_tokenizer

    if options.tokenizer is not None or not any(_is_text(corpus) for corpus in corpora):
        return options.tokenizer
    if not has_tokenizer(subject.folder):
        raise UserError(f"{subject.folder}: no tokenizer in it; pass --tokenizer FOLDER, or --tokenizer bytes")
    return str(subject.folder)


def _tokenizer_hash(
    options: DiagnoseOptions, subject: Subject, corpora: Sequence[TextCorpus | TokenCorpus]
) -> str | None:
    """Equal for tokenizers that make the same ids, as those of a family's members do: they need be drawn with once."""
    from plt_eval.corpus.encoders import has_tokenizer, tokenizer_sha256

    name = _tokenizer(options, subject, corpora)
    return tokenizer_sha256(Path(name)) if name is not None and has_tokenizer(Path(name)) else name


def _is_text(corpus: TextCorpus | TokenCorpus) -> bool:
    from plt_eval.diagnosis.samples import TextCorpus

    return isinstance(corpus, TextCorpus)


# --- saying -------------------------------------------------------------------------------------------


def _named(settings: Settings, run_id: str | None, loops: int | None, *, several: bool) -> Settings:
    """With --run-id: the name itself for a single run, else the beginning of each run's name."""
    if run_id is None:
        return settings
    return replace(settings, run_id=f"{run_id}-r{loops}" if several else run_id)


def _notes(console: Console) -> Callable[[str], None]:
    def note(message: str) -> None:
        console.print(f"note: {message}", markup=False, soft_wrap=True)

    return note


def _say_done(console: Console, result: Result) -> None:
    manifest = result.diagnosis.manifest
    how = "complete already" if result.reused else f"{manifest.done} of {manifest.total} samples measured"
    console.print(f"{manifest.run_id}: {how}, in {result.diagnosis.path}", markup=False, soft_wrap=True)


def _warn(console: Console, results: Sequence[Result]) -> None:
    from plt_eval.diagnosis.table import warnings

    for line in warnings(result.diagnosis for result in results):
        console.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
