"""Figure 3: the gain-cost scissors. What a loop changes in the output, against what the shift costs on the way into it.

    figure = draw_scissors(prepare_scissors(diagnoses, "plt-tiny"))

Gain is the output shift KL(p(r) || p(r-1)), in nats, on the left and logarithmic; cost is the intrinsic offset cost,
the mean norm of z_i(r-1) - z_{i-1}(r-1), on the right. The two have different units: only their course by loop
compares."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from plt_eval.diagnosis.store import Diagnosis
from plt_eval.report import style
from plt_eval.report.figures.common import (
    COLUMNS,
    Canvas,
    Diagnoses,
    band,
    both,
    headline,
    log_axis,
    loop_axis,
    name_of,
    of,
    own_loops,
    own_rows,
    published_panel,
    published_rows,
    samples_of,
)

GAIN, COST, RATIO = "output_shift", "offset_cost", "offset_cost_over_output_shift"
_GAIN_LABEL = r"output shift $\Delta_p$ (nats, log scale)"


def prepare_scissors(diagnoses: Diagnoses, name: str) -> pd.DataFrame:
    """The rows of figure 3; see figures.common.COLUMNS. Raises NoData."""
    own = own_rows(diagnoses, name, [GAIN, COST], fewest_loops=2)
    measured = [each for each in diagnoses.values() if {GAIN, COST} <= {*each.manifest.measurements}]
    own = pd.concat([own, *(_ratios(each, name) for each in measured)], ignore_index=True)
    printed = pd.concat([published_rows("table3", [GAIN]), published_rows("figure3")], ignore_index=True)
    return both(own, printed)


def _ratios(diagnosis: Diagnosis, name: str) -> pd.DataFrame:
    """The ratio of the two means by loop, with its interval."""
    from plt_diagnostics.synthesis import cost_over_gain

    variant = diagnosis.manifest.defaults[COST]
    found = cost_over_gain(diagnosis.rows([GAIN, COST]), variant=variant)
    found = found[found["quantity"] == "ratio"]
    whose = {
        "origin": "own",
        "model": name,
        "loops": diagnosis.manifest.loops,
        "measurement": RATIO,
        "variant": variant,
    }
    return found.assign(**whose).astype({"n": "Int64"})[list(COLUMNS)]


def draw_scissors(data: pd.DataFrame, figure: Canvas | None = None) -> Canvas:
    """Draw prepare_scissors' rows, into `figure` or a new one: a panel for each R, all on the same two scales."""
    every = own_loops(data)
    figure = style.new_figure(2.0 + 2.2 * (len(every) + 1), 2.9) if figure is None else figure
    grid = figure.subplots(1, len(every) + 1, squeeze=False)[0]
    gains, costs, ratios = (of(data, "own", each) for each in (GAIN, COST, RATIO))
    twins = []
    for axes, loops in zip(grid[:-1], every, strict=True):
        twins.append(_panel(axes, gains[gains["loops"] == loops], costs[costs["loops"] == loops]))
        loop_axis(axes, 2, max(every))
        axes.set_title(f"R={loops}{_times(ratios[ratios['loops'] == loops])}")
    _share_scales(list(grid[:-1]), twins)
    _published_panel(grid[-1], data)
    headline(figure, f"{name_of(data)}: gain against cost by loop, mean and 95% band over {samples_of(data)}")
    _legend(figure)
    return figure


def _panel(axes: Axes, gain: pd.DataFrame, cost: pd.DataFrame) -> Axes:
    """One R; returns the right-hand axes."""
    twin = axes.twinx()
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    look = {"marker": "o", "line": "solid"}
    band(axes, gain, colour=style.GAIN, aside=-0.05, **look)
    band(twin, cost, colour=style.COST, marker="s", line=(0, (4, 1.5)), aside=0.05)
    return twin


def _share_scales(axes: list[Axes], twins: list[Axes]) -> None:
    """The same limits in all panels; labels at the outer edges only."""
    for group in (axes, twins):
        limits = [each.get_ylim() for each in group]
        for each in group:
            each.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    low = min(each.dataLim.y0 for each in axes)
    high = max(each.dataLim.y1 for each in axes)
    for each in axes:
        if low > 0:
            each.set_ylim(low / 1.3, high * 1.3)
            log_axis(each)
    for each in twins:
        each.set_ylim(0, max(twin.dataLim.y1 for twin in twins) * 1.15)
    for each in axes[1:]:
        each.tick_params(labelleft=False)
    for each in twins[:-1]:
        each.tick_params(labelright=False)
    axes[0].set_ylabel(_GAIN_LABEL, color=style.GAIN)
    twins[-1].set_ylabel(r"offset cost $\Omega$ (L2 norm)", color=style.COST)


def _times(ratios: pd.DataFrame) -> str:
    """As in "Omega / Delta_p = 12 to 31", over its loops."""
    if ratios.empty:
        return ""
    low, high = f"{ratios['value'].min():.3g}", f"{ratios['value'].max():.3g}"
    return f"\n$\\Omega/\\Delta_p$ = {low}" + ("" if low == high else f" to {high}")


def _published_panel(axes: Axes, data: pd.DataFrame) -> None:
    rows = of(data, "published", GAIN)
    low = of(data, "published", f"{RATIO}_lowest")["value"].iloc[0]
    high = of(data, "published", f"{RATIO}_highest")["value"].iloc[0]
    published_panel(axes, rows, _GAIN_LABEL, margin=0.35, log=True)
    axes.set_title(f"{axes.get_title()}\n$\\Omega/\\Delta_p$ = {low:g} to {high:g}, every loop", color=style.PUBLISHED)


def _legend(figure: Canvas) -> None:
    handles = [
        Line2D([], [], color=style.GAIN, marker="o", linestyle="solid", label="gain: output shift (left)"),
        Line2D([], [], color=style.COST, marker="s", linestyle=(0, (4, 1.5)), label="cost: offset cost (right)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
