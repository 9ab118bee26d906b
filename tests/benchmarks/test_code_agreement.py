"""Our verdicts beside the official ones, on right, wrong, mutated, late and odd answers."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bare_official import bare_official
from evalplus_parts import gold

from plt_benchmarks.code import HUMANEVAL, MBPP, EvalPlusSuite
from plt_benchmarks.datafiles import read_bytes
from plt_benchmarks.evalplus_judge.oracle import Oracle
from plt_benchmarks.evalplus_judge.problem import Problem
from plt_benchmarks.evalplus_judge.scorer import EvalPlusScorer
from plt_benchmarks.protocols import Answer, Sample, Sandbox, Score


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


def official_command(code: EvalPlusSuite, answers: dict[str, list[str]], folder: Path, data: Path) -> dict[str, Any]:
    """The results file of the official command on solutions by task."""
    source = Path(code.load(data).source)
    override = folder / "data.jsonl"
    override.write_bytes(read_bytes(source))
    samples = folder / "samples.jsonl"
    lines = [{"task_id": task, "solution": text} for task, texts in answers.items() for text in texts]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    variable = {"humaneval": "HUMANEVAL_OVERRIDE_PATH", "mbpp": "MBPP_OVERRIDE_PATH"}[code.dataset]
    command = [sys.executable, "-m", "evalplus.evaluate", "--dataset", code.dataset, "--samples", str(samples)]
    environment = {**os.environ, variable: str(override), "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run([*command, "--parallel", "2"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results: dict[str, Any] = json.loads((folder / "samples_eval_results.json").read_text())["eval"]
    return results


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("code", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
def test_the_official_command(code: EvalPlusSuite, data_folder: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    """Three answers to every task, one right and two mutated; the faulty tasks too."""
    samples = {sample.id: sample for sample in code.load(data_folder).samples}
    answers = {
        task: [gold(sample).text, *(mutants(gold(sample).text, 2, seed=3) if task != "Mbpp/255" else ["", ""])]
        for task, sample in samples.items()
    }
    answers = {task: (texts + [""] * 2)[:3] for task, texts in answers.items()}
    scorer = EvalPlusScorer(code.dataset, sandbox, Oracle(sandbox, tmp_path))
    jobs = [(task, text) for task, texts in answers.items() for text in texts]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: scorer.score(samples[job[0]], Answer(job[1], solution=True)), jobs))
    scorer.close()
    scores: dict[str, list[Score]] = {task: [] for task in samples}
    for (task, _), score in zip(jobs, found, strict=True):
        scores[task].append(score)
    results = official_command(code, answers, tmp_path, data_folder)
    late = 0
    for task, verdicts in results.items():
        for verdict, score, text in zip(verdicts, scores[task], answers[task], strict=True):
            base, plus = verdict["base_status"], verdict["plus_status"]
            if score.values["plus"] and plus != "pass":
                ((base, plus),) = bare_official(code.dataset, [(dict(samples[task].data), text)], min_time_limit=20.0)
                late += 1
            assert score.values["base"] == (base == "pass"), f"{task}: {score.detail}\n{text}"
            assert score.values["plus"] == (base == plus == "pass"), f"{task}: {score.detail}\n{text}"
    official = sum(v["base_status"] == v["plus_status"] == "pass" for vs in results.values() for v in vs) / len(jobs)
    assert code.metrics(scores)[f"{code.name}.plus.pass@1"].value == pytest.approx(official + late / len(jobs))


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
