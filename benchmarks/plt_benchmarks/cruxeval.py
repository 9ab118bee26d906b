"""CRUXEval: say what a short Python function gives for an input (`-o`), or find an input for an output (`-i`).

Data: 800 functions with an input and its output (MIT licence). Paper: Gu et al. 2024, "CRUXEval: A Benchmark for Code
Reasoning, Understanding and Execution". Each task comes with the direct prompt and with the chain-of-thought prompt of
the authors (`-cot`), and an answer counts if `f(input) == output` holds when it is executed.

What is executed is the data's own function, on plain data. A predicted output has to be a literal, as the prompt
demands. A predicted input may be any expression: one of literals, lambdas, and calls of harmless builtins and methods
is passed as it is (a few of the data's own inputs are functions); any other is evaluated in a sandbox first, and all
that leaves it is plain data. So no answer can pass by an `__eq__` of its own, by `None or True`, or by hiding the
comparison behind a `#`, as it can with the authors' script, which pastes the answer into an assertion.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plt_benchmarks.datafiles import Release, open_data, suite_data
from plt_benchmarks.literals import (
    MOST_CHARACTERS,
    call_arguments,
    evaluated,
    expression,
    is_literal,
    run_program,
    source,
)
from plt_benchmarks.outcomes import how_it_ended, told_by
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
    SuiteData,
    SuiteError,
)
from plt_benchmarks.statistics import pass_metrics

Task = Literal["input", "output"]
JUDGE_VERSION = 1
SYSTEM = "You are an expert at Python programming, code execution, test case generation, and fuzzing."

RELEASE = Release(
    stem="cruxeval",
    version="v1",
    url="https://raw.githubusercontent.com/facebookresearch/cruxeval/main/data/cruxeval.jsonl",
    md5="909218466adc7ef626ae886ddb79a42d",
    sha256="8368b81047dc5014e4caf5a2f97604eff7644e0ecd7415e3ceeb184bbc2e0c96",
)


@dataclass
class CruxEvalSuite:
    """One of the two tasks with one of the two prompts; a Suite."""

    task: Task
    thinks: bool
    release: Release = RELEASE
    extra: str | None = None
    runs_code: bool = True
    problems: int = 800
    cost: str = "1 min on 2 cores"
    name: str = field(init=False)
    version: str = field(init=False)
    summary: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"cruxeval-{self.task[0]}" + ("-cot" if self.thinks else "")
        self.version = f"{self.release.name}+judge-{JUDGE_VERSION}"
        what = "an input for an output" if self.task == "input" else "the output for an input"
        how = "chain of thought" if self.thinks else "direct"
        self.summary = f"CRUXEval-{self.task[0].upper()}: {what} of 800 short Python functions ({how})"

    def needs(self) -> Sequence[Need]:
        """Nothing but the sandbox."""
        return ()

    def load(self, source: Path | None) -> SuiteData:
        """Read the functions from `source` (file or folder), or from the official file when None. Raises SuiteError."""
        return suite_data(open_data(self.release, source), _check_row, key="id")

    def prompt(self, sample: Sample) -> Prompt:
        """The authors' prompt with its examples; a chat model gets the same text after their system message."""
        text = _template(self.task, self.thinks).format(**_shown(self.task, sample))
        return Prompt(
            text=text,
            stop=("[/ANSWER]",),
            messages=(Message("system", SYSTEM), Message("user", text)),
            chat_stop=("[/ANSWER]",),
            max_new_tokens=1024 if self.thinks else 256,
        )

    def gold(self, sample: Sample) -> Answer | None:
        """The assertion with the data's own input and output."""
        return Answer(f"[ANSWER]\nassert f({sample.data['input']}) == {sample.data['output']}\n", solution=True)

    def scorer(self, sandbox: Sandbox) -> Scorer:
        """Executes the data's functions in `sandbox`."""
        return CruxEvalScorer(self.task, sandbox)

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """pass@k for each k up to the fewest answers that any problem has; scores with an error count for nothing."""
        words = f"{self.summary}; f(input) == output holds when executed"
        return pass_metrics(self.name, "right", scores, words)


class CruxEvalScorer:
    """Judges answers to one of the tasks. Thread-safe."""

    def __init__(self, task: Task, sandbox: Sandbox) -> None:
        self._task: Task = task
        self._sandbox = sandbox

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Value "right"; the detail says why not. Raises DriverEnded."""
        value, why = self._value(answer.text)
        if value is None:
            return _wrong("", why)
        shown = value if self._task == "output" else f"f({value})"
        call, output = sample.data["input"], sample.data["output"]
        if self._task == "output":
            if not is_literal(value):
                return _wrong(shown, "the output is no literal")
            output = value
        elif _harmless(value):
            call = value
        else:
            plain = evaluated(self._sandbox, value)
            if plain is None:
                return _wrong(shown, "the input cannot be evaluated to plain data")
            call = plain
        outcome = run_program(self._sandbox, _CHECK, {"code": sample.data["code"], "call": call, "output": output})
        said = told_by(outcome, str)
        if said is None:
            return _wrong(shown, how_it_ended(outcome))
        return Score({"right": said == "equal"}, judged=shown, detail={} if said == "equal" else {"why": said})

    def close(self) -> None:
        """Nothing is held."""

    def _value(self, text: str) -> tuple[str | None, str]:
        if len(text) > MOST_CHARACTERS:
            return None, f"the answer has {len(text)} characters"
        found = predicted(self._task, text)
        return found, f"no {self._task} was found in the answer"


_CHECK = """
import io, json, os, sys
request = json.load(sys.stdin)
print("ready", flush=True)
out, sys.stdout = sys.stdout, io.StringIO()
space = {}
exec(request["code"], space)
expected = eval(request["output"], {})
try:
    found = eval("f(" + request["call"] + ")", space)
    told = "equal" if found == expected else "it gives " + repr(found)[:200]
except Exception as error:
    told = "it raises " + type(error).__name__
json.dump(told, out)
"""
"""Runs trusted code on plain data."""


def _wrong(shown: str, why: str) -> Score:
    return Score({"right": False}, judged=shown, detail={"why": why})


# --- what an answer says ------------------------------------------------------------------------------


def predicted(task: Task, text: str) -> str | None:
    """The output, or the arguments of f, that `text` predicts, as source; None where there is none.

    It is read from the last `[ANSWER]` on, or from its beginning; a whole assertion `assert f(...) == ...` is looked
    for first, then, for an output, a bare expression, and for an input a bare `f(...)`.
    """
    said = text.rpartition("[ANSWER]")[2].partition("[/ANSWER]")[0].strip()
    said = said.removeprefix("```python").removeprefix("```").removesuffix("```").strip()
    start = said.find("assert ")
    found = _assertion(said[start:]) if start >= 0 else None
    if found is not None:
        return found[task == "output"]
    if task == "output":
        after = said.rpartition("==")[2] if start >= 0 else said
        return after.strip() or None
    call = expression(said.partition("==")[0].strip() if start < 0 else said[start + 7 :].partition("==")[0].strip())
    return call_arguments(call) if call is not None else None


def _assertion(text: str) -> tuple[str, str] | None:
    """Arguments and output of the assertion at the beginning of `text`, which may be followed by other text."""
    lines = text.split("\n")
    for end in range(1, min(len(lines), 50) + 1):
        try:
            statement = ast.parse("\n".join(lines[:end])).body[0]
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
        test = statement.test if isinstance(statement, ast.Assert) else None
        if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
            return None
        arguments = call_arguments(test.left)
        output = source(test.comparators[0])
        return None if arguments is None or output is None else (arguments, output)
    return None


def _harmless(text: str) -> bool:
    """Whether arguments cannot do more than make plain data, and functions that do no more: there is no way from what
    is allowed here to a class of its own, to a frame or to a module, so nothing can interfere with the comparison."""
    call = expression(f"f({text})")
    return isinstance(call, ast.Call) and all(
        _harmless_node(node) for part in (*call.args, *call.keywords) for node in ast.walk(part)
    )


def _harmless_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in _METHODS
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) or (isinstance(node.func, ast.Name) and node.func.id in _BUILTINS)
    if isinstance(node, ast.Name):
        return not node.id.startswith("_") and (node.id in _BUILTINS or not hasattr(builtins, node.id))
    return isinstance(node, _NODES)


_METHODS = frozenset(
    name
    for kind in (str, bytes, list, tuple, dict, set, frozenset, int, float, range)
    for name in dir(kind)
    if not name.startswith("_") and name not in ("format", "format_map")
)
_BUILTINS = frozenset({
    "abs", "all", "any", "bin", "bool", "bytes", "chr", "dict", "divmod", "enumerate", "filter", "float",
    "frozenset", "hex", "int", "len", "list", "map", "max", "min", "oct", "ord", "pow", "range", "repr",
    "reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip",
})  # fmt: skip
_NODES = (
    ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Starred, ast.keyword, ast.expr_context, ast.operator,
    ast.unaryop, ast.boolop, ast.cmpop, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript,
    ast.Slice, ast.Lambda, ast.arguments, ast.arg, ast.ListComp, ast.SetComp, ast.DictComp, ast.comprehension,
)  # fmt: skip


# --- data and prompts ---------------------------------------------------------------------------------


def _check_row(place: str, row: dict[str, Any]) -> None:
    """Raises SuiteError for a row that is not in the official format."""
    for key in ("id", "code", "input", "output"):
        if not isinstance(row.get(key), str):
            found = type(row[key]).__name__ if key in row else f"the keys {', '.join(sorted(row)) or 'none'}"
            raise SuiteError(f"{place}: expected {key!r} to be a string, found {found}")
    if expression(f"f({row['input']})") is None:
        raise SuiteError(f"{place}: expected 'input' to be arguments of f, found {row['input'][:80]!r}")
    if expression(row["output"]) is None:
        raise SuiteError(f"{place}: expected 'output' to be an expression, found {row['output'][:80]!r}")


def _shown(task: Task, sample: Sample) -> dict[str, str]:
    call, output = ("??", sample.data["output"]) if task == "input" else (sample.data["input"], "??")
    return {"code": sample.data["code"], "call": call, "output": output}


def _template(task: Task, thinks: bool) -> str:
    """The authors' prompt, with places for code, call and output."""
    name = f"cruxeval_{task}_cot.txt" if thinks else f"cruxeval_{task}.txt"
    return (Path(__file__).with_name("data") / name).read_text()


CRUXEVAL_I = CruxEvalSuite("input", thinks=False)
CRUXEVAL_O = CruxEvalSuite("output", thinks=False)
CRUXEVAL_I_COT = CruxEvalSuite("input", thinks=True)
CRUXEVAL_O_COT = CruxEvalSuite("output", thinks=True)
