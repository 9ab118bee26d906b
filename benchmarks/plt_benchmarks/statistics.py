"""Numbers over problems: pass@k and intervals. Exact where it costs nothing, and independent of any order."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from plt_benchmarks.protocols import Metric, Score

KS = (1, 5, 10, 25, 50, 100)
"""The k of pass@k that are reported, as far as there are answers."""
Z_95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution."""


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that at least one of k answers drawn without replacement from n, of which `correct` are right, is
    right: the unbiased estimator of pass@k. Computed in whole numbers, so that it is the nearest float for any n.

    Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} right answers among {n} is not defined")
    return float(1 - Fraction(math.comb(n - correct, k), math.comb(n, k)))


def mean(values: Collection[float]) -> float:
    """The mean, the same for any order of `values`. Raises ValueError for none."""
    if not values:
        raise ValueError("the mean of no values is not defined")
    return math.fsum(values) / len(values)


def wilson_interval(proportion: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval around the mean of n values in [0, 1], one per problem.

    For right-or-wrong values it is the usual interval for a proportion, which behaves at 0 and 1 and for small n. For
    values in between (pass@k of several answers) it is conservative: they vary less than right-or-wrong
    values of the same mean do. Raises ValueError unless n >= 1 and 0 <= proportion <= 1.
    """
    if n < 1 or not 0 <= proportion <= 1:
        raise ValueError(f"no interval around {proportion} of {n} values")
    spread = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    middle, scale = proportion + z * z / (2 * n), 1 + z * z / n
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return max(0.0, min(low, proportion)), min(1.0, max(high, proportion))


def pass_metrics(prefix: str, key: str, scores: Mapping[str, Sequence[Score]], definition: str) -> dict[str, Metric]:
    """`PREFIX.pass@k` of the value `key` for each k of KS up to the fewest answers that any problem has. Scores with an
    error count for nothing, and so does a problem without others."""
    counted = [[score for score in found if score.error is None] for found in scores.values()]
    right = [(len(found), sum(bool(score.values[key]) for score in found)) for found in counted if found]
    metrics = {}
    for k in (k for k in KS if k <= min((n for n, _ in right), default=0)):
        value = mean([pass_at_k(n, correct, k) for n, correct in right])
        low, high = wilson_interval(value, len(right))
        words = f"{definition}; pass@{k}: unbiased estimate, mean over problems, 95% Wilson interval over problems"
        metrics[f"{prefix}.pass@{k}"] = Metric(value, len(right), low, high, words)
    return metrics
