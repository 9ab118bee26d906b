"""`plt-eval figures`: the paper's figures and tables, from the runs at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def figures(
    results: Annotated[Path, typer.Option(help="Where runs and studies are: this folder and its runs/.")] = Path(
        "results"
    ),
    out: Annotated[Path, typer.Option(help="Where figures and tables are written.")] = Path("figures"),
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A family or model by its name in `plt-eval ls` (may be given again); default: most diagnoses."
        ),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Only some, as fig3,table2 (default: fig2 to fig7, table2 to table4).")
    ] = "",
    format_: Annotated[str, typer.Option("--format", help="Formats of figures: some of pdf,png,svg.")] = "pdf,png",
) -> None:
    """Draw figures 2-7 and tables 2-4 of arXiv 2606.18023 from your own runs.

    Diagnoses give the figures and table 3, evaluations and studies table 2. Published numbers stand beside, marked as
    such. Each figure comes with its data as CSV, each table as CSV, Markdown and LaTeX; the same runs give the same
    bytes. What a missing run leaves out is said in a line.
    """
    from plt_eval.report.command import FiguresOptions, draw_everything

    options = FiguresOptions(results=results, out=out, models=tuple(model or ()), only=only, formats=format_)
    draw_everything(options, say=typer.echo, warn=lambda text: typer.echo(f"plt-eval: warning: {text}", err=True))
