"""Recipe x loop counts x seeds -> a study: build the data, train each model, measure it, and write down what came out.

Every stage knows its own results: data folders their manifest, trainings their result, scores what they were made
with, runs their samples. So a study that was stopped or killed anywhere goes on where it stood, and one that is
complete is only read. study.json and summary.md are written again after each model, but never over a record that has
more: one that an earlier command completed stays until this one has completed its own.
"""

from __future__ import annotations

import gc
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from plt_eval import provenance
from plt_eval.engines.hf import HFEngine
from plt_eval.heldout import DocumentScores
from plt_eval.journal import write_atomically
from plt_eval.records import Session
from plt_eval.study import measure
from plt_eval.study.plan import StudyPlan, check_folder, held
from plt_eval.study.records import STUDY, SUMMARY, Study, TrainingRecord, Variant, read_study
from plt_eval.study.summary import study_markdown, summarise_loops
from plt_model.training.shards import TokenData


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C; what was done is stored, and the message says how to go on."""


def run_study(plan: StudyPlan, console: Console) -> Study:
    """Do what is missing of the study, and return all of it. Progress goes to `console`.

    Raises UserError, SuiteError, SandboxError, the RecipeError, ShardError, TrainingError and CheckpointError of
    plt_model (all: one line for the user) and StudyInterrupted; what was done until then is stored.
    """
    recipe = _load(plan)
    check_folder(plan.out, recipe.digest(), recipe.name)
    with held(plan.out):
        session = _StudySession(plan, recipe, console, _session(plan))
        try:
            return session.work()
        except KeyboardInterrupt as error:
            where = f" ({error})" if str(error) else ""
            raise StudyInterrupted(f"{plan.out}: run the same command again to go on{where}") from error


def _load(plan: StudyPlan) -> Any:
    """The recipe, after checking all that can be checked before anything is built."""
    from plt_benchmarks.registry import get_suite
    from plt_model.training.recipe import load_recipe

    recipe = load_recipe(plan.recipe)
    for loops in plan.loops:
        recipe.config(loops)
    for name in plan.suites:
        get_suite(name)
    return recipe


@dataclass
class _StudySession:
    """One process' work on a study."""

    plan: StudyPlan
    recipe: Any
    console: Console
    session: Session
    heldout: list[str] = field(default_factory=list)
    """Entries of the recipe's data with held-out text."""
    variants: list[Variant] = field(default_factory=list)
    scores: dict[tuple[int, int, str], DocumentScores] = field(default_factory=dict)
    earlier: Study | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.plan.seeds or (self.recipe.seed,)

    def work(self) -> Study:
        if (self.plan.out / STUDY).exists():
            self.earlier = read_study(self.plan.out)
            if self._answers(self.earlier):
                self._say(f"{self.plan.out}: complete already")
                return self.earlier
        if self.earlier is None or self.earlier.status == "running":
            self._save("running")  # a complete one is not touched before there is something new
        self._build_data()
        for loops in self.plan.loops:
            for seed in self.seeds:
                training = self._train(loops, seed)
                self.variants.append(self._measure(loops, seed, training))
                self._save("running")
                _free_memory()
        return self._save("complete")

    # --- stages -------------------------------------------------------------------------------------------

    def _build_data(self) -> None:
        from plt_eval.corpus import build_recipe_data

        build_recipe_data(self.recipe, self.plan.data_folder, self.console, command=self.plan.command)
        for entry in self.recipe.data:
            if TokenData.open(self.plan.data_folder / entry.name, "heldout").bytes:
                self.heldout.append(entry.name)
            else:
                self._say(
                    f"warning: data entry {entry.name} has no held-out text, so no bits per byte: it is too small"
                )

    def _train(self, loops: int, seed: int) -> Any:
        """The training's result; at once if it is there."""
        from plt_model.training.run import RESULT, train

        out = self.plan.training(loops, seed)
        what = "trained already" if (out / RESULT).exists() else f"training {self.recipe.name}"
        self._say(f"r{loops}-s{seed}: {what}")
        return train(self.recipe, loops=loops, data=self.plan.data_folder, out=out, seed=seed, console=self.console)

    def _measure(self, loops: int, seed: int, training: Any) -> Variant:
        name, plan = f"r{loops}-s{seed}", self.plan
        self._say(f"{name}: measuring")
        model = Path(training.model)
        with closing(HFEngine(str(model), label=f"{self.recipe.name}:{name}", notify=self._say)) as engine:
            heldout = {}
            for entry in self.heldout:
                heldout[entry], self.scores[loops, seed, entry] = measure.measure_heldout(
                    engine,
                    plan.data_folder / entry,
                    plan.out / "heldout" / f"{name}-{entry}",
                    sequence_length=self.recipe.sequence_length,
                    limit_tokens=plan.heldout_tokens,
                )
            suites = measure.measure_suites(engine, plan, self.console)
            parameters, embedding = measure.count_parameters(engine.model)
            cache = measure.measure_cache(engine.model.config, plan.context, self._cache_dtype())
            decode = measure.measure_decode(engine, plan.out / "decode" / f"{name}.json")
            weights = engine.weights_sha256
        return Variant(
            loops=loops,
            seed=seed,
            model=_relative(model, plan.out),
            weights_sha256=weights,
            parameters=parameters,
            embedding_parameters=embedding,
            training=TrainingRecord(**{name: getattr(training, name) for name in TrainingRecord.model_fields}),
            cache=cache,
            decode=decode,
            heldout=heldout,
            suites=suites,
            diagnosis=self._diagnose(name, model),
        )

    def _diagnose(self, name: str, model: Path) -> str | None:
        """The run directory; None where it is not asked for, or nothing was held out."""
        if not self.plan.diagnosis_samples or not self.heldout:
            return None
        self._say(f"{name}: opening its loops")
        entries = [self.plan.data_folder / entry for entry in self.heldout]
        length, label = self.recipe.sequence_length, f"{self.recipe.name}:{name}"
        found = measure.measure_diagnosis(
            model, label, entries, self.plan, sequence_length=length, console=self.console
        )
        return _relative(found, self.plan.out)

    def _cache_dtype(self) -> torch.dtype:
        """That in which the recipe saves the model, and so the one that it is served in."""
        dtype: torch.dtype = getattr(torch, self.recipe.save_dtype)
        return dtype

    # --- the record ---------------------------------------------------------------------------------------

    def _answers(self, study: Study) -> bool:
        """Whether `study` is all that was asked for."""
        missing = any(suite.missing for variant in study.variants for suite in variant.suites.values())
        return study.status == "complete" and not missing and study.model_copy(update=self._asked()) == study

    def _asked(self) -> dict[str, Any]:
        """The fields of the record that the plan decides."""
        plan = self.plan
        return {
            "loops": plan.loops,
            "seeds": self.seeds,
            "suites": plan.suites,
            "limit": plan.limit,
            "heldout_tokens": plan.heldout_tokens,
            "diagnosis_samples": plan.diagnosis_samples,
            "context": plan.context,
            "data": _relative(plan.data_folder, plan.out),
        }

    def _save(self, status: Any) -> Study:
        """Write down what there is so far, or where the earlier record has more, only that there was this session."""
        ended = datetime.now(UTC) if status == "complete" else None
        earlier = () if self.earlier is None else self.earlier.sessions
        sessions = (*earlier, self.session.model_copy(update={"ended": ended}))
        if status == "running" and self.earlier is not None and self._has_more(self.earlier):
            study = self.earlier.model_copy(update={"sessions": sessions})
            write_atomically(self.plan.out / STUDY, study.model_dump_json(indent=2) + "\n")
            return study
        study = Study(
            status=status,
            recipe=self.recipe.model_dump(mode="json"),
            recipe_sha256=self.recipe.digest(),
            **self._asked(),
            started=self.session.started if self.earlier is None else self.earlier.started,
            ended=ended,
            sessions=sessions,
            variants=tuple(self.variants),
            summary=summarise_loops(self.variants, self.scores),
        )
        write_atomically(self.plan.out / STUDY, study.model_dump_json(indent=2) + "\n")
        if study.variants:
            write_atomically(self.plan.out / SUMMARY, study_markdown(study, self.plan.out))
        return study

    def _has_more(self, earlier: Study) -> bool:
        return earlier.status == "complete" or len(earlier.variants) > len(self.variants)

    def _say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)


def _session(plan: StudyPlan) -> Session:
    return Session(
        started=datetime.now(UTC),
        ended=None,
        command=plan.command,
        packages=provenance.packages(),
        git=provenance.git_state(),
        hardware=provenance.hardware(),
        sandbox=plan.sandbox,
    )


def _relative(path: Path, out: Path) -> str:
    """Relative to the study's folder where it is inside of it, so that the folder can be moved."""
    try:
        return str(path.resolve().relative_to(out.resolve()))
    except ValueError:
        return str(path.resolve())


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
