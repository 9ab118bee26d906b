"""Our verdicts beside the official ones, on right, wrong, mutated, late and odd answers."""

from __future__ import annotations

import ast
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bare_official import bare_official
from evalplus_parts import gold

from plt_benchmarks.code import HUMANEVAL, MBPP, EvalPlusSuite
from plt_benchmarks.evalplus_judge.oracle import Oracle
from plt_benchmarks.evalplus_judge.problem import Problem
from plt_benchmarks.evalplus_judge.scorer import EvalPlusScorer
from plt_benchmarks.protocols import Answer, Sample, Sandbox


class Mutation(ast.NodeTransformer):
    """Changes the `at`-th thing that can be changed."""

    SWAPS = {  # noqa: RUF012
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
        ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
    }  # fmt: skip

    def __init__(self, at: int) -> None:
        self.left = at
        self.done = False

    def _now(self) -> bool:
        self.left -= 1
        self.done |= self.left == -1
        return self.left == -1

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, int) and self._now():
            return ast.copy_location(ast.Constant(node.value + 1), node)
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if node.value is not None and self._now():
            wrapped = ast.Call(ast.Name("str", ast.Load()), [node.value], [])
            return ast.fix_missing_locations(ast.copy_location(ast.Return(wrapped), node))
        return self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if type(node) in self.SWAPS and self._now():
            return self.SWAPS[type(node)]()
        return super().generic_visit(node)


def mutants(text: str, count: int, seed: int) -> list[str]:
    """Up to `count` different programs that differ from `text` in one place."""
    found, places = [], list(range(40))
    random.Random(seed).shuffle(places)
    for place in places:
        mutation = Mutation(place)
        tree = mutation.visit(ast.parse(text))
        if mutation.done and len(found) < count:
            found.append(ast.unparse(tree))
    return found


def variants(sample: Sample, count: int) -> list[str]:
    text, entry = gold(sample).text, sample.data["entry_point"]
    return [
        text,
        "",
        *mutants(text, count, seed=len(text)),
        f"{text}\n_inner = {entry}\ndef {entry}(*args):\n    print(args)\n    return _inner(*args)\n",
        f"{text}\n_inner = {entry}\ndef {entry}(*args):\n    while True: pass\n",
        f"import numpy as np\n{text}\n_inner = {entry}\ndef {entry}(*args):\n    return np.asarray(_inner(*args))\n",
        f"{text}\n_inner = {entry}\ndef {entry}(*args):\n    found = _inner(*args)\n"
        "    return tuple(found) if isinstance(found, list) else [found]\n",
    ]


SOME = [0, 9, 20, 21, 32, 57, 99, 136]
SOME_MBPP = [2, 7, 82, 124, 222, 558, 581, 590, 737, 769]


def assert_agreement(dataset: str, samples: list[Sample], scorer: EvalPlusScorer, count: int) -> dict[str, int]:
    """Compares all verdicts; returns how many there were of each kind. Where the official check alone says no, it gets
    a second look with a wider limit: its limits are in real time, and the machine may be busy."""
    jobs = [(sample, text) for sample in samples for text in variants(sample, count)]
    with ThreadPoolExecutor(2) as pool:
        ours = list(pool.map(lambda job: scorer.score(job[0], Answer(job[1], solution=True)), jobs))
    official = bare_official(dataset, [(dict(sample.data), text) for sample, text in jobs])
    kinds: dict[str, int] = {}
    for (sample, text), score, (base, plus) in zip(jobs, ours, official, strict=True):
        assert score.error is None
        expected = {"base": base == "pass", "plus": base == plus == "pass"}
        found = {key: score.values[key] for key in expected}
        if found["plus"] and not expected["plus"]:
            ((base, plus),) = bare_official(dataset, [(dict(sample.data), text)], min_time_limit=20.0)
            expected = {"base": base == "pass", "plus": base == plus == "pass"}
        assert found == expected, f"{sample.id}: ours {score.detail}, official {base}, {plus}:\n{text}"
        if "while True" in text:
            assert "timeout" in score.detail.values()
        kinds[f"{base} {plus}"] = kinds.get(f"{base} {plus}", 0) + 1
    return kinds


@pytest.mark.timeout(900)
def test_some_of_humaneval(humaneval: dict[str, Sample], humaneval_scorer: EvalPlusScorer) -> None:
    samples = [humaneval[f"HumanEval/{i}"] for i in SOME]
    kinds = assert_agreement("humaneval", samples, humaneval_scorer, 4)
    assert kinds["pass pass"] > 10
    assert kinds["fail fail"] > 20


@pytest.mark.timeout(900)
def test_some_of_mbpp(mbpp: dict[str, Sample], mbpp_scorer: EvalPlusScorer) -> None:
    samples = [mbpp[f"Mbpp/{i}"] for i in SOME_MBPP]
    kinds = assert_agreement("mbpp", samples, mbpp_scorer, 4)
    assert kinds["pass pass"] > 10
    assert kinds["fail fail"] > 20


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("code", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
def test_all_tasks(code: EvalPlusSuite, data_folder: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    """But for the task whose official verdict hangs on the memory of the official process."""
    samples = [sample for sample in code.load(data_folder).samples if sample.id != "Mbpp/255"]
    scorer = EvalPlusScorer(code.dataset, sandbox, Oracle(sandbox, tmp_path))
    kinds = assert_agreement(code.dataset, samples, scorer, 2)
    scorer.close()
    assert kinds["pass pass"] > len(samples)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("code", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
def test_expected_outputs_are_the_official_ones(
    code: EvalPlusSuite, data_folder: Path, sandbox: Sandbox, tmp_path: Path
) -> None:
    """What the reference solution returns inside the sandbox, encoded and decoded, is what it returns in the official
    process: every output of every task."""
    from evalplus.gen.util import trusted_exec

    from plt_benchmarks.evalplus_judge.check import ExpectedOutputs

    oracle = Oracle(sandbox, tmp_path)
    for sample in code.load(data_folder).samples:
        problem = Problem.from_row(code.dataset, sample.data)
        expected = oracle.expected(problem)
        for name, inputs in problem.inputs.items():
            official = trusted_exec(gold(sample).text, inputs, problem.entry_point, output_not_none=problem.not_none)
            ours = ExpectedOutputs(expected[name].path)
            assert len(ours) == len(official)
            for i, theirs in enumerate(official):
                found = ours[i]
                if problem.iterate:  # what the order of a set decides, the official check does not look at
                    assert type(found) is type(theirs)
                    found, theirs = set(found), set(theirs)
                assert same_data(found, theirs), f"{sample.id} {name} {i}"


def same_data(ours: Any, theirs: Any) -> bool:
    """Equal and of one type, all the way down through lists and tuples; -0.0 is not 0.0, and nan is nan."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same_data, ours, theirs))
    return repr(ours) == repr(theirs) if isinstance(theirs, float | complex) else bool(ours == theirs)


def test_rows_survive_the_way_to_the_official_script(mbpp: dict[str, Sample]) -> None:
    assert json.loads(json.dumps(mbpp["Mbpp/2"].data)) == mbpp["Mbpp/2"].data
