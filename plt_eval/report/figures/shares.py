"""Figure 7: where refinement concentrates. Each extra loop's share of three things, stacked.

    figure = draw_shares(prepare_shares(diagnoses, "plt-tiny"))

The lenses: the output shift, the re-routing of attention, and token breadth (the tokens whose output a loop moves
most). A model with R loops has R-1 shares a lens; at two loops there is nothing to share, so three are the fewest.
Shares have the same scale for every model: the published ones stand beside, in grey."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from plt_eval.report import style
from plt_eval.report.figures.common import (
    COLUMNS,
    Canvas,
    Diagnoses,
    NoData,
    both,
    headline,
    name_of,
    of,
    own_loops,
    published_rows,
    samples_of,
)
from plt_eval.report.reference import LABEL

LENSES = {
    "output_shift_share": "output\nshift",
    "attention_kl_share": "attention\nre-routing",
    "peak_loop_share": "token\nbreadth",
}
"""By measurement: the bar's label. Values are in percent."""

FEWEST_LOOPS = 3
_STRENGTHS = (0.55, 0.25, 0.85)
"""Of the colours of neighbouring loops, so that bars differ in grey too."""
_GREYS = ("#f2f2f2", "#bdbdbd", "#8a8a8a", "#d9d9d9", "#a6a6a6", "#737373")


def prepare_shares(diagnoses: Diagnoses, name: str) -> pd.DataFrame:
    """The rows of figure 7, in percent; see figures.common.COLUMNS. Raises NoData."""
    from plt_diagnostics.synthesis import SHARED, shares

    if max(diagnoses, default=0) < FEWEST_LOOPS:
        raise NoData(f"it needs a diagnosis at {FEWEST_LOOPS} or more loops")
    frames = []
    for loops, diagnosis in diagnoses.items():
        if loops < FEWEST_LOOPS or not {*SHARED} & {*diagnosis.manifest.measurements}:
            continue
        found = shares(diagnosis.rows(list(SHARED)))
        found["measurement"] = found["measurement"].astype(str) + "_share"
        found[["value", "low", "high"]] *= 100.0
        frames.append(found.assign(origin="own", model=name, loops=loops))
    if not frames:
        raise NoData(f"the diagnoses of it hold no {' and no '.join(SHARED)}")
    own = pd.concat(frames, ignore_index=True)
    missing = [lens for lens in LENSES if not (own["measurement"] == lens).any()]
    if missing:
        raise NoData(f"the diagnoses of it hold no {' and no '.join(each.removesuffix('_share') for each in missing)}")
    order = {lens: place for place, lens in enumerate(LENSES)}
    own = own.sort_values(
        ["loops", "measurement", "loop"], key=lambda c: c.map(order) if c.name == "measurement" else c
    )
    plain = {"variant": str, "n": "Int64"}
    return both(own.astype(plain)[list(COLUMNS)], published_rows("figure7", list(LENSES)))


def draw_shares(data: pd.DataFrame, figure: Canvas | None = None) -> Canvas:
    """Draw prepare_shares' rows, into `figure` or a new one: a panel for each R, and the published one."""
    every = own_loops(data)
    figure = style.new_figure(1.0 + 2.5 * (len(every) + 1), 3.2) if figure is None else figure
    grid = figure.subplots(1, len(every) + 1, squeeze=False, sharey=True)[0]
    own, printed = of(data, "own"), of(data, "published")
    for axes, loops in zip(grid[:-1], every, strict=True):
        _bars(axes, own[own["loops"] == loops], grey=False)
        axes.set_title(f"R={loops}")
    _bars(grid[-1], printed, grey=True)
    grid[-1].set_title(f"{LABEL}, R={int(printed['loops'].iloc[0])}", color=style.PUBLISHED)
    grid[-1].set_facecolor("#f6f6f6")
    grid[-1].tick_params(colors=style.PUBLISHED)
    grid[0].set_ylabel("share of the extra loops (%)")
    grid[0].set_ylim(0, 100)
    headline(figure, f"{name_of(data)}: where refinement concentrates, over {samples_of(data)}")
    extra = range(2, max(*every, int(printed["loop"].max())) + 1)
    figure.legend(
        handles=[_patch(loop) for loop in extra], loc="outside lower center", ncols=len(extra), handleheight=1.8
    )
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, *, grey: bool) -> None:
    """A stacked bar for each lens, loop 2 at the bottom, with its numbers."""
    axes.grid(axis="x", visible=False)
    for place, lens in enumerate(LENSES):
        bottom = 0.0
        for loop, value in rows[rows["measurement"] == lens].sort_values("loop")[["loop", "value"]].to_numpy(float):
            if not value > 0:
                continue
            colour = _GREYS[(int(loop) - 2) % len(_GREYS)]
            edge = style.PUBLISHED if grey else "black"
            axes.bar(
                place,
                value,
                bottom=bottom,
                width=0.68,
                facecolor=colour if grey else _colour(int(loop)),
                edgecolor=edge,
                hatch=style.look(int(loop)).hatch,
                linewidth=0.6,
            )
            if value >= 5:
                box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
                axes.text(place, bottom + value / 2, f"{value:.0f}", ha="center", va="center", fontsize=7, bbox=box)
            bottom += value
    axes.set_xticks(range(len(LENSES)), list(LENSES.values()))


def _colour(loop: int) -> tuple[str, float]:
    return style.look(loop).colour, _STRENGTHS[(loop - 2) % len(_STRENGTHS)]


def _patch(loop: int) -> Patch:
    hatch = style.look(loop).hatch
    return Patch(facecolor=_colour(loop), edgecolor="black", hatch=hatch, linewidth=0.6, label=f"loop {loop}")
