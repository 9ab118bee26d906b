"""`plt-eval run --suite paper`: every column of the paper's Table 2 that can run here, as one row a loop count.

Each column is a run of its own in the store, so an interrupted command goes on where it stood. A column that cannot run
here is marked, and a line says why; it never counts as zero.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column as Head
from rich.table import Table
from rich.text import Text

from plt_eval.errors import UserError
from plt_eval.report.columns import COLUMNS, Column

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from plt_benchmarks.options import SuiteOptions
    from plt_eval.cli.options import RunOptions
    from plt_eval.records import MetricRecord
    from plt_eval.runner import Result
    from plt_eval.swe.command import SweOptions

PAPER = "paper"
_NO_EFFECT = ("n_samples", "run_id", "completions")


@dataclass(frozen=True)
class Measured:
    """One column: its results, one for each model and loop count, and why there are none, or none that counts."""

    column: Column
    results: tuple[Result, ...] = ()
    why: str = ""


Evaluate = Callable[["RunOptions", "Console"], list["Result"]]


def evaluate_paper(options: RunOptions, console: Console, evaluate: Evaluate) -> list[Measured]:
    """Run the columns in the paper's order, each by `evaluate`. Raises UserError for options that no column would
    take; what only one column cannot do marks that column."""
    from plt_benchmarks.protocols import SandboxError, SuiteError
    from plt_benchmarks.registry import UnknownSuite
    from plt_eval.journal import DiskFull

    _check(options)
    measured: list[Measured] = []
    for column in COLUMNS:
        console.print(f"{column.name}: suite {column.suite}", style="bold", highlight=False)
        try:
            found = _measured(column, tuple(evaluate(_options_for(column, options), console)))
        except DiskFull:  # no other column could store anything either
            raise
        except UnknownSuite:
            found = Measured(column, why=f"this version has no suite {column.suite}")
        except (UserError, SuiteError, SandboxError) as error:
            found = Measured(column, why=" ".join(str(error).split()))
        if found.why:
            what = "does not count" if found.results else "cannot run here"
            console.print(f"{column.name}: {what}: {found.why}", style="yellow", markup=False, soft_wrap=True)
        measured.append(found)
    if not any(found.results for found in measured):
        raise UserError(f"--suite {PAPER}: no column can run here; first: {measured[0].column.name}: {measured[0].why}")
    return measured


def _measured(column: Column, results: tuple[Result, ...]) -> Measured:
    """With the reason why a result has no number for the column, where that is so."""
    for result in results:
        if _metric(column, result) is None:
            examples = result.run.manifest.missing_examples
            judged = f"nothing was judged; first: {examples[0]}" if examples else "nothing was judged"
            why = f"its run has no metric {column.metric}" if result.metrics.metrics else judged
            return Measured(column, results, f"{result.run.manifest.run_id}: {why}")
    return Measured(column, results)


def _check(options: RunOptions) -> None:
    from plt_eval.cli.options import check_options

    for name in _NO_EFFECT:
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} has no effect on suite {PAPER}: each column is a run of its own, one answer a problem"
            )
    if options.engine == "replay":
        raise UserError(f"--engine replay has no effect on suite {PAPER}: stored completions are scored suite by suite")
    swe = options.swe
    for name in ("instances", "predictions", "gold"):
        if swe is not None and getattr(swe, name) is not None:
            raise UserError(f"--{name} has no effect on suite {PAPER}: score patches with --suite swe")
    taken = {name for column in COLUMNS for name in column.takes}
    if options.chosen is not None:
        options.chosen.only(PAPER, taken)
    if options.data is not None and not options.data.is_dir():
        raise UserError(f"--data {options.data}: expected a folder with the data of all columns, found no folder")
    check_options(options)


def _options_for(column: Column, options: RunOptions) -> RunOptions:
    """The same command for one column alone."""
    given = replace(options, suite=column.suite, chosen=_chosen(column, options.chosen))
    given = replace(given, data=_data(column, options.data), swe=_agent_options(column, options.swe))
    unused: dict[str, Any] = dict.fromkeys(column.plumbing)
    given = replace(given, **unused)
    if not column.agent:
        return given
    return replace(given, scoring_workers=None, sandbox_image=None)


def _agent_options(column: Column, swe: SweOptions | None) -> SweOptions | None:
    from dataclasses import fields

    if swe is None or not column.agent:
        return None
    return replace(swe, **{f.name: None for f in fields(swe) if f.name not in column.agent})


def _chosen(column: Column, chosen: SuiteOptions | None) -> SuiteOptions | None:
    from dataclasses import fields

    if chosen is None:
        return None
    return replace(chosen, **{f.name: None for f in fields(chosen) if f.name not in column.takes})


def _data(column: Column, folder: Path | None) -> Path | None:
    """The column's own folder in `folder` or in a folder of that, else `folder` itself, or none where the official
    package carries the data."""
    if folder is None:
        return None
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    otherwise = None if column.own_data else folder
    return next((place / name for place in places for name in column.folders if (place / name).is_dir()), otherwise)


# --- the row ------------------------------------------------------------------------------------------


WIDE = 190
"""Columns of a terminal from which on the table stands as in the paper, a row a model."""


@dataclass(frozen=True)
class PaperTable:
    """A row for each model and loop count, the published row of that loop count below it, in points. Where that is too
    wide, benchmarks are the rows."""

    measured: Sequence[Measured]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.across() if options.max_width >= WIDE else self.down()
        yield from (Text(line, overflow="fold") for line in _notes(self.measured))

    def across(self) -> Table:
        """As in the paper."""
        table = Table("model", Head("R", justify="right"))
        for found in self.measured:
            table.add_column(_title(found), justify="right", overflow="fold")
        table.add_column(f"mean of {len(_ran(self.measured))}", justify="right")
        for row in paper_rows(self.measured):
            for name, cells in _lines(row, self.measured):
                loops = "-" if row["loops"] is None else str(row["loops"])
                style = "" if name == row["model"] else "dim italic"
                table.add_row(*map(Text, (name, loops, *cells)), style=style)
        return table

    def down(self) -> Table:
        """A benchmark a row."""
        table = Table("benchmark")
        columns = []
        for row in paper_rows(self.measured):
            for name, cells in _lines(row, self.measured):
                style = "" if name == row["model"] else "dim italic"
                loops = "" if row["loops"] is None else f"\nR={row['loops']}"
                table.add_column(f"{name}{loops}", justify="right", overflow="fold", style=style)
                columns.append(cells)
        names = [*map(_title, self.measured), f"mean of {len(_ran(self.measured))}"]
        for name, *cells in zip(names, *columns, strict=True):
            table.add_row(*(Text(cell.replace("\n", " ") if cell[:1].isalpha() else cell) for cell in (name, *cells)))
        return table


def _lines(row: dict[str, Any], measured: Sequence[Measured]) -> Iterator[tuple[str, list[str]]]:
    """The own line and the published one: a name, a cell for each column, and the mean."""
    cells = [_cell(row["columns"].get(found.column.name), found) for found in measured]
    yield row["model"], [*cells, _points(row["mean"])]
    printed = row["published"]
    if printed is not None:
        cells = [_points(printed["columns"].get(found.column.name)) for found in measured]
        yield PUBLISHED, [*cells, _points(printed["mean"])]


PUBLISHED = "published, 7B"


def _title(found: Measured) -> str:
    from plt_eval.report.tables import BENCHMARKS

    return BENCHMARKS[found.column.name]


def paper_table(measured: Sequence[Measured]) -> PaperTable:
    """What was measured, for a console of any width."""
    return PaperTable(measured)


def paper_json(measured: Sequence[Measured]) -> dict[str, Any]:
    """The rows, and for each column its suite, its runs, or why it could not run."""
    return {
        "columns": [
            {
                "name": found.column.name,
                "suite": found.column.suite,
                "metric": found.column.metric,
                "runs": [result.run.manifest.run_id for result in found.results],
                "missing": sum(result.metrics.missing for result in found.results),
                "cannot_run": (found.why or None) if not found.results else None,
                "does_not_count": (found.why or None) if found.results else None,
            }
            for found in measured
        ],
        "rows": paper_rows(measured),
    }


def paper_rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """By model and loop count: points with intervals by column, their mean over the columns that ran (None unless this
    row has them all), and the published numbers of that loop count with their mean over the same columns."""
    names = [found.column.name for found in _ran(measured)]
    whose = dict.fromkeys(_who(result) for found in measured for result in found.results)
    rows = []
    for model, loops in whose:
        columns = {}
        for found in measured:
            own = next((result for result in found.results if _who(result) == (model, loops)), None)
            metric = None if own is None else _metric(found.column, own)
            if own is not None and metric is not None:
                numbers = {"value": 100 * metric.value, "low": 100 * metric.low, "high": 100 * metric.high}
                columns[found.column.name] = {**numbers, "n": metric.n, "missing": own.metrics.missing}
        values = [columns[name]["value"] for name in names if name in columns]
        whole = len(values) == len(names) and bool(values)
        mean = sum(values) / len(values) if whole else None
        rows.append(
            {"model": model, "loops": loops, "columns": columns, "mean": mean, "published": _printed(loops, names)}
        )
    return rows


def _printed(loops: int | None, names: Sequence[str]) -> dict[str, Any] | None:
    from plt_eval.report.reference import published

    table = published("table2")
    rows = table[table["model"].str.startswith("LoopCoder-v2") & (table["loops"] == (loops or 0))]
    columns = {str(row["quantity"]): float(row["value"]) for _, row in rows.iterrows()}
    if not columns:
        return None
    values = [columns[name] for name in names if name in columns]
    return {"columns": columns, "mean": sum(values) / len(values) if values else None}


def _ran(measured: Sequence[Measured]) -> list[Measured]:
    return [found for found in measured if any(_metric(found.column, result) for result in found.results)]


def _who(result: Result) -> tuple[str, int | None]:
    identity = result.run.manifest.identity
    return identity.model, identity.loops


def _metric(column: Column, result: Result) -> MetricRecord | None:
    return result.metrics.metrics.get(column.metric)


def _cell(numbers: dict[str, Any] | None, found: Measured) -> str:
    if numbers is not None:
        missing = f"\n{numbers['missing']} missing" if numbers["missing"] else ""
        return f"{numbers['value']:.1f}\n[{numbers['low']:.1f}, {numbers['high']:.1f}]\nn={numbers['n']}{missing}"
    return "none\njudged" if found.results else "cannot\nrun"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _notes(measured: Sequence[Measured]) -> list[str]:
    lines = ["own values in points with 95% intervals; the mean is over the columns that ran, for both rows"]
    if any(result.metrics.missing for found in measured for result in found.results):
        lines.append("missing: broken in engine or judging, and counted nowhere; the same command tries them again")
    parts = [part for found in measured if (part := _part(found))]
    if parts:
        lines.append(f"part of the benchmark only: {', '.join(parts)}")
    reasons: dict[str, list[str]] = {}
    for found in measured:
        if found.why:
            reasons.setdefault(found.why, []).append(_title(found))
    return lines + [f"{', '.join(names)}: {textwrap.shorten(why, MOST_OF_A_REASON)}" for why, names in reasons.items()]


def _part(found: Measured) -> str | None:
    """As in "HumanEval+ 5 of 164", where fewer problems than the benchmark has were to be judged."""
    from plt_benchmarks.registry import get_suite

    whole = get_suite(found.column.suite)[0].problems if found.results else 0
    counts = {result.run.manifest.identity.problems for result in found.results}
    return f"{_title(found)} {min(counts):,} of {whole:,}" if counts and min(counts) < whole else None


MOST_OF_A_REASON = 300
"""Characters of a reason below the table; it stands whole above it, and in the JSON form."""
