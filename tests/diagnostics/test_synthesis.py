"""Means with intervals, and loops of one run set against each other."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import made_rows

from plt_diagnostics.bootstrap import MIN_SAMPLES, draw, function_of_means, means
from plt_diagnostics.synthesis import (
    KEYS,
    Cell,
    RowsError,
    Samples,
    cost_over_gain,
    paired_difference,
    ratio,
    share,
    shares,
    summarise,
)

EXTRA = {
    ("output_shift", "", 2): 2.0,
    ("output_shift", "", 3): 1.0,
    ("output_shift", "", 4): 1.0,
    ("attention_kl", "mixed", 2): 0.3,
    ("attention_kl", "mixed", 3): 0.2,
    ("attention_kl", "mixed", 4): 0.5,
    ("attention_kl", "local", 2): 9.0,
    ("peak_loop", "", 2): 0.6,
    ("peak_loop", "", 3): 0.3,
    ("peak_loop", "", 4): 0.1,
    ("offset_cost", "normed", 2): 20.0,
    ("offset_cost", "normed", 3): 30.0,
    ("offset_cost", "normed", 4): 30.0,
    ("step_size", "raw", 1): 5.0,
    ("step_size", "raw", 2): 4.0,
}


def shuffled(rows: pd.DataFrame, seed: int = 1) -> pd.DataFrame:
    return rows.sample(frac=1, random_state=seed).reset_index(drop=True)


def at(table: pd.DataFrame, **where: object) -> pd.Series:
    for name, value in where.items():
        table = table[table[name].isna() if value is None else table[name] == value]
    assert len(table) == 1, table
    return table.iloc[0]


class TestSummarise:
    def test_every_cell_has_its_mean(self) -> None:
        rows = made_rows(EXTRA)
        found = summarise(rows)
        assert len(found) == len(EXTRA)
        for (measurement, variant, loop), mean in EXTRA.items():
            cell = at(found, measurement=measurement, variant=variant, loop=loop)
            assert cell["value"] == pytest.approx(mean, abs=1e-12)
            assert cell["low"] < cell["value"] < cell["high"]
            assert cell["n"] == 64

    def test_layers_and_positions_are_cells_of_their_own(self) -> None:
        whole = made_rows({("gate", "", 2): 0.5})
        layer = made_rows({("gate", "", 2): 0.25}).assign(layer=0)
        position = made_rows({("gate", "", 2): 0.75}).assign(position=8)
        found = summarise(shuffled(pd.concat([position, layer, whole])))
        assert at(found, layer=None, position=None)["value"] == pytest.approx(0.5)
        assert at(found, layer=0, position=None)["value"] == pytest.approx(0.25)
        assert at(found, layer=None, position=8)["value"] == pytest.approx(0.75)
        assert (str(found["layer"].dtype), str(found["position"].dtype)) == ("Int16", "Int32")

    @given(seed=st.integers(0, 50))
    @settings(max_examples=10)
    def test_the_order_of_rows_does_not_matter(self, seed: int) -> None:
        rows = made_rows(EXTRA, samples=20)
        rows.loc[::7, "value"] = np.nan
        backwards = pd.CategoricalDtype(sorted(rows["measurement"].unique(), reverse=True))
        typed = rows.astype({"measurement": backwards, "variant": "category"})
        pd.testing.assert_frame_equal(
            summarise(rows, resamples=50), summarise(shuffled(typed, seed), resamples=50), check_exact=True
        )

    def test_the_seed_decides_the_interval_alone(self) -> None:
        rows = made_rows(EXTRA)
        one, same, other = (summarise(rows, seed=seed) for seed in (1, 1, 2))
        assert one.equals(same)
        assert one["value"].equals(other["value"])
        assert not one["low"].equals(other["low"])

    def test_a_sample_counts_once_however_many_tokens_it_has(self) -> None:
        rows = made_rows({("step_size", "raw", 1): 1.0}, samples=10)
        rows["value"] = [0.0] * 9 + [10.0]
        rows["count"] = [1] * 9 + [1_000_000]
        assert summarise(rows)["value"].item() == 1.0

    def test_nulls_are_left_out_and_counted(self) -> None:
        rows = made_rows({("step_size", "raw", 1): 3.0, ("step_size", "raw", 2): 4.0}, samples=20)
        broken = (rows["loop"] == 2) & (rows["sample"] < 5)
        rows.loc[broken, "value"], rows.loc[broken, "nonfinite"] = np.nan, 7
        rows = rows[~((rows["loop"] == 2) & (rows["sample"] == 19))]  # absent altogether
        found = at(summarise(rows), loop=2)
        kept = rows[(rows["loop"] == 2) & rows["value"].notna()]["value"]
        assert found["value"] == pytest.approx(kept.mean(), abs=1e-12)
        assert (found["n"], found["nonfinite"]) == (14, 35)
        assert at(summarise(rows), loop=1)["n"] == 20

    def test_a_cell_that_few_samples_have_is_resampled_over_those(self) -> None:
        """Against a bootstrap written out sample by sample, with the same weights."""
        rows = made_rows({("step_size", "raw", 1): 3.0, ("step_size", "raw", 2): 4.0}, samples=30, spread=0.5)
        rows = rows[(rows["loop"] == 1) | (rows["sample"] >= 18)]
        found = at(summarise(rows, seed=3, resamples=400), loop=2)
        values = dict(zip(rows[rows["loop"] == 2]["sample"], rows[rows["loop"] == 2]["value"], strict=True))
        resampled = []
        for weights in draw(30, seed=3, resamples=400):
            drawn = [values[s] for s in range(30) for _ in range(int(weights[s])) if s in values]
            resampled.append(np.mean(drawn))
        assert [found["low"], found["high"]] == pytest.approx(list(np.quantile(resampled, [0.025, 0.975])), abs=1e-12)

    @pytest.mark.parametrize("samples", [1, MIN_SAMPLES - 1])
    def test_no_interval_over_few_samples(self, samples: int) -> None:
        found = summarise(made_rows(EXTRA, samples=samples))
        assert found["value"].notna().all()
        assert found["low"].isna().all()
        assert found["high"].isna().all()

    def test_an_interval_from_the_minimum_on(self) -> None:
        assert summarise(made_rows(EXTRA, samples=MIN_SAMPLES))["low"].notna().all()

    def test_a_constant_has_an_interval_without_width(self) -> None:
        found = summarise(made_rows({("step_size", "raw", 1): 0.1}, spread=0)).iloc[0]
        assert found["low"] == found["value"] == found["high"] == 0.1

    def test_nothing_finite_is_no_number(self) -> None:
        rows = made_rows({("step_size", "raw", 1): 1.0}, samples=9).assign(value=np.nan, nonfinite=4)
        found = summarise(rows).iloc[0]
        assert np.isnan([found["value"], found["low"], found["high"]]).all()
        assert (found["n"], found["nonfinite"]) == (0, 36)

    def test_no_rows_no_cells(self) -> None:
        assert summarise(made_rows(EXTRA).iloc[:0]).empty

    def test_a_row_twice_is_refused(self) -> None:
        rows = made_rows(EXTRA)
        with pytest.raises(RowsError, match=r"twice \(sample 0, loop 2, output_shift\)"):
            summarise(pd.concat([rows, rows.iloc[:1]]))

    def test_an_infinite_value_is_refused(self) -> None:
        rows = made_rows(EXTRA)
        rows.loc[3, "value"] = np.inf
        with pytest.raises(RowsError, match=r"infinite value \(sample 3"):
            summarise(rows)

    def test_a_missing_column_is_named(self) -> None:
        with pytest.raises(RowsError, match="without variant, nonfinite"):
            summarise(made_rows(EXTRA).drop(columns=["variant", "nonfinite"]))

    def test_nine_in_ten_and_more_intervals_hold_the_truth(self) -> None:
        """200 cells of 40 normal samples each: 95%, less what a bootstrap of 40 falls short, is about 94%."""
        values = np.random.default_rng(0).normal(3.0, 2.0, size=(40, 200))
        _, low, high, _ = means(values, draw(40))
        held = ((low < 3.0) & (high > 3.0)).mean()
        assert 0.88 <= held <= 0.98

    def test_intervals_are_as_wide_as_normal_theory_says(self) -> None:
        values = np.random.default_rng(0).normal(size=(400, 50))
        _, low, high, _ = means(values, draw(400))
        assert np.mean((high - low) / (2 * 1.96 * values.std(axis=0) / 20)) == pytest.approx(1, abs=0.03)

    def test_a_large_run_takes_seconds(self) -> None:
        rng = np.random.default_rng(0)
        values = rng.normal(size=(500, 1500))
        values[rng.random(values.shape) < 0.05] = np.nan
        started = time.process_time()
        means(values, draw(500))
        assert time.process_time() - started < 10


class TestComparisons:
    def test_difference_cancels_what_is_hard_about_a_sample(self) -> None:
        rows = made_rows({("next_token_nll", "", 1): 3.0, ("next_token_nll", "", 2): 2.9}, spread=0)
        hard = np.random.default_rng(0).normal(size=64)
        rows["value"] += hard[rows["sample"]]
        found = paired_difference(rows, "next_token_nll", "", 2, 1)
        assert found.value == pytest.approx(-0.1)
        assert found.low == pytest.approx(-0.1)
        assert found.high == pytest.approx(-0.1)

    def test_difference_is_the_first_less_the_second(self) -> None:
        rows = made_rows(EXTRA)
        one = paired_difference(rows, "output_shift", "", 3, 2)
        other = paired_difference(rows, "output_shift", "", 2, 3)
        assert one.value == pytest.approx(-1.0)
        assert (other.value, other.low, other.high) == pytest.approx((1.0, -(one.high or 0), -(one.low or 0)))

    def test_only_samples_that_have_both(self) -> None:
        rows = made_rows({("step_size", "raw", 1): 1.0, ("step_size", "raw", 2): 2.0}, samples=30)
        rows.loc[(rows["loop"] == 2) & (rows["sample"] >= 10), "value"] = np.nan
        found = paired_difference(rows, "step_size", "raw", 2, 1)
        wide = rows.pivot(index="sample", columns="loop", values="value").dropna()
        assert found.n == 10
        assert found.value == pytest.approx((wide[2] - wide[1]).mean())

    def test_ratio_of_means_not_mean_of_ratios(self) -> None:
        rows = made_rows({("a", "", 2): 1.0, ("b", "", 2): 1.0}, samples=10)
        rows["value"] = [1.0] * 10 + [0.1] + [2.1] + [1.1] * 8
        found = ratio(rows, Cell("a", "", 2), Cell("b", "", 2))
        assert found.value == pytest.approx(10 / 11)

    def test_its_interval_is_that_of_the_differences(self) -> None:
        """Over samples that have both, resampled with the weights of the whole run: against summarise, on rows that
        hold the differences themselves."""
        rows = made_rows({("step_size", "raw", 1): 1.0, ("step_size", "raw", 2): 2.0}, samples=40, spread=0.5)
        rows.loc[(rows["loop"] == 2) & (rows["sample"] % 3 == 0), "value"] = np.nan
        one, two = (rows[rows["loop"] == loop].reset_index(drop=True) for loop in (1, 2))
        direct = summarise(two.assign(value=two["value"] - one["value"]), seed=5).iloc[0]
        found = paired_difference(rows, "step_size", "raw", 2, 1, seed=5)
        assert (found.value, found.low, found.high) == pytest.approx((direct["value"], direct["low"], direct["high"]))
        assert found.n == direct["n"] == 26

    def test_layer_rows_are_not_read(self) -> None:
        rows = made_rows({("gate", "", 2): 0.5, ("gate", "", 3): 0.25})
        noise = made_rows({("gate", "", 2): 9.0, ("gate", "", 3): 9.0}).assign(layer=1)
        found = paired_difference(pd.concat([noise, rows]), "gate", "", 2, 3)
        assert found.value == pytest.approx(0.25)

    def test_a_loop_that_was_not_measured_is_named(self) -> None:
        with pytest.raises(RowsError, match="no sample-level rows of step_size raw at loop 7"):
            paired_difference(made_rows(EXTRA), "step_size", "raw", 7, 2)

    def test_zero_over_zero_is_no_number(self) -> None:
        rows = made_rows({("a", "", 2): 0.0, ("b", "", 2): 0.0}, spread=0)
        found = ratio(rows, Cell("a", "", 2), Cell("b", "", 2))
        assert (found.value, found.low, found.high, found.n) == (None, None, None, 64)

    def test_a_resample_without_a_finite_ratio_leaves_no_interval(self) -> None:
        rows = made_rows({("a", "", 2): 1.0, ("b", "", 2): 1.0}, samples=10)
        rows.loc[rows["measurement"] == "b", "value"] = [1.0] + [0.0] * 9
        found = ratio(rows, Cell("a", "", 2), Cell("b", "", 2))
        assert found.value == pytest.approx(10.0)
        assert (found.low, found.high) == (None, None)

    def test_samples_do_the_work_once(self) -> None:
        rows = made_rows(EXTRA)
        samples = Samples(rows)
        assert paired_difference(samples, "output_shift", "", 3, 2) == paired_difference(rows, "output_shift", "", 3, 2)
        assert (samples.count, samples.loops) == (64, 4)

    def test_a_sample_without_a_value_still_counts_as_one(self) -> None:
        one_token = made_rows({("step_size", "raw", 1): 1.0}, samples=3).assign(position=0)
        rows = made_rows(EXTRA)
        rows["sample"] += 100
        both = pd.concat([rows, one_token])
        assert Samples(both).count == 67
        found = Samples(both).estimate([Cell("step_size", "raw", 2)], lambda mean: mean[..., 0])
        cell = at(summarise(both), measurement="step_size", loop=2)
        assert (found.value, found.low, found.high) == pytest.approx((cell["value"], cell["low"], cell["high"]))

    def test_the_function_sees_the_means(self) -> None:
        values = np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 8.0]])
        found = function_of_means(values, draw(3), lambda mean: mean[..., 0] * mean[..., 1])
        assert (found.value, found.n, found.low) == (15.0, 2, None)


class TestShares:
    def test_known_shares(self) -> None:
        found = shares(made_rows(EXTRA))
        by_name = {name: list(part["value"]) for name, part in found.groupby("measurement")}
        assert by_name["output_shift"] == pytest.approx([0.5, 0.25, 0.25])
        assert by_name["attention_kl"] == pytest.approx([0.3, 0.2, 0.5])
        assert by_name["peak_loop"] == pytest.approx([0.6, 0.3, 0.1])
        assert (found["low"] < found["value"]).all()
        assert (found["value"] < found["high"]).all()
        assert set(found[found["measurement"] == "attention_kl"]["variant"]) == {"mixed"}

    @given(
        st.lists(st.floats(0.001, 1000), min_size=2, max_size=6),
        st.integers(0, 5),
        st.integers(8, 20),
    )
    @settings(max_examples=25)
    def test_they_sum_to_one(self, sizes: list[float], seed: int, samples: int) -> None:
        means = {("output_shift", "", loop): size for loop, size in enumerate(sizes, start=2)}
        rows = made_rows(means, samples=samples, seed=seed)
        rows = rows[~((rows["loop"] == 3) & (rows["sample"] == 2))]
        found = shares(rows, resamples=50)
        assert found["value"].sum() == pytest.approx(1)
        assert (found["n"] == samples - 1).all()

    def test_two_loops_share_one_uncertainty(self) -> None:
        """Bootstrapped together, one's share is what the other's leaves: so are the ends of the intervals."""
        rows = made_rows({("output_shift", "", 2): 3.0, ("output_shift", "", 3): 1.0}, spread=0.5)
        two, three = (row for _, row in shares(rows).iterrows())
        assert (three["low"], three["high"]) == pytest.approx((1 - two["high"], 1 - two["low"]))

    def test_multiples_of_all_values_have_the_same_shares(self) -> None:
        rows = made_rows(EXTRA)
        scaled = rows.assign(value=rows["value"] * 1000)
        pd.testing.assert_frame_equal(shares(rows), shares(scaled))

    def test_zeros_share_nothing(self) -> None:
        rows = made_rows({("output_shift", "", 2): 0.0, ("output_shift", "", 3): 0.0}, spread=0)
        assert shares(rows)["value"].isna().all()

    def test_one_extra_loop_has_all_of_it(self) -> None:
        found = shares(made_rows({("output_shift", "", 2): 2.0})).iloc[0]
        assert (found["value"], found["low"], found["high"]) == (1.0, 1.0, 1.0)

    def test_nothing_measured_nothing_shared(self) -> None:
        assert shares(made_rows({("step_size", "raw", 1): 2.0})).empty

    def test_among_some_loops(self) -> None:
        found = share(made_rows(EXTRA), "output_shift", "", 3, [2, 3])
        assert found.value == pytest.approx(1 / 3)


class TestCostOverGain:
    def test_ratio_and_growth(self) -> None:
        found = cost_over_gain(made_rows(EXTRA), variant="normed")
        assert at(found, loop=2, quantity="ratio")["value"] == pytest.approx(10)
        assert at(found, loop=3, quantity="ratio")["value"] == pytest.approx(30)
        assert at(found, loop=3, quantity="growth")["value"] == pytest.approx(3)
        assert at(found, loop=4, quantity="growth")["value"] == pytest.approx(1)
        assert len(found) == 5

    def test_growth_has_no_unit(self) -> None:
        rows = made_rows(EXTRA)
        scaled = rows.copy()
        scaled.loc[scaled["measurement"] == "offset_cost", "value"] *= 64
        one, other = (cost_over_gain(each, variant="normed") for each in (rows, scaled))
        growth = one["quantity"] == "growth"
        pd.testing.assert_frame_equal(one[growth], other[growth])
        assert at(other, loop=2, quantity="ratio")["value"] == pytest.approx(640)

    def test_a_model_without_a_shift_has_none(self) -> None:
        rows = made_rows(EXTRA)
        assert cost_over_gain(rows[rows["measurement"] != "offset_cost"], variant="normed").empty


def test_the_keys_are_those_of_a_cell() -> None:
    assert list(summarise(made_rows(EXTRA)).columns) == [*KEYS, "value", "low", "high", "n", "nonfinite"]


def test_resamples_must_be_some() -> None:
    with pytest.raises(ValueError, match="resamples 0"):
        summarise(made_rows(EXTRA), resamples=0)
