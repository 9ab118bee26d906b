"""The slow reference agrees with what the vendor's code computed, and each known mistake would be seen.

This is the control of all other tests of the model: a fixture that a mistake does not move could not kill it.
"""

from __future__ import annotations

import pytest
import torch
from plt_cases import FIXTURE_NAMES, VISIBLE, Fixture, assert_close, fixture, gap
from reference import MISTAKES, Reference

STORED = 5e-7
"""The fixtures are float64 results stored in float32: half a unit in the last place of values up to 8."""

BLIND: dict[str, set[str]] = {
    "a_r2_w4": set(),
    "c_r4_w64_s160": {"ring one slot short"},  # its chunks begin before the window is full
    "e_r2_nonorm_noscale": {"pass 0 scaled", "no norm between passes"},
    "f_r1": set(MISTAKES) - {"pass 0 scaled", "interleaved RoPE"},
    "g_decode_r2_w4": set(),
}
"""The mistakes that cannot show on a fixture, since it does not use what they get wrong."""


@pytest.fixture(params=FIXTURE_NAMES)
def case(request: pytest.FixtureRequest) -> Fixture:
    return fixture(request.param)


def test_every_fixture_is_here() -> None:
    assert set(FIXTURE_NAMES) == set(BLIND)


def test_agrees_with_the_fixture(case: Fixture) -> None:
    trace = Reference(case.config, case.weights).run(case.ids, case.chunks)
    assert_close(trace.logits, case.expected["logits"], STORED, "logits")
    assert_close(torch.stack(trace.states), case.expected["loop_prenorm"], STORED, "loop_prenorm")
    assert_close(torch.stack([*trace.handed, trace.normed[-1]]), case.expected["loop_hidden"], STORED, "loop_hidden")
    if case.config["plt_num_loops"] == 1:
        assert not trace.gates
    else:
        gates = torch.stack([torch.stack(of_pass) for of_pass in trace.gates])
        assert_close(gates, case.expected["gates"], STORED, "gates")


def test_agrees_with_the_vectors_carried_at_decode() -> None:
    case = fixture("g_decode_r2_w4")
    trace = Reference(case.config, case.weights).run(case.ids)
    assert case.prefill is not None
    carried = torch.stack([trace.carry(t) for t in range(case.prefill - 1, len(case.ids))])
    assert_close(carried, case.expected["saved_hidden"], STORED, "saved_hidden")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(case: Fixture, mistake: str) -> None:
    wrong = Reference(case.config, case.weights, mistake).run(case.ids, case.chunks)
    moved = gap(wrong.logits, case.expected["logits"])
    if mistake in BLIND[case.name]:
        assert moved <= STORED
    else:
        assert moved > VISIBLE


def test_every_mistake_shows_somewhere() -> None:
    assert not set.intersection(*BLIND.values())
