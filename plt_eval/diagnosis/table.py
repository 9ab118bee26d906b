"""Diagnoses as tables for people, and as JSON types for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from plt_eval.diagnosis.records import DiagnosisManifest, DiagnosisMetrics, LoopMetric
from plt_eval.diagnosis.store import Diagnosis
from plt_eval.errors import UserError
from plt_eval.words import plural

_STATES = {"raw": "before the final norm", "normed": "after it"}
_HEADLINE = "output_shift"
_READS = {"states": "States", "attention": "Attention", "outputs": "Outputs"}


def loop_tables(diagnoses: Sequence[Diagnosis]) -> list[Table]:
    """The tables of loops: one row a loop of each diagnosis; a table each for what is read of states, attention and
    outputs. The columns are measurements in their default variant. Raises UserError for a diagnosis that is not
    complete."""
    from plt_diagnostics import MEASUREMENTS

    tables = []
    measured = {name for diagnosis in diagnoses for name in diagnosis.manifest.measurements}
    for reads, title in _READS.items():
        names = [name for name, kind in MEASUREMENTS.items() if kind.reads == reads and name in measured]
        if names:
            tables.append(_table(title, names, diagnoses))
    return tables


def _table(title: str, names: Sequence[str], diagnoses: Sequence[Diagnosis]) -> Table:
    models = list(dict.fromkeys(_model(diagnosis.manifest) for diagnosis in diagnoses))
    several = len(models) > 1
    table = Table(title=title if several else f"{title} of {models[0]}", title_justify="left")
    if several:
        table.add_column("model", overflow="fold")
    table.add_column("R", justify="right")
    table.add_column("loop", justify="right")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for diagnosis in diagnoses:
        manifest = diagnosis.manifest
        values = {(row.measurement, row.loop): row for row in _defaults(diagnosis)}
        for loop in range(1, manifest.loops + 1):
            cells = [_model(manifest)] if several else []
            cells += [str(manifest.loops), str(loop)]
            cells += [_cell(values.get((name, loop))) for name in names]
            table.add_row(*(Text(cell) for cell in cells), end_section=loop == manifest.loops)
    return table


def _model(manifest: DiagnosisManifest) -> str:
    """Its name; of a family's member at the loop count that it was trained with, the family's: R says which it is."""
    model = manifest.model
    return model.family if model.family and model.trained_loops == manifest.loops else model.label


def definitions_table(diagnosis: Diagnosis) -> Table:
    """Each measurement: its equation, its unit, and what it says."""
    from plt_diagnostics import MEASUREMENTS

    table = Table()
    for heading in ("measurement", "equation", "unit", "definition"):
        table.add_column(heading, overflow="fold")
    for name in diagnosis.manifest.measurements:
        if name in MEASUREMENTS:
            kind = MEASUREMENTS[name]
            table.add_row(*(Text(cell) for cell in (name, kind.equation, kind.unit, kind.definition)))
    return table


def _cell(row: LoopMetric | None) -> str:
    if row is None:
        return "-"
    if row.value is None:
        return "not finite"
    if row.low is None or row.high is None:
        return number(row.value)
    return f"{number(row.value)}\n[{number(row.low)}, {number(row.high)}]"


def number(value: float) -> str:
    """Four digits at most, as in "0.0123", "12.35", "1835"; thousandths of thousandths as "1.2e-07"."""
    size = abs(value)
    if value == 0 or size >= 1000:
        return f"{value:.0f}"
    if size < 0.001:
        return f"{value:.1e}"
    digits = 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:.{digits}f}"


def _defaults(diagnosis: Diagnosis) -> list[LoopMetric]:
    """The rows of metrics.json in the variants that tables show."""
    defaults = diagnosis.manifest.defaults
    return [row for row in _metrics(diagnosis).rows if row.variant == defaults[row.measurement]]


def _metrics(diagnosis: Diagnosis) -> DiagnosisMetrics:
    metrics = diagnosis.metrics()
    if metrics is None:
        raise UserError(f"{diagnosis.path}: not complete: run the same command again to go on")
    return metrics


def notes(diagnoses: Sequence[Diagnosis]) -> Iterator[str]:
    """What the tables are of: the samples, the variants they show, the time and memory it took."""
    manifests = [diagnosis.manifest for diagnosis in diagnoses]
    for text in dict.fromkeys(f"{_intervals(manifest)}; {_samples(manifest)}" for manifest in manifests):
        yield text
    for text in dict.fromkeys(_variants(manifest) for manifest in manifests):
        if text:
            yield f"shown are {text}"
    yield "- is not defined at that loop; `plt-eval show RUN` names the measurements, loops.parquet holds every variant"
    for manifest in manifests:
        yield f"R={manifest.loops}: {cost(manifest)}"


def _intervals(manifest: DiagnosisManifest) -> str:
    from plt_diagnostics.bootstrap import MIN_SAMPLES

    if manifest.total < MIN_SAMPLES:
        return f"means over samples, without intervals: they take {MIN_SAMPLES} samples"
    return "means over samples with 95% intervals (bootstrap over samples)"


def _samples(manifest: DiagnosisManifest) -> str:
    data = manifest.data
    read = f"{manifest.total} {plural(manifest.total, 'sample')}, {manifest.tokens} {plural(manifest.tokens, 'token')}"
    pieces = plural(data.candidates, "window" if data.windows else "text")
    return f"{read}, at most {data.sequence_length} each, of {data.candidates} {pieces} of {data.name}"


def _variants(manifest: DiagnosisManifest) -> str:
    """As in "step size, angular change: raw state (before the final norm); effective rank: ..."."""
    by_variant: dict[str, list[str]] = {}
    for name, variant in manifest.defaults.items():
        if variant:
            by_variant.setdefault(variant, []).append(name.replace("_", " "))
    return "; ".join(f"{', '.join(names)}: {_variant(variant)}" for variant, names in by_variant.items())


def _variant(variant: str) -> str:
    state, _, mode = variant.partition("/")
    words = f"{state} state ({_STATES[state]})" if state in _STATES else state
    return f"{words}, {mode.replace('_', ' ')}" if mode else words


def cost(manifest: DiagnosisManifest) -> str:
    """As in "12.3 s, 256 MiB above the model, on cpu in float32"."""
    memory = "memory not measured"
    if manifest.peak_memory_bytes is not None:
        memory = f"{manifest.peak_memory_bytes / 2**20:.0f} MiB above the model"
    return f"{manifest.seconds:.1f} s, {memory}, on {manifest.device} in {manifest.dtype}"


def warnings(diagnoses: Iterable[Diagnosis]) -> Iterator[str]:
    """One line for each diagnosis with values that are not finite."""
    for diagnosis in diagnoses:
        counts: dict[str, int] = {}
        samples = 0
        for sample in diagnosis.samples():
            samples += bool(sample.nonfinite)
            for name, count in sample.nonfinite.items():
                counts[name] = counts.get(name, 0) + count
        if counts:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            yield (
                f"R={diagnosis.manifest.loops}: values that are not finite, left out of the means, in {samples} of "
                f"{diagnosis.manifest.total} samples: {listed}"
            )


# --- listings and JSON ----------------------------------------------------------------------------------


def headline(diagnosis: Diagnosis) -> str:
    """How much the last loop still changes the predictions, in a few words."""
    metrics = diagnosis.metrics()
    rows = () if metrics is None else metrics.rows
    last = [row for row in rows if row.measurement == _HEADLINE and row.loop == diagnosis.manifest.loops]
    if not last or last[0].value is None:
        return "-"
    return f"{_HEADLINE} of loop {last[0].loop}: {number(last[0].value)} nats (n={last[0].n})"


def diagnosis_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The run's place, state and identity in JSON types."""
    manifest = diagnosis.manifest
    return {
        "kind": manifest.kind,
        "run_id": manifest.run_id,
        "path": str(diagnosis.path),
        "data": manifest.data.name,
        "model": manifest.model.label,
        "loops": manifest.loops,
        "state": diagnosis.state(),
        "total": manifest.total,
        "done": diagnosis.done(),
    }


def result_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """A complete diagnosis with its loops, as `plt-eval diagnose --json` prints it."""
    manifest = diagnosis.manifest
    return {
        **diagnosis_json(diagnosis),
        "tokens": manifest.tokens,
        "seconds": manifest.seconds,
        "peak_memory_bytes": manifest.peak_memory_bytes,
        "defaults": manifest.defaults,
        "rows": _metrics(diagnosis).model_dump(mode="json")["rows"],
    }


def manifest_lines(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """(name, value) of what a person asks first."""
    from plt_eval.tables import session_lines

    manifest = diagnosis.manifest
    model, data = manifest.model, manifest.data
    trained = "" if model.trained_loops is None else f", trained with {model.trained_loops}"
    return [
        ("run", manifest.run_id),
        ("status", f"{diagnosis.state()}, {diagnosis.done()} of {manifest.total} samples done"),
        ("model", f"{model.label}, {model.parameters} parameters, {model.folder}"),
        ("  weights sha256", model.weights_sha256),
        ("loops", f"{manifest.loops}{trained}, wired as {manifest.adapter}"),
        ("data", f"{data.name}: {data.source}"),
        ("  samples sha256", data.sha256),
        ("  tokenizer", data.tokenizer),
        ("samples", f"{_samples(manifest)}; seed {manifest.seed}"),
        ("measurements", ", ".join(manifest.measurements)),
        ("took", cost(manifest)),
        ("started", f"{manifest.started.astimezone():%Y-%m-%d %H:%M:%S}, resumed {manifest.resumed} times"),
        ("ended", f"{manifest.ended.astimezone():%Y-%m-%d %H:%M:%S}" if manifest.ended else "-"),
        *session_lines(manifest.sessions),
    ]
