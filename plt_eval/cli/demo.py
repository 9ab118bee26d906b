"""`plt-eval demo`: the whole road from checkpoint to score, on models and problems that the package brings along."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from plt_eval.cli.run import SandboxName


@dataclass(frozen=True)
class Demonstration:
    """What is run, and the words around it. `more` are commands to go on with, each with what it shows."""

    introduction: str
    loops: str
    options: dict[str, Any]
    more: dict[str, str] = field(default_factory=dict)


TOY = Demonstration(
    introduction="""\
A demonstration on what is embedded: plt-demo, a byte-level PLT of 0.46M parameters that this project trained with 2
loops, and 30 one-line Python functions to write. Completions run in the sandbox and are judged as HumanEval+ is.
A PLT is trained for one loop count: watch what happens at the others.
""",
    loops="1,2,3",
    options={
        "suite": "demo",
        "model": str(Path(__file__).parents[1] / "demo" / "plt-demo"),
        "max_new_tokens": 48,
    },
)
"""One model, at loop counts that it was not trained for."""

FAMILY = Demonstration(
    introduction="""\
A demonstration on what is bundled: plt-tiny, byte-level PLTs that this project trained alike but for one thing, the
number of loops. Each is asked, at its own loop count, for values that small programs compute: what takes several steps
to follow is where more loops could help.
""",
    loops="1-4",
    options={"suite": "trace", "model": "plt-tiny", "limit": 170},
    more={
        "one member at other loop counts": "plt-eval run --suite trace --model plt-tiny:r3 --loops 1-4",
    },
)
"""A model for each loop count. The limit takes about 10 problems of each kind and depth."""

DEMONSTRATION = TOY
"""What `plt-eval demo` shows."""

STUDY = {"train such a family yourself, in minutes": "plt-eval study --quick"}


def demo(
    loops: Annotated[
        str | None, typer.Option(help="Loop counts, as 2 or 1,2,4 or 1-4 (default: some to compare).")
    ] = None,
    results: Annotated[Path, typer.Option(help="Where runs are stored.")] = Path("results/runs"),
    sandbox: Annotated[SandboxName, typer.Option(help="Where model-written code runs.")] = SandboxName.bubblewrap,
) -> None:
    """Evaluate what the package brings along at several loop counts: no download, under two minutes."""
    show(DEMONSTRATION, loops=loops, results=results, sandbox=sandbox)


def show(demonstration: Demonstration, *, loops: str | None, results: Path, sandbox: SandboxName) -> None:
    """Say what it is, run it, and say where to look closer. Exits with 1 when samples are missing."""
    from plt_eval.cli.evaluate import RunOptions, report_runs

    typer.echo(demonstration.introduction)
    options = RunOptions(
        loops=loops or demonstration.loops, results=results, sandbox=sandbox.value, **demonstration.options
    )
    missing = report_runs(options, as_json=False)
    here = f"--results {results}"
    closer = {
        "all runs": f"plt-eval ls {here}",
        "what one of them got wrong": f"plt-eval show RUN {here} --failed",
        **demonstration.more,
        **STUDY,
    }
    width = max(map(len, closer))
    typer.echo("\nlook closer:")
    for what, command in closer.items():
        typer.echo(f"  {what:<{width}}   {command}")
    if missing:
        raise typer.Exit(1)
