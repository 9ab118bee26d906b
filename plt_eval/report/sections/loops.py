"""What the loops do: gain and cost, shares, and every measurement by loop, layer and position."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd

from plt_eval.report import style
from plt_eval.report.blocks import Block, Folded, Picture, Section, Table, Text
from plt_eval.report.breakdowns import draw_layers, draw_positions, prepare_layers, prepare_positions
from plt_eval.report.evidence import Evidence
from plt_eval.report.figures import FIGURES, Canvas, NoData
from plt_eval.report.reference import LABEL, published
from plt_eval.report.sections.cells import PER_LOOP, estimate, sentence


def scissors(evidence: Evidence) -> Section:
    """Figure 3 and its numbers."""
    blocks: list[Block] = []

    def table(data: pd.DataFrame) -> Table:
        rows: list[tuple[str, ...]] = []
        grey = []
        own = data[data["origin"] == "own"]
        for loops in sorted(own["loops"].unique()):
            for loop in sorted(own[own["loops"] == loops]["loop"].unique()):
                cells = [_cell_of(own, loops, loop, name) for name in _SCISSORS]
                rows.append((f"R={loops}, loop {loop}", *cells))
        for _, row in data[(data["origin"] == "published") & (data["measurement"] == "output_shift")].iterrows():
            grey.append(len(rows))
            rows.append((f"{LABEL}, R={row['loops']}, loop {row['loop']}", str(row["value"]), "-", "-"))
        printed = {row["quantity"]: row["printed"] for _, row in published("figure3").iterrows()}
        grey.append(len(rows))
        between = f"{printed[f'{_SCISSORS[2]}_lowest']} to {printed[f'{_SCISSORS[2]}_highest']}"
        rows.append((f"{LABEL}, every extra loop", "-", "-", between))
        heads = ("", "output shift (nats)", "offset cost (L2 norm)", "cost / gain")
        caption = "Gain and cost of each extra loop, mean [95% interval over samples]"
        return Table(caption, heads, tuple(rows), published=frozenset(grey))

    blocks += _figure(
        evidence,
        "fig3",
        "The gain is how much a loop changes the predictions, the cost how far the state that it reads is from the "
        "token's own. Units differ, so their course over the loops compares, not their height.",
        table,
    )
    return Section("scissors", "Gain against cost", tuple(blocks))


_SCISSORS = ("output_shift", "offset_cost", "offset_cost_over_output_shift")


def _cell_of(rows: pd.DataFrame, loops: int, loop: int, measurement: str) -> str:
    found = rows[(rows["loops"] == loops) & (rows["loop"] == loop) & (rows["measurement"] == measurement)]
    return estimate(found.iloc[0]) if len(found) else "-"


def shares(evidence: Evidence) -> Section:
    """Figure 7 and its numbers."""

    def table(data: pd.DataFrame) -> Table:
        loops = sorted(int(loop) for loop in data["loop"].unique())
        rows: list[tuple[str, ...]] = []
        grey = []
        for (origin, count, lens), group in data.groupby(["origin", "loops", "measurement"], sort=False):
            if origin == "published":
                grey.append(len(rows))
            by_loop = {int(row["loop"]): estimate(row, ".0f") for _, row in group.iterrows()}
            whose = f"{LABEL}, " if origin == "published" else ""
            rows.append((f"{whose}R={count}: {_SHARED[str(lens)]}", *(by_loop.get(loop, "-") for loop in loops)))
        heads = ("share of", *(f"loop {loop} (%)" for loop in loops))
        caption = "Each extra loop's share, in percent [95% interval over samples]"
        return Table(caption, heads, tuple(rows), published=frozenset(grey))

    caption = "Each extra loop's share of what all extra loops do. A model of two loops has nothing to share."
    return Section("shares", "Where refinement concentrates", tuple(_figure(evidence, "fig7", caption, table)))


_SHARED = {
    "output_shift_share": "output shift",
    "attention_kl_share": "attention re-routing",
    "peak_loop_share": "token breadth",
}


def breadth(evidence: Evidence) -> Section:
    """On how many tokens each loop does the most."""
    rows, said = [], ""
    last = max(evidence.diagnoses)
    for loops, summary in evidence.summaries.items():
        mine = whole(summary, "peak_loop", "")
        if loops < 3 or mine.empty:
            continue
        by_loop = {int(row["loop"]): row for _, row in mine.iterrows()}
        cells = [estimate(by_loop[loop], ".1%") if loop in by_loop else "-" for loop in range(2, last + 1)]
        rows.append((f"R={loops}", *cells))
        top = max(by_loop.values(), key=lambda row: float(row["value"]))
        said = (
            f"Of the {loops}-loop model's tokens, {float(top['value']):.0%} change most at loop {int(top['loop'])}; "
            f"an even spread over {loops - 1} extra loops would be {1 / (loops - 1):.0%}."
        )
    if not rows:
        text = "Token breadth says which extra loop moves a token most: it needs a diagnosis at three or more loops."
        return Section("breadth", "Token by token", (Text(text),))
    heads = ("", *(f"peak at loop {loop}" for loop in range(2, last + 1)))
    table = Table("Share of tokens whose output each loop moves most, mean [95% interval]", heads, tuple(rows))
    return Section("breadth", "Token by token", (Text(said), table))


def by_loop(evidence: Evidence) -> Section:
    """Every measurement at every loop of the largest-R run, and the paper's other figures."""
    main = evidence.main
    blocks: list[Block] = [_loop_table(evidence, max(evidence.diagnoses))]
    captions = {
        "fig2": "Small steps in a kept direction that near a fixed point would be refinement; steps that turn back are "
        "oscillation.",
        "fig5": "How diffuse the heads are, how far a loop re-routes them, and how much they read loop 1's cache.",
        "fig6": "The rank of the true next token should fall while loops refine.",
        "fig4": "Alike heads (near 1) do the same work twice.",
    }
    for name, caption in captions.items():
        blocks += _figure(evidence, name, caption, None)
    others = [loops for loops in evidence.diagnoses if loops != main.manifest.loops]
    blocks += [
        Folded(f"The same table at R={loops}", (_loop_table(evidence, loops),))
        for loops in sorted(others, reverse=True)
    ]
    return Section("loops", "Every measurement, loop by loop", tuple(blocks))


def _loop_table(evidence: Evidence, loops: int) -> Table:
    from plt_diagnostics import MEASUREMENTS

    manifest, summary = evidence.diagnoses[loops].manifest, evidence.summaries[loops]
    rows = []
    for name, kind in MEASUREMENTS.items():
        variant = manifest.defaults.get(name, "")
        mine = whole(summary, name, variant)
        if mine.empty:
            continue
        cells = {int(row["loop"]): estimate(row) for _, row in mine.iterrows()}
        title = f"{kind.title} ({variant})" if variant else kind.title
        rows.append((title, kind.unit, *(cells.get(loop, "") for loop in range(1, loops + 1))))
    heads = ("measurement", "unit", *(PER_LOOP.format(loop) for loop in range(1, loops + 1)))
    caption = f"R={loops}: mean over tokens, layers and heads, then over samples [95% interval over samples]"
    return Table(caption, heads, tuple(rows), left=frozenset({0, 1}))


def breakdowns(evidence: Evidence) -> Section:
    """By layer, and along the text."""
    main = evidence.main
    who = f"{evidence.name}, R={main.manifest.loops}"
    blocks: list[Block] = []
    for name, prepare, draw, title in (
        ("layers", prepare_layers, draw_layers, "attention entropy, re-routing and gate by layer"),
        ("positions", prepare_positions, draw_positions, "output shift by position in the text"),
    ):
        try:
            data = prepare(main)
        except NoData as why:
            blocks.append(Text(f"Not drawn: {title}; {why}.", "note"))
            continue
        wide = _place_table(data, name, title)
        with style.drawing():
            canvas = draw(data)
        alternative = f"{who}: {title}; the numbers are in the table below."
        blocks.append(_picture(canvas, name, alternative, sentence(title)))
        blocks.append(Folded(f"The numbers: {title}", (wide,)))
    return Section("breakdowns", "By layer and position", tuple(blocks))


def _place_table(data: pd.DataFrame, by: str, title: str) -> Table:
    places = sorted(int(at) for at in data["at"].unique())
    rows = []
    for (measurement, loop), group in data.groupby(["measurement", "loop"], sort=False):
        cells = {int(row["at"]): estimate(row) for _, row in group.iterrows()}
        rows.append((f"{measurement}, loop {loop}", *(cells.get(place, "") for place in places)))
    unit = "layer" if by == "layers" else "from position"
    return Table(f"{sentence(title)} Mean [95% interval]", ("", *(f"{unit} {place}" for place in places)), tuple(rows))


def _figure(
    evidence: Evidence, name: str, caption: str, table: Callable[[pd.DataFrame], Table] | None
) -> Iterable[Block]:
    """One of the paper's figures and the table of its numbers; a line that says why where it cannot be drawn."""
    figure = FIGURES[name]
    try:
        data = figure.prepare(evidence.diagnoses, evidence.name)
    except NoData as why:
        return [Text(f"Not drawn: {figure.title}; {why}.", "note")]
    numbers = [] if table is None else [table(data)]
    where = "the numbers are in the table below" if numbers else "the numbers are in the table of this section"
    alternative = f"{evidence.name}: {figure.title}; {where}."
    with style.drawing():
        canvas = figure.draw(data)
    return [_picture(canvas, name, alternative, caption), *numbers]


def _picture(canvas: Canvas, name: str, alternative: str, caption: str) -> Picture:
    svg = style.inline_svg(style.root_figure(canvas), name, alternative)
    return Picture(svg, alternative, caption)


def whole(summary: pd.DataFrame, measurement: str, variant: str) -> pd.DataFrame:
    """The sample-level rows of one measurement and variant, by loop."""
    rows = summary[summary["layer"].isna() & summary["position"].isna()]
    rows = rows[(rows["measurement"].astype(str) == measurement) & (rows["variant"].astype(str) == variant)]
    return rows.sort_values("loop")
