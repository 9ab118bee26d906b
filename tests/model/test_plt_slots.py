"""Requests that change places in a running batch: reordered, copied, replaced, and a cache used again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import BACKENDS, MODES, build, quick, row, tiny, tokens
from plt_slots import Slots

from plt_model import PLTCache


def running(mode: str = "plt", loops: int = 3, backend: str = "sdpa", **settings: object) -> Slots:
    """A batch of three requests of different lengths, a few tokens in."""
    chosen = tiny(**MODES[mode], plt_num_loops=loops, **settings)
    slots = Slots(build(chosen, backend=backend), chosen)
    slots.start([7, 2, 4], [5])
    slots.append(1)
    return slots


def go_on(slots: Slots) -> None:
    for count in (1, 2, 1):
        slots.append(count)
    slots.check_carry()


@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_rows_change_places(mode: str, loops: int, how: str) -> None:
    slots = running(mode, loops)
    slots.reorder([2, 0, 0], how)
    go_on(slots)


@pytest.mark.parametrize("keep", [[1], [2, 0], [0, 1, 2, 2, 1]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_are_selected(mode: str, keep: list[int]) -> None:
    slots = running(mode)
    slots.reorder(keep, "batch_select_indices")
    go_on(slots)


@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_rows_are_repeated(mode: str, loops: int) -> None:
    slots = running(mode, loops)
    slots.repeat(3)
    go_on(slots)


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_cache_serves_another_batch(mode: str) -> None:
    slots = running(mode)
    slots.restart([3, 6, 1, 5, 2], [])
    go_on(slots)
    slots.restart([4], [1, 1])
    go_on(slots)


@pytest.mark.parametrize("length", [1, 2, 8, 20], ids="new-{}".format)
@pytest.mark.parametrize(
    ("mode", "loops"), [*(("plt", r) for r in (1, 2, 3, 4)), ("sequential", 3), ("no-shift", 2), ("no-gswa", 3)]
)
def test_a_slot_is_given_to_another_request(mode: str, loops: int, length: int) -> None:
    """One shorter, as long as, and longer than the requests that stay (which are 8 positions long)."""
    slots = running(mode, loops)
    slots.replace(1, length)
    go_on(slots)


@pytest.mark.parametrize("window", [0, 1, 5, 64], ids="w{}".format)
def test_slots_are_given_again_and_again(window: int) -> None:
    slots = running(plt_window_size=[window, 0])
    for slot, length in ((1, 12), (0, 1), (2, 3), (1, 30), (1, 2)):
        slots.replace(slot, length)
        slots.append(1)
    go_on(slots)


def test_the_other_request_is_left_as_it_was() -> None:
    """replace_row copies: going on with one cache does not change the other."""
    settings = tiny()
    model = build(settings, backend="sdpa")
    prompt = tokens(6, seed=9)
    with torch.no_grad():
        alone = PLTCache(model.config)
        model(row(prompt), past_key_values=alone, use_cache=True)
        expected = model(row([7]), past_key_values=alone, use_cache=True).logits
        other, batch = PLTCache(model.config), PLTCache(model.config)
        model(row(prompt), past_key_values=other, use_cache=True)
        model(torch.tensor([tokens(6), tokens(6, seed=1)]), past_key_values=batch, use_cache=True)
        batch.replace_row(0, other)
        model(torch.tensor([[9], [9]]), past_key_values=batch, use_cache=True)
        found = model(row([7]), past_key_values=other, use_cache=True).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("then", ["step", "chunk", "replace", "reorder"])
def test_a_cache_filled_in_inference_mode_goes_on_outside(then: str) -> None:
    """What inference_mode made must not be written in place."""
    settings = tiny()
    slots = Slots(build(settings, backend="sdpa"), settings)
    with torch.inference_mode():
        slots.start([6, 4], [])
    if then == "replace":
        slots.replace(1, 3)
    elif then == "reorder":
        slots.reorder([1, 0])
    slots.append(3 if then == "chunk" else 1)
    slots.append(1)
    slots.check_carry()


def test_replace_row_refuses_what_it_cannot_take() -> None:
    model = build(tiny())
    batch, pair = PLTCache(model.config), PLTCache(model.config)
    stranger_model = build(tiny(plt_num_loops=2))
    stranger = PLTCache(stranger_model.config)
    with torch.no_grad():
        for cache in (batch, pair):
            model(torch.tensor([tokens(3), tokens(3, seed=1)]), past_key_values=cache, use_cache=True)
        stranger_model(row(tokens(3)), past_key_values=stranger, use_cache=True)
    with pytest.raises(ValueError, match="one sequence"):
        batch.replace_row(0, pair)
    with pytest.raises(ValueError, match="loops"):
        batch.replace_row(0, stranger)


@given(data=st.data())
@quick(40)
def test_anything_in_any_order(data: st.DataObject) -> None:
    """A random life of a cache: whatever happens to it, every request goes on as if it were alone."""
    settings = tiny(
        **MODES[data.draw(st.sampled_from(list(MODES)))],
        plt_num_loops=data.draw(st.integers(1, 4)),
        plt_window_size=[data.draw(st.sampled_from([0, 1, 3, 64])), 0],
        num_hidden_layers=1,
    )
    slots = Slots(build(settings, backend=data.draw(st.sampled_from(BACKENDS))), settings)
    lengths = st.lists(st.integers(1, 8), min_size=1, max_size=3)
    chunks = st.lists(st.integers(1, 4), max_size=4)
    slots.start(data.draw(lengths), data.draw(chunks))
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(["append", "reorder", "select", "repeat", "replace", "restart"]))
        row_of = st.integers(0, len(slots.rows) - 1)
        if what == "append":
            slots.append(data.draw(st.integers(1, 5)))
        elif what == "reorder":
            count = len(slots.rows)
            slots.reorder(data.draw(st.lists(row_of, min_size=count, max_size=count)))
        elif what == "select":
            slots.reorder(data.draw(st.lists(row_of, min_size=1, max_size=4)), "batch_select_indices")
        elif what == "repeat" and len(slots.rows) < 4:
            slots.repeat(2)
        elif what == "replace":
            slots.replace(data.draw(row_of), data.draw(st.integers(1, 12)))
        elif what == "restart":
            slots.restart(data.draw(lengths), data.draw(chunks))
        slots.append(1)
        slots.check_carry()
