"""`plt-eval demo`: the whole road from checkpoint to score, on models and problems that the package brings along."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from plt_eval.cli.run import SandboxName


@dataclass(frozen=True)
class Demonstration:
    """What is run, and the words before it."""

    introduction: str
    loops: str
    options: dict[str, Any]


FAMILY = Demonstration(
    introduction="""\
1. plt-tiny: byte-level PLTs that this project trained alike but for one thing, the number of loops. Each is asked, at
its own loop count, for values that small programs compute: what takes several steps to follow is where more loops
could help.
""",
    loops="1-4",
    options={"suite": "trace", "model": "plt-tiny", "limit": 150},
)
"""A model for each loop count. The limit takes 10 problems of each kind and depth."""

CODE = Demonstration(
    introduction="""
2. plt-demo: a toy trained with 2 loops to write one-line Python functions. What it writes runs in the sandbox and is
judged as HumanEval+ is.
""",
    loops="2",
    options={
        "suite": "demo",
        "model": str(Path(__file__).parents[1] / "demo" / "plt-demo"),
        "max_new_tokens": 48,
    },
)
"""Code that is run."""

CLOSER = {
    "all runs": "plt-eval ls {results}",
    "what one of them got wrong": "plt-eval show RUN {results} --failed",
    "one member at other loop counts": "plt-eval run --suite trace --model plt-tiny:r3 --loops 1-4 {results}",
    "train such a family yourself, in minutes": "plt-eval study --quick",
}
"""Commands to go on with, by what they show."""


def demo(
    loops: Annotated[
        str | None, typer.Option(help="Members of the family to compare, as 2 or 1,2,4 or 1-4 (default: all).")
    ] = None,
    results: Annotated[Path, typer.Option(help="Where runs are stored.")] = Path("results/runs"),
    sandbox: Annotated[SandboxName, typer.Option(help="Where model-written code runs.")] = SandboxName.bubblewrap,
) -> None:
    """Evaluate what the package brings along at several loop counts: no download, under two minutes."""
    missing = show(FAMILY, loops=loops, results=results, sandbox=sandbox)
    missing |= show(CODE, loops=None, results=results, sandbox=sandbox)
    width = max(map(len, CLOSER))
    typer.echo("\nlook closer:")
    for what, command in CLOSER.items():
        typer.echo(f"  {what:<{width}}   {command.format(results=f'--results {results}')}")
    if missing:
        raise typer.Exit(1)


def show(demonstration: Demonstration, *, loops: str | None, results: Path, sandbox: SandboxName) -> bool:
    """Say what it is, run it, print its table, and say whether samples are missing."""
    from plt_eval.cli.evaluate import report_runs
    from plt_eval.cli.options import RunOptions

    typer.echo(demonstration.introduction)
    options = RunOptions(
        loops=loops or demonstration.loops, results=results, sandbox=sandbox.value, **demonstration.options
    )
    return report_runs(options, as_json=False)
