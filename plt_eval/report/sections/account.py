"""How it is known: definitions, runs, warnings, and the commands that do it again."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from plt_eval.report.blocks import Block, Commands, Items, Section, Table, Text
from plt_eval.report.evidence import Evidence
from plt_eval.report.sections.cells import size
from plt_eval.words import count_of

if TYPE_CHECKING:
    from plt_eval.diagnosis.store import Diagnosis


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
    blocks.append(Text(f"Data: {main.data.source}, {main.total:,} of {count_of(main.data.candidates, 'text')}."))
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
        row("trained at", lambda m: "-" if m.model.trained_loops is None else count_of(m.model.trained_loops, "loop")),
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
        row("memory above the model", lambda m: size(m.peak_memory_bytes)),
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
    return f"{hardware.cpu}, {count_of(hardware.cores, 'core')}, {', '.join(hardware.gpus) or 'no GPU'}"


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
