"""The decode step on its static cache: every slot's logits are those of the whole text read at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import EXACT, MODES, assert_close, build, gap, needs_compiler, quick, row, tiny, tokens
from torch import Tensor

from plt_model import PLTCache, PLTForCausalLM
from plt_model.decode.baselines import SequentialTrips
from plt_model.decode.cache import StaticCache
from plt_model.decode.prefill import read_prompt
from plt_model.decode.step import DecodeStep
from plt_model.kernels.gswa_decode import gswa_decode
from plt_model.kernels.gswa_decode.cpu import load


class Texts:
    """Texts in the slots of a cache, each step's logits compared with the model's own forward over the whole text."""

    def __init__(self, model: PLTForCausalLM, *, slots: int, capacity: int, dirty: bool = False) -> None:
        self.model, self.step = model, DecodeStep(model)
        dtype = model.lm_head.weight.dtype
        self.cache = StaticCache(model.config, slots=slots, capacity=capacity, dtype=dtype, device="cpu")
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self.drawn = 0
        if dirty:
            for slot in range(slots):
                poison(self.cache, slot)

    def adopt(self, slot: int, length: int) -> None:
        self.drawn += 1
        self.texts[slot] = tokens(length, seed=self.drawn)
        self.cache.adopt(slot, read_prompt(self.model, row(self.texts[slot]))[0])

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target)
        self.texts[target] = list(self.texts[source])

    def go_on(self, steps: int, count: int | None = None, spare: int = 0) -> Tensor:
        """Some steps of the first `count` slots; the logits [steps, count, V]."""
        count = len(self.texts) if count is None else count
        out = []
        for _ in range(steps):
            self.drawn += 1
            new = tokens(count, seed=self.drawn)
            reach = min(self.cache.capacity, max(map(len, self.texts[:count])) + 1 + spare)
            out.append(self.step(self.cache, torch.tensor(new), reach))
            for text, token in zip(self.texts, new, strict=False):
                text.append(token)
        for slot in range(count):
            with torch.no_grad():
                expected = self.model(row(self.texts[slot])).logits[0, -steps:]
            found = torch.stack([logits[slot] for logits in out])
            assert_close(found, expected, EXACT, f"slot {slot} after {len(self.texts[slot])} tokens")
            assert int(self.cache.lengths[slot]) == len(self.texts[slot])
        return torch.stack(out)


def poison(cache: StaticCache, slot: int) -> None:
    """What a careless neighbour or an earlier request may leave."""
    for held in (*cache.keys, *cache.values, *cache.ring_keys, *cache.ring_values, cache.carry):
        held[slot] = float("nan")
    cache.lengths[slot] = 0


def texts(slots: int = 3, capacity: int = 40, *, dirty: bool = False, **settings: Any) -> Texts:
    return Texts(build(tiny(**settings), backend="sdpa"), slots=slots, capacity=capacity, dirty=dirty)


@pytest.mark.parametrize("gate", [True, False], ids=["gate-states", "gate-query"])
@pytest.mark.parametrize("mode", ["plt", "no-gswa"])
@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
def test_slots_of_different_lengths(loops: int, mode: str, gate: bool) -> None:
    held = texts(plt_num_loops=loops, plt_gate_use_hidden_states=gate, **MODES[mode])
    for slot, length in enumerate((7, 1, 3)):
        held.adopt(slot, length)
    held.go_on(6)


@given(data=st.data())
@quick(40)
def test_any_shape(data: st.DataObject) -> None:
    groups, slots = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    held = texts(
        slots=slots,
        capacity=data.draw(st.integers(21, 33)),
        dirty=data.draw(st.booleans()),
        plt_num_loops=data.draw(st.integers(1, 4)),
        plt_window_size=[data.draw(st.sampled_from([0, 1, 2, 5, 64])), 0],
        plt_gswa=data.draw(st.booleans()),
        plt_gate_use_hidden_states=data.draw(st.booleans()),
        plt_normalize_per_loop=data.draw(st.booleans()),
        plt_emb_scale=data.draw(st.sampled_from([None, 0.7])),
        plt_hidden_scale=data.draw(st.sampled_from([None, 1.3])),
        num_key_value_heads=groups,
        num_attention_heads=groups * data.draw(st.integers(1, 3)),
        head_dim=data.draw(st.sampled_from([2, 6, 10])),
        hidden_size=data.draw(st.sampled_from([9, 16])),
        intermediate_size=data.draw(st.integers(1, 11)),
        num_hidden_layers=data.draw(st.integers(1, 2)),
        attention_bias=data.draw(st.booleans()),
        mlp_bias=data.draw(st.booleans()),
        tie_word_embeddings=data.draw(st.booleans()),
    )
    for slot in range(slots):
        held.adopt(slot, data.draw(st.integers(1, 12)))
    held.go_on(data.draw(st.integers(1, 4)), data.draw(st.integers(1, slots)), data.draw(st.integers(0, 9)))


@given(data=st.data())
@quick(20)
def test_slots_live_through_anything(data: st.DataObject) -> None:
    """Requests come, go on and move, in any order."""
    held = texts(capacity=60, dirty=True, plt_window_size=[3, 0], num_hidden_layers=1)
    slot = st.integers(0, 2)
    for first in range(3):
        held.adopt(first, data.draw(st.integers(1, 10)))
    for _ in range(data.draw(st.integers(2, 5))):
        what = data.draw(st.sampled_from(["adopt", "move", "step"]))
        if what == "adopt":
            held.adopt(data.draw(slot), data.draw(st.integers(1, 10)))
        elif what == "move":
            held.move(data.draw(slot), data.draw(slot))
        held.go_on(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))


@pytest.mark.parametrize("window", [0, 1, 4], ids="w{}".format)
@pytest.mark.parametrize("length", [1, 4, 5, 6], ids="prompt-{}".format)
def test_the_ring_goes_round(window: int, length: int) -> None:
    held = texts(slots=1, plt_window_size=[window, 0])
    held.adopt(0, length)
    held.go_on(3 * (window + 1) + 2)


@pytest.mark.parametrize("mode", ["plt", "no-gswa"])
def test_nothing_of_an_earlier_request_reaches_the_next(mode: str) -> None:
    """Not even when it left numbers that are none."""
    fresh, used = (texts(dirty=dirty, **MODES[mode]) for dirty in (False, True))
    for held in (fresh, used):
        for slot, length in enumerate((7, 1, 3)):
            held.adopt(slot, length)
    assert torch.equal(fresh.go_on(6), used.go_on(6))


def test_a_poisoned_neighbour_changes_nothing() -> None:
    clean, mixed = texts(), texts()
    for held in (clean, mixed):
        held.adopt(0, 5)
        held.adopt(2, 9)
        held.adopt(1, 4)
    poison(mixed.cache, 1)
    expected = clean.go_on(3)
    for i in range(3):
        mixed.drawn = clean.drawn - 3 + i
        mixed.drawn += 1
        found = mixed.step(mixed.cache, torch.tensor(tokens(3, seed=mixed.drawn)), 20)
        assert found[1].isnan().all()
        for slot in (0, 2):
            assert_close(found[slot], expected[i, slot], 1e-12)


def test_slots_beyond_the_first_stay_as_they_are() -> None:
    held = texts()
    for slot, length in enumerate((7, 2, 3)):
        held.adopt(slot, length)
    held.go_on(3, 1)
    held.go_on(2, 2)
    held.go_on(2, 3)


def test_a_moved_request_goes_on_in_its_new_slot() -> None:
    held = texts(dirty=True)
    held.adopt(0, 12)
    held.adopt(2, 5)
    held.go_on(2, 1)
    held.move(2, 0)
    held.go_on(7, 1)
    held.move(0, 1)
    held.go_on(2, 2)


def test_a_longer_reach_changes_nothing() -> None:
    outs = []
    for spare in (0, 1, 100):
        held = texts(dirty=True)
        for slot, length in enumerate((7, 1, 3)):
            held.adopt(slot, length)
        outs.append(held.go_on(4, spare=spare))
    assert gap(outs[1], outs[0]) <= 1e-12
    assert gap(outs[2], outs[0]) <= 1e-12


def test_the_last_token_of_a_full_slot() -> None:
    held = texts(slots=1, capacity=8)
    held.adopt(0, 7)
    held.go_on(1)


@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
@pytest.mark.parametrize(("window", "capacity"), [(3, 50), (0, 7), (64, 512)])
def test_bytes_held(loops: int, window: int, capacity: int) -> None:
    """KV bytes are exactly 1 + (R-1)(w+1)/T times those of one pass; beside them R-1 vectors a slot."""

    def held(loops: int) -> dict[str, int]:
        model = build(tiny(plt_num_loops=loops, plt_window_size=[window, 0]))
        cache = StaticCache(model.config, slots=3, capacity=capacity, dtype=torch.bfloat16, device="meta")
        return cache.nbytes()

    one, many = held(1), held(loops)
    assert one == {"shared": 2 * 2 * 3 * 2 * capacity * 8 * 2, "windows": 0, "carry": 0}
    kv = many["shared"] + many["windows"]
    assert kv * capacity == one["shared"] * (capacity + (loops - 1) * (window + 1))
    assert many["carry"] == 3 * (loops - 1) * 24 * 2


def test_bytes_are_the_tensors_own_and_stay() -> None:
    held = texts()
    parts = [*held.cache.keys, *held.cache.values, *held.cache.ring_keys, *held.cache.ring_values, held.cache.carry]
    size, where = sum(held.cache.nbytes().values()), [part.data_ptr() for part in parts]
    assert size == sum(part.numel() * 8 for part in parts)
    for slot in range(3):
        held.adopt(slot, 4)
    held.go_on(5)
    assert [part.data_ptr() for part in parts] == where
    assert held.cache.keys[0] is parts[0]


@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
def test_bf16_is_as_true_as_the_models_own_one_trip(loops: int) -> None:
    """One step after many a text, against the same in float64: the step's root mean square error is that of the
    model's one trip within 10% (they add up in another order)."""
    settings = tiny(plt_num_loops=loops, hidden_size=64, head_dim=16, vocab_size=400)
    model = build(settings, dtype=torch.bfloat16, backend="sdpa")
    exact = PLTForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    exact.set_attn_implementation("sdpa")
    cache = StaticCache(model.config, slots=1, capacity=64, dtype=torch.bfloat16, device="cpu")
    step, errors, largest = DecodeStep(model), [], 0.0
    with torch.no_grad():
        for seed in range(16):
            text = tokens(10 + seed, seed=seed, vocabulary=400)
            held, _ = read_prompt(model, row(text))
            cache.adopt(0, held)
            stepped = step(cache, torch.tensor([7]), 64)[0]
            truth = _doubled(held, exact)
            trip = model(row([7]), past_key_values=held, use_cache=True).logits[0, 0]
            true = exact(row([7]), past_key_values=truth, use_cache=True).logits[0, 0]
            errors.append([(found - true).square().mean() for found in (stepped, trip)])
            largest = max(largest, gap(stepped, trip) / float(true.abs().max()))
    ours, own = torch.tensor(errors).mean(0).sqrt().tolist()
    assert stepped.dtype == torch.bfloat16
    assert ours <= 1.1 * own
    assert 0 < own < 0.05
    assert largest <= 0.04, f"a logit is apart by {largest:.3f} of the largest"


def _doubled(cache: PLTCache, model: PLTForCausalLM) -> PLTCache:
    """A copy in float64."""
    out = PLTCache(model.config)
    for mine, layer in zip(out.layers, cache.layers, strict=True):
        for name in ("keys", "values", "window_keys", "window_values"):
            held = getattr(layer, name)
            setattr(mine, name, None if held is None else held.double())
        mine.is_initialized = True
    out.carry = None if cache.carry is None else cache.carry.double()
    return out


def test_packing_changes_no_weight_and_holds_none_twice() -> None:
    model = build(tiny(attention_bias=True), backend="sdpa")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    step = DecodeStep(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    attn = model.model.layers[0].self_attn
    packed = step.layers[0].qkv.weight
    assert attn.k_proj.weight.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_a_model_packed_twice() -> None:
    held = texts(slots=1)
    again = Texts(held.model, slots=1, capacity=40)
    for one in (held, again):
        one.adopt(0, 4)
        one.go_on(3)


@pytest.mark.parametrize("mode", ["sequential", "no-shift", "no-shift-no-gswa"])
def test_a_model_of_several_trips_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="takes one trip a pass: use generate"):
        DecodeStep(build(tiny(**MODES[mode])))


def test_adopt_refuses_what_does_not_fit() -> None:
    held = texts(slots=1, capacity=6)
    with pytest.raises(ValueError, match=r"6 tokens and one more .* capacity of 6"):
        held.adopt(0, 6)
    pair = PLTCache(held.model.config)
    with torch.no_grad():
        held.model(torch.tensor([tokens(3), tokens(3, seed=1)]), past_key_values=pair, use_cache=True)
    with pytest.raises(ValueError, match="a slot takes one sequence, found 2"):
        held.cache.adopt(0, pair)


@pytest.mark.parametrize("loops", [1, 3], ids="R{}".format)
@pytest.mark.parametrize("kernel", ["triton", pytest.param("c++", marks=needs_compiler)])
def test_the_kernels_are_what_the_step_asks_for(kernel: str, loops: int) -> None:
    """The Triton one in its interpreter, or on a GPU; windows, slots of unequal lengths, two baselines' calls too."""
    settings = tiny(plt_num_loops=loops)
    plain, fast = (DecodeStep(build(settings, backend="sdpa").float()) for _ in range(2))
    fast.attend = gswa_decode if kernel == "triton" else load()
    caches = []
    for step in (plain, fast):
        cache = StaticCache(step.config, slots=2, capacity=24, dtype=torch.float32, device="cpu")
        for slot, length in enumerate((9, 1)):
            cache.adopt(slot, read_prompt(step.model, row(tokens(length, seed=slot)))[0])
        caches.append(cache)
    for make in (lambda step: step, SequentialTrips):
        for i in range(3):
            new = torch.tensor([i, 7 - i])
            expected, found = make(plain)(caches[0], new, 24), make(fast)(caches[1], new, 24)
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
