"""`plt-eval install`: environments of their own for official packages that cannot live beside ours."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from plt_eval.errors import UserError


def install(
    names: Annotated[list[str], typer.Argument(help="Which environments; `plt-eval suites` says what each is for.")],
    again: Annotated[bool, typer.Option("--again", help="Also those that are there already.")] = False,
) -> None:
    """Install official packages that some suites run in an environment of their own."""
    from plt_benchmarks.registry import environments

    known = environments()
    for name in names:
        if name not in known:
            raise UserError(f"{name}: no such environment; there are {', '.join(known)}")
    for name in dict.fromkeys(names):
        if known[name].present and not again:
            typer.echo(f"{name}: there already, in {known[name].folder}")
            continue
        known[name].install(partial(_say, name), again=again)
        typer.echo(f"{name}: installed, in {known[name].folder}")


def _say(name: str, step: str) -> None:
    typer.echo(f"{name}: {step}", err=True)
