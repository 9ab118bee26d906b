"""BFCL v3: which functions to call, with what, or none; in one turn, and in conversations whose calls are executed.

Data: the Berkeley Function Calling Leaderboard, version 3, as bfcl-eval 2025.7.17 carries it (Apache-2.0): 4,441
problems in 17 categories. Paper: Patil et al. 2025, "The Berkeley Function Calling Leaderboard (BFCL): From Tool Use to
Agentic Evaluation of Large Language Models". Prompts, the course of conversations, decoding and verdicts are the
package's own code; see tools.package for where it runs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plt_benchmarks.datafiles import Release
from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import (
    Answer,
    Message,
    Metric,
    Need,
    Prompt,
    Sample,
    Sandbox,
    Score,
    Scorer,
    Suite,
    SuiteData,
    SuiteError,
)
from plt_benchmarks.statistics import mean, wilson_interval
from plt_benchmarks.tools.gold import gold_result
from plt_benchmarks.tools.package import BFCL_VERSION, ENVIRONMENT, describe
from plt_benchmarks.tools.scorer import ToolsScorer

Mode = Literal["prompt", "native"]
JUDGE_VERSION = 1
MAX_NEW_TOKENS = 4096
"""The official limit for models that are served locally."""
TURN = "\n\n### {role}\n"
"""What separates the turns of a transcript, for models without a chat template."""

NON_LIVE = {
    "simple": 400,
    "java": 100,
    "javascript": 50,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "irrelevance": 240,
}
LIVE = {
    "live_simple": 258,
    "live_multiple": 1053,
    "live_parallel": 16,
    "live_parallel_multiple": 24,
    "live_irrelevance": 882,
    "live_relevance": 18,
}
MULTI_TURN = dict.fromkeys(
    ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context"), 200
)
CATEGORIES = {**NON_LIVE, **LIVE, **MULTI_TURN}
"""Category -> problems."""
GROUPS: dict[str, Mapping[str, int]] = {
    "all": CATEGORIES,
    "non_live": NON_LIVE,
    "live": LIVE,
    "multi_turn": MULTI_TURN,
    "single_turn": {**NON_LIVE, **LIVE},
}
_TEXTS_ONLY = "the answer holds numbers and truth values; the reader makes texts of all in an ArrayList of any"
RELEASE = Release("BFCL", "v3", f"in bfcl-eval {BFCL_VERSION}", md5="", sha256="")
"""The package that `plt-eval install tools` installs carries it."""
GOLD_MISSES = {
    "simple_363": "the answer names another function than the description",
    "java_36": _TEXTS_ONLY,
    "java_64": "the answer has a text where a list of accepted texts belongs",
    "java_65": _TEXTS_ONLY,
    "javascript_41": "the answer names another function than the description",
    "live_simple_106-63-0": "a parameter is required, and must be left out",
    "live_simple_112-68-0": "a parameter is required, and must be left out",
    "live_multiple_862-181-3": "the answer has a parameter that the description does not have",
    "live_multiple_964-207-0": "the answer is for another of the functions",
}
"""Problems whose own answers the official checker refuses, whichever way they are written, and why."""


@dataclass
class ToolsSuite:
    """Some or all of the categories, with functions described in the prompt or given as tools; a Suite."""

    categories: tuple[str, ...] = tuple(CATEGORIES)
    mode: Mode = "prompt"
    release: Release = RELEASE
    extra: str | None = None
    runs_code: bool = True
    cost: str = "4 min on 2 cores"
    name: str = field(init=False)
    version: str = field(init=False)
    summary: str = field(init=False)
    problems: int = field(init=False)

    def __post_init__(self) -> None:
        self.name = _name(self.categories)
        self.version = f"bfcl_eval-{BFCL_VERSION}+judge-{JUDGE_VERSION}+{self.mode}"
        self.problems = sum(CATEGORIES[category] for category in self.categories)
        self.summary = "BFCL v3: function calls in one turn, and conversations whose calls are executed"

    def needs(self) -> Sequence[Need]:
        """The official package."""
        return (ENVIRONMENT.need(),)

    def load(self, source: Path | None) -> SuiteData:
        """Read the problems from the official package, or from a folder in its form. Raises SuiteError."""
        if source is not None and not source.is_dir():
            raise SuiteError(f"data {source}: expected a folder with BFCL_v3_*.json and possible_answer/, found none")
        told = describe(source, self.mode, self.categories)
        samples = {row["id"]: Sample(row["id"], row) for row in told["samples"]}
        if len(samples) != len(told["samples"]):
            raise SuiteError(f"data {source or 'of bfcl-eval'}: two problems have one id")
        if not samples:
            raise SuiteError(f"data {source}: expected problems, found none")
        where = f"bfcl-eval {BFCL_VERSION}" if source is None else str(source)
        revision = f"bfcl_eval-{BFCL_VERSION}" if source is None else f"local:{source.name}"
        return SuiteData(tuple(samples.values()), revision, told["sha256"], where)

    def prompt(self, sample: Sample) -> Prompt:
        """The first question of the official package; a base model gets it as a transcript."""
        return transcript_prompt(messages_of(sample.data["messages"]))

    def gold(self, sample: Sample) -> Answer | None:
        """The first of the accepted answers, as a model would have written it. Where no call is wanted, a refusal;
        where any call is, one without arguments."""
        data, native = sample.data, self.mode == "native"
        result = gold_result(data["category"], data["entry"], data["answer"], native=native)
        return Answer(answer_text(result, self.mode))

    def scorer(self, sandbox: Sandbox) -> Scorer:
        """Raises SuiteError without the official package."""
        return ToolsScorer(self.mode, sandbox)

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """Accuracy of each category, and, where all of theirs are there, of the official groups and overall."""
        accuracy: dict[str, tuple[float, int]] = {}
        for category in self.categories:
            right = [_right(found) for sample, found in scores.items() if sample.rsplit("_", 1)[0] == category]
            values = [value for value in right if value is not None]
            if values:
                accuracy[category] = (mean(values), len(values))
        metrics = {f"tools.{name}": _metric(weights, accuracy, words) for name, weights, words in _groups(accuracy)}
        for category, (value, n) in accuracy.items():
            low, high = wilson_interval(value, n)
            words = f"BFCL v3, {category}: right answers, as bfcl-eval {BFCL_VERSION} judges; 95% Wilson interval"
            metrics[f"tools.{category}"] = Metric(value, n, low, high, words)
        return metrics


def tools_suites(key: str, selection: str | None, options: SuiteOptions) -> list[Suite]:
    """For the registry: the categories and groups that `selection` names, in the order of CATEGORIES."""
    options.only(key, ("tool_calls",))
    mode: Mode = "native" if options.tool_calls == "native" else "prompt"
    wanted: set[str] = set()
    for name in (selection or "all").split(","):
        name = name.strip().lower()
        if name not in GROUPS and name not in CATEGORIES:
            near = difflib.get_close_matches(name, [*GROUPS, *CATEGORIES], n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            known = ", ".join([*GROUPS, *CATEGORIES])
            raise SuiteError(f"--suite {key}:{selection}: no category {name!r}{hint}; there are {known}")
        wanted |= set(GROUPS.get(name, (name,)))
    return [ToolsSuite(tuple(category for category in CATEGORIES if category in wanted), mode)]


def _name(categories: Sequence[str]) -> str:
    for group, inside in GROUPS.items():
        if set(inside) == set(categories):
            return "tools" if group == "all" else f"tools-{group}"
    named = "+".join(categories)
    return f"tools-{named}" if len(named) <= 40 else f"tools-{hashlib.sha256(named.encode()).hexdigest()[:8]}"


# --- answers and questions ----------------------------------------------------------------------------


def answer_text(result: Any, mode: str) -> str:
    """An answer in the official form of results as the text of an Answer: see scorer.result_of."""
    return result if mode == "prompt" and isinstance(result, str) else json.dumps(result)


def messages_of(turns: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """The official package's messages as ours."""
    return tuple(Message(turn["role"], turn["content"] or "") for turn in turns)


def transcript_prompt(messages: Sequence[Message]) -> Prompt:
    """A prompt of these messages, and of a transcript of them for a model without a chat template."""
    text = "".join(TURN.format(role=turn.role) + turn.content for turn in messages)
    return Prompt(
        text=text.lstrip() + TURN.format(role="assistant"),
        stop=("\n### ",),
        messages=tuple(messages),
        max_new_tokens=MAX_NEW_TOKENS,
    )


# --- the official arithmetic --------------------------------------------------------------------------


def overall_weights() -> dict[str, dict[str, float]]:
    """Group -> category -> its weight in the group's score, as the official leaderboard computes it: Java and
    JavaScript count with `simple` as one of five non-live parts; live categories count by their problems; the overall
    score is the mean of the three groups."""
    part = 1 / 5
    non_live = dict.fromkeys(("multiple", "parallel", "parallel_multiple", "irrelevance"), part)
    non_live |= dict.fromkeys(("simple", "java", "javascript"), part / 3)
    multi_turn = dict.fromkeys(MULTI_TURN, 1 / len(MULTI_TURN))
    return {"non_live": non_live, "live": {}, "multi_turn": multi_turn}


def _groups(accuracy: Mapping[str, tuple[float, int]]) -> list[tuple[str, dict[str, float], str]]:
    """(name, weights, definition) of the official scores all of whose categories are there, the overall one first."""
    weights = overall_weights()
    if LIVE.keys() <= accuracy.keys():
        total = sum(accuracy[category][1] for category in LIVE)
        weights["live"] = {category: accuracy[category][1] / total for category in LIVE}
    else:
        del weights["live"]
    words = {
        "non_live": "BFCL v3, non-live: the mean of simple (itself that of Python, Java and JavaScript), multiple, "
        "parallel, parallel_multiple and irrelevance",
        "live": "BFCL v3, live: right answers of its six categories together",
        "multi_turn": "BFCL v3, multi-turn: the mean of its four categories",
        "overall": "BFCL v3, overall accuracy: the mean of non-live, live and multi-turn",
    }
    found = {name: inside for name, inside in weights.items() if inside.keys() <= accuracy.keys()}
    if len(found) == 3:
        overall = {category: w / 3 for inside in found.values() for category, w in inside.items()}
        found = {"overall": overall, **found}
    return [(name, inside, words[name]) for name, inside in found.items()]


def _metric(weights: Mapping[str, float], accuracy: Mapping[str, tuple[float, int]], words: str) -> Metric:
    value = min(1.0, max(0.0, sum(w * accuracy[category][0] for category, w in weights.items())))
    effective = 1 / sum(w * w / accuracy[category][1] for category, w in weights.items())
    low, high = wilson_interval(value, max(1, int(effective)))
    counted = sum(accuracy[category][1] for category in weights)
    words += (
        f", as bfcl-eval {BFCL_VERSION} computes it; 95% Wilson interval for the {int(effective)} problems of equal "
        "weight that would vary as much"
    )
    return Metric(value, counted, low, high, words)


def _right(found: Sequence[Score]) -> float | None:
    """The share of right answers to one problem; scores with an error count for nothing."""
    values = [float(bool(score.values["right"])) for score in found if score.error is None]
    return mean(values) if values else None
