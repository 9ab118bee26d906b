"""`plt-eval ls`: the stored runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ls(
    results: Annotated[Path, typer.Option(help="Where runs are stored.")] = Path("results/runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """List the stored runs.

    One row each, oldest first: suite, model, loops, status, samples done, and the suite's headline metric.
    """
    import json

    from plt_eval.store import list_runs
    from plt_eval.tables import output_console, run_json, runs_table

    runs = list_runs(results, problem=lambda error: typer.echo(f"plt-eval: warning: {error}", err=True))
    if json_:
        typer.echo(json.dumps([run_json(run) for run in runs], indent=2))
    elif runs:
        output_console().print(runs_table(runs))
    else:
        typer.echo(f"no runs in {results}")
