"""What is known about the official scorer, evalplus 0.3.1: where its files are, and its faults by name.

What is imported of evalplus is imported when asked for; `evalplus.data`, which loads pandas and more, never is.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plt_benchmarks.protocols import SuiteError

EVALPLUS_VERSION = "0.3.1"
MIN_TIME_LIMIT_S = 1.0
TIME_LIMIT_FACTOR = 4.0
SET_LIMIT_S = 60.0
"""A set of tests gets the sum of its calls' limits, at most this, and SET_EXTRA_S."""
SET_EXTRA_S = 2.0


@dataclass(frozen=True)
class Fault:
    """A task that the official command misjudges. `effect`: "always fails" whatever the answer, or "may fail" with the
    load of the machine. `cure` is how the `_corrected` metrics (and, for "may fail", all of them) judge it. `sets` are
    the official verdicts that it concerns."""

    entry_point: str
    effect: Literal["always fails", "may fail"]
    fault: str
    cure: str
    sets: tuple[str, ...] = ("base", "plus")


FAULTS = {
    "HumanEval/32": Fault(
        "find_zero",
        "always fails",
        "after its oracle has accepted an output, the scorer skips the line that records the success",
        "the same oracle, abs(poly(xs, x)) <= atol, decides every test",
    ),
    "Mbpp/255": Fault(
        "combinations_colors",
        "always fails",
        "its process holds the expected outputs, over 1 GiB, twice: too little of its 4 GiB is left for the plus tests",
        "the candidate has the 4 GiB to itself, and outputs are compared in another process",
        sets=("plus",),
    ),
    "Mbpp/392": Fault(
        "get_max_sum",
        "may fail",
        "the reference takes half of the limit, which is in real time",
        "limits are in processor time",
    ),
    "Mbpp/630": Fault(
        "get_coordinates",
        "may fail",
        "the reference takes a good part of the limit, which is in real time",
        "limits are in processor time",
    ),
}


def always_fails(task_id: str, entry_point: str) -> bool:
    """Whether the official command fails every answer to this task, in the fault's sets."""
    fault = FAULTS.get(task_id)
    return fault is not None and fault.entry_point == entry_point and fault.effect == "always fails"


@functools.cache
def evalplus_folder() -> Path:
    """The installed package. Raises SuiteError when it is not there in the version that is needed."""
    spec = importlib.util.find_spec("evalplus")
    if spec is None or spec.origin is None:
        raise SuiteError("HumanEval+ and MBPP+ need evalplus, which is not installed: pip install 'plt-eval[code]'")
    version = importlib.metadata.version("evalplus")
    if version != EVALPLUS_VERSION:
        raise SuiteError(f"evalplus {EVALPLUS_VERSION} is needed, found {version}: pip install 'plt-eval[code]'")
    return Path(spec.origin).parent


@functools.cache
def evalplus_source(name: str) -> bytes:
    """The text of one file of the installed package, such as "eval/utils.py"."""
    return (evalplus_folder() / name).read_bytes()


@functools.cache
def _restore_mbpp_inputs() -> Callable[[str, list[Any]], list[Any]]:
    """The official function alone: importing its module would load pandas and a dozen more."""
    tree = ast.parse(evalplus_source("data/mbpp.py"))
    name = "mbpp_deserialize_inputs"
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    space: dict[str, Any] = {}
    exec(compile(tree, "evalplus/data/mbpp.py", "exec"), space)
    return space[name]  # type: ignore[no-any-return]


def mbpp_inputs(task_id: str, inputs: list[Any]) -> list[Any]:
    """The inputs of an MBPP+ task as the official command gives them: tuples, sets and complex numbers restored."""
    return _restore_mbpp_inputs()(task_id, inputs)


def special_tasks(name: Literal["MBPP_OUTPUT_NOT_NONE_TASKS", "MBPP_OUTPUT_SET_EQ_TASKS"]) -> frozenset[str]:
    """Entry points of MBPP+ with an oracle of their own."""
    evalplus_folder()
    from evalplus.eval import _special_oracle

    return frozenset(getattr(_special_oracle, name))


def stop_strings(dataset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What ends a completion: of a base model, and of a chat model inside its code block."""
    evalplus_folder()
    from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

    return (*EOS, *extra_eos_for_direct_completion(dataset)), (*EOS, "\n```\n")
