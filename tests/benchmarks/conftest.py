"""Shared parts of the suites' tests: the real sandbox, the real data, and a cache of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from plt_benchmarks.code import HUMANEVAL, MBPP
from plt_benchmarks.evalplus_judge.oracle import Oracle
from plt_benchmarks.evalplus_judge.scorer import EvalPlusScorer
from plt_benchmarks.protocols import Sample, Sandbox
from plt_eval.errors import UserError
from plt_eval.sandbox import open_sandbox


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the real problems."""
    folder = os.environ.get("PLT_EVAL_DATA")
    if not folder:
        pytest.skip("PLT_EVAL_DATA is not set: a folder with HumanEvalPlus.jsonl.gz and MbppPlus.jsonl.gz")
    return Path(folder)


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    try:
        return open_sandbox("bubblewrap")
    except UserError as error:
        pytest.skip(f"no sandbox here: {error}")


@pytest.fixture(scope="session")
def expected_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("expected")


@pytest.fixture(scope="session")
def humaneval_scorer(sandbox: Sandbox, expected_folder: Path) -> Iterator[EvalPlusScorer]:
    scorer = EvalPlusScorer("humaneval", sandbox, Oracle(sandbox, expected_folder))
    yield scorer
    scorer.close()


@pytest.fixture(scope="session")
def mbpp_scorer(sandbox: Sandbox, expected_folder: Path) -> Iterator[EvalPlusScorer]:
    scorer = EvalPlusScorer("mbpp", sandbox, Oracle(sandbox, expected_folder))
    yield scorer
    scorer.close()


@pytest.fixture(scope="session")
def humaneval(data_folder: Path) -> dict[str, Sample]:
    return {sample.id: sample for sample in HUMANEVAL.load(data_folder).samples}


@pytest.fixture(scope="session")
def mbpp(data_folder: Path) -> dict[str, Sample]:
    return {sample.id: sample for sample in MBPP.load(data_folder).samples}
