"""The 95% percentile bootstrap over samples, of means and of functions of means.

    weights = draw(500, seed=0, resamples=2000)          # [2000, 500]: how often each sample is in each resample
    means(values, weights)                               # values [500, cells], NaN where a sample has none
    function_of_means(values[:, [3, 7]], weights, lambda m: m[..., 0] / m[..., 1])

What is resampled is samples, with replacement, as many as there are. One set of weights serves every cell of a run, so
everything that is compared meets the same samples in every resample: what is hard about a sample cancels. A sample
counts once, whatever its length.

A cell that some samples have no value for is averaged over those that have one, in the data and in each resample: the
weighted sum over them, divided by their weights. A resample that holds none of them says nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
"""Of the bootstrap."""

MIN_SAMPLES = 8
"""Samples below which there is no interval. A resample of n things spreads as if their variance were (n-1)/n of what
it is, and its percentiles know nothing of the tails that were not drawn: over fewer than 8 a "95%" interval holds the
truth less than nine times in ten, and one sample would give an interval of no width."""

PORTION = 512
"""Cells at a time, so that the resampled means of a large run stay small in memory."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval and the samples that it is of. `value` is None where it is not defined (no
    sample, or 0/0); `low` and `high` are None for fewer than MIN_SAMPLES samples, and where a resample has no
    finite value."""

    value: float | None
    low: float | None
    high: float | None
    n: int


def draw(samples: int, *, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """Weights [resamples, samples]: how often each sample is in each resample; every row sums to `samples`. Raises
    ValueError for fewer than one resample."""
    if resamples < 1:
        raise ValueError(f"resamples {resamples}: expected at least 1")
    if samples == 0:
        return np.zeros((resamples, 0))
    rng = np.random.default_rng(seed)
    return rng.multinomial(samples, np.full(samples, 1 / samples), size=resamples).astype(np.float64)


def means(values: Floats, weights: Floats) -> tuple[Floats, Floats, Floats, Integers]:
    """Mean, low, high and number of samples, each [cells], of values [samples, cells]. NaN stands for "no value" on the
    way in, and for "not defined" and "no interval" on the way out."""
    cells = values.shape[1]
    value, low, high = (np.full(cells, np.nan) for _ in range(3))
    present = ~np.isnan(values)
    n = present.sum(axis=0).astype(np.int64)
    for start in range(0, cells, PORTION):
        part = slice(start, start + PORTION)
        value[part] = _means(values[:, part], present[:, part])
        resampled = _resampled(values[:, part], present[:, part], value[part], weights)
        enough = n[part] >= MIN_SAMPLES
        low[part][enough], high[part][enough] = _percentiles(resampled[:, enough])
    return value, low, high, n


def function_of_means(values: Floats, weights: Floats, function: Callable[[Floats], Floats]) -> Estimate:
    """`function` of the means of the columns of values [samples, columns], over the samples that have all of them.

    `function` takes means [..., columns] and gives [...]: a difference, a ratio, a share.
    """
    complete = ~np.isnan(values).any(axis=1)
    n = int(complete.sum())
    if n == 0:
        return Estimate(None, None, None, 0)
    kept, drawn = values[complete], weights[:, complete]
    mean = _means(kept, np.ones_like(kept, dtype=bool))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(function(mean))
        resampled = function(_resampled(kept, np.ones_like(kept, dtype=bool), mean, drawn))
    if not np.isfinite(value):
        return Estimate(None, None, None, n)
    resampled = resampled[drawn.sum(axis=1) > 0]
    if n < MIN_SAMPLES or not np.isfinite(resampled).all():
        return Estimate(value, None, None, n)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n)


def _means(values: Floats, present: npt.NDArray[np.bool_]) -> Floats:
    """Over what is present. The second pass takes the rounding of the first away: equal values have their own mean."""
    n = present.sum(axis=0)
    with np.errstate(invalid="ignore"):
        rough = np.where(present, values, 0.0).sum(axis=0) / n
        found: Floats = rough + np.where(present, values - rough, 0.0).sum(axis=0) / n
    return found


def _resampled(values: Floats, present: npt.NDArray[np.bool_], mean: Floats, weights: Floats) -> Floats:
    """Means [resamples, cells]. Summed as deviations from the mean, which keeps a constant cell exactly constant."""
    deviations = np.where(present, values - mean, 0.0)
    drawn = weights @ present.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(drawn > 0, mean + (weights @ deviations) / drawn, np.nan)
    return found


def _percentiles(resampled: Floats) -> tuple[Floats, Floats]:
    """Of each column [resamples], over its resamples that are not NaN."""
    gaps = np.isnan(resampled).any(axis=0)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    if gaps.any():
        low[gaps], high[gaps] = np.nanquantile(resampled[:, gaps], [0.025, 0.975], axis=0)
    return low, high
