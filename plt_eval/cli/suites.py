"""`plt-eval suites`: what can be evaluated, and what is installed for it."""

from __future__ import annotations

import re

import typer


def suites() -> None:
    """List the suites.

    What each is, the extra it needs and whether that is installed, the version of its data and scoring,
    and where its data comes from.
    """
    from rich.table import Table
    from rich.text import Text

    from plt_benchmarks.registry import all_suites, suite_names
    from plt_eval.tables import output_console

    table = Table()
    for heading in ("suite", "what it is", "needs", "version", "data"):
        table.add_column(heading, overflow="fold")
    for suite in all_suites():
        source = getattr(getattr(suite, "release", None), "url", "given by --data")
        cells = (suite.name, suite.summary, needs(suite.extra), suite.version, source)
        table.add_row(*(Text(cell) for cell in cells))
    output_console().print(table)
    typer.echo(f"names that --suite takes: {', '.join(suite_names())}; --data gives other problems for one")


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
