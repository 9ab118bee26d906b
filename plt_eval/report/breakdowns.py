"""What a mean over layers and positions hides: attention layer by layer, and the output shift along the text.

    draw_layers(prepare_layers(diagnosis))         # entropy, re-routing and gate of each layer, a line for each loop
    draw_positions(prepare_positions(diagnosis))   # the output shift by position, a line for each loop

Both are of one run and read its summary; call draw_ under style.drawing(). Their tables have the columns measurement,
variant, loop, at (the layer, or the first token of a bin of positions), value, low, high, n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from plt_eval.report import style
from plt_eval.report.figures.attention import PANELS as ATTENTION
from plt_eval.report.figures.common import Canvas, NoData, band

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from plt_eval.diagnosis.store import Diagnosis

COLUMNS = ("measurement", "variant", "loop", "at", "value", "low", "high", "n")
SHIFT = "output_shift"


def prepare_layers(diagnosis: Diagnosis) -> pd.DataFrame:
    """Attention measurements by layer, in their default variants. Raises NoData where there are none."""
    return _rows(diagnosis, "layer", tuple(ATTENTION))


def prepare_positions(diagnosis: Diagnosis) -> pd.DataFrame:
    """The output shift by the first token of each bin of positions. Raises NoData where there is none."""
    return _rows(diagnosis, "position", (SHIFT,))


def _rows(diagnosis: Diagnosis, by: str, measurements: tuple[str, ...]) -> pd.DataFrame:
    summary = diagnosis.summary()
    rows = summary[summary[by].notna() & summary["value"].notna()]
    rows = rows.astype({"measurement": str, "variant": str})
    defaults = [diagnosis.manifest.defaults.get(name, "") for name in rows["measurement"]]
    rows = rows[rows["measurement"].isin(measurements) & (rows["variant"] == defaults)]
    if rows.empty:
        raise NoData(f"the diagnosis holds no {' and no '.join(measurements)} by {by}")
    rows = rows.assign(at=rows[by].astype(int)).sort_values(["measurement", "loop", "at"])
    return rows[list(COLUMNS)].reset_index(drop=True)


def draw_layers(data: pd.DataFrame) -> Canvas:
    """Draw prepare_layers' rows: a panel for each measurement."""
    names = [name for name in ATTENTION if (data["measurement"] == name).any()]
    figure = style.new_figure(2.6 * len(names) + 0.4, 2.8)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        rows = data[data["measurement"] == name]
        _lines(axes, rows)
        axes.set_title(ATTENTION[name][0])
        axes.set_ylabel(ATTENTION[name][1])
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlim(-0.35, int(data["at"].max()) + 0.35)
        axes.set_ylim(0.0, 1.0 if name == "gate" else None)
    _legend(figure, data)
    return figure


def draw_positions(data: pd.DataFrame) -> Canvas:
    """Draw prepare_positions' rows, on a scale on which every bin is as wide as its neighbour."""
    figure = style.new_figure(5.2, 2.8)
    axes = figure.subplots()
    places = {first: place for place, first in enumerate(sorted(data["at"].unique()))}
    _lines(axes, data.assign(at=data["at"].map(places)))
    axes.set_ylabel("output shift (nats)")
    axes.set_xlabel("position of the token (first of each bin)")
    axes.set_ylim(bottom=0.0)
    axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    named = {place: str(first) for first, place in places.items()}
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: named.get(round(x), "")))
    _legend(figure, data)
    return figure


def _lines(axes: Axes, rows: pd.DataFrame) -> None:
    for loop in sorted(rows["loop"].unique()):
        mine = rows[rows["loop"] == loop]
        look = style.look(int(loop))
        # `band` draws against the column "loop"; here that is the layer or the position.
        band(axes, mine.assign(loop=mine["at"]), colour=look.colour, marker=look.marker, line=look.line)


def _legend(figure: Canvas, data: pd.DataFrame) -> None:
    handles = []
    for loop in sorted(data["loop"].unique()):
        look = style.look(int(loop))
        line: Any = look.line
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, linestyle=line, label=f"loop {loop}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
