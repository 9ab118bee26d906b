"""Figure 4: how alike the heads attend, loop by loop: head x head heat maps of one model, mean over layers.

    figure = draw_heads(prepare_heads(diagnoses, "plt-tiny"))

A cell is the mean cosine between two heads' attention rows; the number in a title is the mean over pairs of different
heads. Cosines have the same scale for every model, so the last panel has the published means of the three-loop model
among its axes: grey and open."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes

from plt_eval.report import style
from plt_eval.report.figures.common import (
    COLUMNS,
    Canvas,
    Diagnoses,
    NoData,
    both,
    headline,
    loop_axis,
    name_of,
    of,
    paper_loops,
    published_points,
    published_rows,
)
from plt_eval.report.reference import LABEL

PAPER_LOOPS = 3
"""The paper shows its three-loop model."""

MOST_NUMBERED = 8
"""Heads up to which the cells carry their numbers."""

MEAN = "head_cosine"
CELL = "head_cosine_pair"


def prepare_heads(diagnoses: Diagnoses, name: str, *, loops: int | None = None) -> pd.DataFrame:
    """The cells and means of figure 4, for `loops` (default: 3 if it was run, else the most): figures.common.COLUMNS,
    and head_i and head_j (NA in the means). Raises NoData."""
    if not diagnoses:
        raise NoData("there is no diagnosis of it")
    shown = paper_loops(list(diagnoses), PAPER_LOOPS) if loops is None else loops
    heads = diagnoses[shown].heads()
    if heads.empty:
        raise NoData("the diagnoses of it hold no head_cosine")
    cells = heads.groupby(["loop", "head_i", "head_j"], as_index=False)["cosine"].mean()
    means = cells[cells["head_i"] != cells["head_j"]].groupby("loop", as_index=False)["cosine"].mean()
    if means.empty:
        raise NoData("the model has one head only")
    found = pd.concat([_rows(means, MEAN), _rows(cells, CELL)], ignore_index=True)
    own = found.assign(
        origin="own",
        model=name,
        loops=diagnoses[shown].manifest.loops,
        variant="",
        low=np.nan,
        high=np.nan,
        n=diagnoses[shown].manifest.done,
    )
    printed = published_rows("figure4", [MEAN]).assign(head_i=pd.NA, head_j=pd.NA)
    kinds = {"head_i": "Int16", "head_j": "Int16"}
    columns = [*COLUMNS, "head_i", "head_j"]
    return both(own.astype(kinds)[columns], printed.astype(kinds)[columns])


def _rows(table: pd.DataFrame, measurement: str) -> pd.DataFrame:
    rows = table.rename(columns={"cosine": "value"}).assign(measurement=measurement)
    return rows if "head_i" in rows else rows.assign(head_i=pd.NA, head_j=pd.NA)


def draw_heads(data: pd.DataFrame, figure: Canvas | None = None) -> Canvas:
    """Draw prepare_heads' rows, into `figure` or a new one: a heat map for each loop, at most four in a row, and the
    means."""
    means = of(data, "own", MEAN)
    loops = [int(loop) for loop in means["loop"]]
    panels = len(loops) + 1
    columns = min(panels, 5)
    rows = math.ceil(panels / columns)
    figure = style.new_figure(0.7 + 2.1 * columns, 0.8 + 2.2 * rows) if figure is None else figure
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    lowest = min(0.0, float(of(data, "own", CELL)["value"].min()))
    image = None
    for axes, loop, mean in zip(grid, loops, means["value"], strict=False):
        image = axes.imshow(_matrix(data, loop), cmap=style.MAP, vmin=lowest, vmax=1.0)
        _label_cells(axes, _matrix(data, loop), lowest)
        axes.set_title(f"loop {loop}: mean {mean:.2f}")
        axes.set_xlabel("head")
    grid[0].set_ylabel("head")
    assert image is not None
    bar = figure.colorbar(image, ax=list(grid[: len(loops)]), shrink=0.7, pad=0.02, aspect=18)
    bar.set_label("cosine")
    _means_panel(grid[len(loops)], means, of(data, "published", MEAN))
    for axes in grid[panels:]:
        axes.axis("off")
    headline(figure, f"{name_of(data)}, R={int(means['loops'].iloc[0])}: similarity of heads, mean over layers")
    return figure


def _matrix(data: pd.DataFrame, loop: int) -> npt.NDArray[np.float64]:
    cells = of(data, "own", CELL)
    cells = cells[cells["loop"] == loop]
    size = int(cells[["head_i", "head_j"]].max().max()) + 1
    matrix = np.full((size, size), np.nan)
    matrix[cells["head_i"].to_numpy(int), cells["head_j"].to_numpy(int)] = cells["value"].to_numpy(float)
    return matrix


def _label_cells(axes: Axes, matrix: npt.NDArray[np.float64], lowest: float) -> None:
    """Numbers in the cells of small maps, dark on light; whole head numbers on the axes."""
    size = len(matrix)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)
    every = max(1, math.ceil(size / 8))
    axes.set_xticks(range(0, size, every))
    axes.set_yticks(range(0, size, every))
    if size > MOST_NUMBERED:
        return
    for (row, column), value in np.ndenumerate(matrix):
        light = value > lowest + 0.46 * (1 - lowest)
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color="black" if light else "white"
        )


def _means_panel(axes: Axes, means: pd.DataFrame, printed: pd.DataFrame) -> None:
    loops = int(means["loops"].iloc[0])
    look = style.look(loops)
    x, y = means["loop"].to_numpy(float), means["value"].to_numpy(float)
    axes.plot(x, y, color=look.colour, marker=look.marker, linestyle=look.line, label=f"own, R={loops}")
    published_points(axes, printed, label=f"{LABEL}, R={int(printed['loops'].iloc[0])}")
    loop_axis(axes, 1, max(loops, int(printed["loop"].max())))
    axes.set_ylim(min(0.0, float(y.min())), 1.0)
    axes.set_ylabel("mean cosine")
    axes.set_title("mean over pairs")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), fontsize=6.5)
    axes.set_box_aspect(1)
