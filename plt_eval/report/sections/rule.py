"""What the rule says: every lens' vote on every extra loop, and what would change the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from plt_eval.report.blocks import Block, Section, Table, Text
from plt_eval.report.evidence import Evidence
from plt_eval.report.sections.cells import PER_LOOP, loops_or_open, number, with_interval

if TYPE_CHECKING:
    from plt_diagnostics.lenses import Vote


STANCES = {"for": "▲ for", "against": "▼ against", "abstains": "· abstains"}
"""A vote in a table: a sign and a word, so that no colour is needed."""


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
            (f"R={loops}", loops_or_open(found.loops), found.sentence)
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
            with_interval(vote.value, vote.low, vote.high, line=vote.line),
            "-" if vote.line is None else f"{vote.line:.3g}",
            vote.quantity,
            vote.meaning,
        )
        for vote in cast
    )
    heads = ("lens", "vote", "value [95%]", "line", "of what", "why")
    return Table(caption, heads, rows, left=frozenset({0, 1, 4, 5}), cards=True)


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
                loops_or_open(change.loops),
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
