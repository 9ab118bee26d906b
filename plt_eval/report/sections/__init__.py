"""What a report says, section by section: Evidence in, blocks out. page.py puts them together and writes them."""

from __future__ import annotations

from collections.abc import Sequence

from plt_eval.report.blocks import Section
from plt_eval.report.evidence import Evidence
from plt_eval.report.sections.account import methods, reproduce, warnings
from plt_eval.report.sections.evaluation import scores
from plt_eval.report.sections.loops import breadth, breakdowns, by_loop, scissors, shares
from plt_eval.report.sections.published import reference
from plt_eval.report.sections.rule import changes, votes


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
