"""What a report says, section by section: Evidence in, blocks out. page.py puts them together and writes them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from plt_eval.report import style
from plt_eval.report.blocks import Block, Commands, Folded, Items, Picture, Section, Table, Text
from plt_eval.report.breakdowns import draw_layers, draw_positions, prepare_layers, prepare_positions
from plt_eval.report.evidence import Agreement, Evidence
from plt_eval.report.figures import FIGURES, Canvas, NoData
from plt_eval.report.reference import LABEL, published
from plt_eval.report.scores import HOW_TEXT, Measured, Score

if TYPE_CHECKING:
    from plt_diagnostics.lenses import Vote
    from plt_eval.diagnosis.store import Diagnosis

STANCES = {"for": "▲ for", "against": "▼ against", "abstains": "· abstains"}
"""A vote in a table: a sign and a word, so that no colour is needed."""

PER_LOOP = "loop {}"


def all_sections(evidence: Evidence, report_command: Sequence[str]) -> tuple[Section, ...]:
    """The sections in the order in which a reader asks: why, how much, where, is it so, against what, and how known."""
    return (
        votes(evidence),
        scissors(evidence),
        shares(evidence),
        breadth(evidence),
        scores(evidence),
        changes(evidence),
        by_loop(evidence),
        breakdowns(evidence),
        reference(evidence),
        methods(evidence),
        warnings(evidence),
        reproduce(evidence, report_command),
    )


# --- the votes ----------------------------------------------------------------------------------------


def votes(evidence: Evidence) -> Section:
    """Every lens' vote on every extra loop, first at a glance, then with numbers and reasons."""
    answer = evidence.answer
    blocks: list[Block] = [Text(answer.sentence)]
    if answer.votes:
        blocks.append(_glance(answer.votes, answer.measured))
        blocks.append(
            Text(
                "A lens votes only where its 95% interval lies wholly on one side of its line. Lenses of one mechanism "
                "are one voice; a mechanism is credited where at least two of its lenses vote and all that vote agree.",
                "note",
            )
        )
    for verdict in answer.verdicts:
        mine = [vote for vote in answer.votes if vote.loop == verdict.loop]
        blocks.append(_vote_table(mine, f"{verdict.sentence[:1].upper()}{verdict.sentence[1:]}"))
    if len(evidence.advice) > 1:
        rows = tuple(
            (f"R={loops}", _loops_or_open(found.loops), found.sentence)
            for loops, found in sorted(evidence.advice.items(), reverse=True)
        )
        blocks.append(
            Table(
                "The same rule on each diagnosis; the answer above is that of the largest R, which sees the most loops",
                ("diagnosis of", "says", "because"),
                rows,
                left=frozenset({0, 1, 2}),
                cards=True,
            )
        )
    return Section("evidence", "The evidence, lens by lens", tuple(blocks))


def _glance(cast: Sequence[Vote], loops: int) -> Table:
    lenses = list(dict.fromkeys((vote.mechanism, vote.lens) for vote in cast))
    by_place = {(vote.lens, vote.loop): STANCES[vote.stance] for vote in cast}
    rows = tuple(
        (lens, mechanism, *(by_place.get((lens, loop), "") for loop in range(2, loops + 1)))
        for mechanism, lens in lenses
    )
    heads = ("lens", "mechanism", *(PER_LOOP.format(loop) for loop in range(2, loops + 1)))
    return Table("Votes at a glance: does the loop earn its place?", heads, rows, left=frozenset(range(len(heads))))


def _vote_table(cast: Sequence[Vote], caption: str) -> Table:
    rows = tuple(
        (
            vote.lens,
            STANCES[vote.stance],
            with_interval(vote.value, vote.low, vote.high),
            "-" if vote.line is None else f"{vote.line:.3g}",
            vote.quantity,
            _meaning(vote),
        )
        for vote in cast
    )
    heads = ("lens", "vote", "value [95%]", "line", "of what", "why")
    return Table(caption, heads, rows, left=frozenset({0, 1, 4, 5}), cards=True)


def _meaning(vote: Vote) -> str:
    """The reason without the number at its end, which has columns of its own."""
    meaning, _, number_ = vote.reason.rpartition(" (")
    return meaning if vote.value is not None and ", line " in number_ else vote.reason


def changes(evidence: Evidence) -> Section:
    """What would change the answer."""
    answer = evidence.answer
    blocks: list[Block] = [Text(answer.nearest)]
    if answer.what_would_change:
        shown = answer.what_would_change[:8]
        rows = tuple(
            (
                change.lens,
                str(change.loop),
                f"{change.stance} → {change.to}",
                _loops_or_open(change.loops),
                number(change.margin),
            )
            for change in shown
        )
        blocks.append(
            Table(
                "Single votes that would change the answer, the nearest to flipping first; the margin is how far the "
                "value is from its line, in half-widths of the interval (below 1 the lens abstains now)",
                ("lens", "loop", "vote", "then the answer is", "margin"),
                rows,
                left=frozenset({0, 2, 3}),
            )
        )
    wider = [vote for vote in answer.votes if vote.stance == "abstains" and vote.margin is not None]
    if wider:
        blocks.append(
            Text(
                f"{len(wider)} of {len(answer.votes)} votes abstain because their interval holds the line. "
                f"Four times the {answer.samples or 0:,} samples would halve the intervals."
            )
        )
    if answer.loops is not None and answer.loops == answer.measured:
        blocks.append(Text("Every loop that was measured earned its place: a diagnosis with more loops may say more."))
    return Section("change", "What would change the answer", tuple(blocks))


# --- gain and cost ------------------------------------------------------------------------------------


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
        rows, grey = [], []
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
        mine = _whole(summary, "peak_loop", "")
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


# --- in full ------------------------------------------------------------------------------------------


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
        mine = _whole(summary, name, variant)
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
        blocks.append(_picture(canvas, name, alternative, _sentence(title)))
        blocks.append(Folded(f"The numbers: {title}", (wide,)))
    return Section("breakdowns", "By layer and position", tuple(blocks))


def _place_table(data: pd.DataFrame, by: str, title: str) -> Table:
    places = sorted(int(at) for at in data["at"].unique())
    rows = []
    for (measurement, loop), group in data.groupby(["measurement", "loop"], sort=False):
        cells = {int(row["at"]): estimate(row) for _, row in group.iterrows()}
        rows.append((f"{measurement}, loop {loop}", *(cells.get(place, "") for place in places)))
    unit = "layer" if by == "layers" else "from position"
    return Table(f"{_sentence(title)} Mean [95% interval]", ("", *(f"{unit} {place}" for place in places)), tuple(rows))


# --- evaluation ---------------------------------------------------------------------------------------


def scores(evidence: Evidence) -> Section:
    """Task scores at each loop count, and whether they bear the recommendation out."""
    headline = [each for each in evidence.agreements if each.measured.headline]
    parts = [each for each in evidence.agreements if not each.measured.headline]
    if not headline and not parts:
        text = (
            "No task scores of these models were found, so nothing says yet whether the diagnostics are right. "
            "`plt-eval run` evaluates a model at several loop counts, `plt-eval study` trains and evaluates a family."
        )
        return Section("scores", "What evaluation says", (Text(text, "note"),))
    blocks: list[Block] = [Text(agreement_sentence(evidence))]
    blocks.append(Items(tuple(f"{each.measured.name} {each.verdict}: {each.reason}." for each in headline)))
    sources = list(dict.fromkeys(each.measured.source for each in (*headline, *parts)))
    for source in sources:
        mine = [each for each in (headline or parts) if each.measured.source == source]
        if mine:
            blocks.append(_score_table(mine, f"Scores by loop count, each with its 95% interval, from {source}"))
    rest = [_score_table([each for each in parts if each.measured.source == s], f"Parts, from {s}") for s in sources]
    blocks += (
        [Folded("Parts of the suites", tuple(table for table in rest if table.rows))] if parts and headline else []
    )
    blocks.append(Folded("How far each loop count is from the best", (_gap_table(headline or parts),)))
    blocks.append(
        Text(
            "Every loop count here is a model of its own, trained for it, unless one model was run at several. The "
            "intervals are over problems or documents and say nothing of what another training seed would give; they "
            "are not corrected for being several.",
            "note",
        )
    )
    return Section("scores", "What evaluation says", tuple(blocks))


def agreement_sentence(evidence: Evidence) -> str:
    """As in "Of 3 measures of task performance, asked about 2 loops: 1 agrees (...); 2 disagree (...)." """
    headline = [each for each in evidence.agreements if each.measured.headline] or list(evidence.agreements)
    said = evidence.answer.loops
    if not headline:
        return "No task scores of these models were found."
    if said is None:
        best = [f"R={each.measured.best} on {each.measured.name}" for each in headline]
        return f"There is no recommendation to hold against it. The best is {', '.join(dict.fromkeys(best))}."
    parts = []
    for verdict, verb in (("agrees", "agree"), ("disagrees", "disagree"), ("cannot tell", "cannot tell")):
        names = [each.measured.name for each in headline if each.verdict == verdict]
        if names:
            parts.append(f"{len(names)} {verb if len(names) > 1 else verdict} ({', '.join(dict.fromkeys(names))})")
    asked = f"Of {_count(len(headline), 'measure')} of task performance, asked about {_count(said, 'loop')}"
    return f"{asked}: {'; '.join(parts)}."


def _score_table(agreements: Sequence[Agreement], caption: str) -> Table:
    loops = sorted({score.loops for each in agreements for score in each.measured.scores})
    rows = tuple(
        (
            each.measured.name,
            *(_score(each.measured, each.measured.at(count)) for count in loops),
            f"R={each.measured.best}",
            "-" if each.measured.level is None else f"R={each.measured.level}",
            each.verdict,
        )
        for each in agreements
    )
    heads = ("measure", *(f"R={count}" for count in loops), "best", "smallest\nlevel with it", "the answer")
    return Table(caption, heads, rows, left=frozenset({0, len(heads) - 1}))


def _score(measured: Measured, score: Score | None) -> str:
    if score is None:
        return "-"
    if measured.unit == "share":
        return with_interval(score.value, score.low, score.high, ".1%")
    return with_interval(score.value, score.low, score.high, ".4f")


def _gap_table(agreements: Sequence[Agreement]) -> Table:
    rows = []
    for each in agreements:
        form = "+.1%" if each.measured.unit == "share" else "+.4f"
        for gap in each.measured.gaps.values():
            if gap.how != "itself":
                cell = with_interval(gap.value, gap.low, gap.high, form)
                against = f"R={gap.loops} less R={each.measured.best}"
                rows.append((each.measured.name, against, cell, HOW_TEXT[gap.how], each.measured.definition))
    heads = ("measure", "gap", "value [95% interval]", "how", "definition")
    caption = "Each loop count's score less that of the best; an interval without 0 tells them apart"
    return Table(caption, heads, tuple(rows), left=frozenset({0, 1, 3, 4}), cards=True)


# --- the paper ----------------------------------------------------------------------------------------


def reference(evidence: Evidence) -> Section:
    """Published numbers beside our own, told apart."""
    table3, figure4, table2 = published("table3"), published("figure4"), published("table2")
    rows: list[tuple[str, ...]] = []
    grey = []
    for printed in (table3, figure4):
        for name, group in printed.groupby("quantity", sort=False):
            theirs = int(group["loops"].iloc[0])
            ours = theirs if theirs in evidence.diagnoses else max(evidence.diagnoses)
            rows.append((f"{name}: {evidence.name}, R={ours}", *_own_cells(evidence, ours, str(name))))
            grey.append(len(rows))
            by_loop = {int(row["loop"]): str(row["printed"]) for _, row in group.iterrows()}
            rows.append((f"{name}: {LABEL}, R={theirs}", *(by_loop.get(at, "-") for at in _FOUR)))
    blocks: list[Block] = [
        Text(
            "Numbers in italics are printed in arXiv 2606.18023 and were not measured here. They are of models of 7B "
            "parameters and hidden size 5120: norms and ranks do not compare in height with those of other sizes, "
            "their course over the loops does.",
            "note",
        ),
        Table(
            "Per-loop signatures beside the published ones",
            ("", *(PER_LOOP.format(at) for at in _FOUR)),
            tuple(rows),
            published=frozenset(grey),
        ),
        Folded("The published benchmarks by loop count", (_published_benchmarks(table2),)),
    ]
    return Section("published", "Beside the published numbers", tuple(blocks))


_FOUR = (1, 2, 3, 4)


def _own_cells(evidence: Evidence, loops: int, measurement: str) -> list[str]:
    variant = evidence.diagnoses[loops].manifest.defaults.get(measurement, "")
    mine = _whole(evidence.summaries[loops], measurement, variant)
    by_loop = {int(row["loop"]): estimate(row) for _, row in mine.iterrows()}
    return [by_loop.get(at, "-") for at in _FOUR]


def _published_benchmarks(table2: pd.DataFrame) -> Table:
    rows = table2[table2["model"].str.startswith("LoopCoder-v2")]
    cells = {(str(row["quantity"]), int(row["loops"])): str(row["printed"]) for _, row in rows.iterrows()}
    names = list(dict.fromkeys(name for name, _ in cells))
    body = tuple((name, *(cells.get((name, at), "-") for at in _FOUR)) for name in names)
    return Table(
        f"{LABEL}: benchmarks in points, each model at its own loop count (Table 2)",
        ("benchmark", *(f"R={at}" for at in _FOUR)),
        body,
        published=frozenset(range(len(body))),
    )


# --- how it is known ----------------------------------------------------------------------------------


def methods(evidence: Evidence) -> Section:
    """How each number was defined and measured."""
    main = evidence.main.manifest
    blocks: list[Block] = [
        Text(
            "A value is the mean over a sample's tokens (and layers and heads where there are any), then over samples; "
            "each sample counts once. Intervals are of 95%, a percentile bootstrap over samples; everything that is "
            "compared meets the same samples in every resample."
        ),
        _runs_table(evidence),
        _definitions(evidence.main),
        _lenses(),
    ]
    left = ", ".join(f"R={loops}" for loops, one in evidence.diagnoses.items() if one.manifest.resumed)
    if left:
        blocks.append(Text(f"Stopped and gone on with: {left}.", "note"))
    blocks.append(Text(f"Data: {main.data.source}, {main.total:,} of {main.data.candidates:,} texts."))
    return Section("methods", "How it was measured", tuple(blocks))


def _definitions(diagnosis: Diagnosis) -> Table:
    from plt_diagnostics import MEASUREMENTS

    manifest = diagnosis.manifest
    rows = []
    for name, kind in MEASUREMENTS.items():
        if name in manifest.measurements:
            read = manifest.defaults.get(name, "") or "-"
            rows.append((f"{kind.title} ({name})", kind.equation, kind.unit, kind.definition, read, kind.reads))
    heads = ("measurement", "equation", "unit", "what it says", "variant shown", "read from")
    return Table("Every measurement that was made", heads, tuple(rows), left=frozenset(range(6)), cards=True)


def _lenses() -> Table:
    from plt_diagnostics.lenses import LENSES

    rows = tuple((lens.name, lens.mechanism, lens.question, lens.equation) for lens in LENSES)
    heads = ("lens", "mechanism", "question", "number and line")
    return Table("The lenses of the rule", heads, rows, left=frozenset(range(4)), cards=True)


def _runs_table(evidence: Evidence) -> Table:
    manifests = [one.manifest for one in evidence.diagnoses.values()]

    def row(name: str, cell: Callable[[Any], str]) -> tuple[str, ...]:
        return (name, *(cell(manifest) for manifest in manifests))

    rows = (
        row("model", lambda m: m.model.label),
        row("trained at", lambda m: "-" if m.model.trained_loops is None else _count(m.model.trained_loops, "loop")),
        row("wiring of the loops", lambda m: m.loop_mode or "-"),
        row("read as", lambda m: m.adapter),
        row("weights sha256", lambda m: m.model.weights_sha256[:16]),
        row("parameters", lambda m: f"{m.model.parameters:,}"),
        row("samples", lambda m: f"{m.done:,}"),
        row("tokens", lambda m: f"{m.tokens:,}"),
        row("tokens a sample, at most", lambda m: f"{m.data.sequence_length:,}"),
        row("data", lambda m: m.data.name),
        row("data sha256", lambda m: m.data.sha256[:16]),
        row("tokenizer", lambda m: m.data.tokenizer),
        row("dtype, device", lambda m: f"{m.dtype}, {m.device}"),
        row("seed of the draw", lambda m: str(m.seed)),
        row("seconds", lambda m: f"{m.seconds:,.1f}"),
        row("memory above the model", lambda m: _size(m.peak_memory_bytes)),
        row("versions", lambda m: _versions(m)),
        row("commit", lambda m: _commit(m)),
        row("machine", lambda m: _machine(m)),
        row("started", lambda m: f"{m.started:%Y-%m-%d %H:%M} UTC"),
        row("run", lambda m: m.run_id),
    )
    heads = ("", *(f"R={manifest.loops}" for manifest in manifests))
    caption = "The runs that this report reads; hashes are cut, the manifests have them in full"
    return Table(caption, heads, rows, left=frozenset(range(len(heads))))


def _versions(manifest: Any) -> str:
    packages = manifest.sessions[-1].packages if manifest.sessions else {}
    wanted = ("plt-eval", "torch", "transformers", "numpy", "python")
    return ", ".join(f"{name} {packages[name]}" for name in wanted if name in packages) or "-"


def _commit(manifest: Any) -> str:
    git = manifest.sessions[-1].git if manifest.sessions else None
    return "-" if git is None else git.commit[:12] + (" and changes" if git.dirty else "")


def _machine(manifest: Any) -> str:
    if not manifest.sessions:
        return "-"
    hardware = manifest.sessions[-1].hardware
    return f"{hardware.cpu}, {_count(hardware.cores, 'core')}, {', '.join(hardware.gpus) or 'no GPU'}"


def warnings(evidence: Evidence) -> Section:
    """What may make the numbers wrong: values that were not finite, and what the files said on the way."""
    rows = tuple(_nonfinite(evidence))
    blocks: list[Block] = []
    if rows:
        heads = ("measurement", "R", "loop", "not finite", "in tables as")
        caption = "Values that were not finite, of all samples; means are over the others"
        total = "Some values were not finite. They were counted and left out; no lens reads a cell that has any."
        blocks += [Text(total, "warning"), Table(caption, heads, rows, left=frozenset({0, 4}))]
    else:
        blocks.append(Text("All measured values were finite."))
    few = [loops for loops, one in evidence.diagnoses.items() if one.manifest.done < _FEW]
    if few:
        loops = ", ".join(f"R={count}" for count in few)
        blocks.append(
            Text(f"Fewer than {_FEW} samples at {loops}: bootstrap intervals of so few are too narrow.", "warning")
        )
    if evidence.notes:
        blocks.append(Items(evidence.notes))
    return Section("warnings", "Warnings and notes", tuple(blocks))


_FEW = 30
"""Samples below which a percentile bootstrap of a mean is noticeably too narrow."""


def _nonfinite(evidence: Evidence) -> Iterator[tuple[str, ...]]:
    for loops, summary in evidence.summaries.items():
        whole = summary[summary["layer"].isna() & summary["position"].isna() & (summary["nonfinite"] > 0)]
        for _, row in whole.iterrows():
            variant = f" ({row['variant']})" if row["variant"] else ""
            left = "no value" if pd.isna(row["value"]) else "mean of the others"
            yield f"{row['measurement']}{variant}", str(loops), str(row["loop"]), f"{row['nonfinite']:,}", left


def reproduce(evidence: Evidence, report_command: Sequence[str]) -> Section:
    """The commands that made this."""
    lines = [
        shlex.join(one.manifest.sessions[-1].command) for one in evidence.diagnoses.values() if one.manifest.sessions
    ]
    lines += [shlex.join(found.study.sessions[-1].command) for found in evidence.studies if found.study.sessions]
    lines.append(shlex.join(report_command))
    blocks: tuple[Block, ...] = (
        Text("Each command finds what it has done already and only reads it; the last one writes this report again."),
        Commands(tuple(dict.fromkeys(line for line in lines if line))),
    )
    return Section("reproduce", "To reproduce", blocks)


# --- pictures and numbers -----------------------------------------------------------------------------


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


def _whole(summary: pd.DataFrame, measurement: str, variant: str) -> pd.DataFrame:
    """The sample-level rows of one measurement and variant, by loop."""
    rows = summary[summary["layer"].isna() & summary["position"].isna()]
    rows = rows[(rows["measurement"].astype(str) == measurement) & (rows["variant"].astype(str) == variant)]
    return rows.sort_values("loop")


def number(value: float | None, decimals: int | None = None) -> str:
    """With `decimals`, or three digits and more for large whole parts; "-" for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")


_ROUNDING = 1e-6
"""Of float32: below it there is nothing to tell digits of."""


def with_interval(value: float | None, low: float | None, high: float | None, form: str | None = None) -> str:
    """The value, and on a line of its own the interval, as in "0.236\n[0.121, 0.344]". Without a `form` it has as many
    digits as the interval bears: two of its width."""
    if value is None or not math.isfinite(value):
        return "-"
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    if form is not None:
        return f"{value:{form}}\n[{low:{form}}, {high:{form}}]" if known else f"{value:{form}}"
    if not known or low == high:
        return number(value)
    if abs(value) < _ROUNDING:
        return f"{value:.0e}"
    assert low is not None
    assert high is not None
    decimals = interval_digits(high - low)
    return f"{number(value, decimals)}\n[{number(low, decimals)}, {number(high, decimals)}]"


def interval_digits(width: float) -> int:
    """Decimals that show two digits of a width > 0; at most six."""
    return min(6, max(0, 1 - math.floor(math.log10(width))))


def estimate(row: Any, form: str | None = None) -> str:
    """`with_interval` of a row's value, low and high."""
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    return with_interval(value, low, high, form)


def _loops_or_open(loops: int | None) -> str:
    return "not enough evidence" if loops is None else _count(loops, "loop")


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def _size(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"
