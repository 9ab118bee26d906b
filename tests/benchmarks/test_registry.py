"""Suites by name."""

from __future__ import annotations

import pytest

from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import SuiteError
from plt_benchmarks.registry import all_suites, get_suite, suite_names


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("code", ["humaneval", "mbpp"]),
        ("humaneval", ["humaneval"]),
        ("HumanEval+", ["humaneval"]),
        ("mbpp", ["mbpp"]),
        ("MBPP+", ["mbpp"]),
        ("trace", ["trace"]),
        ("cruxeval", ["cruxeval-i", "cruxeval-o", "cruxeval-i-cot", "cruxeval-o-cot"]),
    ],
)
def test_known_names(name: str, found: list[str]) -> None:
    assert [suite.name for suite in get_suite(name)] == found


def test_an_unknown_name_suggests_its_neighbours() -> None:
    with pytest.raises(SuiteError, match=r"unknown suite 'humanevl' \(did you mean humaneval"):
        get_suite("humanevl")


def test_a_name_without_neighbours_lists_all() -> None:
    with pytest.raises(SuiteError) as caught:
        get_suite("xyzzy")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in suite_names())


def test_every_suite_is_listed_once_and_describes_itself() -> None:
    suites = all_suites()
    assert len({suite.name for suite in suites}) == len(suites)
    for suite in suites:
        assert suite.summary
        assert "\n" not in suite.summary
        assert suite.version
        assert suite.extra in (None, "code", "swe", "lm-eval")
        assert suite.problems > 0 or suite.extra == "lm-eval"  # which stands for any of its tasks
        assert suite.cost
        assert all(need.what for need in suite.needs())
        # What the SWE suites and Terminal-Bench judge runs in containers; the others compare text with text.
        compares = suite.name == "trace" or suite.name.startswith(("lcb-execution", "terminal", "mind2web"))
        assert suite.runs_code is (not compares and suite.extra not in ("swe", "lm-eval"))


def test_a_selection_and_options_that_a_suite_does_not_take() -> None:
    with pytest.raises(SuiteError, match="--suite trace:x: trace has no parts to choose from"):
        get_suite("trace:x")
    with pytest.raises(SuiteError, match="--num-fewshot has no effect on suite trace"):
        get_suite("trace", SuiteOptions(num_fewshot=1))
