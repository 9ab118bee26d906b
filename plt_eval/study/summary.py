"""A study in one table: a row a measure, a column a loop count, gains first and costs after them.

summary.md has what the suites' parts are made of as well.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from plt_eval.heldout import MIN_UNITS, DocumentScores, difference
from plt_eval.study.records import Estimate, HeldOutRecord, HeldOutSummary, LoopSummary, Study, Variant
from plt_eval.words import count_of

Row = tuple[str, list[str]]
Scores = Mapping[tuple[int, int, str], DocumentScores]
"""By (loops, seed, entry)."""


def summarise_loops(variants: Sequence[Variant], scores: Scores) -> tuple[LoopSummary, ...]:
    """One LoopSummary for each loop count of `variants`, in their order. Differences are from the first one's, seed by
    seed, for the seeds that both have."""
    by_loops: dict[int, list[Variant]] = {}
    for variant in variants:
        by_loops.setdefault(variant.loops, []).append(variant)
    first = next(iter(by_loops), 0)
    return tuple(_summary(rows, first, scores) for rows in by_loops.values())


def _summary(rows: list[Variant], first: int, scores: Scores) -> LoopSummary:
    one = rows[0]
    peaks = [row.training.peak_memory_bytes for row in rows if row.training.peak_memory_bytes is not None]
    return LoopSummary(
        loops=one.loops,
        seeds=tuple(row.seed for row in rows),
        heldout={entry: _heldout(rows, entry, first, scores) for entry in one.heldout},
        metrics=_metrics(rows),
        step_seconds=over_seeds([Estimate(value=row.training.step_seconds) for row in rows]),
        tokens_per_second=over_seeds([Estimate(value=row.training.tokens_per_second) for row in rows]),
        decode_seconds=over_seeds([Estimate(value=row.decode.seconds) for row in rows]),
        peak_memory_bytes=max(peaks, default=None),
        parameters=one.parameters,
        embedding_parameters=one.embedding_parameters,
        cache=one.cache,
    )


def _heldout(rows: list[Variant], entry: str, first: int, scores: Scores) -> HeldOutSummary:
    found = [row.heldout[entry] for row in rows]
    gains = []
    for row in rows:
        own, base = scores.get((row.loops, row.seed, entry)), scores.get((first, row.seed, entry))
        if row.loops != first and own is not None and base is not None:
            value, low, high = difference(own, base)
            gains.append(Estimate(value=value, low=low, high=high))
    bits = [Estimate(value=record.bits_per_byte, low=record.low, high=record.high) for record in found]
    return HeldOutSummary(
        bits_per_byte=over_seeds(bits),
        nats_per_token=over_seeds([Estimate(value=record.nats_per_token) for record in found]),
        against_first=over_seeds(gains) if gains else None,
    )


def _metrics(rows: list[Variant], *, parts_of_parts: bool = False) -> dict[str, Estimate]:
    """By metric name, of those that all seeds have: the suites' and their parts', or only the parts' own parts."""
    each = []
    for row in rows:
        metrics = {name: metric for suite in row.suites.values() for name, metric in suite.metrics.items()}
        each.append({name: metric for name, metric in metrics.items() if (name.count("/") >= 2) == parts_of_parts})
    shared = [name for name in each[0] if all(name in metrics for metrics in each)]
    return {
        name: over_seeds([Estimate(value=m[name].value, low=m[name].low, high=m[name].high) for m in each])
        for name in shared
    }


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """One number of several seeds': itself if it is alone, else mean and (sample) standard deviation."""
    if len(estimates) == 1:
        return estimates[0]
    values = [estimate.value for estimate in estimates]
    return Estimate(value=statistics.fmean(values), spread=statistics.stdev(values))


# --- rows ---------------------------------------------------------------------------------------------


def gain_rows(study: Study) -> list[Row]:
    """Held-out text by entry, then the suites' metrics."""
    rows: list[Row] = []
    for entry in study.summary[0].heldout:
        found = [row.heldout[entry] for row in study.summary]
        rows.append((f"{entry}: held-out bits per byte", [_estimate(each.bits_per_byte, 4) for each in found]))
        if any(each.against_first for each in found):
            first = study.summary[0].loops
            rows.append((f"{entry}: against R={first}", [_signed(each.against_first) for each in found]))
        rows.append((f"{entry}: held-out nats per token", [_estimate(each.nats_per_token, 4) for each in found]))
    names = list(dict.fromkeys(name for row in study.summary for name in row.metrics))
    rows += [(name, [_percent(row.metrics.get(name)) for row in study.summary]) for name in names]
    return rows


def part_rows(study: Study) -> list[Row]:
    """What the suites' parts are made of, as accuracy by family and number of steps; perhaps none."""
    by_loops = [[variant for variant in study.variants if variant.loops == row.loops] for row in study.summary]
    found = [_metrics(variants, parts_of_parts=True) for variants in by_loops]
    names = list(dict.fromkeys(name for metrics in found for name in metrics))
    return [(name, [_percent(metrics.get(name)) for metrics in found]) for name in names]


def cost_rows(study: Study) -> list[Row]:
    """What the gain is paid with; under what grows with the loops, how many times the first column's it is."""
    rows, cache = study.summary, study.summary[0].cache
    steps = [row.step_seconds.value for row in rows]
    decodes, caches = [row.decode_seconds.value for row in rows], [row.cache.total for row in rows]
    return [
        ("training step (s)", _times(steps, [_estimate(row.step_seconds, 3) for row in rows])),
        ("training tokens/s", [_count(row.tokens_per_second) for row in rows]),
        ("training peak memory", [_size(row.peak_memory_bytes) for row in rows]),
        ("decoding a token (ms)", _times(decodes, [_milliseconds(row.decode_seconds) for row in rows])),
        ("parameters", [f"{row.parameters:,}" for row in rows]),
        ("  without embeddings", [f"{row.parameters - row.embedding_parameters:,}" for row in rows]),
        (f"KV cache at {cache.context:,} tokens", _times(caches, [_size(total) for total in caches])),
    ]


def study_table(study: Study) -> Table:
    """For the terminal."""
    table = Table(caption=caption(study), caption_justify="left")
    table.add_column("", overflow="fold")
    for row in study.summary:
        table.add_column(f"R={row.loops}", justify="right")
    for rows in (gain_rows(study), cost_rows(study)):
        for name, cells in rows:
            table.add_row(*(Text(cell) for cell in (name, *cells)))
        table.add_section()
    return table


def caption(study: Study) -> str:
    """What the brackets are, and where there are none for want of units."""
    if len(study.seeds) == 1:
        return (
            f"one training each (seed {study.seeds[0]}); [95% intervals] are over held-out documents or packages and "
            f"over problems, and say nothing of what another seed would give{_too_few(study)}"
        )
    return f"mean ± standard deviation over {len(study.seeds)} seeds"


def _too_few(study: Study) -> str:
    """As in "; no interval over fewer than 8 of them (python: 2 packages)"."""
    few = [f"{name}: {_units(found)}" for name, found in study.variants[0].heldout.items() if found.low is None]
    return f"; no interval over fewer than {MIN_UNITS} of them ({', '.join(few)})" if few else ""


def _units(found: HeldOutRecord) -> str:
    """What was resampled: documents that stand for themselves, or the packages that they are of."""
    if found.units == found.documents:
        return count_of(found.documents, "document")
    return count_of(found.units, "package")


def _amount(found: HeldOutRecord) -> str:
    """As in "199,967 tokens of 18 documents of 14 packages"."""
    of = "" if found.units == found.documents else f" of {_units(found)}"
    return f"{found.tokens:,} tokens of {count_of(found.documents, 'document')}{of}"


def study_markdown(study: Study, folder: Path) -> str:
    """summary.md."""
    heads = [f"R={row.loops}" for row in study.summary]
    lines = [f"# Study: {study.recipe.get('name')}", ""]
    description = str(study.recipe.get("description") or "").strip()
    lines += [description, ""] if description else []
    for title, rows in (("Gain", gain_rows(study)), ("Cost", cost_rows(study)), ("In parts", part_rows(study))):
        if rows:
            lines += [f"## {title}", "", *_markdown_table(["", *heads], rows), ""]
    lines += [f"{caption(study)[:1].upper()}{caption(study)[1:]}.", "", "## How", "", *_how(study, folder)]
    return "\n".join(lines) + "\n"


def _how(study: Study, folder: Path) -> list[str]:
    ended = [session for session in study.sessions if session.ended is not None]
    sessions = ended or study.sessions  # a complete study may have been asked for more since, in vain
    session = sessions[-1] if sessions else None
    one = study.variants[0]
    heldout = ", ".join(f"{name} {_amount(found)}" for name, found in one.heldout.items())
    limit = "all problems" if study.limit is None else f"the first {study.limit} problems"
    lines = [
        f"- Recipe `{study.recipe.get('name')}` ({study.recipe_sha256[:12]}), {one.training.tokens:,} tokens in "
        f"{one.training.steps:,} steps; only the loop count differs.",
        f"- Held-out text: {heldout or 'none'}; every token but the first of a document is predicted once.",
        f"- Suites: {', '.join(study.suites) or 'none'}, {limit}; runs in `{folder / 'runs'}`.",
        f"- KV cache: one sequence in {one.cache.dtype}. Decoding: one sequence after {one.decode.context} tokens in "
        f"{one.decode.dtype} on {one.decode.device}, the median of {one.decode.tokens} steps.",
    ]
    if session is not None:
        gpus = ", ".join(session.hardware.gpus) or "no GPU"
        lines.append(f"- Machine: {session.hardware.cpu}, {session.hardware.cores} cores, {gpus}.")
        lines.append(f"- Command: `{' '.join(session.command)}`")
    return lines


def _markdown_table(heads: Sequence[str], rows: Iterable[Row]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ").strip() for cell in cells) + " |"

    return [line(heads), line(["---", *["---:"] * (len(heads) - 1)]), *(line([name, *cells]) for name, cells in rows)]


# --- cells --------------------------------------------------------------------------------------------


def _estimate(found: Estimate, digits: int) -> str:
    return _cell(found, lambda value: f"{value:.{digits}f}")


def _signed(found: Estimate | None) -> str:
    return "-" if found is None else _cell(found, lambda value: f"{value:+.4f}")


def _percent(found: Estimate | None) -> str:
    if found is None:
        return "-"
    body = _cell(found, lambda value: f"{100 * value:.1f}")
    return body.replace("\n", "%\n", 1) if "\n" in body else body + "%"


def _milliseconds(found: Estimate) -> str:
    return _cell(found, lambda value: f"{1000 * value:.2f}")


def _count(found: Estimate) -> str:
    return _cell(found, lambda value: f"{value:,.0f}")


def _times(values: Sequence[float], cells: list[str]) -> list[str]:
    """The cells, each but the first with its value as a multiple of the first's."""
    first = values[0]
    if not first:
        return cells
    more = [f"{cell}\n×{value / first:.3f}" for value, cell in zip(values[1:], cells[1:], strict=True)]
    return [cells[0], *more]


def _cell(found: Estimate, text: Callable[[float], str]) -> str:
    """The value, and under it its interval or its spread."""
    if found.spread is not None:
        return f"{text(found.value)}\n± {text(found.spread).lstrip('+')}"
    if found.low is None or found.high is None:
        return text(found.value)
    return f"{text(found.value)}\n[{text(found.low)}, {text(found.high)}]"


def _size(count: int | None) -> str:
    """Bytes with three digits, as in "1.25 MiB"."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count} B"
    power = min(4, (count.bit_length() - 1) // 10)
    value = count / 1024**power
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {'KMGT'[power - 1]}iB"
