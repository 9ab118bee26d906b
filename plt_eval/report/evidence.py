"""What a report is written from: the diagnoses, what follows from them, and what evaluation says of the same models.

    diagnoses = find_diagnoses(["diagnosis-trace-plt-tiny-r4-r4-1a2b3c4d"], Path("results"))
    evidence = gather(diagnoses, Path("results"))
    evidence.advice[4].loops                  # what the rule says from the four-loop model's diagnosis

    for case in compare_with_evaluation("plt-tiny", Path("results")):
        print(case.seed, case.advice.loops, [(each.measured.best, each.verdict) for each in case.agreements])

The rule is plt_diagnostics.recommend. It sees the largest-R model's diagnosis and never a task score, so the scores of
the models that were trained at each loop count can say whether it is right: that is compare_with_evaluation.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plt_eval.diagnosis.store import Diagnosis, list_diagnoses, open_diagnosis
from plt_eval.errors import UserError
from plt_eval.models import BUNDLED, DEFAULT_FAMILY
from plt_eval.report.collect import collect, comparable_runs, run_folders
from plt_eval.report.scores import FoundStudy, Measured, find_studies, run_scores, study_scores
from plt_eval.store import MANIFEST, Run, list_runs
from plt_eval.study.plan import DIAGNOSES
from plt_eval.study.records import STUDY, Variant, read_study
from plt_eval.words import count_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from plt_diagnostics.recommend import Recommendation

Verdict = Literal["agrees", "disagrees", "cannot tell"]


@dataclass(frozen=True)
class Agreement:
    """What one measure says of a recommended loop count, and why; see `agreement`."""

    measured: Measured
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Case:
    """One trained family: what the rule says from its largest-R model alone, and what evaluation says."""

    study: FoundStudy
    seed: int
    diagnosis: Diagnosis
    advice: Recommendation
    agreements: tuple[Agreement, ...]


@dataclass(frozen=True)
class Evidence:
    """Everything a report shows. `diagnoses`, `summaries` (Diagnosis.summary) and `advice` are by loop count; `main` is
    the largest-R one, whose advice is the answer; `studies` are those whose models these are."""

    name: str
    diagnoses: Mapping[int, Diagnosis]
    summaries: Mapping[int, DataFrame]
    advice: Mapping[int, Recommendation]
    agreements: tuple[Agreement, ...]
    studies: tuple[FoundStudy, ...]
    notes: tuple[str, ...]

    @property
    def main(self) -> Diagnosis:
        return self.diagnoses[max(self.diagnoses)]

    @property
    def answer(self) -> Recommendation:
        return self.advice[max(self.advice)]


# --- which diagnoses ----------------------------------------------------------------------------------


def find_diagnoses(wanted: Sequence[str], results: Path, notes: list[str]) -> dict[int, Diagnosis]:
    """By loop count, the diagnoses meant by `wanted`: directories, run ids, or beginnings of run ids below `results`.

    Without any, the newest complete set of the default family, or else of the model with the most diagnoses; a line in
    `notes` says which. Raises UserError for what is not there, is not complete, or does not compare.
    """
    if not wanted:
        return _default_set(results, notes)
    found: dict[int, Diagnosis] = {}
    for text in dict.fromkeys(wanted):
        one = _find(text, results)
        if one.manifest.status != "complete":
            raise UserError(f"{one.path}: this diagnosis is {one.state()}: the same `plt-eval diagnose` completes it")
        other = found.setdefault(one.manifest.loops, one)
        if other.path.resolve() != one.path.resolve():
            raise UserError(
                f"two diagnoses of R={one.manifest.loops}: {other.path} and {one.path}; give one for each loop count"
            )
    found = dict(sorted(found.items()))
    _check_comparable(list(found.values()), notes)
    return found


def _default_set(results: Path, notes: list[str]) -> dict[int, Diagnosis]:
    skipped: list[UserError] = []
    selection = collect(results, problem=skipped.append)
    if selection.name != DEFAULT_FAMILY:
        with contextlib.suppress(UserError):  # another model's, then
            selection = collect(results, [DEFAULT_FAMILY], problem=skipped.append)
    if not selection.diagnoses:
        raise UserError(
            f"--results {results}: no complete diagnosis in it; `plt-eval diagnose` writes them, or name a RUN"
        )
    loops = ", ".join(f"R={count}" for count in selection.diagnoses)
    ids = ", ".join(one.path.name for one in selection.diagnoses.values())
    notes.append(f"no RUN given: the newest complete set of {selection.name} at {loops} ({ids})")
    notes.extend(dict.fromkeys(map(str, skipped)))
    return dict(selection.diagnoses)


def _find(text: str, results: Path) -> Diagnosis:
    if (Path(text) / MANIFEST).is_file():
        return open_diagnosis(Path(text))
    named = {path.parent for folder in diagnosis_folders(results) for path in folder.glob(f"*/{MANIFEST}")}
    exact = sorted(path for path in named if path.name == text)
    matches = exact or sorted(path for path in named if path.name.startswith(text))
    if len(matches) == 1:
        return open_diagnosis(matches[0])
    if matches:
        raise UserError(f"{text!r} is the name or the beginning of {len(matches)} runs: {', '.join(map(str, matches))}")
    ids = [one.path.name for folder in diagnosis_folders(results) for one in list_diagnoses(folder, problem=_ignore)]
    near = difflib.get_close_matches(text, ids, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else f" (it holds {count_of(len(set(ids)), 'diagnosis')})"
    raise UserError(f"no run {text!r} in {results}{hint}")


def _check_comparable(found: Sequence[Diagnosis], notes: list[str]) -> None:
    """Diagnoses on different text do not stand side by side; what else differs is said."""
    last = found[-1].manifest
    for one in found[:-1]:
        mine = one.manifest
        if mine.identity.data_sha256 != last.identity.data_sha256:
            raise UserError(
                f"{one.path} and {found[-1].path} were measured on different samples ({mine.data.name}, {mine.total} "
                f"of at most {mine.data.sequence_length} tokens; {last.data.name}, {last.total} of at most "
                f"{last.data.sequence_length}): they do not compare"
            )
        for what in ("dtype", "loop_mode", "device"):
            if getattr(mine, what) != getattr(last, what):
                notes.append(
                    f"{what} differs: {getattr(mine, what)} at R={mine.loops}, {getattr(last, what)} at R={last.loops}"
                )


# --- what follows -------------------------------------------------------------------------------------


def gather(diagnoses: Mapping[int, Diagnosis], results: Path, notes: Sequence[str] = ()) -> Evidence:
    """The evidence on the models of `diagnoses` (complete ones by loop count), with the task scores below `results` and
    those of the bundled families. Raises UserError for files that cannot be read."""
    said = list(notes)
    advice = {loops: advise(one) for loops, one in diagnoses.items()}
    every = list(diagnoses.values())
    studies = _studies_of(every, results, said)
    measured = _study_measures(studies, every) + _run_measures(every, studies, results, said)
    recommended = advice[max(advice)].loops
    return Evidence(
        name=name_of(every),
        diagnoses=diagnoses,
        summaries={loops: one.summary() for loops, one in diagnoses.items()},
        advice=advice,
        agreements=tuple(agreement(each, recommended) for each in measured),
        studies=tuple(studies),
        notes=tuple(dict.fromkeys(said)),
    )


def advise(diagnosis: Diagnosis) -> Recommendation:
    """What the rule says from this diagnosis alone. Raises UserError as Diagnosis.rows does."""
    from plt_diagnostics.recommend import recommend
    from plt_diagnostics.synthesis import RowsError

    manifest = diagnosis.manifest
    try:
        return recommend(
            diagnosis.rows(),
            shifts=manifest.shifts,
            defaults=manifest.defaults,
            trained_loops=manifest.model.trained_loops,
        )
    except RowsError as error:
        raise UserError(f"{diagnosis.path}: {error}") from error


def name_of(diagnoses: Collection[Diagnosis]) -> str:
    """The family's name where each is a member at the loop count of its name, else the labels."""
    labels = [one.manifest.model.label for one in diagnoses]
    members = [re.fullmatch(rf"(.+):r{one.manifest.loops}(?:-s\d+)?", one.manifest.model.label) for one in diagnoses]
    families = {match[1] if match else None for match in members}
    family = families.pop() if len(families) == 1 else None
    return family if family is not None and len(labels) > 1 else ", ".join(dict.fromkeys(labels))


# --- what evaluation says -----------------------------------------------------------------------------


def agreement(measured: Measured, recommended: int | None) -> Agreement:
    """Whether `measured` says the same as the rule. "disagrees": the best loop count is clearly better than the
    recommended one (the 95% interval of their gap leaves 0 out). "agrees": it is not, and the recommended one is the
    smallest of which that holds. "cannot tell": everything else."""
    best, level = measured.best, measured.level
    gap = None if recommended is None else measured.gaps.get(recommended)
    if recommended is None:
        return Agreement(
            measured, "cannot tell", f"nothing was recommended; R={best} has the best value, {_level(measured)}"
        )
    if gap is None:
        return Agreement(measured, "cannot tell", f"R={recommended} was not scored; R={best} has the best value")
    if gap.clear is None:
        return Agreement(
            measured, "cannot tell", f"R={best} has the best value, but there is no interval to weigh it by"
        )
    if gap.clear:
        return Agreement(measured, "disagrees", f"R={best} is clearly better than R={recommended}")
    first = "has the best value" if best == recommended else f"cannot be told from the best, R={best}"
    if level == recommended:
        smaller = "" if level == min(measured.gaps) else ", and every smaller one is clearly worse"
        return Agreement(measured, "agrees", f"R={recommended} {first}{smaller}")
    rivals = [loops for loops, each in sorted(measured.gaps.items()) if loops < recommended and not each.clear]
    others = ", ".join(f"R={loops}" for loops in rivals)
    return Agreement(measured, "cannot tell", f"R={recommended} {first}; no telling {others} from it either")


def _level(measured: Measured) -> str:
    if measured.level is None:
        return "and nothing says how clearly"
    return "clearly" if measured.level == measured.best else f"but R={measured.level} cannot be told from it"


def compare_with_evaluation(family: str, results: Path) -> list[Case]:
    """For every seed of the study of `family` (a study's folder, or its name): what the rule recommends from the
    diagnosis of the model with the most loops, against what the study's evaluation says of all loop counts.

    The diagnosis is the one that the study names, or the newest below `results` of those weights at that loop count.
    Raises UserError where there is no such study, or no diagnosis of any of its seeds.
    """
    notes: list[str] = []
    found = _named_study(family, results, notes)
    loops = max(found.study.loops)
    largest = [each for each in found.study.variants if each.loops == loops]
    cases = []
    for variant in largest:
        diagnosis = _diagnosis_of(found, variant, results)
        if diagnosis is not None:
            advice = advise(diagnosis)
            measured = study_scores(found, seed=variant.seed)
            cases.append(
                Case(found, variant.seed, diagnosis, advice, tuple(agreement(each, advice.loops) for each in measured))
            )
    if not cases:
        raise UserError(
            f"{found.folder}: no complete diagnosis of its models at R={loops} below {results}; make one with "
            f"`plt-eval diagnose --model {found.folder / largest[0].model} --loops {loops}`"
        )
    return cases


def _named_study(family: str, results: Path, notes: list[str]) -> FoundStudy:
    if (Path(family) / STUDY).is_file():
        return FoundStudy(Path(family), read_study(Path(family)))
    studies = find_studies([results, BUNDLED], notes)
    for found in studies:
        if family in (found.folder.resolve().name, found.study.recipe.get("name")):
            return found
    names = ", ".join(found.folder.resolve().name for found in studies)
    raise UserError(f"{family}: no study of that name in {results}; there are {names or 'none'}")


def _diagnosis_of(found: FoundStudy, variant: Variant, results: Path) -> Diagnosis | None:
    """The one that the study names, else the newest of those on the most samples."""
    if variant.diagnosis is not None and (found.folder / variant.diagnosis / MANIFEST).is_file():
        own = open_diagnosis(found.folder / variant.diagnosis)
        if own.manifest.status == "complete":
            return own
    mine = [
        one
        for folder in diagnosis_folders(results)
        for one in list_diagnoses(folder, problem=_ignore)
        if one.manifest.status == "complete"
        and (one.manifest.model.weights_sha256, one.manifest.loops) == (variant.weights_sha256, variant.loops)
    ]
    return max(mine, key=lambda one: (one.manifest.total, one.manifest.started), default=None)


def diagnosis_folders(results: Path) -> list[Path]:
    """Where diagnoses lie: among the runs, and in the diagnosis/ of studies."""
    studies = [
        path for pattern in (DIAGNOSES, f"*/{DIAGNOSES}", f"studies/*/{DIAGNOSES}") for path in results.glob(pattern)
    ]
    return [*run_folders(results), *sorted(studies)]


def _ignore(_: UserError) -> None:
    """A run that cannot be read is none of those sought."""


def _studies_of(diagnoses: Collection[Diagnosis], results: Path, notes: list[str]) -> list[FoundStudy]:
    """The studies that trained a model of `diagnoses`; what looks like one but has other weights is said."""
    keys = {(one.manifest.model.weights_sha256, one.manifest.loops) for one in diagnoses}
    families = {one.manifest.model.family for one in diagnoses} - {None}
    found = []
    for each in find_studies([results, BUNDLED], notes):
        if keys & each.weights.keys():
            found.append(each)
        elif families & {each.folder.resolve().name, each.study.recipe.get("name")}:
            notes.append(f"{each.title} has the name of this family, but other weights: not shown")
    return found


def _study_measures(studies: Collection[FoundStudy], diagnoses: Collection[Diagnosis]) -> list[Measured]:
    keys = {(one.manifest.model.weights_sha256, one.manifest.loops) for one in diagnoses}
    measures = []
    for found in studies:
        seeds = {seed for key, seed in found.weights.items() if key in keys}
        for seed in sorted(seeds):
            measures += study_scores(found, seed=seed)
    return measures


def _run_measures(
    diagnoses: Collection[Diagnosis], studies: Collection[FoundStudy], results: Path, notes: list[str]
) -> list[Measured]:
    """Of evaluation runs of these models: the same weights at the same loop count, or weights that a study of theirs
    trained for it, or, of one model that was opened at several loop counts, that model at any."""
    known = {(one.manifest.model.weights_sha256, one.manifest.loops) for one in diagnoses}
    for found in studies:
        seeds = {seed for key, seed in found.weights.items() if key in known}
        known |= {key for key, seed in found.weights.items() if seed in seeds}
    weights = {one.manifest.model.weights_sha256 for one in diagnoses}
    alone = weights.pop() if len(weights) == 1 and not studies else None
    skipped: list[UserError] = []
    own = []
    for folder in run_folders(results):
        for run in list_runs(folder, problem=skipped.append):
            mine = str(run.manifest.identity.engine_identity.get("weights_sha256"))
            if (mine, run.manifest.identity.loops) in known or (alone is not None and mine == alone):
                own.append(run)
    notes.extend(str(error) for error in skipped)
    measures = []
    for suite, by_loops in comparable_runs(own, notes).items():
        where = ", ".join(dict.fromkeys(str(run.path.parent) for run in by_loops.values()))
        if not _told_by(studies, suite, by_loops.values()):
            measures += run_scores(suite, by_loops, f"evaluation runs in {where}")
    return measures


def _told_by(studies: Collection[FoundStudy], suite: str, runs: Collection[Run]) -> bool:
    """Whether these are the studies' own runs, which speak already."""
    told = {
        variant.suites[suite].run_id for found in studies for variant in found.study.variants if suite in variant.suites
    }
    return all(run.manifest.run_id in told for run in runs)
