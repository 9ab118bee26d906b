"""Is the rule right? What it recommends from diagnostics alone, against what evaluation says of every loop count.

    python scripts/validate_rule.py plt-tiny
    python scripts/validate_rule.py results/studies/mine --results results --markdown

For every seed of each family's study the rule reads the diagnosis of the model with the most loops and no task score;
the study's held-out text and suites say which loop count is best, and which is the smallest that the data do not tell
from it (plt_eval.report.scores). Rules that need no diagnosis ("always R=1") stand beside it: a rule that is worth its
diagnosis disagrees with evaluation less often than they do. Measures of one model are not independent of each other,
so the counts are no test of significance.

Exit code 0, whatever comes out; 2 where a study or its diagnoses are missing (one line says how to make them).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import rich.table

from plt_eval.errors import UserError
from plt_eval.models import DEFAULT_FAMILY
from plt_eval.report.blocks import Table, markdown_table
from plt_eval.report.evidence import Case, agreement, compare_with_evaluation
from plt_eval.report.scores import Measured
from plt_eval.tables import output_console

VERDICTS = ("agrees", "cannot tell", "disagrees")
HEADS = ("family", "seed", "read on", "rule says", "measure", "best", "smallest level with it", "verdict")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        cases = [case for family in options.family for case in compare_with_evaluation(family, options.results)]
    except UserError as error:
        print(f"validate_rule: {error}", file=sys.stderr)
        return 2
    for table in (case_table(cases), tally_table(cases)):
        if options.markdown:
            print(markdown_table(table) + "\n")
        else:
            _print(table)
    return 0


def _print(table: Table) -> None:
    shown = rich.table.Table(*table.heads, title=table.caption, title_justify="left")
    for row in table.rows:
        shown.add_row(*row)
    output_console().print(shown)


def case_table(cases: Sequence[Case]) -> Table:
    """One row for each headline measure of each family's seed."""
    rows = tuple(row for case in cases for row in _case_rows(case))
    return Table("What the rule says and what evaluation says", HEADS, rows, left=frozenset(range(len(HEADS))))


def _case_rows(case: Case) -> list[tuple[str, ...]]:
    says = "not enough evidence" if case.advice.loops is None else f"R={case.advice.loops}"
    found = []
    for each in case.agreements:
        if each.measured.headline:
            level = "-" if each.measured.level is None else f"R={each.measured.level}"
            name, read = case.study.folder.resolve().name, case.diagnosis.manifest
            on = f"{read.done} samples of {read.data.name}"
            best = f"R={each.measured.best}"
            found.append((name, str(case.seed), on, says, each.measured.name, best, level, each.verdict))
    return found


def tally_table(cases: Sequence[Case]) -> Table:
    """How often the rule, and each constant one, agrees and disagrees with a headline measure."""
    own = [each.verdict for case in cases for each in case.agreements if each.measured.headline]
    measures = [each.measured for case in cases for each in case.agreements if each.measured.headline]
    counts = sorted({score.loops for measured in measures for score in measured.scores})
    rows = [("from the diagnostics", *_tally(own))]
    rows += [(f"always R={loops}", *_tally(_constant(measures, loops))) for loops in counts]
    return Table("How often a rule agrees with evaluation", ("rule", *VERDICTS), tuple(rows))


def _constant(measures: Sequence[Measured], loops: int) -> list[str]:
    return [agreement(measured, loops).verdict for measured in measures]


def _tally(verdicts: Sequence[str]) -> list[str]:
    counted = Counter(verdicts)
    return [str(counted[verdict]) for verdict in VERDICTS]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("family", nargs="*", default=[DEFAULT_FAMILY], help="studies: their names or folders")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where diagnoses and studies are")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
