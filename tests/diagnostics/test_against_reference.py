"""Every cell of the diagnostics against a second computation that shares no code with them (loops_reference.py).

What is compared: which rows exist, how many values each counts, and the values; of every measurement, variant, loop,
layer and position bin, one sample at a time; and the head x head table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from loops_cases import (
    BUNDLED,
    FIXTURE_NAMES,
    FIXTURES,
    Case,
    Tolerance,
    assert_heads,
    assert_rows,
    checkpoint,
    expected_of,
    heads_of,
    random_model,
    real_text,
    rows_of,
    tokens,
)
from loops_reference import ReferenceModel, ReferenceTrace, Rows, measure_heads, unclear_peaks
from loops_reference import measure as measure_reference
from safetensors.numpy import load_file

from plt_diagnostics import MEASUREMENTS

FLOAT64 = Tolerance(1e-5, {"": 1e-11, "step_size": 1e-11, "fixed_point_gap": 1e-11, "angular_change": 1e-6})
"""Of the value. The two sides' rotary tables are float32 and differ in the last bit, which is what 1e-7 of the values
comes from. Floors: what rounding leaves of an exact zero (1e-11, in nats or the state's unit); a cosine near 0 is held
absolutely, because it is a difference of products of order 1."""

FLOAT32 = Tolerance(
    1e-5,
    {
        "": 2e-6,
        "attention_kl": 4e-6,
        "output_shift": 6e-6,
        "output_entropy": 1e-5,
        "next_token_nll": 1e-5,
        "angular_change": 2e-4,
    },
)
"""Of the value, or absolutely: a divergence is a sum of differences of logarithms, each of them rounded to 1e-7 of a
logit (of order 10), so that a small divergence keeps only its 6th decimal; a logarithm of a probability near 1
likewise. A cosine divides by a step: one of a hundredth of its state has lost two of seven digits."""

STATE32 = 1e-6
"""Of the states' norm: float32's floor of differences between states (step size, fixed-point gap, offset cost)."""

DIFFERENCES = ("step_size", "fixed_point_gap", "offset_cost")

LENGTHS = (23, 9, 2, 1)
"""Of one batch: longer and shorter than the window, two tokens, one token."""


def tolerance_of(case: Case, trace: ReferenceTrace) -> Tolerance:
    """For this model's type, with the floors that depend on the sample."""
    single = case.model.dtype == torch.float32
    base = FLOAT32 if single else FLOAT64
    floor = dict(base.floor)
    if single:
        largest = max(float(np.sqrt((h * h).sum(-1)).max()) for h in trace.raw)
        floor |= dict.fromkeys(DIFFERENCES, STATE32 * largest)
    floor["peak_loop"] = unclear_peaks(trace, floor.get("output_shift", floor[""])) / len(trace.ids)
    return Tolerance(base.relative, floor)


RIGHT_KEPT, LEFT_KEPT = {"left": False, "keep": True}, {"left": True, "keep": True}
RIGHT_AGAIN, LEFT_AGAIN = {"left": False, "keep": False}, {"left": True, "keep": False}
"""The side of the padding, and whether the adapter keeps queries and keys or runs the layers again."""


def assert_agrees(
    case: Case, samples: Sequence[Sequence[int]], ways: Sequence[dict[str, bool]] = (RIGHT_KEPT, LEFT_AGAIN)
) -> None:
    """All samples in one batch, each against the reference's own reading of it alone."""
    traces = [case.reference.trace(sample) for sample in samples]
    rows, heads = [measure_reference(trace) for trace in traces], measure_heads(traces)
    for way in ways:
        findings = case.measure(samples, **way)
        for index, trace in enumerate(traces):
            note = f"{way}, sample {index} of {len(trace.ids)} tokens"
            assert_rows(rows_of(findings, index), rows[index], tolerance_of(case, trace), note)
        assert_heads(heads_of(findings), heads, 1e-6)


def batch(vocab: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    return [tokens(length, vocab, seed) for seed, length in enumerate(lengths)]


# --- the reference itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_the_reference_computes_what_the_vendors_code_computed(name: str) -> None:
    import json

    folder = FIXTURES / name
    expected = load_file(folder / "expected.safetensors")
    model = ReferenceModel.read(folder)
    trace = model.trace(json.loads((folder / "case.json").read_text())["input_ids"])
    np.testing.assert_allclose(np.stack(trace.raw[1:]), expected["loop_prenorm"], atol=2e-6)
    logits = model.norm(trace.raw[-1]) @ model.weights["lm_head.weight"].T
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-6)
    if "gates" in expected:
        gates = np.stack([[layer.gate_HS.T for layer in loop] for loop in trace.attention[1:]])
        np.testing.assert_allclose(gates, expected["gates"], atol=1e-6)


def test_the_reference_knows_every_measurement_and_variant() -> None:
    rows = measure_reference(random_model().reference.trace(tokens(9)))
    found = {(name, variant) for _, name, variant, _, _ in rows}
    assert found == {(name, variant) for name, kind in MEASUREMENTS.items() for variant in kind.variants}


# --- float64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in FIXTURE_NAMES if n != "g_decode_r2_w4"])
def test_released_format_checkpoints(name: str) -> None:
    assert_agrees(checkpoint(FIXTURES / name), batch(199))


CONFIGS: dict[str, dict[str, Any]] = {
    "two-loops": {"plt_num_loops": 2},
    "three-loops": {},
    "four-loops": {"plt_num_loops": 4},
    "one-loop": {"plt_num_loops": 1},
    "query-gate": {"plt_gate_use_hidden_states": False},
    "raw-hand-on": {"plt_normalize_per_loop": False},
    "no-scales": {"plt_emb_scale": None, "plt_hidden_scale": None},
    "raw-hand-on-no-scales": {"plt_normalize_per_loop": False, "plt_emb_scale": None, "plt_hidden_scale": None},
    "window-0": {"plt_window_size": [0, 0]},
    "window-1": {"plt_window_size": [1, 0]},
    "window-wider-than-the-sample": {"plt_window_size": [64, 0]},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "a-key-head-each": {"num_key_value_heads": 4},
    "one-layer": {"num_hidden_layers": 1},
    "sequential": {"plt_loop_mode": "sequential"},
    "sequential-raw-hand-on": {"plt_loop_mode": "sequential", "plt_normalize_per_loop": False},
    "sequential-one-loop": {"plt_loop_mode": "sequential", "plt_num_loops": 1},
    "no-shift": {"plt_clp_shift": False},
    "no-local-branch": {"plt_gswa": False},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name: str) -> None:
    assert_agrees(random_model(**CONFIGS[name]), batch(53))


def test_query_gate_with_padding_on_the_left() -> None:
    assert_agrees(random_model(**CONFIGS["query-gate"]), batch(53), [LEFT_KEPT])


def test_both_ways_and_both_sides_of_padding() -> None:
    ways = (RIGHT_KEPT, RIGHT_AGAIN, LEFT_KEPT, LEFT_AGAIN)
    assert_agrees(random_model(seed=3), batch(53, (13, 1, 6)), ways)


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
def test_trained_members_on_real_text(loops: int) -> None:
    assert_agrees(checkpoint(BUNDLED / f"r{loops}"), [real_text(90), real_text(40, skip=200)], [RIGHT_KEPT])


def test_more_loops_than_trained_and_the_sequential_baseline_of_a_trained_member() -> None:
    changes = {"plt_num_loops": 3, "plt_loop_mode": "sequential"}
    assert_agrees(checkpoint(BUNDLED / "r2", **changes), [real_text(40)])


def test_long_samples_compare_heads_at_every_second_query() -> None:
    case = random_model(plt_window_size=[64, 0], plt_num_loops=2, num_hidden_layers=1)
    assert_agrees(case, [tokens(300), tokens(257, seed=1), tokens(256, seed=2)], [LEFT_KEPT])


def test_in_many_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plt_diagnostics.attention.BLOCK_BYTES", 1)  # 8 queries, the least
    monkeypatch.setattr("plt_diagnostics.trace.OUTPUT_BYTES", 1)  # one token
    assert_agrees(random_model(), batch(53, (37, 20, 8, 9)))


# --- float32 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c_r4_w64_s160", "e_r2_nonorm_noscale"])
def test_released_format_checkpoints_in_float32(name: str) -> None:
    assert_agrees(checkpoint(FIXTURES / name, torch.float32), batch(199))


@pytest.mark.parametrize("name", ["three-loops", "query-gate", "sequential", "no-scales"])
def test_configurations_in_float32(name: str) -> None:
    assert_agrees(random_model(torch.float32, **CONFIGS[name]), batch(53), [RIGHT_KEPT])


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
def test_trained_members_on_real_text_in_float32(loops: int) -> None:
    assert_agrees(checkpoint(BUNDLED / f"r{loops}", torch.float32), [real_text(60)], [RIGHT_AGAIN])


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_one_measurement_alone_is_the_same(name: str) -> None:
    case, samples = random_model(plt_num_loops=2), batch(53, (9, 4))
    (first, second), _ = expected_of(case, samples)
    findings = case.measure(samples, measurements=[name])
    tolerance = Tolerance(FLOAT64.relative, dict(FLOAT64.floor))
    for index, rows in enumerate((first, second)):
        expected: Rows = {key: cell for key, cell in rows.items() if key[1] == name}
        assert_rows(rows_of(findings, index), expected, tolerance)
