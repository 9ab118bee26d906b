"""Reading a request in pieces equals reading it whole, in float64; what a decoding step costs and keeps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import (
    BACKENDS,
    MODES,
    SHAPE,
    assert_close,
    assert_same_gates,
    assert_same_run,
    build,
    counted_calls,
    quick,
    reference_of,
    row,
    tiny,
    tokens,
)
from plt_slots import Slots
from reference import Reference

from plt_model import PLTCache, PLTForCausalLM

LOOPS = [1, 2, 3, 4]


def read(model: PLTForCausalLM, ids: list[int], starts: list[int], cache: PLTCache | None = None) -> torch.Tensor:
    """Logits [S, V] of a request read in the pieces that begin at `starts` (and at 0), without any mask."""
    cache = PLTCache(model.config) if cache is None else cache
    edges = [0, *starts, len(ids)]
    with torch.no_grad():
        pieces = [
            model(row(ids[a:b]), past_key_values=cache, use_cache=True).logits[0] for a, b in itertools.pairwise(edges)
        ]
    return torch.cat(pieces)


@given(data=st.data())
@quick(60)
def test_any_chunking(data: st.DataObject) -> None:
    settings = tiny(
        **MODES[data.draw(st.sampled_from(["plt", "plt", "plt", *MODES]))],
        plt_num_loops=data.draw(st.sampled_from(LOOPS)),
        plt_window_size=[data.draw(st.sampled_from([0, 1, 3, 5, 64])), 0],
        plt_normalize_per_loop=data.draw(st.booleans()),
        plt_gate_use_hidden_states=data.draw(st.booleans()),
        num_key_value_heads=data.draw(st.sampled_from([1, 2, 4])),
    )
    model = build(settings, backend=data.draw(st.sampled_from(BACKENDS)))
    ids = tokens(data.draw(st.integers(1, 20)))
    starts = sorted(data.draw(st.sets(st.integers(1, max(1, len(ids) - 1)), max_size=len(ids)))) if len(ids) > 1 else []
    cache = PLTCache(model.config)
    trace = reference_of(model, settings).run(ids)
    assert_close(read(model, ids, starts, cache), trace.logits, what=f"pieces at {starts}")
    if settings["plt_num_loops"] > 1:
        assert_close(cache.carry[0], trace.carry(len(ids) - 1), what="carry")


@pytest.mark.parametrize(("window", "backend"), [(0, "sdpa"), (1, "eager"), (3, "sdpa"), (3, "eager"), (64, "sdpa")])
@pytest.mark.parametrize("loops", LOOPS, ids="R{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_token_by_token(mode: str, loops: int, backend: str, window: int) -> None:
    settings = tiny(**MODES[mode], plt_num_loops=loops, plt_window_size=[window, 0])
    model = build(settings, backend=backend)
    ids = tokens(10)
    assert_close(read(model, ids, list(range(1, 10))), reference_of(model, settings).run(ids).logits)


@pytest.mark.parametrize("starts", [[300], [256, 257], [64, 65, 66, 400], [511, 512, 513]], ids=str)
def test_long_chunks(starts: list[int]) -> None:
    """Pieces longer than a slice of queries, after a past longer than the window."""
    settings = tiny(plt_num_loops=3, num_hidden_layers=1, num_attention_heads=2, plt_window_size=[64, 0])
    model = build(settings, backend="sdpa")
    ids = tokens(600)
    with torch.no_grad():
        whole = model(row(ids)).logits[0]
    assert_close(read(model, ids, starts), whole)


@pytest.mark.parametrize("mistake", ["carry zeroed", "ring one slot short", "no shift", "shift wraps around"])
@pytest.mark.parametrize("loops", [2, 3, 4], ids="R{}".format)
def test_a_faulty_cache_would_show(loops: int, mistake: str) -> None:
    settings = tiny(plt_num_loops=loops)
    model = build(settings, backend="sdpa")
    ids, starts = tokens(12), [5, 8, 9, 10]
    weights = {name: w.detach() for name, w in model.named_parameters()}
    wrong = Reference(settings, weights, mistake).run(ids, starts).logits
    assert (read(model, ids, starts) - wrong).abs().max() > 0.01


@pytest.mark.parametrize("gate", [True, False], ids=["gate-hidden", "gate-query"])
@pytest.mark.parametrize("normalize", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("loops", LOOPS, ids="R{}".format)
def test_states_and_gates_of_a_step(loops: int, normalize: bool, gate: bool) -> None:
    """One trip with R rows reports the passes as R trips do."""
    settings = tiny(plt_num_loops=loops, plt_normalize_per_loop=normalize, plt_gate_use_hidden_states=gate)
    backend = "sdpa" if normalize == gate else "eager"
    model = build(settings, backend=backend)
    ids = tokens(8)
    trace = reference_of(model, settings).run(ids)
    cache = PLTCache(model.config)
    with torch.no_grad():
        model(row(ids[:7]), past_key_values=cache, use_cache=True)
        out = model(row(ids[7:]), past_key_values=cache, use_cache=True, output_loop_states=True)
    trace.logits = trace.logits[-1:]
    trace.states, trace.normed = [x[-1:] for x in trace.states], [x[-1:] for x in trace.normed]
    trace.gates = [[g[-1:] for g in of_pass] for of_pass in trace.gates]
    assert_same_run(out, trace)
    assert_same_gates(out, trace)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunks", [[], [1] * 9, [3, 1, 4], [8]], ids=["whole", "ones", "3-1-4", "8-1"])
def test_left_padded_batch_in_pieces(chunks: list[int], mode: str, backend: str) -> None:
    """Also where a piece is padding only for some of the rows."""
    settings = tiny(**MODES[mode])
    slots = Slots(build(settings, backend=backend), settings)
    slots.start([9, 2, 5, 1], chunks)
    slots.check_carry()
    for count in (1, 1, 3, 1):
        slots.append(count)
        slots.check_carry()


@pytest.mark.parametrize(
    ("mode", "trips"),
    [("plt", 1), ("no-gswa", 1), ("sequential", None), ("no-shift", None), ("no-shift-no-gswa", None)],
)
@pytest.mark.parametrize("loops", LOOPS, ids="R{}".format)
@pytest.mark.parametrize("backend", BACKENDS)
def test_trips_through_the_layers(backend: str, loops: int, mode: str, trips: int | None) -> None:
    """A new token takes one trip, each weight matrix used once; R trips where its passes wait for one another."""
    model = build(tiny(**MODES[mode], plt_num_loops=loops), backend=backend)
    layers = SHAPE["num_hidden_layers"]
    cache = PLTCache(model.config)
    with torch.no_grad():
        with counted_calls(model) as prompt:
            model(torch.tensor([tokens(6), tokens(6, seed=1)]), past_key_values=cache, use_cache=True)
        for _ in range(2):
            with counted_calls(model) as step:
                model(torch.tensor([[5], [6]]), past_key_values=cache, use_cache=True)
            assert step == {"layer": layers * (trips or loops), "matrix": trips or loops}
    assert prompt == {"layer": layers * loops, "matrix": loops}


def expected_bytes(settings: dict[str, Any], batch: int, length: int, itemsize: int) -> dict[str, int]:
    """By hand: one cache of all positions (R of them in the sequential baseline), R-1 windows, R-1 vectors."""
    entry = 2 * settings["num_key_value_heads"] * settings["head_dim"] * settings["num_hidden_layers"] * itemsize
    later = settings["plt_num_loops"] - 1
    sequential = settings.get("plt_loop_mode") == "sequential"
    windows = later if not sequential and settings.get("plt_gswa", True) else 0
    return {
        "shared": batch * length * entry * (settings["plt_num_loops"] if sequential else 1),
        "windows": batch * windows * settings["plt_window_size"][0] * entry,
        "carry": batch * later * settings["hidden_size"] * itemsize,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 3, 64], ids="w{}".format)
@pytest.mark.parametrize("loops", LOOPS, ids="R{}".format)
@pytest.mark.parametrize("mode", ["plt", "no-gswa", "sequential"])
def test_memory(mode: str, loops: int, window: int, dtype: torch.dtype) -> None:
    settings = tiny(**MODES[mode], plt_num_loops=loops, plt_window_size=[window, 0])
    model = build(settings, dtype=dtype, backend="sdpa")
    cache = PLTCache(model.config)
    length = 0
    for size in (9, 1, 1, 4, 1):
        with torch.no_grad():
            model(torch.tensor([tokens(size), tokens(size, seed=1)]), past_key_values=cache, use_cache=True)
        length += size
        assert cache.nbytes() == expected_bytes(settings, 2, length, dtype.itemsize)


@pytest.mark.parametrize("loops", [2, 4], ids="R{}".format)
def test_memory_that_is_really_held(loops: int) -> None:
    """The storages behind the cache's tensors: no more than what it says, and one slot of slack a window."""
    settings = tiny(plt_num_loops=loops, plt_window_size=[5, 0])
    model = build(settings, dtype=torch.float32, backend="sdpa")
    cache = PLTCache(model.config)
    for size in (40, 1, 7, 1, 1):
        with torch.no_grad():
            model(row(tokens(size)), past_key_values=cache, use_cache=True)
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*tensors, cache.carry]}
    roomy = expected_bytes({**settings, "plt_window_size": [6, 0]}, 1, 50, 4)
    assert sum(storages.values()) <= sum(roomy.values())


def test_a_cache_of_another_model_is_refused() -> None:
    model = build(tiny(plt_num_loops=2))
    for settings in (tiny(plt_num_loops=3), tiny(plt_num_loops=2, plt_loop_mode="sequential")):
        with pytest.raises(ValueError, match="past_key_values"):
            model(row(tokens(3)), past_key_values=PLTCache(build(settings).config), use_cache=True)


def test_a_given_cache_is_never_ignored() -> None:
    """`use_cache=False` beside a filled cache must not silently forget what the cache holds."""
    model = build(tiny())
    ids = tokens(9)
    cache = PLTCache(model.config)
    with torch.no_grad():
        whole = model(row(ids)).logits[0, -1:]
        model(row(ids[:8]), past_key_values=cache, use_cache=True)
        try:
            found = model(row(ids[8:]), past_key_values=cache, use_cache=False).logits[0]
        except ValueError:
            return
    assert_close(found, whole)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = build(tiny())
    cache = PLTCache(model.config)
    with torch.no_grad():
        model(row(tokens(4)), past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match="attention_mask"):
            model(row([5]), attention_mask=torch.ones(1, 1), past_key_values=cache, use_cache=True)


def test_the_cache_has_two_names() -> None:
    """`past_key_values`, and what transformers calls it from 5.24 on; both at once is a mistake."""
    model, ids = build(tiny()), tokens(9)
    one, other = PLTCache(model.config), PLTCache(model.config)
    with torch.no_grad():
        for first, last in ((0, 6), (6, 9)):
            piece = row(ids[first:last])
            expected, found = model(piece, past_key_values=one).logits, model(piece, cache=other).logits
            assert_close(found, expected, 0.0)
    assert other.get_seq_length() == 9
    for inner in (model, model.model):
        with pytest.raises(ValueError, match=r"^give the cache as past_key_values or as cache, not as both$"):
            inner(row(ids), past_key_values=one, cache=other)
