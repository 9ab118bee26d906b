"""Answers and problems that several tests of the code suites use."""

from __future__ import annotations

from plt_benchmarks.protocols import Answer, Sample


def gold(sample: Sample) -> Answer:
    """The reference solution as an answer."""
    return Answer(sample.data["prompt"] + sample.data["canonical_solution"], solution=True)


def own_problem(body: str, inputs: list[list[object]], **changes: object) -> Sample:
    """A small problem in the official format, whose function is `f(x)`."""
    row = {
        "task_id": "Own/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": body,
        "base_input": inputs,
        "plus_input": inputs,
        "atol": 0,
    }
    row.update(changes)
    return Sample(str(row["task_id"]), row)
