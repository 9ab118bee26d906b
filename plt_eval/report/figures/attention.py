"""Figure 5: the attention. How diffuse the heads are, how much they are re-routed between loops, and what the gate
reads.

    figure = draw_attention(prepare_attention(diagnoses, "plt-tiny"))

The gate weighs the global branch, the first loop's keys and values: near 1 a loop lives off that cache, near 0 off its
own window. It starts at one half, before training. The paper prints no numbers of this figure."""

from __future__ import annotations

import pandas as pd

from plt_eval.report import style
from plt_eval.report.figures.common import (
    COLUMNS,
    Canvas,
    Diagnoses,
    headline,
    lines_by_loops,
    loop_axis,
    loops_legend,
    name_of,
    of,
    own_loops,
    own_rows,
    samples_of,
)

PANELS = {
    "attention_entropy": ("attention entropy", "nats"),
    "attention_kl": ("re-routing between loops", r"KL$(A^{(r)}\,\|\,A^{(r-1)})$ (nats)"),
    "gate": ("gate (grey line: before training)", "weight of the global branch"),
}
"""By measurement: the panel's title and its axis."""

_GATE_START = 0.5


def prepare_attention(diagnoses: Diagnoses, name: str) -> pd.DataFrame:
    """The rows of figure 5; see figures.common.COLUMNS. A model without a gate has no rows of it. Raises NoData."""
    rows = own_rows(diagnoses, name, list(PANELS), fewest_loops=2, optional=("gate",))
    return rows[list(COLUMNS)]


def draw_attention(data: pd.DataFrame, figure: Canvas | None = None) -> Canvas:
    """Draw prepare_attention's rows, into `figure` or a new one."""
    figure = style.new_figure(7.8, 2.9) if figure is None else figure
    last = max(own_loops(data))
    for axes, (measurement, (title, label)) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        rows = of(data, "own", measurement)
        axes.set_title(title)
        if rows.empty:
            axes.axis("off")
            axes.text(0.5, 0.5, "this model has no gate", ha="center", va="center", transform=axes.transAxes)
            continue
        lines_by_loops(axes, rows)
        loop_axis(axes, int(rows["loop"].min()), last)
        axes.set_ylabel(label)
        if measurement == "gate":
            axes.set_ylim(0.0, 1.0)
            axes.axhline(_GATE_START, color="#9a9a9a", linewidth=0.7, zorder=0.5)
        else:
            axes.set_ylim(bottom=0.0)
    headline(figure, f"{name_of(data)}: attention by loop, mean and 95% band over {samples_of(data)}")
    loops_legend(figure, own_loops(data))
    return figure
