"""From tidy rows to numbers with intervals: means over samples, and loops of one run set against each other.

    rows = pandas.read_parquet(run / "loops.parquet")
    summarise(rows)                                          # every cell: value, low, high, n
    shares(rows)                                             # where refinement concentrates, loops 2..R
    cost_over_gain(rows, variant="normed")                   # offset cost per nat of output shift, and its growth
    paired_difference(rows, "effective_rank", "normed", 3, 2)

All of them take the rows of one run: columns sample, loop, measurement, variant, layer, position, value, count,
nonfinite, one row for each (sample, loop, measurement, variant, layer, position); the sample-level rows have neither
layer nor position. The statistics are plt_diagnostics.bootstrap's: means over samples, in which each sample counts once
however many tokens it has, with 95% percentile intervals over samples. The order of the rows does not matter.

The comparisons read sample-level rows, over the samples that have all the values compared. Whoever makes many of them
makes one `Samples(rows)` and gives it in place of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from plt_diagnostics.bootstrap import RESAMPLES, Estimate, Floats, draw, function_of_means, means

if TYPE_CHECKING:
    from collections.abc import Hashable

KEYS = ["measurement", "variant", "loop", "layer", "position"]
COLUMNS = ["sample", *KEYS, "value", "nonfinite"]

SHARED = {"output_shift": "", "attention_kl": "mixed", "peak_loop": ""}
"""Measurements whose loops' shares say where refinement concentrates (output shift, attention re-routing, token
breadth), with the variant that is read."""


class RowsError(ValueError):
    """The rows are not those of one run, or lack what is asked of them."""


class Cell(NamedTuple):
    """A sample-level number."""

    measurement: str
    variant: str
    loop: int


def summarise(rows: pd.DataFrame, *, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Mean over samples with its 95% interval, for every (measurement, variant, loop, layer, position) in `rows`.

    Columns: those five (layer Int16 and position Int32, NA in sample-level rows), value, low, high (NaN where there is
    none: no finite value, or fewer than bootstrap.MIN_SAMPLES samples with one), n (samples with a value), nonfinite
    (sum over samples). Sorted by the five. Raises RowsError for rows that lack a column, hold a cell of a sample twice,
    or a value that is infinite.
    """
    table = _pivot(rows)
    value, low, high, n = means(table.values, draw(len(table.samples), seed=seed, resamples=resamples))
    found = table.cells.assign(value=value, low=low, high=high, n=n, nonfinite=table.nonfinite)
    for name, kind in (("layer", "Int16"), ("position", "Int32")):
        found[name] = found[name].where(found[name] >= 0).astype(kind)
    return found


class Samples:
    """The sample-level values of one run, with the weights of its resamples: what the comparisons read."""

    def __init__(self, rows: pd.DataFrame, *, seed: int = 0, resamples: int = RESAMPLES) -> None:
        _check_columns(rows)
        everyone = np.unique(rows["sample"].to_numpy())  # also those that have no sample-level row
        table = _pivot(rows[rows["layer"].isna() & rows["position"].isna()])
        self.count = len(everyone)
        self._weights = draw(self.count, seed=seed, resamples=resamples)
        self._values = np.full((self.count, len(table.cells)), np.nan)
        self._values[np.searchsorted(everyone, table.samples)] = table.values
        cells = table.cells[KEYS[:3]].itertuples(index=False)
        self._column = {Cell(str(m), str(v), int(loop)): at for at, (m, v, loop) in enumerate(cells)}
        self._nonfinite = table.nonfinite

    @property
    def loops(self) -> int:
        """R, the last loop that any measurement reached; 0 without rows."""
        return max((cell.loop for cell in self._column), default=0)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self._column

    def loops_of(self, measurement: str, variant: str) -> list[int]:
        """The loops that it was measured at, ascending."""
        return sorted(cell.loop for cell in self._column if cell[:2] == (measurement, variant))

    def nonfinite(self, cells: Iterable[Cell]) -> int:
        """How many tokens or queries of the cells were not finite."""
        return sum(int(self._nonfinite[self._at(cell)]) for cell in cells)

    def estimate(self, cells: Sequence[Cell], function: Callable[[Floats], Floats]) -> Estimate:
        """`function` of the cells' means [..., cells] -> [...], over the samples that have all of them. Raises
        RowsError for a cell that was not measured."""
        return function_of_means(self._values[:, [self._at(cell) for cell in cells]], self._weights, function)

    def _at(self, cell: Cell) -> int:
        if cell not in self._column:
            name = " ".join(filter(None, cell[:2]))
            raise RowsError(f"no sample-level rows of {name} at loop {cell.loop}")
        return self._column[cell]


# --- loops set against each other --------------------------------------------------------------------------


def paired_difference(
    rows: pd.DataFrame | Samples,
    measurement: str,
    variant: str,
    loop_a: int,
    loop_b: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean over samples of the value at `loop_a` less that at `loop_b`. Raises RowsError where either is missing."""
    cells = [Cell(measurement, variant, loop_a), Cell(measurement, variant, loop_b)]
    return _samples(rows, seed, resamples).estimate(cells, lambda mean: mean[..., 0] - mean[..., 1])


def ratio(
    rows: pd.DataFrame | Samples, above: Cell, below: Cell, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Ratio of the two means over samples (not the mean of the samples' ratios, which one small denominator can
    rule). Raises RowsError where either is missing."""
    return _samples(rows, seed, resamples).estimate([above, below], lambda mean: mean[..., 0] / mean[..., 1])


def share(
    rows: pd.DataFrame | Samples,
    measurement: str,
    variant: str,
    loop: int,
    among: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The mean of `loop` as a part of the sum of the means of the loops `among`. Raises RowsError where one is
    missing, ValueError where `loop` is not among them."""
    at = list(among).index(loop)
    cells = [Cell(measurement, variant, each) for each in among]
    return _samples(rows, seed, resamples).estimate(cells, lambda mean: mean[..., at] / mean.sum(axis=-1))


def shares(rows: pd.DataFrame | Samples, *, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Each extra loop's share of the output shift, of the attention re-routing and of the tokens that it moves most.

        share(r) = mean(r) / sum over k = 2..R of mean(k)

    over the samples that have all of these loops. All loops of a measurement are resampled together, so the shares sum
    to 1 in every resample. Columns: measurement, variant, loop, value, low, high, n; NaN where a share is not defined.
    No rows for what was not measured, or for one loop alone.
    """
    found = []
    samples = _samples(rows, seed, resamples)
    for measurement, variant in SHARED.items():
        among = [loop for loop in samples.loops_of(measurement, variant) if loop >= 2]
        for loop in among:
            found.append((measurement, variant, loop, share(samples, measurement, variant, loop, among)))
    return _frame(found, ["measurement", "variant", "loop"])


def cost_over_gain(
    rows: pd.DataFrame | Samples, *, variant: str, seed: int = 0, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """What the shift between loops distorts for each nat that the loop moves the output.

        ratio(r) = mean offset_cost(r) / mean output_shift(r)       growth(r) = ratio(r) / ratio(r-1), r >= 3

    The ratio's unit is that of the states and says little by itself; the growth has none. `variant` is offset_cost's:
    the state that is really shifted, raw or normed. Columns: loop, quantity ("ratio" or "growth"), value, low, high, n;
    a loop without either measurement has no row.
    """
    found = []
    samples = _samples(rows, seed, resamples)
    both = sorted(set(samples.loops_of("offset_cost", variant)) & set(samples.loops_of("output_shift", "")))
    for loop in both:
        cost, gain = Cell("offset_cost", variant, loop), Cell("output_shift", "", loop)
        found.append((loop, "ratio", ratio(samples, cost, gain)))
        if loop - 1 in both:
            found.append((loop, "growth", growth(samples, "offset_cost", variant, "output_shift", "", loop)))
    return _frame(found, ["loop", "quantity"])


def growth(samples: Samples, above: str, above_variant: str, below: str, below_variant: str, loop: int) -> Estimate:
    """Of the ratio `above` / `below` from loop - 1 to loop: 1 where it stays, 2 where it doubles."""
    cells = [
        Cell(name, variant, at)
        for at in (loop, loop - 1)
        for name, variant in ((above, above_variant), (below, below_variant))
    ]
    return samples.estimate(cells, lambda m: (m[..., 0] / m[..., 1]) / (m[..., 2] / m[..., 3]))


def _samples(rows: pd.DataFrame | Samples, seed: int, resamples: int) -> Samples:
    return rows if isinstance(rows, Samples) else Samples(rows, seed=seed, resamples=resamples)


def _frame(found: Sequence[tuple[object, ...]], names: list[str]) -> pd.DataFrame:
    """Rows (*names, Estimate) as a table; None becomes NaN."""
    table = pd.DataFrame([row[:-1] for row in found], columns=names)
    estimates = [row[-1] for row in found]
    for name in ("value", "low", "high"):
        table[name] = np.array([getattr(each, name) for each in estimates], dtype=np.float64)
    table["n"] = np.array([getattr(each, "n") for each in estimates], dtype=np.int64)  # noqa: B009
    return table


# --- rows to a table ---------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """values [samples, cells] (NaN where a sample has none), nonfinite [cells], the cells' keys (layer and position -1
    in sample-level rows) in order, the samples in order."""

    values: Floats
    nonfinite: np.typing.NDArray[np.int64]
    cells: pd.DataFrame
    samples: np.typing.NDArray[np.int64]


def _pivot(rows: pd.DataFrame) -> _Table:
    _check_columns(rows)
    keys = _keys(rows)
    groups = keys.groupby(KEYS, observed=True, sort=True)
    cell = groups.ngroup().to_numpy()
    names, sample = np.unique(rows["sample"].to_numpy(), return_inverse=True)
    values = rows["value"].to_numpy(dtype=np.float64, na_value=np.nan)
    if np.isinf(values).any():
        raise RowsError(f"an infinite value{_where(rows, np.isinf(values))}: expected finite ones, or null")
    cells = groups.size().reset_index()[KEYS]
    flat = sample * len(cells) + cell
    taken = np.bincount(flat, minlength=len(names) * len(cells))
    if (taken > 1).any():
        raise RowsError(f"sample, loop and measurement twice{_where(rows, taken[flat] > 1)}: are these two runs' rows?")
    wide = np.full(len(names) * len(cells), np.nan)
    wide[flat] = values
    counted = rows["nonfinite"].to_numpy(dtype=np.float64, na_value=0)
    nonfinite = np.bincount(cell, weights=counted, minlength=len(cells)).astype(np.int64)
    cells = cells.astype({"measurement": "str", "variant": "str"})
    return _Table(wide.reshape(len(names), len(cells)), nonfinite, cells, names)


def _keys(rows: pd.DataFrame) -> pd.DataFrame:
    """The five columns, as what groups fast and sorts the same in any order of the rows."""
    keys: dict[Hashable, object] = {}
    for name in ("measurement", "variant"):
        column = rows[name].astype("category")
        keys[name] = column.cat.set_categories(sorted(column.cat.categories))
    keys["loop"] = rows["loop"].astype("int64")
    for name in ("layer", "position"):
        keys[name] = rows[name].astype("Int64").fillna(-1).astype("int64")
    return pd.DataFrame(keys)


def _check_columns(rows: pd.DataFrame) -> None:
    missing = [name for name in COLUMNS if name not in rows.columns]
    if missing:
        raise RowsError(f"rows without {', '.join(missing)}: expected the columns {', '.join(COLUMNS)}")


def _where(rows: pd.DataFrame, at: np.typing.NDArray[np.bool_]) -> str:
    row = rows[at].iloc[0]
    return f" (sample {row['sample']}, loop {row['loop']}, {row['measurement']} {row['variant']})".replace(" )", ")")
