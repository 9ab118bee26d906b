"""`plt-eval show`: one run, or one of its samples, for reading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plt_eval.cli._find import find_folder
from plt_eval.errors import UserError

if TYPE_CHECKING:
    from plt_eval.records import Key
    from plt_eval.store import Run


def show(
    run: Annotated[str, typer.Argument(help="A run's id, the beginning of it, or its directory.")],
    sample: Annotated[
        str | None, typer.Option(help="One sample: prompt, completion, judged code, verdict. ID or ID#INDEX.")
    ] = None,
    instance: Annotated[
        str | None, typer.Option(help="One instance of a SWE run: its issue, every step of the agent, patch, verdict.")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="List the samples that did not pass.")] = False,
    results: Annotated[Path, typer.Option(help="Where runs are stored.")] = Path("results/runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print manifest and metrics as JSON.")] = False,
) -> None:
    """Show one run, or one of its samples.

    By default the manifest and the metrics with their definitions; of a diagnosis the manifest and the tables of loops.
    """
    if (sample is not None) + (instance is not None) + failed + json_ > 1:
        raise UserError("--sample, --instance, --failed and --json exclude each other: give one")
    from plt_eval.diagnosis.records import DIAGNOSIS
    from plt_eval.store import open_run, run_kind

    folder = find_folder(run, results)
    if run_kind(folder) == DIAGNOSIS:
        given = [name for name, on in (("sample", sample), ("instance", instance), ("failed", failed)) if on]
        if given:
            raise UserError(f"--{given[0]}: {folder} is a diagnosis, which judges no samples")
        _show_diagnosis(folder, as_json=json_)
        return
    found = open_run(folder)
    if sample is not None:
        _show_sample(found, sample)
    elif instance is not None:
        _show_instance(found, instance)
    elif failed:
        _show_failed(found)
    elif json_:
        _show_json(found)
    else:
        _show_run(found)


def _show_run(run: Run) -> None:
    from plt_eval.tables import manifest_lines, metrics_table, output_console

    _show_lines(manifest_lines(run))
    metrics = run.metrics()
    if metrics is None:
        typer.echo("no metrics yet: run the same command again to complete the run")
        return
    output_console().print(metrics_table(metrics))
    if metrics.missing:
        typer.echo(f"warning: {metrics.missing} of {metrics.total} samples are missing and not counted")


def _show_lines(lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:<{width}}  {value}".rstrip())


def _show_diagnosis(folder: Path, *, as_json: bool) -> None:
    import json

    from plt_eval.diagnosis.store import open_diagnosis
    from plt_eval.diagnosis.table import definitions_table, loop_tables, manifest_lines, notes, warnings
    from plt_eval.tables import output_console

    found = open_diagnosis(folder)
    metrics = found.metrics()
    if as_json:
        both = {
            "manifest": found.manifest.model_dump(mode="json"),
            "metrics": None if metrics is None else metrics.model_dump(mode="json"),
        }
        typer.echo(json.dumps(both, indent=2))
        return
    _show_lines(manifest_lines(found))
    if metrics is None:
        typer.echo("no loops yet: run the same command again to complete the run")
        return
    console = output_console()
    for table in (*loop_tables([found]), definitions_table(found)):
        console.print(table)
    for line in (*notes([found]), *(f"warning: {line}" for line in warnings([found]))):
        typer.echo(line)


def _show_json(run: Run) -> None:
    import json

    metrics = run.metrics()
    both = {
        "manifest": run.manifest.model_dump(mode="json"),
        "metrics": None if metrics is None else metrics.model_dump(mode="json"),
    }
    typer.echo(json.dumps(both, indent=2))


def _show_failed(run: Run) -> None:
    from plt_eval.tables import failed_table, output_console

    judged = list(run.samples())
    wrong = sorted((s for s in judged if s.failed() or s.error is not None), key=lambda s: s.key)
    if wrong:
        output_console().print(failed_table(wrong))
    typer.echo(f"{len(wrong)} of {len(judged)} judged samples did not pass")


def _show_sample(run: Run, wanted: str) -> None:
    from plt_eval.tables import sample_text

    completions = {record.key: record for record in run.completions()}
    samples = {record.key: record for record in run.samples()}
    every = sorted(completions.keys() | samples.keys())
    keys = _keys(run, every, wanted, "--sample")
    for key in keys:
        typer.echo(sample_text(completions.get(key), samples.get(key)))


def _show_instance(run: Run, wanted: str) -> None:
    from plt_eval.swe.trajectory import trajectory_text
    from plt_eval.tables import sample_text

    completions = {record.key: record for record in run.completions()}
    samples = {record.key: record for record in run.samples()}
    for key in _keys(run, sorted(completions.keys() | samples.keys()), wanted, "--instance"):
        completion = completions.get(key)
        if completion is not None and (place := completion.detail.get("trajectory")):
            typer.echo(trajectory_text(run.path / str(place)))
        typer.echo(sample_text(None if samples.get(key) else completion, samples.get(key)))


def _keys(run: Run, every: list[Key], wanted: str, flag: str) -> list[Key]:
    """Those of `every` that are called `wanted`. Raises UserError when there is none."""
    keys = [key for key in every if wanted in (key[0], f"{key[0]}#{key[1]}")]
    if not keys:
        import difflib

        near = difflib.get_close_matches(wanted, dict.fromkeys(key[0] for key in every), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else f" (it has {len(every)} so far)"
        raise UserError(f"{flag} {wanted}: no such sample in {run.manifest.run_id}{hint}")
    return keys
