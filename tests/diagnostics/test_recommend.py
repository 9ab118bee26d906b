"""How many loops to run: the votes, the rule, what would change it, and the comparison with scores."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_rows import Means, made_rows

from plt_diagnostics.bootstrap import MIN_SAMPLES
from plt_diagnostics.lenses import LENSES, Published, Vote
from plt_diagnostics.recommend import (
    Recommendation,
    recommend,
)
from plt_diagnostics.synthesis import Samples

Key = tuple[str, str, int]


def over_loops(measurement: str, variant: str, first: int, *values: float) -> dict[Key, float]:
    return {(measurement, variant, loop): value for loop, value in enumerate(values, start=first)}


GOOD: dict[Key, float] = {
    **over_loops("output_shift", "", 2, 1.0, 1.3, 1.6),
    **over_loops("peak_loop", "", 2, 0.3, 0.33, 0.37),
    **over_loops("attention_kl", "mixed", 2, 0.40, 0.45, 0.30),
    **over_loops("next_token_nll", "", 1, 4.0, 3.5, 3.0, 2.5),
    **over_loops("logit_lens_rank", "log", 1, 3.0, 2.5, 2.0, 1.5),
    **over_loops("angular_change", "raw", 2, -0.7, 0.4, 0.3),
    **over_loops("step_size", "raw", 1, 90.0, 60.0, 30.0, 15.0),
    **over_loops("fixed_point_gap", "raw/as_next", 1, 60.0, 30.0, 15.0, 8.0),
    **over_loops("effective_rank", "normed", 1, 100.0, 110.0, 120.0, 130.0),
    **over_loops("offset_cost", "normed", 2, 50.0, 50.0, 50.0),
}
"""A model of four loops in which every lens speaks for loop 3."""

EARLY: dict[Key, float] = {
    **GOOD,
    **over_loops("output_shift", "", 2, 1.6, 1.0, 1.3),
    **over_loops("peak_loop", "", 2, 0.5, 0.2, 0.3),
    **over_loops("attention_kl", "mixed", 2, 0.6, 0.3, 0.3),
    **over_loops("angular_change", "raw", 2, -0.7, -0.4, -0.3),
    **over_loops("step_size", "raw", 1, 90.0, 60.0, 70.0, 80.0),
    **over_loops("fixed_point_gap", "raw/as_next", 1, 60.0, 70.0, 80.0, 90.0),
    **over_loops("effective_rank", "normed", 1, 100.0, 110.0, 105.0, 100.0),
    **over_loops("next_token_nll", "", 1, 4.0, 3.5, 3.6, 2.5),
    **over_loops("logit_lens_rank", "log", 1, 3.0, 2.5, 2.6, 1.5),
}
"""A model of four loops in which loop 2 does the work and every lens speaks against loop 3."""

PAPER: dict[Key, float] = {
    **over_loops("step_size", "raw", 2, 846, 464, 1014),
    **over_loops("output_shift", "", 2, 1.75, 1.32, 1.58),
    **over_loops("effective_rank", "normed", 2, 174.6, 172.5, 158.2),
    **over_loops("angular_change", "raw", 2, -0.72, -0.46, 0.04),
    **over_loops("attention_kl", "mixed", 2, 0.50, 0.25, 0.25),
    **over_loops("peak_loop", "", 2, 0.43, 0.13, 0.44),
}
"""What was published of the 7B model with four loops: table 3, and the shares of figure 7 (arXiv 2606.18023)."""

SHIFTED = {"offset_cost": "normed"}


def of(means: Means, *, shifts: bool = True, **options: object) -> Recommendation:
    rows = made_rows(means, **options)  # type: ignore[arg-type]
    return recommend(rows, shifts=shifts, defaults=SHIFTED, resamples=200)


def vote(found: Recommendation, lens: str, loop: int) -> Vote:
    return next(each for each in found.votes if (each.lens, each.loop) == (lens, loop))


def stances(found: Recommendation, loop: int) -> dict[str, str]:
    return {each.lens: each.stance for each in found.votes if each.loop == loop}


def outcomes(found: Recommendation) -> list[str]:
    return [verdict.outcome for verdict in found.verdicts]


class TestThePublishedModel:
    def test_two_loops_whatever_the_exact_offset_cost(self) -> None:
        """The offset cost is published as 30 to 45 times the output shift at every extra loop: any of these do."""
        for times in itertools.product((30, 37.5, 45), repeat=3):
            cost = {("offset_cost", "normed", r): times[r - 2] * PAPER["output_shift", "", r] for r in (2, 3, 4)}
            found = recommend(Published({**PAPER, **cost}, samples=500), shifts=True, defaults=SHIFTED)
            assert (found.loops, found.by_value, found.samples) == (2, True, 500)

    def test_and_without_one(self) -> None:
        assert recommend(Published(PAPER), shifts=True).loops == 2

    def test_why(self) -> None:
        found = recommend(Published(PAPER), shifts=True)
        assert outcomes(found) == ["earned", "not earned", "undecided"]
        credited = {(voice.loop, voice.mechanism, voice.says) for voice in found.credited}
        assert credited == {(2, "refinement", "for"), (3, "refinement", "against")}
        assert "by value only" in vote(found, "output shift", 3).reason
        assert "By value only" in found.sentence

    def test_turning_back_after_the_first_pass_is_held_against_no_loop(self) -> None:
        found = recommend(Published(PAPER), shifts=True)
        assert vote(found, "update direction", 2).stance == "abstains"
        assert vote(found, "update direction", 2).value is None
        assert vote(found, "update direction", 3).stance == "against"

    def test_one_vote_would_leave_it_open_and_none_would_give_another_number(self) -> None:
        """The rank of loop 3 is 1.2% below that of loop 2, the nearest of all to its line."""
        found = recommend(Published(PAPER), shifts=True)
        assert {each.loops for each in found.what_would_change} == {None}
        assert found.nearest == (
            "Nearest to changing this: if effective rank at loop 3 voted for it, the answer would be open."
        )

    def test_no_single_vote_would_change_it_where_the_offset_cost_grows_too(self) -> None:
        cost = over_loops("offset_cost", "normed", 2, 60.0, 59.0, 59.0 * 1.58 / 1.32)  # loop 4: right on its line
        found = recommend(Published({**PAPER, **cost}), shifts=True)
        assert found.what_would_change == ()
        assert found.nearest.startswith("No single vote would change this; the nearest to flipping is effective rank")

    def test_the_last_loop_is_not_credited_with_its_head(self) -> None:
        """Loop 4 has an even share of the output shift and more of the tokens: it alone was trained to be read."""
        found = recommend(Published(PAPER), shifts=True)
        assert vote(found, "token breadth", 4).value == pytest.approx(0.44)
        assert stances(found, 4)["output shift"] == stances(found, 4)["token breadth"] == "abstains"

    def test_an_interval_is_what_a_table_lacks(self) -> None:
        assert all(each.low is None for each in recommend(Published(PAPER), shifts=True).votes)


class TestTheRule:
    def test_a_loop_as_good_as_the_one_before_earned_its_place(self) -> None:
        means = {**GOOD, **over_loops("output_shift", "", 2, 1.0, 1.0, 1.6)}
        found = of(means)
        assert outcomes(found) == ["earned", "earned", "undecided"]
        assert (found.loops, found.safe, found.measured) == (None, 3, 4)
        assert "beyond 3 loops" in found.sentence
        assert "open a model trained with more loops" in found.sentence

    def test_every_lens_votes_for_the_third(self) -> None:
        assert set(stances(of(GOOD), 3).values()) == {"for"}

    def test_every_lens_votes_against_the_third(self) -> None:
        found = of(EARLY)
        assert set(stances(found, 3).values()) == {"against"}
        assert outcomes(found)[:2] == ["earned", "not earned"]
        assert (found.loops, found.safe) == (2, 2)
        assert found.sentence.startswith("Run 2 loops: loop 2 earned its place")

    def test_all_earned_where_the_model_was_trained_with_more(self) -> None:
        rows = made_rows({key: value for key, value in GOOD.items() if key[2] <= 3})
        found = recommend(rows, shifts=True, defaults=SHIFTED, trained_loops=4, resamples=200)
        assert (found.loops, found.measured) == (3, 3)
        assert "all that were measured" in found.sentence

    def test_one_loop_where_the_second_does_harm(self) -> None:
        worse = {
            **EARLY,
            **over_loops("next_token_nll", "", 1, 3.0, 3.5, 3.6, 3.7),
            **over_loops("logit_lens_rank", "log", 1, 2.0, 2.5, 2.6, 2.7),
            **over_loops("output_shift", "", 2, 1.0, 1.6, 1.6),
            **over_loops("peak_loop", "", 2, 0.2, 0.4, 0.4),
            **over_loops("effective_rank", "normed", 1, 120.0, 110.0, 105.0, 100.0),
        }
        found = of(worse)
        assert (found.loops, found.safe) == (1, 1)
        assert found.sentence.startswith("Run 1 loop: loop 2 did not earn its place")

    def test_credited_gain_and_credited_harm_leave_it_open(self) -> None:
        mixed = {
            **EARLY,
            **over_loops("next_token_nll", "", 1, 4.0, 3.5, 3.0, 2.5),
            **over_loops("logit_lens_rank", "log", 1, 3.0, 2.5, 2.0, 1.5),
        }
        found = of(mixed)
        assert outcomes(found)[:2] == ["earned", "undecided"]
        assert (found.loops, found.safe) == (None, 2)
        assert "Not enough evidence" in found.sentence
        assert "open a model" not in found.sentence

    def test_one_credited_objection_is_enough_to_leave_it_open(self) -> None:
        """Refinement is spent, but all else speaks for loop 3: more voices for than against, and still undecided."""
        spent = {
            **GOOD,
            **over_loops("output_shift", "", 2, 1.6, 1.0, 1.3),
            **over_loops("peak_loop", "", 2, 0.5, 0.2, 0.3),
            **over_loops("attention_kl", "mixed", 2, 0.6, 0.3, 0.3),
            **over_loops("offset_cost", "normed", 2, 60.0, 30.0, 30.0),
        }
        found = of(spent)
        assert [voice.says for voice in found.verdicts[1].voices] == ["against", "for", "for", "for"]
        assert (found.loops, found.safe) == (None, 2)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_credited_mechanism_does_not_outvote_two_others(self, sign: int) -> None:
        """Prediction credited, one lens each of refinement and stability the other way: open, either way round."""
        means = {
            **over_loops("next_token_nll", "", 1, 4.0, 3.5, 3.5 - 0.5 * sign),
            **over_loops("logit_lens_rank", "log", 1, 3.0, 2.5, 2.5 - 0.5 * sign),
            **over_loops("attention_kl", "mixed", 2, 0.5, 0.5 - 0.2 * sign),
            **over_loops("angular_change", "raw", 3, -0.3 * sign, 0.1),
        }
        found = of(means)
        says = {voice.mechanism: voice.says for voice in found.verdicts[1].voices}
        ahead, behind = ("for", "against") if sign > 0 else ("against", "for")
        assert (says["prediction"], says["refinement"], says["stability"]) == (ahead, behind, behind)
        assert outcomes(found)[1] == "undecided"

    def test_a_loop_that_does_nothing_does_not_earn_its_place_by_being_stable(self) -> None:
        idle = {key: value for key, value in GOOD.items() if key[0] in ("angular_change", "step_size")}
        idle |= {key: value for key, value in GOOD.items() if key[0] in ("fixed_point_gap", "effective_rank")}
        found = of(idle)
        assert {voice.says for voice in found.verdicts[1].voices} == {"for", "silent"}
        assert (found.loops, outcomes(found)[1]) == (None, "undecided")

    def test_one_lens_credits_nothing(self) -> None:
        one = {key: value for key, value in EARLY.items() if key[0] == "output_shift"}
        found = of(one)
        assert stances(found, 3)["output shift"] == "against"
        assert (found.loops, found.credited) == (None, ())
        assert "(one lens)" in found.verdicts[1].sentence

    def test_a_mechanism_whose_lenses_disagree_is_split(self) -> None:
        found = of({**GOOD, ("logit_lens_rank", "log", 3): 2.6})
        voice = next(each for each in found.verdicts[1].voices if each.mechanism == "prediction")
        assert (voice.says, voice.credited, voice.lenses) == ("split", False, ("next-token loss", "logit-lens rank"))
        assert "lenses disagree on: prediction" in found.verdicts[1].sentence


FLIPS: dict[str, dict[Key, float]] = {
    "output shift": {("output_shift", "", 3): 0.8},
    "token breadth": {("peak_loop", "", 3): 0.2},
    "attention re-routing": {("attention_kl", "mixed", 3): 0.3},
    "next-token loss": {("next_token_nll", "", 3): 3.8},
    "logit-lens rank": {("logit_lens_rank", "log", 3): 2.8},
    "update direction": {("angular_change", "raw", 3): -0.3},
    "step size": {("step_size", "raw", 3): 75.0},
    "fixed-point gap": {("fixed_point_gap", "raw/as_next", 3): 45.0},
    "effective rank": {("effective_rank", "normed", 3): 105.0},
    "cost over gain": {("offset_cost", "normed", 3): 90.0},
}


class TestLenses:
    def test_there_is_a_flip_for_each(self) -> None:
        assert list(FLIPS) == [lens.name for lens in LENSES]

    @pytest.mark.parametrize("lens", FLIPS)
    def test_it_flips_and_no_other_does(self, lens: str) -> None:
        before, after = stances(of(GOOD), 3), stances(of({**GOOD, **FLIPS[lens]}), 3)
        changed = {name for name in before if before[name] != after[name]}
        bound = {"output shift": {"output shift", "cost over gain"}}  # the gain is what the cost is held against
        assert changed == bound.get(lens, {lens})
        assert (before[lens], after[lens]) == ("for", "against")

    @pytest.mark.parametrize("nudge", [-1e-5, 1e-5])
    @pytest.mark.parametrize("lens", FLIPS)
    def test_no_difference_no_vote(self, lens: str, nudge: float) -> None:
        """Where the third loop is like the second but for noise, the interval holds the line, whichever side of it the
        value is on."""
        same = {
            "output shift": {("output_shift", "", 3): 1.0},
            "token breadth": {("peak_loop", "", 3): 0.3},
            "attention re-routing": {("attention_kl", "mixed", 3): 0.4},
            "next-token loss": {("next_token_nll", "", 3): 3.5},
            "logit-lens rank": {("logit_lens_rank", "log", 3): 2.5},
            "update direction": {("angular_change", "raw", 3): 0.0},
            "step size": {("step_size", "raw", 3): 60.0},
            "fixed-point gap": {("fixed_point_gap", "raw/as_next", 3): 30.0},
            "effective rank": {("effective_rank", "normed", 3): 110.0},
            "cost over gain": {("offset_cost", "normed", 3): 65.0},
        }[lens]
        found = vote(of({**GOOD, **{key: value + nudge for key, value in same.items()}}), lens, 3)
        assert found.stance == "abstains"
        assert found.margin is not None
        assert found.margin < 1

    def test_a_vote_holds_its_number(self) -> None:
        found = vote(of(GOOD), "step size", 3)
        assert found.value == pytest.approx(0.5)
        assert found.line == 1
        assert found.low is not None
        assert found.high is not None
        assert found.low < 0.5 < found.high < 1
        assert found.margin == pytest.approx((1 - found.value) / (found.high - found.value))
        assert (found.above, found.below, found.n, found.by_value) == ("against", "for", 64, False)
        assert "0.500 [" in found.reason

    def test_the_share_of_loop_2_leaves_the_trained_loop_out(self) -> None:
        found = of(EARLY)
        assert vote(found, "output shift", 2).value == pytest.approx(1.6 / 2.6)
        assert vote(found, "attention re-routing", 2).value == pytest.approx(0.6 / 1.2)
        assert vote(found, "attention re-routing", 2).line == pytest.approx(1 / 3)

    def test_later_loops_that_do_more_are_not_held_against_loop_2(self) -> None:
        found = vote(of(GOOD), "output shift", 2)
        assert found.value is not None
        assert found.value < 0.5
        assert (found.stance, found.below) == ("abstains", "abstains")

    def test_the_trained_loop_can_be_found_wanting_but_gains_nothing_through_the_head(self) -> None:
        good = of(GOOD)
        for lens in ("output shift", "next-token loss", "logit-lens rank", "cost over gain", "token breadth"):
            assert vote(good, lens, 4).stance == "abstains", lens
            assert "trained on this loop" in vote(good, lens, 4).reason
        bad = {
            **GOOD,
            ("output_shift", "", 4): 0.2,
            ("peak_loop", "", 4): 0.1,
            ("next_token_nll", "", 4): 3.3,
            ("logit_lens_rank", "log", 4): 2.3,
        }
        for lens in ("output shift", "next-token loss", "logit-lens rank", "cost over gain", "token breadth"):
            assert vote(of(bad), lens, 4).stance == "against", lens

    def test_past_the_trained_loop_a_change_is_no_gain(self) -> None:
        found = recommend(made_rows(GOOD), shifts=True, defaults=SHIFTED, trained_loops=2, resamples=200)
        assert vote(found, "output shift", 3).stance == "abstains"
        assert "trained at 2 loops" in vote(found, "output shift", 3).reason
        assert vote(found, "next-token loss", 2).stance == "abstains"
        assert vote(found, "next-token loss", 3).stance == "for"
        assert vote(found, "output shift", 2).value is None

    def test_a_model_that_does_not_shift_has_no_cost_lens(self) -> None:
        found = of(EARLY, shifts=False)
        assert "cost over gain" not in {each.lens for each in found.votes}
        assert found.loops == 2

    def test_the_state_that_is_shifted_is_read(self) -> None:
        rows = made_rows({**GOOD, **over_loops("offset_cost", "raw", 2, 5.0, 50.0, 500.0)})
        normed, raw = (
            recommend(rows, shifts=True, defaults={"offset_cost": name}, resamples=200) for name in ("normed", "raw")
        )
        assert vote(normed, "cost over gain", 3).stance == "for"
        assert vote(raw, "cost over gain", 3).stance == "against"


class TestNotEnoughEvidence:
    def test_one_loop(self) -> None:
        found = of({("step_size", "raw", 1): 1.0})
        assert (found.loops, found.safe, found.votes, found.verdicts) == (None, 1, (), ())
        assert "runs one loop" in found.sentence

    def test_no_rows(self) -> None:
        assert recommend(made_rows(GOOD).iloc[:0], shifts=True).loops is None

    def test_two_loops_have_nothing_to_compare_with(self) -> None:
        found = of({key: value for key, value in GOOD.items() if key[2] <= 2})
        assert (found.loops, found.safe) == (None, 1)
        assert "open a model trained with more loops" in found.sentence
        assert "no other extra loop" in vote(found, "attention re-routing", 2).reason

    def test_too_few_samples(self) -> None:
        found = of(EARLY, samples=MIN_SAMPLES - 1)
        assert found.loops is None
        assert {each.stance for each in found.votes} == {"abstains"}
        assert f"{MIN_SAMPLES - 1} samples" in found.sentence
        assert of(EARLY, samples=MIN_SAMPLES).loops == 2

    def test_noise(self) -> None:
        found = of(EARLY, spread=30.0)
        assert found.loops is None
        assert found.credited == ()

    def test_states_that_are_not_finite(self) -> None:
        rows = made_rows(EARLY)
        rows.loc[rows["loop"] == 3, "nonfinite"] = 1
        found = recommend(rows, shifts=True, defaults=SHIFTED, resamples=200)
        assert set(stances(found, 3).values()) == {"abstains"}
        assert "64 values of these loops are not finite" in vote(found, "update direction", 3).reason
        assert found.loops is None

    def test_nothing_but_values_that_are_not_finite(self) -> None:
        rows = made_rows(EARLY)
        rows.loc[rows["loop"] == 3, "value"] = np.nan
        found = recommend(rows, shifts=True, defaults=SHIFTED, resamples=200)
        assert set(stances(found, 3).values()) == {"abstains"}

    def test_measurements_that_were_off(self) -> None:
        some = {key: value for key, value in EARLY.items() if key[0] not in ("output_shift", "peak_loop")}
        found = of(some)
        assert vote(found, "output shift", 3).reason == "output_shift was not measured at loops 2, 3"
        assert vote(found, "cost over gain", 3).stance == "abstains"

    def test_states_that_stand_still(self) -> None:
        """Zeros over zeros: no number, no vote, no crash."""
        still = {key: 0.0 if key[0] in ("step_size", "output_shift") else value for key, value in GOOD.items()}
        found = of(still, spread=0.0)
        assert vote(found, "step size", 3).stance == "abstains"
        assert "zeros" in vote(found, "output shift", 3).reason


class TestWhatWouldChangeIt:
    def test_a_single_vote_that_would(self) -> None:
        """Loop 3 is turned down by two lenses of refinement alone: without either of them it would be open."""
        thin = {key: value for key, value in EARLY.items() if key[0] in ("output_shift", "attention_kl", "peak_loop")}
        thin = {key: value for key, value in thin.items() if key[0] != "peak_loop" or key[2] == 2}
        found = of(thin)
        assert found.loops == 2
        assert {(each.lens, each.loop, each.loops) for each in found.what_would_change} == {
            ("output shift", 2, None),
            ("attention re-routing", 2, None),
            ("output shift", 3, None),
            ("attention re-routing", 3, None),
        }
        margins = [each.margin for each in found.what_would_change]
        assert margins == sorted(margins)  # type: ignore[type-var]
        assert found.what_would_change[0].sentence in found.nearest

    def test_an_abstention_that_would_decide(self) -> None:
        """One lens of prediction speaks against loop 3, one cannot tell: had it voted against, the answer would be 2 -
        and so it is, once its number is moved."""
        thin = {
            **over_loops("attention_kl", "mixed", 2, 0.6, 0.3),
            **over_loops("next_token_nll", "", 1, 4.0, 3.5, 3.6),
            **over_loops("logit_lens_rank", "log", 1, 3.0, 2.5, 2.5),
            **over_loops("step_size", "raw", 4, 1.0),
        }
        found = of(thin)
        promised = {(each.lens, each.loop, each.to): each.loops for each in found.what_would_change}
        assert found.loops is None
        assert promised["logit-lens rank", 3, "against"] == 2
        assert of({**thin, ("logit_lens_rank", "log", 3): 2.7}).loops == 2


class TestInvariances:
    @given(st.sampled_from([GOOD, EARLY]), st.integers(0, 1000))
    @settings(max_examples=8)
    def test_the_order_of_rows(self, means: dict[Key, float], seed: int) -> None:
        rows = made_rows(means, samples=16)
        shuffled = rows.sample(frac=1, random_state=seed)
        one, other = (recommend(each, shifts=True, resamples=50) for each in (rows, shuffled))
        assert one == other

    @given(st.sampled_from([GOOD, EARLY]), st.floats(1e-3, 1e3))
    @settings(max_examples=15)
    def test_the_size_of_the_states(self, means: dict[Key, float], times: float) -> None:
        """All norms of all states, times a constant: step, gap and offset cost scale, nothing else does."""
        rows = made_rows(means, samples=16)
        norms = rows["measurement"].isin(["step_size", "fixed_point_gap", "offset_cost"])
        scaled = rows.assign(value=rows["value"].where(~norms, rows["value"] * times))
        one, other = (recommend(each, shifts=True, resamples=50) for each in (rows, scaled))
        assert (one.loops, one.sentence) == (other.loops, other.sentence)
        assert [each.stance for each in one.votes] == [each.stance for each in other.votes]
        assert [each.value for each in one.votes] == pytest.approx([each.value for each in other.votes])

    @given(st.lists(st.floats(0.01, 10), min_size=12, max_size=12), st.integers(2, 4))
    @settings(max_examples=40)
    def test_whatever_was_measured_the_record_holds_together(self, numbers: list[float], loops: int) -> None:
        names = [("output_shift", ""), ("attention_kl", "mixed"), ("next_token_nll", ""), ("effective_rank", "normed")]
        means = {
            (*name, loop): numbers[3 * at + loop - 2] for at, name in enumerate(names) for loop in range(2, loops + 1)
        }
        found = recommend(Published(means), shifts=True)
        assert found.loops in (None, found.safe)
        assert 1 <= found.safe <= found.measured == loops
        assert all(verdict.outcome == "earned" for verdict in found.verdicts[: found.safe - 1])
        if found.loops is not None and found.loops < loops:
            assert found.verdicts[found.safe - 1].outcome == "not earned"
        assert all(change.loops != found.loops for change in found.what_would_change)
        assert found.verdicts[-1].outcome != "earned"  # what the trained loop gains cannot be told
        assert Recommendation.model_validate_json(found.model_dump_json()) == found

    def test_samples_and_rows_give_the_same(self) -> None:
        rows = made_rows(EARLY)
        one = recommend(rows, shifts=True, resamples=100)
        assert recommend(Samples(rows, resamples=100), shifts=True) == one

    def test_written_and_read_again(self) -> None:
        found = of(EARLY)
        assert Recommendation.model_validate_json(found.model_dump_json()) == found


def test_trained_loops_must_be_some() -> None:
    with pytest.raises(ValueError, match="trained_loops 0"):
        recommend(made_rows(GOOD), shifts=True, trained_loops=0)


def test_an_empty_table_says_nothing() -> None:
    assert recommend(Published({}), shifts=True).loops is None
