"""`plt-eval demo`: the whole road from checkpoint to score, on a tiny embedded model and problem set."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import typer

from plt_eval.cli.run import SandboxName

INTRODUCTION = """\
A demonstration on what is embedded: plt-demo, a byte-level PLT of 0.46M parameters that this project trained with 2
loops, and 30 one-line Python functions to write. Completions run in the sandbox and are judged as HumanEval+ is.
A PLT is trained for one loop count: watch what happens at the others.
"""


def demo(
    loops: Annotated[str, typer.Option(help="Loop counts, as 2 or 1,2,4 or 1-4.")] = "1,2,3",
    results: Annotated[Path, typer.Option(help="Where runs are stored.")] = Path("results/runs"),
    sandbox: Annotated[SandboxName, typer.Option(help="Where model-written code runs.")] = SandboxName.bubblewrap,
) -> None:
    """Evaluate an embedded tiny model on embedded problems at several loop counts: no download, under two minutes."""
    from plt_eval.cli.evaluate import RunOptions, report_runs

    typer.echo(INTRODUCTION)
    with as_file(files("plt_eval") / "demo" / "plt-demo") as model:
        options = RunOptions(
            suite="demo", model=str(model), loops=loops, results=results, sandbox=sandbox.value, max_new_tokens=48
        )
        missing = report_runs(options, as_json=False)
    typer.echo(
        f"\nlook closer:   plt-eval ls --results {results}   and   plt-eval show RUN --results {results} --failed"
    )
    if missing:
        raise typer.Exit(1)
