"""lm-eval's results as records of our store: its metrics unchanged, each with its standard error and an interval, and
what became of every document.
"""

from __future__ import annotations

import math
import numbers
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from plt_benchmarks.protocols import Metric
from plt_benchmarks.statistics import wilson_interval
from plt_eval.lm_harness.answers import AnswerRecord, Answers
from plt_eval.lm_harness.tasks import Asked, Chosen, Requests
from plt_eval.records import PROMPT_TAIL, CompletionRecord, SampleRecord, storable

Z_95 = 1.959963984540054
RESAMPLES = 1000
LONGEST = 2000
"""Characters of a target or a choice that a record keeps."""


def metric_name(metric: str, filtered: str) -> str:
    """As in "acc", or "exact_match,strict-match"."""
    return metric if filtered == "none" else f"{metric},{filtered}"


# --- metrics ------------------------------------------------------------------------------------------


def metrics_of(chosen: Chosen, results: Mapping[str, Any], suite: str, version: str) -> dict[str, Metric]:
    """Every number of lm-eval's results: the name's own first, then its parts as `METRIC/part/part`. What is no finite
    number is left out; lm-eval's own file has it."""
    shares = {
        (task, *key): is_share(chosen.tasks[task], key[0], values)
        for task in chosen.tasks
        for key, values in _by_metric(results["samples"][task]).items()
    }
    found = {}
    for part in sorted(results["results"], key=lambda part: len(chosen.parts.get(part, ()))):
        if part not in chosen.parts:
            continue
        leaves = _leaves(chosen, part)
        for metric, filtered, value, stderr in _numbers(results["results"][part]):
            share = [shares.get((leaf, metric, filtered)) for leaf in leaves]
            name = "/".join([f"{suite}.{metric_name(metric, filtered)}", *chosen.parts[part]])
            lower = (results.get("higher_is_better", {}).get(part) or {}).get(metric) is False
            about = _about(results, part, metric, filtered, version, lower_is_better=lower)
            items = _by_metric(results["samples"][part])[metric, filtered] if part in chosen.tasks else []
            found[name] = _metric(
                value,
                stderr,
                _count(results["results"][part], metric, filtered),
                about,
                share=bool(share) and all(one is not False for one in share) and any(share),
                lower_is_better=lower,
                own=_own_interval(chosen.tasks.get(part), metric, items, value),
            )
    return found


def is_share(task: Any, metric: str, values: Sequence[Any]) -> bool:
    """Whether a task's metric is a share of something, in [0, 1]: a mean of such values, or one by its definition."""
    how = getattr(task.aggregation().get(metric), "__name__", "mean")
    if how in ("f1_score", "acc_all"):
        return True
    return how in ("mean", "nanmean", "median") and all(_is_number(value) and 0 <= value <= 1 for value in values)


def _numbers(row: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(metric, filter, value, standard error) of a task's or group's row."""
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value) or not math.isfinite(value):
            continue
        stderr = row.get(f"{metric}_stderr,{filtered}")
        known = stderr is not None and _is_number(stderr) and math.isfinite(stderr)
        yield metric, filtered, float(value), float(stderr) if stderr is not None and known else None


def _metric(
    value: float,
    stderr: float | None,
    n: int,
    about: str,
    *,
    share: bool,
    lower_is_better: bool,
    own: tuple[float, float, str] | None,
) -> Metric:
    if own is not None:
        low, high, how = own
    elif stderr is not None:
        low, high = value - Z_95 * stderr, value + Z_95 * stderr
        how = f"95% interval: value ± 1.96 standard errors of lm-eval, {stderr:.6g}"
        if share:
            low, high, how = max(0.0, low), min(1.0, high), f"{how}, within 0 and 1"
        elif value >= 0 and about.startswith("perplexity"):
            low, how = max(0.0, low), f"{how}, above 0"
    else:
        low = high = value
        how = "no interval: lm-eval gives no standard error"
    known = own is not None or stderr is not None
    about = f"{about}; {how}"
    return Metric(value, n, low, high, about, share, stderr, lower_is_better=lower_is_better, has_interval=known)


def _about(
    results: Mapping[str, Any], part: str, metric: str, filtered: str, version: str, *, lower_is_better: bool
) -> str:
    kind = "group" if part in results.get("group_subtasks", {}) else "task"
    shots = results.get("n-shot", {}).get(part)
    facts = [f"version {results.get('versions', {}).get(part)}"]
    facts += [] if shots is None else [f"{shots}-shot"]
    facts += [] if filtered == "none" else [f"filter {filtered}"]
    facts += ["lower is better"] if lower_is_better else []
    return f"{metric} of {kind} {part} ({', '.join(facts)}) as {version} computes it"


def _own_interval(task: Any, metric: str, items: Sequence[Any], value: float) -> tuple[float, float, str] | None:
    """Where lm-eval's standard error says little or is not there: of a task's share of documents Wilson's interval, as
    the standard error of 0% is 0; of sums over documents percentiles of resamples. None for other metrics."""
    if task is None or not items:
        return None
    aggregate: Callable[[Sequence[Any]], float] | None = task.aggregation().get(metric)
    how = getattr(aggregate, "__name__", "mean")
    if how == "mean" and all(_is_number(item) and item in (0, 1) for item in items):
        return (*wilson_interval(value, len(items)), "95% Wilson interval")
    if aggregate is None or how not in ("weighted_perplexity", "bits_per_byte", "weighted_mean") or len(items) < 2:
        return None
    stream = random.Random(0)
    drawn = sorted(float(aggregate(stream.choices(items, k=len(items)))) for _ in range(RESAMPLES))
    low, high = drawn[int(0.025 * RESAMPLES)], drawn[int(0.975 * RESAMPLES) - 1]
    if not (math.isfinite(low) and math.isfinite(high)):
        return None
    return low, high, f"95% interval: percentiles of {RESAMPLES} resamples of documents"


def _count(row: Mapping[str, Any], metric: str, filtered: str) -> int:
    counts = row.get("sample_count")
    own = counts.get(f"{metric},{filtered}") if isinstance(counts, Mapping) else None
    return int(own if own is not None else row.get("sample_len", 0))


def _leaves(chosen: Chosen, part: str) -> list[str]:
    """The tasks of a part: itself, or those of the group."""
    if part in chosen.tasks:
        return [part]
    return [task for task in chosen.tasks if part == chosen.name or part in chosen.parts[task]]


def _by_metric(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """(metric, filter) -> its value for each document."""
    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            found[metric, sample["filter"]].append(sample[metric])
    return found


# --- documents ----------------------------------------------------------------------------------------


def sample_id(task: str, doc_id: int) -> str:
    """A document's name in the store."""
    return f"{task}/{doc_id}"


def documents(
    chosen: Chosen, results: Mapping[str, Any], requests: Requests, answers: Answers, *, chat: bool
) -> Iterator[tuple[CompletionRecord, SampleRecord]]:
    """What the model said for each document, and what lm-eval made of it."""
    asked: dict[tuple[str, int], list[Asked]] = defaultdict(list)
    for one in requests.asked:
        asked[one.task, one.doc_id].append(one)
    for task in chosen.tasks:
        samples = results["samples"][task]
        binary = {
            key for key, values in _by_metric(samples).items() if all(_is_number(v) and v in (0, 1) for v in values)
        }
        of_doc: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for sample in samples:
            of_doc[sample["doc_id"]].append(sample)
        for doc_id, own in of_doc.items():
            said = asked[task, doc_id]
            told = [answers[key] for one in said for key in one.keys]
            name = sample_id(task, doc_id)
            yield _completion(name, said, told, chat=chat), _verdict(name, own, said, told, binary)


def _completion(name: str, said: Sequence[Asked], told: Sequence[AnswerRecord], *, chat: bool) -> CompletionRecord:
    writes = said[0].kind == "generate_until"
    first = told[0]
    detail: dict[str, Any] = {}
    if writes and len(told) > 1:
        detail["texts"] = [one.text for one in told]
    return CompletionRecord(
        sample_id=name,
        index=0,
        text=first.text if writes else _choices_text(said, told),
        finish_reason=first.finish_reason,
        chat=chat,
        solution=False,
        prompt_tokens=first.prompt_tokens,
        completion_tokens=first.completion_tokens,
        seconds=first.seconds,
        error=None,
        prompt_tail=storable(str(said[0].arguments[0]))[-PROMPT_TAIL:],
        detail=detail,
    )


def _choices_text(said: Sequence[Asked], told: Sequence[AnswerRecord]) -> str:
    """Log-likelihoods for reading, one a line."""
    lines = []
    for one, answer in zip(said, told, strict=True):
        what = f" {one.arguments[1]!r}" if one.kind == "loglikelihood" else " (the whole text)"
        greedy = " (greedy)" if answer.greedy else ""
        lines.append(f"{-math.inf if answer.logprob is None else answer.logprob:.4f}{what[:LONGEST]}{greedy}")
    return storable("\n".join(lines))


def _verdict(
    name: str,
    samples: Sequence[Mapping[str, Any]],
    said: Sequence[Asked],
    told: Sequence[AnswerRecord],
    binary: set[tuple[str, str]],
) -> SampleRecord:
    values: dict[str, bool | float] = {}
    detail: dict[str, Any] = {"target": _json(samples[0]["target"])}
    for sample in samples:
        for metric in sample["metrics"]:
            key, value = metric_name(metric, sample["filter"]), sample[metric]
            if (metric, sample["filter"]) in binary:
                values[key] = bool(value)
            elif _is_number(value) and math.isfinite(value):
                values[key] = float(value)
            else:
                detail[key] = _json(value)
    judged = ""
    if said[0].kind == "generate_until":
        detail["filtered"] = {sample["filter"]: _json(sample["filtered_resps"]) for sample in samples}
        judged = storable(str(samples[0]["filtered_resps"][0]))
    else:
        detail["log_likelihoods"] = [one.logprob for one in told]
    return SampleRecord(sample_id=name, index=0, values=values, judged=judged, detail=detail, error=None)


def _json(value: Any) -> Any:
    """`value` in JSON types; what has none as text, and long text cut."""
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    if value is None or isinstance(value, bool):
        return value
    if _is_number(value):
        plain = value.item() if hasattr(value, "item") else value
        return plain if math.isfinite(plain) else str(plain)
    return storable(str(value))[:LONGEST]


def _is_number(value: Any) -> bool:
    """A real number of Python's or numpy's, yes and no included."""
    return isinstance(value, numbers.Real) or type(value).__name__ in ("bool", "bool_")
