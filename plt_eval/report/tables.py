"""The paper's tables 2 to 4 (arXiv 2606.18023): own numbers in one block, published ones in another, never mixed.

    table = benchmark_table(selection)          # table 2; signature_table: 3, thinking_table: 4
    table.markdown(), table.latex(), table.csv()

The CSV form is long, one number a row, with the columns COLUMNS; `origin` is "own" or "published".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from plt_eval.report.collect import Selection
from plt_eval.report.columns import COLUMNS as OF_THE_PAPER
from plt_eval.report.figures.common import NoData, own_rows
from plt_eval.report.reference import LABEL, published
from plt_eval.report.scores import FoundStudy
from plt_eval.store import Run
from plt_eval.study.records import Estimate
from plt_eval.tables import DEEPEST_COLUMN

COLUMNS = ("origin", "source", "model", "loops", "loop", "quantity", "unit", "value", "low", "high", "spread", "n")
"""`source` is a run's id, a study's name or an arXiv id; `low` and `high` are the 95% interval, `spread` the standard
deviation over seeds; empty where there is none."""

BENCHMARKS = {
    "humaneval_plus": "HumanEval+",
    "multipl_e": "MultiPL-E",
    "bigcodebench_full": "BigCodeBench",
    "livecodebench": "LiveCodeBench",
    "swe_bench_verified": "SWE-bench Verified",
    "swe_bench_multilingual": "SWE-bench Multilingual",
    "terminal_bench_v1": "Terminal-Bench v1",
    "terminal_bench_v2": "Terminal-Bench v2",
    "mind2web": "Mind2Web",
    "bfcl_v3": "BFCL v3",
    "average": "average",
    "cruxeval": "CRUXEval",
    "fullstackbench": "FullStackBench",
    "bigcodebench_hard": "BigCodeBench-Hard",
}
"""By the name they have in results/reference: as tables print them."""

SIGNATURES = {
    "step_size": "step size",
    "output_shift": "output shift (nats)",
    "effective_rank": "effective rank",
    "angular_change": "update alignment (cos)",
}
"""The columns of table 3, by measurement."""

MOST_NARROW = 6
"""Columns up to which a LaTeX table is of ordinary size and width."""

_KINDS = ("instruct", "thinking")

Row = dict[str, Any]
"""By column of COLUMNS; what it lacks is empty."""


@dataclass(frozen=True)
class Block:
    """Rows of one origin. `rows` are cells as printed, the first column names the row."""

    origin: str
    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class PaperTable:
    """One table. `missing` says why there is no own block, None when there is one."""

    name: str
    title: str
    note: str
    blocks: tuple[Block, ...]
    data: pd.DataFrame
    missing: str | None = None

    def markdown(self) -> str:
        """A heading, and a table for each block."""
        lines = [f"# {self.title}", ""]
        for block in self.blocks:
            lines += [f"**{block.title}**", "", _markdown_line(block.heads)]
            lines += [_markdown_line(["---", *["---:"] * (len(block.heads) - 1)])]
            lines += [*(_markdown_line(row) for row in block.rows), ""]
        return "\n".join([*lines, self.note, ""])

    def latex(self) -> str:
        """A table environment that needs no package; published rows are slanted."""
        wide = max(len(block.heads) for block in self.blocks) > MOST_NARROW
        environment = "table*" if wide else "table"
        size = ["\\scriptsize", "\\setlength{\\tabcolsep}{2pt}"] if wide else ["\\small"]
        lines = [f"\\begin{{{environment}}}", "\\centering", *size]
        for block in self.blocks:
            style = "\\slshape " if block.origin == "published" else ""
            lines += [f"{{{style}\\begin{{tabular}}{{l{'r' * (len(block.heads) - 1)}}}", "\\hline"]
            lines += [f"\\multicolumn{{{len(block.heads)}}}{{l}}{{\\textbf{{{_tex(block.title)}}}}} \\\\", "\\hline"]
            lines += [_latex_line(block.heads), "\\hline", *(_latex_line(row) for row in block.rows), "\\hline"]
            lines += ["\\end{tabular}}", "\\par\\medskip"]
        lines += [f"\\caption{{{_tex(self.title)}. {_tex(self.note)}}}", f"\\label{{tab:{self.name}}}"]
        lines.append(f"\\end{{{environment}}}")
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """All numbers, one a row."""
        text: str = self.data.to_csv(index=False, float_format="%.10g", lineterminator="\n")
        return text


# --- table 2 ------------------------------------------------------------------------------------------


def benchmark_table(selection: Selection) -> PaperTable:
    """Table 2: benchmarks by loop count, of the evaluations and the study of `selection`."""
    own = _frame([*_run_rows(selection), *_study_rows(selection)])
    printed = _published("table2")
    blocks = []
    if not own.empty:
        blocks.append(_own_benchmarks(own, selection.name))
    heads = [name for name in BENCHMARKS if (printed["quantity"] == name).any()]
    named = [
        (str(model) if pd.isna(loops) else f"{model}, R={loops}", group)
        for (model, loops), group in printed.groupby(["model", "loops"], sort=False, dropna=False)
    ]
    title = "published, arXiv 2606.18023, Table 2 (points; not measured here)"
    blocks.append(Block("published", title, ("model", *(BENCHMARKS[name] for name in heads)), _body(named, heads)))
    note = "Own values with 95% intervals over problems, documents or packages, or ± the standard deviation over seeds."
    same = [column for column in OF_THE_PAPER if (own["quantity"] == column.metric).any()]
    if same:
        note += f" The paper's {', its '.join(f'{BENCHMARKS[each.name]} is {each.metric} here' for each in same)}."
    missing = None if not own.empty else "no complete evaluation or study of it is there"
    data = pd.concat([own, printed[list(COLUMNS)]], ignore_index=True)
    return PaperTable("table2", "Benchmarks by loop count", note, tuple(blocks), data, missing)


def _own_benchmarks(own: pd.DataFrame, name: str) -> Block:
    heads = list(dict.fromkeys(own["quantity"]))
    units = own.drop_duplicates("quantity").set_index("quantity")["unit"]
    named = [(f"R={loops}", group) for loops, group in own.groupby("loops")]
    titles = tuple(f"{head} (%)" if units[head] == "percent" else head for head in heads)
    return Block("own", f"own: {name}", ("loops", *titles), _body(named, heads))


def _run_rows(selection: Selection) -> Iterable[Row]:
    for by_loops in selection.runs.values():
        for run in by_loops.values():
            yield from _metric_rows(run, selection.name)


def _metric_rows(run: Run, model: str) -> Iterable[Row]:
    """The shares among a run's metrics, in percent; parts of parts are left to `plt-eval show`."""
    whose = {"origin": "own", "source": run.manifest.run_id, "model": model, "loops": run.manifest.identity.loops}
    metrics, suite = run.metrics(), run.manifest.identity.suite
    for name, metric in metrics.metrics.items() if metrics is not None else ():
        if metric.share and name.count("/") <= DEEPEST_COLUMN:
            numbers = {"value": 100 * metric.value, "low": 100 * metric.low, "high": 100 * metric.high, "n": metric.n}
            full = name if name.startswith(f"{suite}.") else f"{suite}.{name}"
            yield {**whose, "quantity": full, "unit": "percent", **numbers}


def _study_rows(selection: Selection) -> Iterable[Row]:
    """Held-out text, and the suites that no evaluation run speaks of; nothing if the study's weights are others."""
    found = selection.study
    if found is None or not _same_weights(found, selection):
        return
    source = f"study {found.folder.resolve().name}"
    for row in found.study.summary:
        whose = {"origin": "own", "source": source, "model": selection.name, "loops": row.loops}
        for entry, heldout in row.heldout.items():
            what = {"quantity": f"{entry}: held-out bits per byte", "unit": "bits per byte"}
            yield {**whose, **what, **_estimate(heldout.bits_per_byte, 1.0)}
        for name, metric in row.metrics.items():
            if name.partition(".")[0] not in selection.runs:
                yield {**whose, "quantity": name, "unit": "percent", **_estimate(metric, 100.0)}


def _same_weights(found: FoundStudy, selection: Selection) -> bool:
    runs = [(loops, run) for by_loops in selection.runs.values() for loops, run in by_loops.items()]
    hashes = [(run.manifest.identity.engine_identity.get("weights_sha256"), loops) for loops, run in runs]
    return all(each in found.weights for each in hashes if each[0] is not None)


def _estimate(found: Estimate, factor: float) -> dict[str, float | None]:
    numbers = {"value": found.value, "low": found.low, "high": found.high, "spread": found.spread}
    return {name: None if number is None else factor * number for name, number in numbers.items()}


# --- table 3 ------------------------------------------------------------------------------------------


def signature_table(selection: Selection) -> PaperTable:
    """Table 3: what each extra loop does, for every loop count that was diagnosed."""
    printed = _published("table3")
    blocks, missing, own = [], None, _frame([])
    try:
        found = own_rows(selection.diagnoses, selection.name, list(SIGNATURES), fewest_loops=2)
    except NoData as reason:
        missing = str(reason)
    else:
        found = found[found["loop"] >= 2].rename(columns={"measurement": "quantity"})
        runs = {loops: diagnosis.manifest.run_id for loops, diagnosis in selection.diagnoses.items()}
        own = found.assign(
            source=found["loops"].map(runs), unit=found["quantity"].map(_signature_units()), spread=np.nan
        )
        own = _frame(own.to_dict("records"))
        blocks.append(_signatures(own, "own", f"own: {selection.name} ({_states(found)})"))
    title = f"{LABEL}, arXiv 2606.18023, Table 3 (500 samples; not measured here)"
    blocks.append(_signatures(printed, "published", title))
    note = (
        "Own values: mean over samples with its 95% interval. Norms and ranks of models of other sizes do not compare."
    )
    data = pd.concat([own, printed[list(COLUMNS)]], ignore_index=True)
    return PaperTable("table3", "Per-loop signatures", note, tuple(blocks), data, missing)


def _signature_units() -> dict[str, str]:
    return dict(published("table3").drop_duplicates("quantity").set_index("quantity")["unit"])


def _states(rows: pd.DataFrame) -> str:
    """As in "step size raw, effective rank normed"."""
    variants = rows[rows["variant"] != ""].drop_duplicates("quantity").set_index("quantity")["variant"]
    return ", ".join(f"{name.replace('_', ' ')} {variant}" for name, variant in variants.items())


def _signatures(rows: pd.DataFrame, origin: str, title: str) -> Block:
    named = [(f"R={loops}, r={loop}", group) for (loops, loop), group in rows.groupby(["loops", "loop"])]
    return Block(origin, title, ("loop", *SIGNATURES.values()), _body(named, list(SIGNATURES)))


# --- table 4 ------------------------------------------------------------------------------------------


def thinking_table(selection: Selection) -> PaperTable:
    """Table 4: an instruct model against the thinking model of the same name, on suites that both were evaluated on at
    the same loop count. The own pairs are of all evaluations: model names that differ in these words alone."""
    own = _frame(_thinking_rows(selection.every_run))
    printed = _published("table4")
    title = f"{LABEL}, R=2, arXiv 2606.18023, Table 4 (points; not measured here)"
    names = list(dict.fromkeys(printed["quantity"]))
    blocks = [*_own_pairs(own), _pair("published", title, printed, {name: BENCHMARKS[name] for name in names})]
    missing, note = None, "Own values with 95% intervals over problems."
    if own.empty:
        missing = "no two models named alike but for `instruct` and `thinking` were evaluated on one suite"
        note = f"There are no own numbers: {missing}."
    data = pd.concat([own, printed[list(COLUMNS)]], ignore_index=True)
    return PaperTable("table4", "Instruct against thinking", note, tuple(blocks), data, missing)


def _thinking_rows(runs: Sequence[Run]) -> Iterable[Row]:
    """The newest run of each kind, of every pair that compares."""
    found: dict[tuple[object, ...], dict[str, Run]] = {}
    for run in runs:
        mine = run.manifest.identity
        base, kind = _kind(mine.model)
        if kind is not None and run.metrics() is not None:
            same = (base, mine.loops, mine.suite, mine.suite_version, mine.data_sha256, mine.problems)
            found.setdefault(same, {})[kind] = run
    for pair in found.values():
        for run in pair.values() if len(pair) == len(_KINDS) else ():
            yield from _metric_rows(run, run.manifest.identity.model)


def _own_pairs(own: pd.DataFrame) -> Iterable[Block]:
    bases = own["model"].map(lambda model: _kind(model)[0])
    for (base, loops), rows in own.groupby([bases, own["loops"]], dropna=False):
        at = "" if pd.isna(loops) else f", R={loops}"
        yield _pair("own", f"own: {base}{at} (%)", rows, {name: name for name in dict.fromkeys(rows["quantity"])})


def _pair(origin: str, title: str, rows: pd.DataFrame, names: Mapping[str, str]) -> Block:
    """A line for each quantity of `names`, the two kinds side by side."""
    kinds = rows.assign(kind=rows["model"].map(lambda model: _kind(model)[1]))
    named = [
        (printed, kinds[kinds["quantity"] == quantity].assign(quantity=lambda found: found["kind"]))
        for quantity, printed in names.items()
    ]
    return Block(origin, title, ("benchmark", *_KINDS), _body(named, _KINDS))


def _kind(model: str) -> tuple[str, str | None]:
    """("LoopCoder-V2", "thinking") of "LoopCoder-V2-Thinking"; no kind for other names."""
    match = re.search(r"[-_. ]?(instruct|thinking)(?![a-z])", model, re.IGNORECASE)
    if match is None:
        return model, None
    return (model[: match.start()] + model[match.end() :]).lower(), match[1].lower()


# --- rows and cells -----------------------------------------------------------------------------------


def _frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Own rows as a table with the columns COLUMNS."""
    table = pd.DataFrame(list(rows), columns=list(COLUMNS))
    numbers = dict.fromkeys(("value", "low", "high", "spread"), float)
    whole = dict.fromkeys(("loops", "loop", "n"), "Int64")
    return table.astype({**numbers, **whole})


def _published(name: str) -> pd.DataFrame:
    """Published rows in the same columns, and `printed`."""
    rows = published(name).assign(origin="published", low=np.nan, high=np.nan, spread=np.nan, n=pd.NA)
    return rows.astype({"n": "Int64"})[[*COLUMNS, "printed"]]


def _body(groups: Iterable[tuple[str, pd.DataFrame]], quantities: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """One line of cells for each (name, rows), a column for each quantity: as printed, or with interval or spread; "-"
    where there is none. The cells of a column have equally many decimals."""
    found = [(name, {row["quantity"]: row for row in rows.to_dict("records")}) for name, rows in groups]
    columns = []
    for quantity in quantities:
        rows = [by_quantity.get(quantity) for _, by_quantity in found]
        decimals = _decimals([row for row in rows if row is not None])
        columns.append(["-" if row is None else _cell(row, decimals) for row in rows])
    return tuple((name, *cells) for (name, _), *cells in zip(found, *columns, strict=True))


def _decimals(rows: Sequence[Row]) -> int:
    """Of own numbers: one for percents, else what gives the smallest about three digits."""
    if not rows or rows[0]["unit"] == "percent":
        return 1
    smallest = min(abs(row["value"]) for row in rows)
    return 0 if smallest >= 1000 else 1 if smallest >= 10 else 2 if smallest >= 3 else 3


def _cell(row: Row, decimals: int) -> str:
    if row["origin"] == "published":
        return str(row["printed"])
    value, low, high, spread = (f"{row[name]:.{decimals}f}" for name in ("value", "low", "high", "spread"))
    if np.isfinite(row["spread"]):
        return f"{value} ± {spread}"
    return f"{value} [{low}, {high}]" if np.isfinite(row["low"]) else value


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(_tex(cell) for cell in cells) + " \\\\"


_TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": "'"}
_TEX |= {char: f"\\{char}" for char in "&%$#_{}"}


def _tex(text: str) -> str:
    """`text` for LaTeX: characters that mean something there are escaped."""
    return "".join(_TEX.get(char, char) for char in text)


TABLES: dict[str, Callable[[Selection], PaperTable]] = {
    "table2": benchmark_table,
    "table3": signature_table,
    "table4": thinking_table,
}
"""By name, as the paper numbers them."""
