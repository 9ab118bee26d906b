"""Runs as tables for people, and as JSON types for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from plt_eval.diagnosis.store import Diagnosis
from plt_eval.diagnosis.table import diagnosis_json
from plt_eval.diagnosis.table import headline as diagnosis_headline
from plt_eval.records import CompletionRecord, Manifest, MetricRecord, Metrics, SampleRecord, Session
from plt_eval.runner import Result
from plt_eval.store import EVALUATION, Run
from plt_eval.words import plural

DEEPEST_COLUMN = 1
"""Slashes in the name of a metric that still has a column of its own."""
MOST_COLUMNS = 10
"""Where there are more metrics than this, they are rows, and the runs are columns."""


def output_console() -> Console:
    """Standard output; wide where it is no terminal, so that logs keep whole names and numbers."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def percent(metric: MetricRecord) -> str:
    """As in "45.1%"; what is no share as it is."""
    return f"{100 * metric.value:.1f}%" if metric.share else f"{metric.value:.4g}"


def interval(metric: MetricRecord) -> str:
    """As in "[37.5, 52.9]", in percent; of what is no share as it is, and "-" where nobody knows one."""
    unknown = metric.n == 1 or not metric.share or not metric.has_interval
    if metric.low == metric.high and metric.stderr is None and unknown:
        return "-"
    scale, form = (100, ".1f") if metric.share else (1, ".4g")
    return f"[{scale * metric.low:{form}}, {scale * metric.high:{form}}]"


# --- results of one command -----------------------------------------------------------------------------


def results_table(results: Sequence[Result]) -> Table:
    """One row a run, one column a metric: value, 95% interval, and n where it is not the row's own.

    A metric called `a/b/c` is a part of `a/b`, which is a part of `a`: the parts of parts are left to `plt-eval show`.
    """
    known = list(dict.fromkeys(name for result in results for name in _short_metrics(result)))
    names = [name for name in known if name.count("/") <= DEEPEST_COLUMN]
    some_missing = any(result.metrics.missing for result in results)
    caption = "values with 95% intervals over problems"
    if len(names) < len(known):
        caption += f"; `plt-eval show RUN` has {len(known) - len(names)} more, parts of these"
    table = Table(caption=caption, caption_justify="left")
    if len(names) > MOST_COLUMNS:
        return _with_metrics_down(table, names, _by_suite(results))
    for heading in ("suite", "model", "loops"):
        table.add_column(heading, overflow="fold")
    table.add_column("n", justify="right")
    if some_missing:
        table.add_column("missing", justify="right")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for result in _by_suite(results):
        identity, metrics = result.run.manifest.identity, result.metrics
        cells = [identity.suite, identity.model, _or_dash(identity.loops), str(metrics.problems)]
        if some_missing:
            cells.append(f"{metrics.missing}/{metrics.total}")
        own = _short_metrics(result)
        cells += [_metric_cell(own.get(name), metrics.problems) for name in names]
        table.add_row(*(Text(cell) for cell in cells), style="yellow" if metrics.missing else None)
    return table


def _with_metrics_down(table: Table, names: Sequence[str], results: Sequence[Result]) -> Table:
    """One row a metric, one column a run: value, 95% interval, and n where it is not the run's own."""
    table.add_column("metric", overflow="fold")
    for result in results:
        identity, metrics = result.run.manifest.identity, result.metrics
        heading = [identity.suite, identity.model, "" if identity.loops is None else f"r{identity.loops}"]
        missing = f", {metrics.missing}/{metrics.total} missing" if metrics.missing else ""
        style = "yellow" if metrics.missing else None
        table.add_column(
            Text(" ".join(filter(None, heading)) + f"\nn={metrics.problems}{missing}"), justify="right", style=style
        )
    own = [(_short_metrics(result), result.metrics.problems) for result in results]
    for name in names:
        cells = [_metric_cell(metrics.get(name), problems).replace("\n", " ") for metrics, problems in own]
        table.add_row(Text(name), *map(Text, cells))
    return table


def result_json(result: Result) -> dict[str, Any]:
    """A run and its metrics, as `plt-eval run --json` prints it."""
    return {**run_json(result.run), "metrics": result.metrics.model_dump(mode="json")["metrics"]}


def _short_metrics(result: Result) -> dict[str, MetricRecord]:
    """Metrics without their suite's name in front: the row says that, and suites can share columns."""
    suite = result.run.manifest.identity.suite
    return {name.removeprefix(f"{suite}."): metric for name, metric in result.metrics.metrics.items()}


def _by_suite(results: Sequence[Result]) -> list[Result]:
    suites = list(dict.fromkeys(result.run.manifest.identity.suite for result in results))
    return [result for suite in suites for result in results if result.run.manifest.identity.suite == suite]


def _metric_cell(metric: MetricRecord | None, problems: int) -> str:
    if metric is None:
        return "-"
    n = "" if metric.n == problems else f"\nn={metric.n}"
    return f"{percent(metric)}\n{interval(metric)}{n}"


# --- listings -------------------------------------------------------------------------------------------


def runs_table(runs: Sequence[Run | Diagnosis]) -> Table:
    """One row a run."""
    table = Table()
    for heading in ("run", "suite", "model"):
        table.add_column(heading, overflow="fold")
    table.add_column("loops", justify="right")
    table.add_column("status")
    table.add_column("done", justify="right")
    table.add_column("headline", overflow="fold")
    table.add_column("started", overflow="fold")
    for run in runs:
        manifest, identity = run.manifest, run.manifest.identity
        cells = [
            manifest.run_id,
            run.manifest.identity.suite if isinstance(run, Run) else f"(diagnosis on {run.manifest.identity.data})",
            identity.model,
            _or_dash(identity.loops),
            run.state(),
            f"{run.done()}/{manifest.total}",
            headline(run.metrics()) if isinstance(run, Run) else diagnosis_headline(run),
            f"{manifest.started.astimezone():%Y-%m-%d %H:%M}",
        ]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def headline(metrics: Metrics | None) -> str:
    """The suite's first metric in a few words; says what it leaves out."""
    if metrics is None or not metrics.metrics:
        return "-"
    name, metric = next(iter(metrics.metrics.items()))
    missing = f", {metrics.missing} missing" if metrics.missing else ""
    return f"{name} {percent(metric)} (n={metric.n}{missing})"


def run_json(run: Run | Diagnosis) -> dict[str, Any]:
    """The run's place, state and identity in JSON types."""
    if isinstance(run, Diagnosis):
        return diagnosis_json(run)
    manifest = run.manifest
    return {
        "kind": EVALUATION,
        "run_id": manifest.run_id,
        "path": str(run.path),
        "suite": manifest.identity.suite,
        "model": manifest.identity.model,
        "loops": manifest.identity.loops,
        "state": run.state(),
        "total": manifest.total,
        "done": run.done(),
        "missing": manifest.missing,
    }


# --- one run, one sample --------------------------------------------------------------------------------


def manifest_lines(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what a person asks first."""
    manifest, identity = run.manifest, run.manifest.identity
    lines = [
        ("run", manifest.run_id),
        ("status", f"{run.state()}, {run.done()} of {manifest.total} samples done"),
        ("suite", f"{identity.suite} ({identity.suite_version})"),
        ("data", f"{manifest.data_revision}, first {identity.problems} problems, from {manifest.data_source}"),
        ("data sha256", identity.data_sha256),
        ("engine", identity.engine),
        *((f"  {name}", _as_text(value)) for name, value in identity.engine_identity.items()),
        ("decoding", _decoding(manifest)),
        ("started", f"{manifest.started.astimezone():%Y-%m-%d %H:%M:%S}, resumed {manifest.resumed} times"),
        ("ended", f"{manifest.ended.astimezone():%Y-%m-%d %H:%M:%S}" if manifest.ended else "-"),
    ]
    if manifest.missing:
        lines.append(("missing", f"{manifest.missing} samples; {'; '.join(manifest.missing_examples)}"))
    if manifest.sessions:
        last = manifest.sessions[-1]
        lines += [(f"  {name}", value) for name, value in last.engine_facts.items()]
        lines.append(("sandbox", last.sandbox or "-"))
    return lines + session_lines(manifest.sessions)


def session_lines(sessions: Sequence[Session]) -> list[tuple[str, str]]:
    """(name, value) of where the last session ran; none before the first."""
    if not sessions:
        return []
    last = sessions[-1]
    git = "-" if last.git is None else last.git.commit + (" (dirty)" if last.git.dirty else "")
    gpus = ", ".join(last.hardware.gpus) or "no GPU"
    machine = f"{last.hardware.cpu}, {last.hardware.cores} cores, {last.hardware.ram / 2**30:.0f} GiB, {gpus}"
    packages = ", ".join(f"{name} {version}" for name, version in last.packages.items())
    return [
        ("command", " ".join(last.command)),
        ("packages", packages),
        ("commit", git),
        ("machine", machine),
    ]


def metrics_table(metrics: Metrics) -> Table:
    """Each metric with its definition."""
    table = Table()
    table.add_column("metric", overflow="fold")
    for heading in ("value", "95% interval", "n"):
        table.add_column(heading, justify="right")
    table.add_column("definition", overflow="fold")
    for name, metric in metrics.metrics.items():
        cells = [name, percent(metric), interval(metric), str(metric.n), metric.definition]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def sample_text(completion: CompletionRecord | None, sample: SampleRecord | None) -> str:
    """One sample for reading: the prompt's end, what the model wrote, what was judged, and the verdict."""
    record = completion or sample
    assert record is not None
    parts = [f"=== {record.sample_id}#{record.index} ==="]
    if completion is not None:
        tokens = "" if completion.completion_tokens is None else f", {completion.completion_tokens} tokens"
        form = "chat" if completion.chat else "text"
        ended = completion.error or f"{completion.finish_reason}{tokens}"
        parts += [f"--- prompt ({form}, its end) ---", completion.prompt_tail]
        parts += [f"--- {'solution' if completion.solution else 'completion'} ({ended}) ---", completion.text]
    if sample is None:
        parts.append("--- not judged yet ---")
    else:
        parts += ["--- judged ---", sample.judged, "--- verdict ---", verdict(sample)]
        if sample.detail:
            parts.append(json.dumps(sample.detail, indent=2, ensure_ascii=False))
    return visible("\n".join(parts))


def verdict(sample: SampleRecord) -> str:
    """As in "base: pass, plus: fail"."""
    if sample.error is not None:
        return f"not judged: {sample.error}"
    return ", ".join(f"{name}: {_value(value)}" for name, value in sample.values.items()) or "no values"


def failed_table(samples: Sequence[SampleRecord]) -> Table:
    """The samples that failed or broke, with their verdicts."""
    table = Table()
    table.add_column("sample", overflow="fold")
    table.add_column("verdict", overflow="fold")
    table.add_column("detail", overflow="fold")
    for sample in samples:
        detail = " ".join(json.dumps(sample.detail, ensure_ascii=False).split()) if sample.detail else ""
        cells = [f"{sample.sample_id}#{sample.index}", verdict(sample), detail[:200]]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def visible(text: str) -> str:
    """`text` with control characters spelled out: a model's output must not steer the terminal."""
    return "".join(char if char in "\n\t" or char.isprintable() else ascii(char)[1:-1] for char in text)


def _value(value: bool | float) -> str:
    if isinstance(value, bool):
        return "pass" if value else "fail"
    return f"{value:.4g}"


def _decoding(manifest: Manifest) -> str:
    decoding, n = manifest.identity.decoding, manifest.identity.n_samples
    limit = "" if decoding.max_new_tokens is None else f", at most {decoding.max_new_tokens} new tokens"
    if decoding.temperature == 0:
        return f"greedy, {n} {plural(n, 'sample')} a problem{limit}"
    return (
        f"temperature {decoding.temperature:g}, top_p {decoding.top_p:g}, seed {decoding.seed}, "
        f"{n} samples a problem{limit}"
    )


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list) else str(value)


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
