"""What the figures share: the rows they are drawn from, and panels of lines against the loop.

Plotted data is one tidy table a figure, with the columns COLUMNS:

    origin       "own", or "published" for numbers that a paper prints
    model        whose
    loops        R, the loop count of the model
    loop         r, from 1
    measurement  as in loops.parquet
    variant      which state or branch; "" where there is one only
    value        mean over samples
    low, high    its 95% interval over samples; empty where there is none
    n            samples; empty for published numbers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from plt_eval.diagnosis.store import Diagnosis
from plt_eval.report import style
from plt_eval.report.reference import LABEL, published
from plt_eval.words import plural

COLUMNS = ("origin", "model", "loops", "loop", "measurement", "variant", "value", "low", "high", "n")

LONGEST_NAME = 40
"""Characters of a model's name in a headline."""

Canvas = Figure | SubFigure
Diagnoses = Mapping[int, Diagnosis]
"""By loop count."""


class NoData(ValueError):
    """The runs at hand do not hold what a figure shows; the message says what is missing."""


# --- rows ---------------------------------------------------------------------------------------------


def own_rows(
    diagnoses: Diagnoses,
    name: str,
    measurements: Sequence[str],
    *,
    fewest_loops: int = 1,
    optional: Sequence[str] = (),
) -> pd.DataFrame:
    """The means over all tokens, layers and heads of `measurements`, each in its default variant, called `name`.

    Raises NoData where no diagnosis has `fewest_loops` loops, or none holds a measurement that is not `optional`.
    """
    if not diagnoses:
        raise NoData("there is no diagnosis of it")
    if max(diagnoses) < fewest_loops:
        raise NoData(f"it needs a diagnosis at {fewest_loops} or more loops; there is R={max(diagnoses)} only")
    frames = [_own(diagnosis, name, measurements) for diagnosis in diagnoses.values()]
    rows = pd.concat(frames, ignore_index=True)
    needed = [each for each in measurements if each not in optional]
    missing = [each for each in needed if not (rows["measurement"] == each).any()]
    if missing:
        raise NoData(f"the diagnoses of it hold no {' and no '.join(missing)}")
    return rows


def _own(diagnosis: Diagnosis, name: str, measurements: Sequence[str]) -> pd.DataFrame:
    summary = diagnosis.summary()
    defaults = diagnosis.manifest.defaults
    whole = summary[summary["layer"].isna() & summary["position"].isna()]
    parts = []
    for measurement in measurements:
        rows = whole[whole["measurement"].astype(str) == measurement]
        rows = rows[rows["variant"].astype(str) == defaults.get(measurement, "")]
        parts.append(rows.sort_values("loop"))
    rows = pd.concat(parts, ignore_index=True)
    rows = rows[rows["value"].notna()]
    plain = {"measurement": str, "variant": str, "loop": int, "n": "Int64"}
    return rows.assign(origin="own", model=name, loops=diagnosis.manifest.loops).astype(plain)[list(COLUMNS)]


def published_rows(name: str, measurements: Sequence[str] | None = None) -> pd.DataFrame:
    """One file of the published numbers in the same columns; `measurements` selects and orders its quantities."""
    rows = published(name)
    if measurements is not None:
        rows = pd.concat([rows[rows["quantity"] == each] for each in measurements], ignore_index=True)
    rows = rows.rename(columns={"quantity": "measurement"})
    empty = {"variant": "", "low": np.nan, "high": np.nan, "n": pd.NA}
    return rows.assign(origin="published", **empty).astype({"n": "Int64"})[list(COLUMNS)]


def both(own: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame:
    """Own rows, then the published ones."""
    kinds = {"loops": "Int64", "loop": "Int64", "low": float, "high": float, "n": "Int64"}
    return pd.concat([own.astype(kinds), printed.astype(kinds)], ignore_index=True)


def of(data: pd.DataFrame, origin: str, measurement: str | None = None) -> pd.DataFrame:
    """The rows of one origin, and of one measurement."""
    rows = data[data["origin"] == origin]
    return rows if measurement is None else rows[rows["measurement"] == measurement]


def name_of(data: pd.DataFrame) -> str:
    """The own model's name, as figures can show it: a long one shortened, no character that starts a formula."""
    name = str(of(data, "own")["model"].iloc[0])
    short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
    return short.replace("$", r"\$")


def paper_loops(loops: Sequence[int], wanted: int) -> int:
    """The loop count that a figure of one model shows: the paper's (`wanted`) if it was run, else the largest."""
    return wanted if wanted in loops else max(loops)


# --- panels -------------------------------------------------------------------------------------------


def lines_by_loops(axes: Axes, rows: pd.DataFrame, *, colour: str | None = None) -> None:
    """One line for each R against the loop, with its 95% band; a point with a bar where an R has one loop only. Lines
    are moved aside a little, so that equal ones do not hide each other."""
    every = sorted(rows["loops"].unique())
    for place, loops in enumerate(every):
        mine = rows[rows["loops"] == loops].sort_values("loop")
        look = style.look(int(loops))
        aside = 0.07 * (place - (len(every) - 1) / 2)
        band(axes, mine, colour=colour or look.colour, marker=look.marker, line=look.line, aside=aside)


def band(axes: Axes, rows: pd.DataFrame, *, colour: str, marker: str, line: Any, aside: float = 0.0) -> None:
    """`rows`, one a loop, as a line with a band (several loops) or bar (one)."""
    x = rows["loop"].to_numpy(float) + aside
    value, low, high = (rows[name].to_numpy(float) for name in ("value", "low", "high"))
    axes.plot(x, value, color=colour, marker=marker, linestyle=line, markeredgecolor="white", markeredgewidth=0.5)
    known = np.isfinite(low) & np.isfinite(high)
    if known.sum() > 1:
        axes.fill_between(x[known], low[known], high[known], color=colour, alpha=0.16, linewidth=0)
    elif known.any():
        axes.vlines(x[known], low[known], high[known], color=colour, linewidth=1.0)


def published_points(axes: Axes, rows: pd.DataFrame, *, label: str | None = None) -> None:
    """Published numbers: grey, open, dotted."""
    axes.plot(
        rows["loop"].to_numpy(float),
        rows["value"].to_numpy(float),
        color=style.PUBLISHED,
        marker="o",
        linestyle=(0, (1, 2)),
        linewidth=1.0,
        markerfacecolor="white",
        markeredgecolor=style.PUBLISHED,
        label=label,
    )


def write_values(axes: Axes, rows: pd.DataFrame) -> None:
    """The numbers themselves beside published points: below where the line has a valley, else above."""
    values = rows["value"].to_numpy(float)
    for place, (loop, value) in enumerate(zip(rows["loop"].to_numpy(float), values, strict=True)):
        neighbours = [values[near] for near in (place - 1, place + 1) if 0 <= near < len(values)]
        below = all(value < neighbour for neighbour in neighbours)
        axes.annotate(
            f"{value:g}",
            (loop, value),
            xytext=(0, -6 if below else 5),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=6.5,
            color=style.PUBLISHED,
        )


def published_panel(axes: Axes, rows: pd.DataFrame, label: str, *, margin: float, log: bool = False) -> None:
    """A panel of published numbers alone, of one model: `label` is its axis, `margin` the room above and below them."""
    published_points(axes, rows)
    write_values(axes, rows)
    axes.margins(y=margin)
    if log:
        log_axis(axes)
    loop_axis(axes, int(rows["loop"].min()), int(rows["loop"].max()))
    axes.set_ylabel(label)
    grey_panel(axes, int(rows["loops"].iloc[0]))


def loop_axis(axes: Axes, first: int, last: int) -> None:
    """Whole loops only, with room at the sides."""
    axes.set_xlim(first - 0.45, last + 0.45)
    axes.xaxis.set_major_locator(FixedLocator(list(range(first, last + 1))))
    axes.set_xlabel("loop $r$")


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with readable ticks, however small or large its range; to be called with the limits set."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(NullFormatter())
    if high / low < 10:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    elif high / low < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    else:
        return
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def grey_panel(axes: Axes, loops: int) -> None:
    """Mark a panel as the paper's: its own scale, grey frame and title."""
    axes.set_title(f"{LABEL}, R={loops}", color=style.PUBLISHED)
    axes.set_facecolor("#f6f6f6")
    axes.tick_params(colors=style.PUBLISHED)
    for part in (axes.xaxis.label, axes.yaxis.label):
        part.set_color(style.PUBLISHED)
    for spine in axes.spines.values():
        spine.set_color(style.PUBLISHED)


def loops_legend(figure: Canvas, loops: Sequence[int]) -> None:
    """One entry for each R, below the panels."""
    handles = []
    for each in loops:
        look = style.look(int(each))
        handles.append(
            Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.line, label=f"R={each}", markersize=5)
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def headline(figure: Canvas, text: str) -> None:
    """What is shown and of which model, at the upper left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=9, fontweight="bold")


def own_loops(data: pd.DataFrame) -> list[int]:
    """The loop counts of the own rows, in order."""
    return sorted(int(each) for each in of(data, "own")["loops"].unique())


def samples_of(data: pd.DataFrame) -> str:
    """As in "96 samples"."""
    counts = of(data, "own")["n"].dropna()
    if not len(counts):
        return "samples"
    most = int(counts.max())
    return f"{most} {plural(most, 'sample')}"
