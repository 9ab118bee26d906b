"""`plt-eval study`: train one recipe at several loop counts, evaluate every model, put gain and cost side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plt_eval.cli.run import SandboxName


def study(
    recipe: Annotated[
        str | None, typer.Option(help="What to train: a recipe's file or the name of a bundled one.")
    ] = None,
    loops: Annotated[
        str, typer.Option(help="Loop counts, as 2 or 1,2,4 or 1-4; the first is compared against.")
    ] = "1-4",
    out: Annotated[Path | None, typer.Option(help="Where the study is kept (default: results/studies/RECIPE).")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="Train each loop count with these seeds, as 0,1,2 or 0-2 (default: the recipe's)."),
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="What to evaluate on (may be given again; default: trace).")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the built data; what is missing is built there (default: OUT/data).")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The recipe `quick` and small samples: a whole study in minutes.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems of each suite.")] = None,
    heldout_tokens: Annotated[
        int | None, typer.Option(min=1, help="Held-out tokens of each data entry (default 200000; --quick: 60000).")
    ] = None,
    diagnosis_samples: Annotated[
        int | None,
        typer.Option(
            min=0, help="Held-out texts on which each model's loops are opened; 0: none (default 200; --quick: 64)."
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens at which KV caches are compared.")] = 4096,
    sandbox: Annotated[SandboxName, typer.Option(help="Where model-written code runs.")] = SandboxName.bubblewrap,
    sandbox_image: Annotated[str | None, typer.Option(help="Image for --sandbox docker.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """How many loops? Train a matched family, evaluate it, and print gain against cost.

    Builds the recipe's data, trains it at every loop count (and seed), measures held-out bits per byte, suites, step
    time, memory and KV cache, opens every loop, and writes OUT/study.json and OUT/summary.md. Stopped or killed, the
    same command goes on where it stood.
    """
    from plt_eval.study.command import StudyOptions, report_study

    options = StudyOptions(
        recipe=recipe,
        loops=loops,
        out=out,
        seeds=seeds,
        suites=tuple(suite or ()),
        data=data,
        quick=quick,
        limit=limit,
        heldout_tokens=heldout_tokens,
        diagnosis_samples=diagnosis_samples,
        context=context,
        sandbox=sandbox.value,
        sandbox_image=sandbox_image,
    )
    if report_study(options, as_json=json_):
        raise typer.Exit(1)
