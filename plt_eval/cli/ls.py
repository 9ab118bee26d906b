"""`plt-eval ls`: the stored runs, evaluations and diagnoses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plt_eval.errors import UserError


def ls(
    results: Annotated[Path, typer.Option(help="Where runs are stored.")] = Path("results/runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """List the stored runs.

    One row each, oldest first: suite (or the text of a diagnosis), model, loops, status, samples done, and the headline
    metric.
    """
    import json

    from plt_eval.diagnosis.store import Diagnosis, list_diagnoses
    from plt_eval.store import Run, list_runs
    from plt_eval.tables import output_console, run_json, runs_table

    def warn(error: UserError) -> None:
        typer.echo(f"plt-eval: warning: {error}", err=True)

    def readable(run: Run | Diagnosis) -> bool:
        try:
            run.metrics(), run.done()
        except UserError as error:
            warn(error)
            return False
        return True

    found: list[Run | Diagnosis] = [*list_runs(results, problem=warn), *list_diagnoses(results, problem=warn)]
    runs = [run for run in found if readable(run)]
    runs.sort(key=lambda run: (run.manifest.started, run.manifest.run_id))
    if json_:
        typer.echo(json.dumps([run_json(run) for run in runs], indent=2))
    elif runs:
        output_console().print(runs_table(runs))
    else:
        typer.echo(f"no runs in {results}")
