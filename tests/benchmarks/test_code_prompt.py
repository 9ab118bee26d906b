"""Prompts, stop strings and metrics of the code suites, against the official ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from plt_benchmarks.code import HUMANEVAL, INSTRUCTION, MBPP, RESPONSE, EvalPlusSuite
from plt_benchmarks.evalplus_judge import official
from plt_benchmarks.protocols import Answer, Sample, Score, SuiteError

SUITES = pytest.mark.parametrize("suite", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
SAMPLE = Sample("HumanEval/0", {"prompt": "\n\ndef f(x):\n    '''Double.'''\n\n"})


class Tokenizer:
    """A chat template that a person can read."""

    chat_template = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}</>" for m in messages)


@SUITES
def test_the_chat_form_is_the_official_one(suite: EvalPlusSuite) -> None:
    utility = pytest.importorskip("evalplus.provider.utility")
    prompt = suite.prompt(SAMPLE)
    task = SAMPLE.data["prompt"].strip() + "\n"
    expected = utility.make_raw_chat_prompt(task, INSTRUCTION, RESPONSE, Tokenizer())
    (message,) = prompt.messages
    assert f"<{message.role}>{message.content}</><assistant>{prompt.prefill}" == expected
    assert prompt.chat_stop == (*utility.EOS, "\n```\n")


@SUITES
def test_the_base_form_is_the_official_one(suite: EvalPlusSuite) -> None:
    utility = pytest.importorskip("evalplus.provider.utility")
    prompt = suite.prompt(SAMPLE)
    assert prompt.text == "def f(x):\n    '''Double.'''\n"
    assert prompt.stop == (*utility.EOS, *utility.extra_eos_for_direct_completion(suite.name))


def test_the_instructions_and_the_length_are_the_official_ones() -> None:
    source = official.evalplus_source("codegen.py").decode()
    assert f'instruction_prefix = "{INSTRUCTION}"' in source
    assert f'response_prefix = "{RESPONSE}"' in source
    assert (
        f"max_new_tokens: int = {HUMANEVAL.prompt(SAMPLE).max_new_tokens},"
        in official.evalplus_source("provider/base.py").decode()
    )


def test_the_limits_are_the_official_ones() -> None:
    config = pytest.importorskip("evalplus.config")
    assert config.DEFAULT_MIN_TIME_LIMIT == official.MIN_TIME_LIMIT_S
    assert config.DEFAULT_GT_TIME_LIMIT_FACTOR == official.TIME_LIMIT_FACTOR


def test_the_inputs_are_the_official_ones(data_folder: Path) -> None:
    mbpp = pytest.importorskip("evalplus.data.mbpp")
    from plt_benchmarks.evalplus_judge.problem import Problem

    for sample in MBPP.load(data_folder).samples:
        problem = Problem.from_row("mbpp", sample.data)
        for name in ("base", "plus"):
            theirs = list(mbpp.mbpp_deserialize_inputs(sample.id, sample.data[f"{name}_input"]))
            assert repr(list(problem.inputs[name])) == repr(theirs)


def scores(*verdicts: bool, error: bool = False) -> list[Score]:
    found = [Score(dict.fromkeys(("base", "plus", "base_corrected", "plus_corrected"), right)) for right in verdicts]
    return [*found, Score(error="broken")] if error else found


def test_metrics_are_those_of_every_k_that_all_problems_allow() -> None:
    five = scores(True, False, False, False, False)
    metrics = HUMANEVAL.metrics({"a": five, "b": scores(*[False] * 6), "c": scores(*[True] * 5)})
    assert {key for key in metrics if ".plus." in key} == {"humaneval.plus.pass@1", "humaneval.plus.pass@5"}
    assert metrics["humaneval.plus.pass@1"].value == pytest.approx((0.2 + 0 + 1) / 3)
    assert metrics["humaneval.plus.pass@5"].value == pytest.approx((1 + 0 + 1) / 3)
    assert metrics["humaneval.base_corrected.pass@1"].n == 3
    for metric in metrics.values():
        assert 0 <= metric.low <= metric.value <= metric.high <= 1
        assert "Wilson" in metric.definition


def test_metrics_are_official_pass_at_1() -> None:
    verdicts = {f"t{i}": scores(i % 3 == 0) for i in range(164)}
    metric = MBPP.metrics(verdicts)["mbpp.plus.pass@1"]
    assert (metric.value, metric.n) == (55 / 164, 164)


def test_metrics_do_not_depend_on_order() -> None:
    generator = random.Random(1)
    found = {f"t{i}": scores(*(generator.random() < 0.1 * i for _ in range(7))) for i in range(11)}
    reference = HUMANEVAL.metrics(found)
    for _ in range(5):
        keys = list(found)
        generator.shuffle(keys)
        assert HUMANEVAL.metrics({key: generator.sample(found[key], 7) for key in keys}) == reference


def test_errors_are_not_counted() -> None:
    metrics = HUMANEVAL.metrics({"a": scores(True, error=True), "b": scores(error=True)})
    assert metrics["humaneval.plus.pass@1"].value == 1.0
    assert metrics["humaneval.plus.pass@1"].n == 1
    assert HUMANEVAL.metrics({"a": scores(error=True)}) == {}
    assert HUMANEVAL.metrics({}) == {}


def test_the_definitions_name_the_faults() -> None:
    metrics = HUMANEVAL.metrics({"a": scores(True)}) | MBPP.metrics({"a": scores(True)})
    assert "HumanEval/32" in metrics["humaneval.plus_corrected.pass@1"].definition
    assert "Mbpp/255" in metrics["mbpp.plus_corrected.pass@1"].definition
    assert "0.3.1" in metrics["mbpp.plus.pass@1"].definition


def test_the_faults_are_of_the_problems_they_name(humaneval: dict[str, Any], mbpp: dict[str, Any]) -> None:
    for task_id, fault in official.FAULTS.items():
        assert (humaneval | mbpp)[task_id].data["entry_point"] == fault.entry_point
    assert not official.always_fails("HumanEval/32", "another")


def test_another_version_of_the_scorer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    official.evalplus_folder.cache_clear()
    monkeypatch.setattr(official.importlib.metadata, "version", lambda _: "0.4.0")
    with pytest.raises(SuiteError, match=r"evalplus 0\.3\.1 is needed, found 0\.4\.0"):
        MBPP.scorer(None)  # type: ignore[arg-type]
    monkeypatch.setattr(official.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SuiteError, match=r"evalplus, which is not installed: pip install 'plt-eval\[code\]'"):
        MBPP.scorer(None)  # type: ignore[arg-type]


def test_answers_become_solutions_as_the_official_command_makes_them() -> None:
    from plt_benchmarks.evalplus_judge.problem import Problem
    from plt_benchmarks.evalplus_judge.scorer import raw_solution

    problem = Problem("t", "humaneval", "\ndef f(x):\n    ", "f", "", {}, 0, False, False, "")
    assert raw_solution(problem, Answer("\treturn x")) == "def f(x):\n    return x"
    assert raw_solution(problem, Answer("```python\n\tx\n```", chat=True)) == "```python\n    x\n```"
    assert raw_solution(problem, Answer("\tas it is", solution=True)) == "\tas it is"
