"""One task of HumanEval+ or MBPP+ as the scorer sees it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plt_benchmarks.evalplus_judge.official import mbpp_inputs, special_tasks

Dataset = Literal["humaneval", "mbpp"]
SETS = ("base", "plus")


@dataclass(frozen=True)
class Problem:
    """A task with its inputs by set of tests, as the official command restores them. `not_none` means that only
    whether an output is None is compared, `iterate` that any iterable will do. `digest` is of the whole row."""

    task_id: str
    dataset: Dataset
    prompt: str
    entry_point: str
    canonical_solution: str
    inputs: Mapping[str, Sequence[Any]]
    atol: float
    not_none: bool
    iterate: bool
    digest: str

    @classmethod
    def from_row(cls, dataset: Dataset, row: Mapping[str, Any]) -> Problem:
        """From a row in the official format, whose keys and types are right."""
        entry_point, mbpp = row["entry_point"], dataset == "mbpp"
        text = json.dumps([dataset, row], sort_keys=True)
        return cls(
            task_id=row["task_id"],
            dataset=dataset,
            prompt=row["prompt"],
            entry_point=entry_point,
            canonical_solution=row["canonical_solution"],
            inputs={name: restored_inputs(dataset, row["task_id"], row[f"{name}_input"] or []) for name in SETS},
            atol=row["atol"],
            not_none=mbpp and entry_point in special_tasks("MBPP_OUTPUT_NOT_NONE_TASKS"),
            iterate=mbpp and entry_point in special_tasks("MBPP_OUTPUT_SET_EQ_TASKS"),
            digest=hashlib.sha256(text.encode()).hexdigest(),
        )


def restored_inputs(dataset: Dataset, task_id: str, inputs: list[Any]) -> list[Any]:
    """What JSON could not hold is put back, by the official function, in the official tasks of MBPP+ (whose numbers it
    goes by). Raises whatever that function raises for inputs of another shape."""
    prefix, _, number = task_id.partition("/")
    return mbpp_inputs(task_id, inputs) if dataset == "mbpp" and prefix == "Mbpp" and number.isdecimal() else inputs
