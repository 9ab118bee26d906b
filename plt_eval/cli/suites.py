"""`plt-eval suites`: what can be evaluated, what each needs, and what of that is here."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from plt_benchmarks.protocols import Suite


def suites(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """List the suites.

    What each is, how many problems it has, what it needs (a pip extra, its data, programs, Docker, an environment of
    its own), what of that is here, and what judging it takes. A model's time comes on top.
    """
    import json

    from plt_benchmarks.registry import all_suites, suite_names
    from plt_eval.tables import output_console

    found = [facts(suite) for suite in all_suites()]
    if json_:
        typer.echo(json.dumps(found, indent=2))
        return
    console = output_console()
    console.print(suites_table(found))
    console.print(f"names that --suite takes: {', '.join(suite_names())}, paper", soft_wrap=True)
    console.print("`paper` runs every column of the paper's Table 2 that can run here", soft_wrap=True)
    console.print(
        "data: --data PATH gives other problems for a suite, and is the only way where it says so; `plt-eval suites "
        "--json` has the address of each one's own",
        soft_wrap=True,
    )


def suites_table(found: list[dict[str, Any]]) -> Table:
    """What `facts` says of each suite, for a terminal of 100 columns or more."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.HORIZONTALS, show_lines=True, pad_edge=False)
    table.add_column("suite", no_wrap=True)
    table.add_column("problems", justify="right", no_wrap=True)
    table.add_column("what it is, and how long judging takes", ratio=5)
    table.add_column("what it needs", ratio=4, overflow="fold")
    for row in found:
        problems = "-" if row["problems"] is None else f"{row['problems']:,}"
        what = Text.assemble(row["summary"], "\n", (f"judging: {row['cost']}", "dim"))
        needed = Text.assemble(*_wanted(row), (f"data: {row['data']['state']}", "dim"))
        table.add_row(Text(row["suite"]), problems, what, needed)
    return table


def _wanted(row: dict[str, Any]) -> list[str]:
    """Lines on what a suite needs: what is there in one, what is missing in one each, with what mends it."""
    have = [need["what"] for need in row["needs"] if need["present"]]
    missing = [need["text"] for need in row["needs"] if not need["present"]]
    if row["missing_packages"]:
        missing.insert(0, row["extra"])
    elif row["extra"]:
        have.insert(0, f"extra {row['extra'].partition(':')[0]}")
    there = ", ".join(have) if len(have) <= MOST_NAMED else f"{len(have)} of {len(have) + len(missing)} programs"
    return [f"{line}\n" for line in ([f"there: {there}"] if have else []) + missing]


MOST_NAMED = 4
"""Needs that are there are named up to here, and counted beyond."""


def facts(suite: Suite) -> dict[str, Any]:
    """What the listing says of a suite, in JSON types: `names` are those of --suite that it is part of."""
    wanted = [
        {
            "what": need.what,
            "present": need.present,
            "mend": need.mend,
            "text": f"{need.what}: {'there' if need.present else f'missing ({need.mend})' if need.mend else 'missing'}",
        }
        for need in suite.needs()
    ]
    return {
        "suite": suite.name,
        "names": _names_with(suite),
        "summary": suite.summary,
        "version": suite.version,
        "problems": suite.problems or None,
        "extra": needs(suite.extra) if suite.extra else "",
        "missing_packages": missing_packages(suite.extra) if suite.extra else [],
        "needs": wanted,
        "data": _data(suite),
        "cost": suite.cost,
        "runs_code": suite.runs_code,
    }


def _names_with(suite: Suite) -> list[str]:
    from plt_benchmarks.protocols import SuiteError
    from plt_benchmarks.registry import get_suite, suite_names

    found = []
    for name in suite_names():
        with suppress(SuiteError):  # some want a selection
            if any(other.name == suite.name for other in get_suite(name)):
                found.append(name)
    return found


def _data(suite: Suite) -> dict[str, Any]:
    """Where it comes from, whether it is here (None where that is no question), and both in a word."""
    release = getattr(suite, "release", None)
    url = getattr(release, "url", None)
    if url is None:
        return {"source": None, "present": None, "state": "--data only"}
    if not url.startswith("https://"):
        return {"source": str(url), "present": True, "state": str(url)}
    present = bool(getattr(release, "present", False))
    return {"source": str(url), "present": present, "state": "here" if present else "to be fetched"}


def needs(extra: str | None) -> str:
    """As in "code: installed", or what is missing."""
    if extra is None:
        return "nothing"
    missing = missing_packages(extra)
    if not missing:
        return f"{extra}: installed"
    return f"{extra}: missing {', '.join(missing)} (pip install 'plt-eval[{extra}]')"


def missing_packages(extra: str) -> list[str]:
    """The packages of plt-eval's `extra` that are not installed."""
    from importlib import metadata

    missing = []
    for name in sorted(_packages_of(extra, metadata.requires("plt-eval") or [], seen=set())):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def _packages_of(extra: str, requirements: list[str], seen: set[str]) -> set[str]:
    """Package names behind `extra`, through extras that name other extras ("plt-eval[code]")."""
    if extra in seen:
        return set()
    seen.add(extra)
    packages: set[str] = set()
    for requirement in requirements:
        condition = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", requirement)
        if condition is None or match is None or condition[1] != extra:
            continue
        if match[1] == "plt-eval":
            for inner in (match[2] or "").split(","):
                packages |= _packages_of(inner.strip(), requirements, seen)
        else:
            packages.add(match[1])
    return packages
