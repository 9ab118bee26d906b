"""What evaluation says: task scores at each loop count, and whether they bear the answer out."""

from __future__ import annotations

from collections.abc import Sequence

from plt_eval.report.blocks import Block, Folded, Items, Section, Table, Text
from plt_eval.report.evidence import Agreement, Evidence
from plt_eval.report.scores import HOW_TEXT, Measured, Score
from plt_eval.report.sections.cells import with_interval
from plt_eval.words import count_of


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
    asked = f"Of {count_of(len(headline), 'measure')} of task performance, asked about {count_of(said, 'loop')}"
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
