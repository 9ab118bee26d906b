"""MultiPL-E: complete a function in one of many languages, from HumanEval's and MBPP's problems translated.

Data: nuprl/MultiPL-E on the Hugging Face hub (BSD-3-Clause; its authors ask not to train on it), at the revision that
the BigCode evaluation harness pins. Paper: Cassano et al. 2022, "MultiPL-E: A Scalable and Extensible Approach to
Benchmarking Neural Code Generation". A program is prompt, answer and tests, compiled and run as the official evaluation
container does, and right where that calls it OK. There is no package of it to call: its commands and rules are in
:mod:`plt_benchmarks.multilingual.languages`, its prompts and stop tokens in the data.

>>> [suite.name for suite in chosen_languages("multilingual", "js,java", SuiteOptions())]
['multilingual-js-java']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plt_benchmarks.multilingual.judge import MultilingualScorer
from plt_benchmarks.multilingual.languages import LANGUAGES, Language, language
from plt_benchmarks.multilingual.rows import NOT_OFFICIAL, Benchmark, Hub, load_rows, problem_of
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
from plt_benchmarks.statistics import mean, pass_metrics, wilson_interval

JUDGE_VERSION = 2
REVISION = "8a4cb75204eb3d5855a81778db6b95bfc80c9136"
INSTRUCTION = (
    "Complete the following {title} code. Answer with one fenced code block that holds the whole function, with the "
    "imports and helper functions that it needs, and without tests, example calls or a main function."
)
_TITLES: dict[Benchmark, str] = {"humaneval": "HumanEval", "mbpp": "MBPP"}


@dataclass
class MultilingualSuite:
    """One of the two translated benchmarks in several languages; a Suite. `chosen` None means all languages whose
    toolchains are here."""

    benchmark: Benchmark
    chosen: tuple[Language, ...] | None = None
    extra: str | None = None
    runs_code: bool = True
    cost: str = field(init=False)
    name: str = field(init=False)
    version: str = field(init=False)
    summary: str = field(init=False)
    problems: int = field(init=False)
    release: Hub = field(init=False)

    def __post_init__(self) -> None:
        base = "multilingual" if self.benchmark == "humaneval" else "multilingual-mbpp"
        self.name = "-".join([base, *(each.key for each in self.chosen or ())])
        self.release = Hub("nuprl/MultiPL-E", REVISION, self.benchmark)
        self.version = f"MultiPL-E-{self.benchmark}-{REVISION[:7]}+judge-{JUDGE_VERSION}"
        official = [each for each in self._asked if self.chosen or each.key not in NOT_OFFICIAL]
        self.problems = sum(self._count(each) for each in official)
        minutes = sum(self._count(each) * each.seconds for each in official) / 60 / 2
        self.cost = f"up to {max(1, round(minutes))} min on 2 cores"
        titles = ", ".join(each.title for each in self._asked)
        self.summary = f"MultiPL-E: {_TITLES[self.benchmark]}'s functions in other languages ({titles})"

    @property
    def _asked(self) -> tuple[Language, ...]:
        return self.chosen or tuple(each for each in LANGUAGES if self._count(each))

    @property
    def judged(self) -> tuple[Language, ...]:
        """The languages of a run: the chosen ones, which the sandbox must have, or all that are here."""
        return self.chosen or tuple(each for each in self._asked if each.present)

    def _count(self, each: Language) -> int:
        return each.counts[self.benchmark == "mbpp"]

    def needs(self) -> Sequence[Need]:
        """The toolchains."""
        return [each.need() for each in self._asked]

    def load(self, source: Path | None) -> SuiteData:
        """Read the problems from `source` (a file, or a folder with one for each language), or from the official data
        set when None. Unless languages were chosen, those without a toolchain are left out. Raises SuiteError."""
        missing = [each for each in self._asked if each not in self.judged]
        notes = [f"left out, because its toolchain is not here: {each.title} ({each.mend})" for each in missing]
        return load_rows(self.release, source, self.judged, notes)

    def prompt(self, sample: Sample) -> Prompt:
        """The data's prompt and stop tokens; a chat model is asked for the whole function in a code block."""
        problem = problem_of(sample)
        text = problem.row["prompt"]
        code = text if text.endswith("\n") else text + "\n"
        asked = f"{INSTRUCTION.format(title=problem.language.title)}\n\n```{problem.language.fence}\n{code}```\n"
        return Prompt(
            text=text,
            stop=tuple(problem.row["stop_tokens"]),
            messages=(Message("user", asked),),
            max_new_tokens=1024,
        )

    def gold(self, sample: Sample) -> Answer | None:
        """The data's own solution, of which the official data has none."""
        solution = sample.data.get("canonical_solution")
        return Answer(sample.data["prompt"] + solution, solution=True) if isinstance(solution, str) else None

    def scorer(self, sandbox: Sandbox) -> Scorer:
        """Raises SuiteError when a toolchain is missing in `sandbox`."""
        return MultilingualScorer(sandbox, self.judged)

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """pass@k in each language, and their mean over languages."""
        by_language: dict[str, dict[str, Sequence[Score]]] = {}
        for sample_id, found in scores.items():
            key, _, name = sample_id.partition("/")
            by_language.setdefault(key, {})[name] = found
        metrics: dict[str, Metric] = {}
        ordered = [each for each in LANGUAGES if each.key in by_language]
        for each in ordered:
            words = f"{_TITLES[self.benchmark]} in {each.title} (MultiPL-E): compiles, and its tests pass"
            metrics |= pass_metrics(f"{self.name}.{each.key}", "right", by_language[each.key], words)
        return self._averages(ordered, metrics, by_language) | metrics

    def _averages(
        self,
        ordered: Sequence[Language],
        metrics: Mapping[str, Metric],
        by_language: Mapping[str, Mapping[str, Sequence[Score]]],
    ) -> dict[str, Metric]:
        """The mean over languages of each pass@k that all of them have. The languages ask the same problems, so that
        the interval is over problems, however many languages there are."""
        problems = len({name for found in by_language.values() for name in found})
        keys = [f"{self.name}.{each.key}." for each in ordered]
        ends = [key.removeprefix(keys[0]) for key in metrics if key.startswith(keys[0])] if keys else []
        averages = {}
        for end in ends:
            found = [metrics[key + end] for key in keys if key + end in metrics]
            if len(found) < len(keys):
                continue
            value = mean([metric.value for metric in found])
            low, high = wilson_interval(value, problems)
            titles = ", ".join(each.title for each in ordered)
            words = f"mean of {end} over {len(ordered)} languages of MultiPL-E's {_TITLES[self.benchmark]} ({titles})"
            words += "; 95% Wilson interval over problems, each a mean over languages"
            averages[f"{self.name}.{end}"] = Metric(value, problems, low, high, words)
        return averages


def chosen_languages(name: str, selection: str | None, options: SuiteOptions) -> list[Suite]:
    """The suite of that name in the languages of `selection` ("js,java"; None: all that are here). Raises
    SuiteError."""
    options.only(name)
    benchmark: Benchmark = "mbpp" if name == "multilingual-mbpp" else "humaneval"
    if selection is None:
        return [MultilingualSuite(benchmark)]
    try:
        wanted = [language(part.strip().lower()) for part in selection.split(",")]
    except SuiteError as error:
        raise SuiteError(f"--suite {name}:{selection}: {error}") from None
    chosen = tuple(each for each in LANGUAGES if each in wanted)
    without = [each.title for each in chosen if not each.counts[benchmark == "mbpp"]]
    if without:
        raise SuiteError(f"--suite {name}:{selection}: {_TITLES[benchmark]} itself is in {without[0]}: --suite mbpp")
    return [MultilingualSuite(benchmark, chosen)]
