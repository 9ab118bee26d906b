"""What evaluation says of the loop counts: each measure at each loop count, the best one, and what is level with it.

    for measured in study_scores(found, seed=0):
        print(measured.name, measured.best, measured.level)

A measure is one of a study (held-out bits per byte of each entry of its data, and its suites' metrics) or of
evaluation runs. "Best" is the loop count with the best value. "Level" is the smallest loop count whose gap to the best
one has a 95% interval that holds 0: so good that the data do not tell it from the best.

The gap of two loop counts is computed on the same documents or problems wherever these are kept (a study's folder has
the scores of every document, a run directory the verdict on every problem). Where they are not, it is put together from
what is written down; every Gap says how. The intervals are each of 95%, and not corrected for being several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plt_eval.errors import UserError
from plt_eval.models import BUNDLED
from plt_eval.records import MetricRecord
from plt_eval.store import Run, open_run
from plt_eval.study.records import STUDY, HeldOutRecord, Study, Variant, read_study

HEADLINE = 0
"""Slashes in the name of a metric that speaks of a whole suite; a part of it has more."""

How = Literal[
    "itself", "same documents", "same problems", "from the differences to the first", "from the two intervals"
]

HOW_TEXT: dict[str, str] = {
    "itself": "the best one itself",
    "same documents": "paired: both on the same documents, bootstrap over documents or packages",
    "same problems": "paired: both on the same problems, bootstrap over problems",
    "from the differences to the first": "from each one's paired difference to the first loop count; squares of half "
    "widths added",
    "from the two intervals": "from the two intervals, as if the models had met different problems: wider than paired",
}


@dataclass(frozen=True)
class Score:
    """A value at one loop count; `low` and `high` are its 95% interval where there is one; `n` what it is over."""

    loops: int
    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Gap:
    """Value at `loops` less the value at the best loop count, with its 95% interval; None where there is none."""

    loops: int
    value: float
    low: float | None
    high: float | None
    how: How

    @property
    def clear(self) -> bool | None:
        """Whether the interval leaves 0 out; None without one."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Measured:
    """One measure at several loop counts, each the model trained for it (or one model run at it).

    `unit` is "bits per byte" (lower is better) or "share" (of problems, 0..1, higher is better). `headline` is False
    for a part of a suite's metric: shown, but no verdict is built on it. `seed` is the training's, where known.
    """

    name: str
    unit: Literal["bits per byte", "share"]
    source: str
    seed: int | None
    definition: str
    scores: tuple[Score, ...]
    gaps: Mapping[int, Gap] = field(default_factory=dict)
    headline: bool = True

    @property
    def lower_is_better(self) -> bool:
        return self.unit == "bits per byte"

    @property
    def best(self) -> int:
        """The loop count with the best value; of equal ones the smallest."""
        return best_of(self.scores, lower_is_better=self.lower_is_better)

    @property
    def level(self) -> int | None:
        """The smallest loop count that the data do not tell from the best; None where a gap has no interval."""
        for loops in sorted(self.gaps):
            clear = self.gaps[loops].clear
            if clear is None:
                return None
            if not clear:
                return loops
        return None

    def at(self, loops: int) -> Score | None:
        return next((score for score in self.scores if score.loops == loops), None)


@dataclass(frozen=True)
class FoundStudy:
    """A study and the folder it lies in."""

    folder: Path
    study: Study

    @property
    def title(self) -> str:
        """As in "the study results/plt-tiny", and without the place where this package is installed."""
        bundled = self.folder.parent.resolve() == BUNDLED.resolve()
        return f"the study of the bundled {self.folder.name}" if bundled else f"the study {self.folder}"

    @property
    def weights(self) -> dict[tuple[str, int], int]:
        """The seed of each (weights hash, loop count)."""
        return {(each.weights_sha256, each.loops): each.seed for each in self.study.variants}


def best_of(scores: Sequence[Score], *, lower_is_better: bool) -> int:
    """The loop count of the best value; of equal ones the smallest."""
    sign = 1 if lower_is_better else -1
    return min(scores, key=lambda score: (sign * score.value, score.loops)).loops


# --- studies ------------------------------------------------------------------------------------------


def find_studies(folders: Sequence[Path], problems: list[str]) -> list[FoundStudy]:
    """The studies in `folders`, one level below them, and in their studies/; the same study in two places counts once.
    One that cannot be read becomes a line in `problems`."""
    found: dict[tuple[str, str], FoundStudy] = {}
    for folder in folders:
        for pattern in (STUDY, f"*/{STUDY}", f"studies/*/{STUDY}"):
            for path in sorted(folder.glob(pattern)):
                try:
                    study = read_study(path.parent)
                except UserError as error:
                    problems.append(str(error))
                    continue
                same = (study.recipe_sha256, str(study.started))
                if study.variants and (same not in found or _kept(path.parent) > _kept(found[same].folder)):
                    found[same] = FoundStudy(path.parent, study)
    return list(found.values())


def _kept(folder: Path) -> int:
    """How much a study's folder has beside its record: the scores of documents, the runs."""
    return (folder / "heldout").is_dir() + (folder / "runs").is_dir()


def study_scores(found: FoundStudy, *, seed: int) -> list[Measured]:
    """Held-out text, then suites, of the variants of one seed; only what at least two loop counts have."""
    variants = sorted((each for each in found.study.variants if each.seed == seed), key=lambda each: each.loops)
    several = f", seed {seed}" if len(found.study.seeds) > 1 else ""
    source = f"{found.title}{several}"
    entries = list(dict.fromkeys(entry for variant in variants for entry in variant.heldout))
    measures = [_heldout(found, variants, entry, source) for entry in entries]
    suites = list(dict.fromkeys(suite for variant in variants for suite in variant.suites))
    for suite in suites:
        having = [variant for variant in variants if suite in variant.suites]
        by_loops = {variant.loops: variant.suites[suite].metrics for variant in having}
        runs = {variant.loops: _run_of(found, variant.suites[suite].run_id) for variant in having}
        measures += _metrics(suite, by_loops, runs, source, seed)
    return [measured for measured in measures if len(measured.scores) >= 2]


def _heldout(found: FoundStudy, variants: Sequence[Variant], entry: str, source: str) -> Measured:
    records = {variant.loops: variant.heldout[entry] for variant in variants if entry in variant.heldout}
    scores = tuple(Score(loops, one.bits_per_byte, one.low, one.high, one.units) for loops, one in records.items())
    seed = variants[0].seed
    best = best_of(scores, lower_is_better=True)
    one = records[best]
    return Measured(
        name=f"{entry}: held-out bits per byte",
        unit="bits per byte",
        source=source,
        seed=seed,
        definition=f"sum of -ln p over {one.tokens:,} held-out tokens of {one.documents:,} documents / ln 2 / bytes; "
        f"interval over {one.units:,} documents or packages",
        scores=scores,
        gaps={score.loops: _heldout_gap(found, entry, seed, score, records, best) for score in scores},
    )


def _heldout_gap(
    found: FoundStudy, entry: str, seed: int, score: Score, records: Mapping[int, HeldOutRecord], best: int
) -> Gap:
    if score.loops == best:
        return Gap(best, 0.0, 0.0, 0.0, "itself")
    exact = _document_gap(found.folder, entry, seed, score.loops, best)
    if exact is not None:
        return exact
    mine, other = _against_first(found.study, entry, score.loops), _against_first(found.study, entry, best)
    if mine is not None and other is not None:
        return _combined(mine, other, "from the differences to the first")
    record = records[best]
    top = Score(best, record.bits_per_byte, record.low, record.high, record.units)
    return _combined(score, top, "from the two intervals")


def _document_gap(folder: Path, entry: str, seed: int, loops: int, best: int) -> Gap | None:
    """From the scores of every document, where the study's folder still has both."""
    mine, top = (folder / "heldout" / f"r{each}-s{seed}-{entry}.npz" for each in (loops, best))
    if not (mine.is_file() and top.is_file()):
        return None
    from plt_eval.heldout import DocumentScores, difference

    try:
        value, low, high = difference(DocumentScores.load(mine), DocumentScores.load(top))
    except ValueError:  # other documents, or no scores at all: what study.json says remains
        return None
    return Gap(loops, value, low, high, "same documents")


def _against_first(study: Study, entry: str, loops: int) -> Score | None:
    """The recorded paired difference to the first loop count; that is 0 for the first itself."""
    if len(study.seeds) > 1:
        return None
    row = next((row for row in study.summary if row.loops == loops), None)
    if row is None or entry not in row.heldout:
        return None
    gain = row.heldout[entry].against_first
    if gain is None:
        return Score(loops, 0.0, 0.0, 0.0, 0) if loops == study.summary[0].loops else None
    return Score(loops, gain.value, gain.low, gain.high, 0)


def _run_of(found: FoundStudy, run_id: str) -> Run | None:
    try:
        return open_run(found.folder / "runs" / run_id)
    except (UserError, OSError):
        return None  # the bundled studies come without their runs


# --- suites -------------------------------------------------------------------------------------------


def run_scores(suite: str, runs: Mapping[int, Run], source: str) -> list[Measured]:
    """The metrics of one suite's comparable runs, by loop count; only what at least two loop counts have. Raises
    UserError for a run that cannot be read."""
    by_loops, kept = {}, {}
    for loops, run in sorted(runs.items()):
        metrics = run.metrics()
        if metrics is not None:
            by_loops[loops], kept[loops] = metrics.metrics, run
    found = _metrics(suite, by_loops, kept, source, None)
    return [measured for measured in found if len(measured.scores) >= 2]


def _metrics(
    suite: str,
    by_loops: Mapping[int, Mapping[str, MetricRecord]],
    runs: Mapping[int, Run | None],
    source: str,
    seed: int | None,
) -> list[Measured]:
    """One Measured a metric, in the suite's own order; parts of parts, and what is no share or better the lower it is,
    are left to the runs' own tables."""
    names = dict.fromkeys(
        name
        for metrics in by_loops.values()
        for name, metric in metrics.items()
        if metric.share and not metric.lower_is_better and name.count("/") <= 1
    )
    found = []
    for name in names:
        records = {loops: metrics[name] for loops, metrics in by_loops.items() if name in metrics}
        scores = tuple(Score(loops, one.value, one.low, one.high, one.n) for loops, one in records.items())
        best = best_of(scores, lower_is_better=False)
        values = {loops: _problem_values(runs.get(loops), suite, name, records[loops]) for loops in records}
        found.append(
            Measured(
                name=name,
                unit="share",
                source=source,
                seed=seed,
                definition=records[best].definition,
                scores=scores,
                gaps={score.loops: _share_gap(score, scores, best, values) for score in scores},
                headline=name.count("/") == HEADLINE,
            )
        )
    return found


def _problem_values(run: Run | None, suite: str, name: str, record: MetricRecord) -> dict[str, float] | None:
    """By problem, the mean of its samples; None unless they give the metric's own value again."""
    key = name.removeprefix(f"{suite}.")
    if run is None or "/" in key:
        return None
    each: dict[str, list[float]] = {}
    for sample in run.samples():
        if sample.error is None and key in sample.values:
            each.setdefault(sample.sample_id, []).append(float(sample.values[key]))
    values = {problem: math.fsum(found) / len(found) for problem, found in each.items()}
    same = len(values) == record.n and math.isclose(math.fsum(values.values()) / max(1, len(values)), record.value)
    return values if same else None


def _share_gap(score: Score, scores: Sequence[Score], best: int, values: Mapping[int, dict[str, float] | None]) -> Gap:
    if score.loops == best:
        return Gap(best, 0.0, 0.0, 0.0, "itself")
    mine, top = values[score.loops], values[best]
    if mine is not None and top is not None and mine.keys() == top.keys():
        return _problem_gap(score.loops, mine, top)
    return _combined(score, next(each for each in scores if each.loops == best), "from the two intervals")


def _problem_gap(loops: int, mine: Mapping[str, float], top: Mapping[str, float]) -> Gap:
    import numpy as np

    from plt_diagnostics.bootstrap import draw, function_of_means

    pairs = np.array([[mine[problem], top[problem]] for problem in sorted(mine)])
    found = function_of_means(pairs, draw(len(pairs)), lambda mean: mean[..., 0] - mean[..., 1])
    return Gap(loops, found.value or 0.0, found.low, found.high, "same problems")


def _combined(mine: Score, other: Score, how: How) -> Gap:
    """Difference of two numbers with intervals, each end from the ends that matter to it (Newcombe's square-and-add,
    Statistics in Medicine 17, 1998, method 10); too wide where the two rise and fall together."""
    value = mine.value - other.value
    if mine.low is None or mine.high is None or other.low is None or other.high is None:
        return Gap(mine.loops, value, None, None, how)
    low = value - math.hypot(mine.value - mine.low, other.high - other.value)
    high = value + math.hypot(mine.high - mine.value, other.value - other.low)
    return Gap(mine.loops, value, low, high, how)
