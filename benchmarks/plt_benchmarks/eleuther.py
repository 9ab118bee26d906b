"""Tasks of the Language Model Evaluation Harness (lm-eval, EleutherAI) by their own names: `lm-eval:gsm8k,hellaswag`.

What a task asks, and how it is scored, is lm-eval's affair alone, over all of a task's answers together; so this suite
only says which tasks are meant. Whoever runs it hands lm-eval a model (plt_eval.lm_harness).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_benchmarks.hub import switched_off
from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import (
    Answer,
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

NAME = "lm-eval"
PACKAGE_VERSION = "0.4.13"
"""The version of lm-eval that the tasks are taken from."""


@dataclass(frozen=True)
class TaskData:
    """Where tasks get their data from, for listings."""

    url: str = "each task's own on the Hugging Face hub, or --include-path"


@dataclass
class LmEvalSuite:
    """Tasks, groups or tags of lm-eval; a Suite for listings, which lm-eval itself prompts and scores."""

    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    num_fewshot: int | None = None
    name: str = f"{NAME}:TASK,..."
    version: str = f"{NAME} {PACKAGE_VERSION}"
    summary: str = "any task of lm-evaluation-harness by its name, as lm-eval:gsm8k,hellaswag"
    extra: str | None = NAME
    runs_code: bool = False
    problems: int = 0
    cost: str = "lm-eval's own, mostly seconds"

    @property
    def release(self) -> TaskData:
        """Where the data comes from."""
        return TaskData()

    def needs(self) -> Sequence[Need]:
        """The tasks' data: from the hub, unless that is switched off."""
        return (Need("Hugging Face hub", switched_off() is None, "unset HF_HUB_OFFLINE HF_DATASETS_OFFLINE"),)

    def load(self, source: Path | None) -> SuiteData:  # noqa: ARG002
        raise self._lm_eval_does_that()

    def prompt(self, sample: Sample) -> Prompt:  # noqa: ARG002
        raise self._lm_eval_does_that()

    def gold(self, sample: Sample) -> Answer | None:  # noqa: ARG002
        return None

    def scorer(self, sandbox: Sandbox) -> Scorer:  # noqa: ARG002
        raise self._lm_eval_does_that()

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:  # noqa: ARG002
        raise self._lm_eval_does_that()

    def _lm_eval_does_that(self) -> SuiteError:
        return SuiteError(f"suite {NAME}: its tasks are asked and scored by lm-eval: plt-eval run --suite {NAME}:TASK")


def chosen_tasks(key: str, selection: str | None, options: SuiteOptions) -> list[Suite]:
    """The suite of the tasks named in `selection`; without one the suite for listings. Raises SuiteError."""
    options.only(key, ("include_path", "num_fewshot"))
    if selection is None:
        return [LmEvalSuite()]
    tasks = tuple(dict.fromkeys(part.strip() for part in selection.split(",") if part.strip()))
    if not tasks:
        raise SuiteError(f"--suite {key}:{selection}: expected names of tasks, as {key}:gsm8k,hellaswag")
    if odd := next((task for task in tasks if re.search(r"[\s*?\[\]]", task)), None):
        raise SuiteError(f"--suite {key}: {odd!r} is no name of a task; patterns are not expanded")
    if options.include_path is not None and not options.include_path.is_dir():
        raise SuiteError(
            f"--include-path {options.include_path}: expected a folder with task files (.yaml), found none"
        )
    return [LmEvalSuite(tasks, options.include_path, options.num_fewshot, name=f"{key}:{','.join(tasks)}")]
