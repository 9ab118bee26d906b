"""pass@k and intervals against definitions, known numbers and the official estimator."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plt_benchmarks.statistics import mean, pass_at_k, wilson_interval


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int) -> None:
    for correct in range(n + 1):
        answers = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(answers, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_agrees_with_the_official_estimator() -> None:
    evaluation = pytest.importorskip("evalplus.eval")
    for n, correct, k in [(200, 1, 100), (200, 37, 10), (20, 20, 5), (100, 0, 100), (10, 9, 1)]:
        official = evaluation.estimate_pass_at_k(n, [correct], k)[0]
        assert pass_at_k(n, correct, k) == pytest.approx(official, abs=1e-12)


def test_pass_at_k_is_exact_where_products_lose_digits() -> None:
    assert pass_at_k(10_000, 1, 1) == 1e-4
    assert pass_at_k(3000, 2999, 1) == 2999 / 3000
    assert pass_at_k(5, 5, 5) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0


@pytest.mark.parametrize(("n", "correct", "k"), [(1, 2, 1), (1, -1, 1), (1, 0, 2), (1, 0, 0), (0, 0, 1)])
def test_pass_at_k_outside_its_domain(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval_known_values(right: int, n: int, low: float, high: float) -> None:
    found = wilson_interval(right / n, n)
    assert found == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_interval_holds_the_mean_and_stays_in_range(n: int, value: float) -> None:
    low, high = wilson_interval(value, n)
    assert 0 <= low <= value <= high <= 1


def test_wilson_interval_refuses_nonsense() -> None:
    for value, n in [(0.5, 0), (1.5, 3), (math.nan, 3)]:
        with pytest.raises(ValueError, match="no interval"):
            wilson_interval(value, n)


def test_mean_does_not_depend_on_order() -> None:
    values = [random.Random(0).random() * 10**-i for i in range(12)] * 5
    means = set()
    for seed in range(20):
        random.Random(seed).shuffle(values)
        means.add(mean(values))
    assert len(means) == 1
    with pytest.raises(ValueError, match="no values"):
        mean([])
