"""Figure 6: the outputs. The rank of the true next token, how far each loop moves the prediction, and how sure it is.

    figure = draw_outputs(prepare_outputs(diagnoses, "plt-tiny"))

The rank (1 is best) falls with the loop where loops refine. The paper prints the output shifts of its four-loop model
(Table 3); they have a panel of their own, because divergences depend on the vocabulary.
"""

from __future__ import annotations

import pandas as pd

from plt_eval.report import style
from plt_eval.report.figures.common import (
    Canvas,
    Diagnoses,
    both,
    headline,
    lines_by_loops,
    log_axis,
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
    "logit_lens_rank": ("rank of the next token", "mean rank, 1 is best (log scale)"),
    "output_shift": ("output shift", r"KL$(p^{(r)}\,\|\,p^{(r-1)})$ (nats, log scale)"),
    "output_entropy": ("output entropy", "nats"),
}
"""By measurement: the panel's title and its axis."""

_LOGARITHMIC = ("logit_lens_rank", "output_shift")


def prepare_outputs(diagnoses: Diagnoses, name: str) -> pd.DataFrame:
    """The rows of figure 6; see figures.common.COLUMNS. Raises NoData."""
    own = own_rows(diagnoses, name, list(PANELS), fewest_loops=2)
    return both(own, published_rows("table3", ["output_shift"]))


def draw_outputs(data: pd.DataFrame, figure: Canvas | None = None) -> Canvas:
    """Draw prepare_outputs' rows, into `figure` or a new one."""
    figure = style.new_figure(9.6, 2.9) if figure is None else figure
    grid = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.85))
    last = max(own_loops(data))
    for axes, (measurement, (title, label)) in zip(grid[:-1], PANELS.items(), strict=True):
        rows = of(data, "own", measurement)
        lines_by_loops(axes, rows)
        loop_axis(axes, int(rows["loop"].min()), last)
        axes.set_title(title)
        axes.set_ylabel(label)
        if measurement in _LOGARITHMIC:
            log_axis(axes)
    rows = of(data, "published", "output_shift")
    published_panel(grid[-1], rows, "output shift (nats, log scale)", margin=0.35, log=True)
    headline(figure, f"{name_of(data)}: outputs by loop, mean and 95% band over {samples_of(data)}")
    loops_legend(figure, own_loops(data))
    return figure
