"""`plt-eval suites`: what can be evaluated, what each needs, and what of that is here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from plt_benchmarks.protocols import Suite


def suites(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """List the suites.

    What each is, how many problems it has, what it needs (a pip extra, its data, programs, Docker, an environment of
    its own), what of that is here, and what judging it takes. A model's time comes on top.
    """
    import json

    from rich.table import Table
    from rich.text import Text

    from plt_benchmarks.registry import all_suites, suite_names
    from plt_eval.tables import output_console

    found = [facts(suite) for suite in all_suites()]
    if json_:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table()
    for heading in ("suite", "what it is", "problems", "needs", "data", "judging"):
        table.add_column(heading, overflow="fold")
    for row in found:
        needs = [row["extra"], *(need["text"] for need in row["needs"])]
        problems = "-" if row["problems"] is None else f"{row['problems']:,}"
        wanted = "\n".join(text for text in needs if text) or "nothing"
        cells = (row["suite"], row["summary"], problems, wanted, row["data"], row["cost"])
        table.add_row(*(Text(str(cell)) for cell in cells))
    console = output_console()
    console.print(table)
    names = ", ".join(suite_names())
    console.print(f"names that --suite takes: {names}, paper; --data gives other problems for one", soft_wrap=True)
    console.print("`paper` runs every column of the paper's Table 2 that can run here", soft_wrap=True)


def facts(suite: Suite) -> dict[str, Any]:
    """What the listing says of a suite, in JSON types."""
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
        "summary": suite.summary,
        "version": suite.version,
        "problems": suite.problems or None,
        "extra": needs(suite.extra) if suite.extra else "",
        "needs": wanted,
        "data": _data(suite),
        "cost": suite.cost,
    }


def _data(suite: Suite) -> str:
    """Where it comes from, and whether it is here."""
    release = getattr(suite, "release", None)
    url = getattr(release, "url", None)
    if url is None:
        return "given by --data"
    if not url.startswith("https://"):
        return str(url)
    return f"{url}\n{'here' if getattr(release, 'present', False) else 'to be fetched, or --data'}"


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
