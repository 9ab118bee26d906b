"""`plt-eval report`: how many loops to run and why, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[
        list[str] | None,
        typer.Argument(
            help="Diagnoses, one for each loop count: directories, run ids or beginnings of them. None: the newest "
            "complete set of plt-tiny, or of the model with the most.",
        ),
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Where runs and studies are: diagnoses are found there, and task scores.")
    ] = Path("results"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML page to write; its Markdown twin goes beside it (default: report.html in the run directory "
            "with the most loops)."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the sentence.")] = False,
) -> None:
    """How many loops? One page that says it, with the evidence.

    Reads what `plt-eval diagnose`, `run` and `study` wrote, and nothing else: it runs no model. The page is one file
    without network or scripts.
    """
    import json
    import sys

    from plt_eval.report.evidence import find_diagnoses, gather
    from plt_eval.report.page import NAME, report_json, write_report

    notes: list[str] = []
    diagnoses = find_diagnoses(run or [], results, notes)
    if not run:  # which set was chosen, and what could not be read
        for note in notes:
            typer.echo(note, err=True)
    evidence = gather(diagnoses, results, notes)
    written = write_report(evidence, out or evidence.main.path / NAME, command=("plt-eval", *sys.argv[1:]))
    if json_:
        typer.echo(json.dumps(report_json(evidence, written), indent=2, allow_nan=False))
        return
    typer.echo(written.answer)
    typer.echo(str(written.html))
    typer.echo(str(written.markdown))
