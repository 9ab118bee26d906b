"""`plt-eval install`: environments of their own for official packages that cannot live beside ours."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Annotated

import typer

from plt_eval.errors import UserError


def install(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which environments; without any, those that there are are listed.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also those that are there already.")] = False,
) -> None:
    """Install official packages that some suites run in an environment of their own.

    Each is a virtual environment with pinned packages, in ~/.cache/plt-eval/environments or in the folder that
    PLT_EVAL_ENVIRONMENTS names.
    """
    from plt_benchmarks.registry import environments

    known = environments()
    if not names:
        if again:
            raise UserError(f"--again has no effect without a name; there are {', '.join(known)}")
        for name, environment in known.items():
            there = f"there, in {environment.folder}" if environment.present else "not installed"
            typer.echo(f"{name}: for {environment.summary}; {there}")
        return
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"{name}: no such environment{hint}; there are {', '.join(known)}")
    for name in dict.fromkeys(names):
        if known[name].present and not again:
            typer.echo(f"{name}: there already, in {known[name].folder}")
            continue
        known[name].install(partial(_say, name), again=again)
        typer.echo(f"{name}: installed, in {known[name].folder}")


def _say(name: str, step: str) -> None:
    typer.echo(f"{name}: {step}", err=True)
