"""Figure 2: the states. Step size, update alignment, effective rank and distance from a fixed point, by loop.

    data = prepare_states(diagnoses, "plt-tiny")
    figure = draw_states(data)

Small steps in a kept direction that near a fixed point would be refinement; steps that turn back are oscillation. The
paper prints the four-loop model's numbers (its Table 3): they have panels and scales of their own, because norms and
ranks grow with the hidden size."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from plt_eval.report import style
from plt_eval.report.figures.common import (
    Canvas,
    Diagnoses,
    both,
    headline,
    lines_by_loops,
    loop_axis,
    loops_legend,
    name_of,
    of,
    own_loops,
    own_rows,
    published_panel,
    published_rows,
    samples_of,
)

PANELS = {
    "step_size": ("step size", r"$\|h^{(r)}-h^{(r-1)}\|_2$"),
    "angular_change": ("update alignment", r"$\cos(\Delta h^{(r)},\,\Delta h^{(r-1)})$"),
    "effective_rank": ("effective rank", "dimensions"),
    "fixed_point_gap": ("fixed-point gap", r"$\|h^{(r)}-f(h^{(r)})\|_2$"),
}
"""By measurement: the panel's title and its axis."""

_PRINTED = ("step_size", "angular_change", "effective_rank")


def prepare_states(diagnoses: Diagnoses, name: str) -> pd.DataFrame:
    """The rows of figure 2; see figures.common.COLUMNS. Raises NoData."""
    return both(own_rows(diagnoses, name, list(PANELS), fewest_loops=2), published_rows("table3", _PRINTED))


def draw_states(data: pd.DataFrame, figure: Canvas | None = None) -> Canvas:
    """Draw prepare_states' rows, into `figure` or a new one."""
    figure = style.new_figure(9.6, 4.6) if figure is None else figure
    grid = figure.subplots(2, 4, height_ratios=(1.45, 1), squeeze=False)
    last = max(own_loops(data))
    for axes, (measurement, (title, label)) in zip(grid[0], PANELS.items(), strict=True):
        rows = of(data, "own", measurement)
        lines_by_loops(axes, rows)
        loop_axis(axes, int(rows["loop"].min()), last)
        axes.set_title(title)
        axes.set_ylabel(label + _variant(rows))
        if measurement == "angular_change":
            _zero_line(axes)
    for axes, (measurement, (_, label)) in zip(grid[1], PANELS.items(), strict=True):
        _published_panel(axes, of(data, "published", measurement), label)
    headline(figure, f"{name_of(data)}: states by loop, mean and 95% band over {samples_of(data)}")
    loops_legend(figure, own_loops(data))
    return figure


def _variant(rows: pd.DataFrame) -> str:
    """As in " (normed)": which state was read."""
    variants = [each for each in rows["variant"].unique() if each]
    return f"\n({', '.join(each.replace('_', ' ') for each in variants)})" if variants else ""


def _published_panel(axes: Axes, rows: pd.DataFrame, label: str) -> None:
    if rows.empty:
        axes.axis("off")
        axes.text(0.5, 0.5, "no published numbers", ha="center", va="center", color=style.PUBLISHED, fontsize=7.5)
        return
    published_panel(axes, rows, label, margin=0.3)
    if (rows["measurement"] == "angular_change").all():
        _zero_line(axes)


def _zero_line(axes: Axes) -> None:
    """Cosines: the whole scale, and where an update keeps no direction."""
    axes.set_ylim(-1.15, 1.15)
    axes.axhline(0.0, color="#9a9a9a", linewidth=0.7, zorder=0.5)
