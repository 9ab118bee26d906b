"""Which runs belong into one set of figures: those of one model, or of one family, that compare with each other.

    found = collect(Path("results"))                    the model with the most diagnoses
    found = collect(Path("results"), ["plt-tiny"])      the members of plt-tiny, each at its own loop count
    found.diagnoses[4].summary()
    found.notes                                         what was chosen and what was left out, a line each

Names. A run goes by its model's label ("plt-tiny:r3", a folder's name), and a family's member at its own loop count by
the family's name too. A study goes by its folder's name; the diagnoses that it names belong to it.

Runs compare when they differ in the loop count alone: same data, sequence length, samples, precision and wiring for
diagnoses; same problems and decoding for evaluations. Of several such sets the one with the most loop counts counts,
then the newest."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from plt_eval.diagnosis.store import Diagnosis, list_diagnoses, open_diagnosis
from plt_eval.errors import UserError
from plt_eval.report.scores import FoundStudy, find_studies
from plt_eval.store import Run, list_runs
from plt_eval.words import count_of

_MEMBER = re.compile(r"(?P<family>[^:/\\]+):r(?P<loops>[1-9]\d*)")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Selection:
    """The runs of one model or family. `diagnoses` is by loop count, `runs` by suite and then loop count; `name` is ""
    where results hold no run at all."""

    name: str
    diagnoses: Mapping[int, Diagnosis] = field(default_factory=dict)
    runs: Mapping[str, Mapping[int, Run]] = field(default_factory=dict)
    study: FoundStudy | None = None
    every_run: tuple[Run, ...] = ()
    """Evaluations of all models."""
    notes: tuple[str, ...] = ()


def collect(
    results: Path, models: Sequence[str] = (), *, problem: Callable[[UserError], None] | None = None
) -> Selection:
    """The runs below `results` (itself, its runs/, and the runs/ of studies) of `models`, or of the model with the most
    complete diagnoses, then evaluations, then studies.

    Raises UserError for a folder that does not exist, a model that no run is of, and a run that cannot be read; the
    last is handed to `problem` instead and left out.
    """
    if not results.is_dir():
        raise UserError(f"--results {results}: no such folder; expected one that `plt-eval diagnose` or `run` wrote to")
    studies = _studies(results, problem)
    notes: list[str] = []
    diagnoses = _diagnoses(results, studies, notes, problem)
    runs = [run for folder in run_folders(results) for run in list_runs(folder, problem=problem)]
    named_runs = [(_names(run.manifest.identity.model, run.manifest.identity.loops), run) for run in runs]
    by_name = _count((names for names, _ in diagnoses), (names for names, _ in named_runs), studies)
    wanted = _wanted(models, by_name)
    left_out: list[str] = []
    own = [one for names, one in diagnoses if names & set(wanted)]
    own_runs = [run for names, run in named_runs if names & set(wanted)]
    chosen, chosen_runs = _comparable_diagnoses(own, left_out), comparable_runs(own_runs, left_out)
    own_studies = [study for name, study in studies.items() if name in wanted]
    if not models and len(by_name) > 1:
        drawn = (len(chosen), sum(map(len, chosen_runs.values())), len(own_studies[:1]))
        notes.append(_chosen_note(wanted[0], drawn, by_name))
    return Selection(
        name=", ".join(wanted),
        diagnoses=chosen,
        runs=chosen_runs,
        study=next(iter(own_studies), None),
        every_run=tuple(runs),
        notes=(*notes, *left_out),
    )


# --- finding ------------------------------------------------------------------------------------------


def run_folders(results: Path) -> list[Path]:
    """Where run directories lie: `results` itself, its runs/, and the runs/ of studies below it."""
    nested = (path for pattern in ("*/runs", "studies/*/runs") for path in results.glob(pattern))
    return [results, results / "runs", *sorted(path for path in nested if path.is_dir())]


def _studies(results: Path, problem: Callable[[UserError], None] | None) -> dict[str, FoundStudy]:
    """By folder name; one in results/ comes before one of the same name in results/studies/."""
    faults: list[str] = []
    found: dict[str, FoundStudy] = {}
    for each in find_studies([results], faults):
        if each.study.summary:
            found.setdefault(each.folder.resolve().name, each)
    for fault in faults:
        if problem is None:
            raise UserError(fault)
        problem(UserError(fault))
    return found


def _diagnoses(
    results: Path, studies: Mapping[str, FoundStudy], notes: list[str], problem: Callable[[UserError], None] | None
) -> list[tuple[frozenset[str], Diagnosis]]:
    """The complete ones with the names they go by."""
    listed = [one for folder in run_folders(results) for one in list_diagnoses(folder, problem=problem)]
    names = {one.path.resolve(): _names(one.manifest.model.label, one.manifest.loops) for one in listed}
    for name, found in studies.items():
        for variant in found.study.variants:
            if variant.diagnosis is None or variant.seed != found.study.seeds[0]:
                continue
            path = (found.folder / variant.diagnosis).resolve()
            if path not in names and path.is_dir():
                listed.append(open_diagnosis(path))
            names[path] = names.get(path, frozenset()) | {name}
    for one in listed:
        if one.manifest.status != "complete":
            notes.append(f"diagnosis {one.path.name} is not complete and left out: run the same command again")
    return [(names[one.path.resolve()], one) for one in listed if one.manifest.status == "complete"]


def _names(label: str, loops: int | None) -> frozenset[str]:
    """What a run of `label` at `loops` goes by."""
    member = _MEMBER.fullmatch(label)
    own = member is not None and loops == int(member["loops"])
    return frozenset([label, member["family"]] if member is not None and own else [label])


def _count(
    diagnoses: Iterable[frozenset[str]], runs: Iterable[frozenset[str]], studies: Mapping[str, FoundStudy]
) -> dict[str, tuple[int, int, int]]:
    """(diagnoses, evaluations, studies) of every name."""
    of_diagnoses = Counter(name for names in diagnoses for name in names)
    of_runs = Counter(name for names in runs for name in names)
    every = sorted(of_diagnoses.keys() | of_runs.keys() | studies.keys())
    return {name: (of_diagnoses[name], of_runs[name], int(name in studies)) for name in every}


def _wanted(models: Sequence[str], counts: Mapping[str, tuple[int, int, int]]) -> list[str]:
    """The models asked for, or the one with the most runs. Raises UserError for one that no run is of."""
    for model in models:
        if model not in counts:
            near = difflib.get_close_matches(model, counts, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(counts) or 'none'}"
            raise UserError(f"--model {model}: no run of such a model{hint}")
    if models:
        return list(dict.fromkeys(models))
    return [max(counts, key=lambda name: counts[name])] if counts else []


def _chosen_note(best: str, drawn: tuple[int, int, int], counts: Mapping[str, tuple[int, int, int]]) -> str:
    """Whose runs are drawn where nobody asked for a model, and how many of those that are stored: others repeat them
    or do not compare."""
    kinds = zip(drawn, counts[best], ("diagnosis", "evaluation", "study"), strict=True)
    parts = [
        count_of(stored, kind) if few == stored else f"{few} of {count_of(stored, kind)}"
        for few, stored, kind in kinds
        if stored
    ]
    others = [name for name in counts if name != best]
    more = f" and {len(others) - 6} more" if len(others) > 6 else ""
    return f"drawn for {best} ({', '.join(parts)}); --model chooses another: {', '.join(others[:6])}{more}"


# --- what compares ------------------------------------------------------------------------------------


def _comparable_diagnoses(diagnoses: Sequence[Diagnosis], notes: list[str]) -> dict[int, Diagnosis]:
    def same(one: Diagnosis) -> Hashable:
        mine = one.manifest.identity
        return (mine.data_sha256, mine.sequence_length, mine.samples, mine.dtype, mine.loop_mode)

    chosen = _largest(
        diagnoses,
        loops=lambda one: one.manifest.loops,
        same=same,
        rank=lambda one: (len(one.manifest.measurements), one.manifest.started, one.manifest.run_id),
    )
    _note_left_out(notes, "diagnoses", [d.path.name for d in chosen.values()], [d.path.name for d in diagnoses])
    return chosen


def comparable_runs(runs: Sequence[Run], notes: list[str]) -> dict[str, dict[int, Run]]:
    """By suite and loop count, those of `runs` that differ in the loop count alone; `notes` gets what is left out."""

    def same(run: Run) -> Hashable:
        mine = run.manifest.identity
        decoding = (*mine.decoding.model_dump().values(), mine.n_samples)
        asked = json.dumps([mine.engine_identity.get(name) for name in ("loop_mode", "api", "agent")], sort_keys=True)
        return (mine.suite_version, mine.data_sha256, mine.prompts_sha256, mine.problems, decoding, asked)

    by_suite: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.manifest.identity.loops is not None and run.metrics() is not None:
            by_suite[run.manifest.identity.suite].append(run)
    chosen = {
        suite: _largest(
            found,
            loops=lambda run: run.manifest.identity.loops or 0,
            same=same,
            rank=lambda run: (run.manifest.status == "complete", run.manifest.started, run.manifest.run_id),
        )
        for suite, found in sorted(by_suite.items())
    }
    for suite, by_loops in chosen.items():
        names = [run.path.name for run in by_loops.values()]
        _note_left_out(notes, f"evaluations on {suite}", names, [run.path.name for run in by_suite[suite]])
    return chosen


def _largest(
    items: Sequence[_T],
    *,
    loops: Callable[[_T], int],
    same: Callable[[_T], Hashable],
    rank: Callable[[_T], tuple[object, ...]],
) -> dict[int, _T]:
    """By loop count, the best-ranked items of the set with the most loop counts."""
    groups: dict[Hashable, dict[int, _T]] = defaultdict(dict)
    for item in sorted(items, key=rank):
        groups[same(item)][loops(item)] = item
    if not groups:
        return {}
    best = max(groups.values(), key=lambda group: (len(group), max(rank(item) for item in group.values())))
    return dict(sorted(best.items()))


def _note_left_out(notes: list[str], what: str, chosen: Sequence[str], every: Sequence[str]) -> None:
    left = [name for name in every if name not in chosen]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        notes.append(f"{what} left out because they repeat or do not compare: {', '.join(left[:3])}{more}")
