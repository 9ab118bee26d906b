"""Published numbers beside our own, told apart."""

from __future__ import annotations

import pandas as pd

from plt_eval.report.blocks import Block, Folded, Section, Table, Text
from plt_eval.report.evidence import Evidence
from plt_eval.report.reference import LABEL, published
from plt_eval.report.sections.cells import PER_LOOP, estimate
from plt_eval.report.sections.loops import whole


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
    mine = whole(evidence.summaries[loops], measurement, variant)
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
