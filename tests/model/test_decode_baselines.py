"""The steps that speed is measured against do the model's work too: a baseline that computes less flatters nobody."""

from __future__ import annotations

import copy

import pytest
import torch
from plt_cases import EXACT, VISIBLE, assert_close, build, gap, tiny, tokens

from plt_model import PLTCache, PLTForCausalLM
from plt_model.decode.baselines import LoopedTransformer, SequentialTrips
from plt_model.decode.cache import StaticCache
from plt_model.decode.step import DecodeStep

PROMPTS = (tokens(1, 1), tokens(3, 2), tokens(11, 3))  # shorter than the window, as long, and longer than two
STEPS = 9


def static(model: PLTForCausalLM) -> StaticCache:
    """The prompts, read by the model, in slots."""
    cache = StaticCache(model.config, slots=3, capacity=24, dtype=torch.float64, device="cpu")
    for slot, prompt in enumerate(PROMPTS):
        read = PLTCache(model.config)
        model(torch.tensor([prompt]), past_key_values=read, use_cache=True)
        cache.adopt(slot, read)
    return cache


def fed() -> torch.Tensor:
    """The tokens that follow, [STEPS, 3]."""
    return torch.tensor([tokens(STEPS, 20 + slot) for slot in range(3)]).T.contiguous()


def whole(model: PLTForCausalLM, slot: int) -> torch.Tensor:
    """Logits of the model's own forward after each fed token, [STEPS, V]."""
    ids = torch.tensor([PROMPTS[slot] + fed()[:, slot].tolist()])
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False).logits[0, len(PROMPTS[slot]) :]
    return logits


@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("gswa", [True, False], ids=["gswa", "no-gswa"])
@pytest.mark.parametrize("hidden", [True, False], ids=["gate-hidden", "gate-query"])
def test_a_trip_a_pass_is_the_same_model(loops: int, gswa: bool, hidden: bool) -> None:
    settings = tiny(plt_num_loops=loops, plt_gswa=gswa, plt_gate_use_hidden_states=hidden)
    model = build(settings)
    expected = [whole(model, slot) for slot in range(3)]
    step = DecodeStep(model)
    trips, one_trip, cache, other = SequentialTrips(step), step, static(model), static(model)
    for t, tokens_N in enumerate(fed()):
        logits = trips(cache, tokens_N, 24)
        for slot in range(3):
            assert_close(logits[slot], expected[slot][t], EXACT, f"slot {slot}, step {t}")
        one_trip(other, tokens_N, 24)
    for name in ("keys", "values", "ring_keys", "ring_values"):
        for mine, theirs in zip(getattr(cache, name), getattr(other, name), strict=True):
            assert_close(mine, theirs, EXACT, name)
    assert_close(cache.carry, other.carry, EXACT, "carry")
    assert cache.lengths.tolist() == [len(prompt) + STEPS for prompt in PROMPTS]


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "raw"])
def test_the_looped_transformer_is_the_models_sequential_mode(loops: int, normed: bool) -> None:
    settings = tiny(plt_num_loops=loops, plt_normalize_per_loop=normed)
    sequential = build({**settings, "plt_loop_mode": "sequential"})
    expected = [whole(sequential, slot) for slot in range(3)]
    model = build(settings)
    looped = LoopedTransformer(DecodeStep(model))
    cache = looped.cache(slots=3, capacity=24)
    for slot, prompt in enumerate(PROMPTS):
        read = PLTCache(sequential.config)
        sequential(torch.tensor([prompt]), past_key_values=read, use_cache=True)
        cache.adopt(slot, read)
    for t, tokens_N in enumerate(fed()):
        logits = looped(cache, tokens_N, 24)
        for slot in range(3):
            assert_close(logits[slot], expected[slot][t], EXACT, f"slot {slot}, step {t}")
    if loops > 1:
        assert gap(expected[0], whole(model, 0)) > VISIBLE  # it is not the PLT


def test_each_pass_of_the_looped_transformer_keeps_all_its_keys() -> None:
    model = build(tiny(plt_num_loops=3))
    cache = LoopedTransformer(DecodeStep(model)).cache(slots=2, capacity=10)
    plain = StaticCache(build(tiny(plt_num_loops=1)).config, slots=2, capacity=10, dtype=torch.float64, device="cpu")
    assert cache.nbytes() == {"shared": 3 * plain.nbytes()["shared"], "windows": 0, "carry": 0}


def test_the_weights_are_the_steps_own() -> None:
    step = DecodeStep(build(tiny()))
    own = {id(weight) for weight in step.parameters()}
    for baseline in (SequentialTrips(step), LoopedTransformer(step)):
        assert {id(weight) for weight in baseline.parameters()} == own


def test_models_of_the_same_weights_are_packed_once() -> None:
    """Whatever loop counts are timed, one copy of the weights is read."""
    model = build(tiny(attention_bias=True))
    other = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    first, second = DecodeStep(model), DecodeStep(other)
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        assert mine.qkv.weight.data_ptr() == theirs.qkv.weight.data_ptr()
        assert mine.up.weight.data_ptr() == theirs.up.weight.data_ptr()
    assert_close(first(static(model), fed()[0], 24), second(static(other), fed()[0], 24), 0.0)
