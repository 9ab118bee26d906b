"""The real model against what the vendor's code computed, in float32, with both backends."""

from __future__ import annotations

import pytest
import torch
from plt_cases import (
    BACKENDS,
    FIXTURE_NAMES,
    SHIPPED,
    VISIBLE,
    Fixture,
    assert_close,
    assert_same_gates,
    assert_same_run,
    fixture,
    gap,
    row,
)
from reference import MISTAKES, Reference

from plt_model import PLTCache, PLTForCausalLM

DECODE_MISTAKES = ("carry zeroed", "ring one slot short")


def load(case: Fixture, backend: str, dtype: torch.dtype = torch.float32) -> PLTForCausalLM:
    return PLTForCausalLM.from_pretrained(case.folder, dtype=dtype, attn_implementation=backend).eval()


def step_by_step(model: PLTForCausalLM, case: Fixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill, then one token at a time -> logits [S, V] and the vectors carried after each step [steps, R-1, D]."""
    assert case.prefill is not None
    cache = PLTCache(model.config)
    logits, carried = [], []
    pieces = [case.ids[: case.prefill]] + [[token] for token in case.ids[case.prefill :]]
    with torch.no_grad():
        for piece in pieces:
            logits.append(model(row(piece), past_key_values=cache, use_cache=True).logits[0])
            carried.append(cache.carry[0].clone())
    return torch.cat(logits), torch.stack(carried)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_whole_sequence(name: str, backend: str) -> None:
    case = fixture(name)
    with torch.no_grad():
        out = load(case, backend)(row(case.ids), output_loop_states=True)
    expected = case.expected
    assert_close(out.logits[0], expected["logits"], SHIPPED, "logits")
    assert_close(torch.cat(out.loop_states), expected["loop_prenorm"], SHIPPED, "loop_prenorm")
    handed = out.loop_normed if case.config["plt_normalize_per_loop"] else out.loop_states
    passes = torch.cat([*handed[:-1], out.loop_normed[-1]])
    assert_close(passes, expected["loop_hidden"], SHIPPED, "loop_hidden")
    if case.config["plt_num_loops"] == 1:
        assert out.loop_gates == ()
        return
    gates = torch.stack(out.loop_gates)[:, :, 0].transpose(-1, -2)  # [R-1, L, S, H]
    assert_close(gates, expected["gates"], SHIPPED, "gates")
    assert_close(gates.mean((-1, -2)), expected["gate_mean"], SHIPPED, "gate_mean")
    assert_close(gates.mean(-2), expected["gate_mean_per_head"], SHIPPED, "gate_mean_per_head")


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_then_token_by_token(backend: str) -> None:
    case = fixture("g_decode_r2_w4")
    logits, carried = step_by_step(load(case, backend), case)
    assert_close(logits, case.expected["logits"], SHIPPED, "logits")
    assert_close(carried, case.expected["saved_hidden"], SHIPPED, "carried vectors")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_in_float64_it_is_the_reference(name: str, backend: str) -> None:
    case = fixture(name)
    trace = Reference(case.config, case.weights).run(case.ids)
    with torch.no_grad():
        out = load(case, backend, torch.float64)(row(case.ids), output_loop_states=True)
    assert_same_run(out, trace)
    assert_same_gates(out, trace)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m not in DECODE_MISTAKES])
def test_it_does_not_make_the_mistake(mistake: str, backend: str) -> None:
    case = fixture("a_r2_w4")
    wrong = Reference(case.config, case.weights, mistake).run(case.ids)
    with torch.no_grad():
        logits = load(case, backend)(row(case.ids)).logits[0]
    assert gap(logits, case.expected["logits"]) <= SHIPPED < VISIBLE < gap(logits, wrong.logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mistake", DECODE_MISTAKES)
def test_it_does_not_make_the_mistake_at_decode(mistake: str, backend: str) -> None:
    case = fixture("g_decode_r2_w4")
    wrong = Reference(case.config, case.weights, mistake).run(case.ids, case.chunks)
    logits, _ = step_by_step(load(case, backend), case)
    assert gap(logits, case.expected["logits"]) <= SHIPPED < VISIBLE < gap(logits, wrong.logits)
