"""The fast forms of a decode step say what the step says, whatever is beside them in their bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import EXACT, needs_compiler, quick
from test_decode_step import texts
from torch import Tensor, nn

from plt_model.decode import compiled
from plt_model.decode.baselines import LoopedTransformer, SequentialTrips
from plt_model.decode.cache import StaticCache
from plt_model.decode.compiled import FastStep, fast_step, layers_compiled, reach_bucket
from plt_model.decode.step import DecodeStep, run_layer
from plt_model.kernels import KernelUnavailable

CLOSE = 5e-5
"""float32 sums in another order."""

CAPACITY = 64


def step_of(dtype: torch.dtype = torch.float32, **settings: Any) -> DecodeStep:
    model = texts(1, CAPACITY, **settings).model.to(dtype)
    return DecodeStep(model)


def new_cache(step: DecodeStep, slots: int = 3, capacity: int = CAPACITY) -> StaticCache:
    return StaticCache(step.config, slots=slots, capacity=capacity, dtype=step.head.weight.dtype, device="cpu")


def write(call: Callable[..., Tensor], cache: StaticCache, rows: list[list[int]]) -> Tensor:
    """The logits of every step of the first slots -> [steps, n, V]."""
    return torch.stack([call(cache, torch.tensor(row), cache.capacity).clone() for row in rows])


def filled(step: DecodeStep, slots: int = 3, capacity: int = CAPACITY) -> StaticCache:
    """Texts of 9 and 70 tokens (or what fits) in the first two slots, garbage in the third, which is idle."""
    generator = torch.Generator().manual_seed(1)
    cache = new_cache(step, slots, capacity)
    for held in (*cache.keys, *cache.values, *cache.ring_keys, *cache.ring_values, cache.carry):
        held.copy_(torch.randn(held.shape, generator=generator))
        held[2:] = 1e3
    cache.lengths.copy_(torch.tensor([9, capacity - 8, 0])[:slots])
    return cache


def agree(fast: FastStep, plain: DecodeStep, steps: int = 6) -> None:
    """The same logits for slots of unequal lengths, with an idle neighbour full of garbage and without."""
    one, other = filled(plain), filled(plain)
    rows = [[5 + i, 9 - i] for i in range(steps)]
    expected = write(plain, one, rows)
    found = write(fast, other, [[*row, 1] for row in rows])
    torch.testing.assert_close(found[:, :2], expected, rtol=0, atol=CLOSE)
    assert other.lengths.tolist() == [9 + steps, CAPACITY - 8 + steps, steps]


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise KernelUnavailable("no compiler here")

    monkeypatch.setattr(compiled, "load", missing)


@pytest.mark.parametrize("loops", [1, 3], ids="R{}".format)
@needs_compiler
def test_eager_with_its_kernel_and_weights(loops: int) -> None:
    fast = fast_step(step_of(plt_num_loops=loops))
    assert fast.about == "eager, reordered weights, C++ attention"
    agree(fast, step_of(plt_num_loops=loops))


@pytest.mark.usefixtures("no_kernel")
def test_without_the_kernel() -> None:
    said: list[str] = []
    fast = fast_step(step_of(), notify=said.append)
    assert said == ["no compiler here; going on with torch's attention"]
    assert fast.about == "eager, reordered weights"
    agree(fast, step_of())
    assert fast.reach(65, 500) == 128


@needs_compiler
def test_a_reach_is_of_no_account_to_the_kernel() -> None:
    assert fast_step(step_of()).reach(65, 500) == 500


@needs_compiler
def test_weights_are_not_held_twice_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    assert fast_step(step_of()).about == "eager, C++ attention"


def test_types_without_fast_forms_run_as_they_are() -> None:
    plain = step_of(dtype=torch.float64)
    fast = fast_step(plain)
    assert fast.about == "eager"
    assert plain.attend is None
    agree(fast, step_of(dtype=torch.float64))


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="compile is 'fast': expected one of auto, on, off"):
        fast_step(step_of(), compile="fast")


@given(tokens=st.integers(1, 10**6), capacity=st.integers(1, 10**6))
@quick(60)
def test_reach_buckets(tokens: int, capacity: int) -> None:
    bucket = reach_bucket(tokens, capacity)
    assert bucket >= min(tokens, capacity)
    assert bucket <= max(256, tokens * 3 // 2)
    assert bucket <= capacity
    assert reach_bucket(bucket, capacity) == bucket
    assert reach_bucket(tokens + 1, capacity) >= bucket


class Broken(nn.Module):
    """A step that no compiler takes."""

    def __init__(self, step: DecodeStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, cache: Any, tokens: Tensor, reach: int) -> Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("not this one")
        logits: Tensor = self.step(cache, tokens, reach)
        return logits


@needs_compiler
def test_what_cannot_be_compiled_is_said() -> None:
    step = step_of()
    with pytest.raises(ValueError, match=r"^the decode step cannot be compiled here: .*go without"):
        fast_step(Broken(step), compile="on")(new_cache(step), torch.tensor([1]), CAPACITY)


@needs_compiler
def test_compiled() -> None:
    """One bucket of the smallest model, 15 seconds: the other forms are in the slow tests."""
    fast = fast_step(step_of(plt_num_loops=2, dtype=torch.bfloat16), compile="on")
    assert fast.about == "compiled, C++ attention"
    plain = step_of(plt_num_loops=2, dtype=torch.bfloat16)
    one, other = filled(plain), filled(plain)
    rows = [[i % 7, 3 + i, 2] for i in range(8)]
    expected, found = write(plain, one, rows), write(fast, other, rows)
    spread = expected.float().std()
    assert (found[:, :2].float() - expected[:, :2].float()).abs().mean() < 0.02 * spread
    assert torch.equal(one.lengths, other.lengths)
    assert len(fast.compiled) == 1


@pytest.mark.slow  # each bucket takes a compiler 15 to 40 seconds
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "sdpa"])
@pytest.mark.parametrize("loops", [1, 3], ids="R{}".format)
@needs_compiler
def test_compiled_is_the_step(loops: int, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(FastStep, "_take_kernel", lambda _: None)
    fast = fast_step(step_of(plt_num_loops=loops), compile="on")
    agree(fast, step_of(plt_num_loops=loops))
    fast.release()
    agree(fast, step_of(plt_num_loops=loops))
    assert len(fast.compiled) == 1


@pytest.mark.slow  # three buckets
@pytest.mark.usefixtures("no_kernel")
@needs_compiler
def test_a_text_that_crosses_buckets() -> None:
    fast, plain = fast_step(step_of(), compile="on"), step_of()
    one, other = new_cache(plain, 1, 1024), new_cache(plain, 1, 1024)
    one.lengths.fill_(250)
    other.lengths.fill_(250)
    for i in range(12):
        reach = fast.reach(251 + i, 1024)
        expected, found = plain(one, torch.tensor([i]), 1024), fast(other, torch.tensor([i]), reach)
        torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)
    assert [key[1] for key in fast.compiled] == [256, 384]


@pytest.mark.parametrize("kind", [DecodeStep, SequentialTrips, pytest.param(LoopedTransformer, marks=pytest.mark.slow)])
@needs_compiler
def test_a_layer_compiled_for_all_layers(kind: type[nn.Module]) -> None:
    """What a GPU's graphs record: the weights of each layer and the pass are told apart, no other is taken for them."""
    inner = step_of(torch.float64, plt_num_loops=3, num_hidden_layers=3)
    step = inner if kind is DecodeStep else kind(inner)
    fast = layers_compiled(step)
    looped = isinstance(step, LoopedTransformer)
    one, other = (step.cache(slots=3, capacity=CAPACITY) if looped else filled(inner) for _ in range(2))
    for i in range(4):
        tokens = torch.tensor([5 + i, 9 - i, 1])
        expected, found = step(one, tokens, CAPACITY), fast(other, tokens, CAPACITY)
        torch.testing.assert_close(found, expected, rtol=0, atol=EXACT)
    assert inner.run_layer is run_layer


@pytest.mark.gpu  # CUDA graphs need a device
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_graphs_are_the_step(mode: str) -> None:
    device = "cuda"
    plain, fast = (step_of(plt_num_loops=3).to(device), fast_step(step_of(plt_num_loops=3).to(device), compile=mode))
    caches = [
        StaticCache(plain.config, slots=4, capacity=CAPACITY, dtype=torch.float32, device=device) for _ in range(2)
    ]
    for count in (4, 2, 1):
        for i in range(4):
            tokens = torch.tensor([i, 5, 6, 7][:count], device=device)
            expected, found = plain(caches[0], tokens, CAPACITY), fast(caches[1], tokens, CAPACITY)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(fast.graphs) == 3
    fast.release()
    assert not fast.graphs
