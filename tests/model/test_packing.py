"""The order of training data: exact weights, every window once a pass, the same whoever asks."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_parts import write_source

from plt_model.training.packing import PERIOD, Ingredient, WindowDataset, permuted
from plt_model.training.shards import TokenData

weights = st.floats(1e-3, 1e3)


@dataclass
class Line:
    """A source whose token at i is `first` + i; refuses to be read outside of itself."""

    tokens: int
    first: int = 0
    reads: list[tuple[int, int]] = field(default_factory=list)

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        assert 0 <= start <= start + count <= self.tokens, (start, count, self.tokens)
        self.reads.append((start, count))
        return np.arange(self.first + start, self.first + start + count)


def mixed(*parts: tuple[int, float], length: int = 8, size: int = 10**9, seed: int = 0) -> WindowDataset:
    """Of sources with these numbers of tokens and weights; source s holds the tokens from s * 10^9 on."""
    mix = [Ingredient(f"s{s}", Line(tokens, s * 10**9), weight) for s, (tokens, weight) in enumerate(parts)]
    return WindowDataset(mix, length=length, size=size, seed=seed)


@given(count=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permuted_is_a_bijection(count: int, key: int) -> None:
    assert sorted(permuted(i, count, key) for i in range(count)) == list(range(count))


@given(count=st.integers(2, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permuted_keeps_big_numbers_apart(count: int, key: int, data: st.DataObject) -> None:
    some = data.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=30))
    images = [permuted(i, count, key) for i in some]
    assert len(set(images)) == len(some)
    assert all(0 <= image < count for image in images)


def test_permuted_looks_random() -> None:
    """No neighbour stays a neighbour more often than by chance, and every place is reached from everywhere."""
    count, keys = 50, 400
    images = np.array([[permuted(i, count, 7919 * key + 1) for i in range(count)] for key in range(keys)])
    neighbours = (np.abs(np.diff(images, axis=1)) == 1).mean()
    assert neighbours == pytest.approx(2 / count, rel=0.25)
    means = images.mean(axis=0)
    assert np.abs(means - (count - 1) / 2).max() < 5 * count / np.sqrt(12 * keys)


@settings(max_examples=25)
@given(shares=st.lists(weights, min_size=1, max_size=8), seed=st.integers(0, 2**32 - 1))
def test_the_weights_hold_to_one_window_in_every_period(shares: list[float], seed: int) -> None:
    windows = mixed(*[(100, share) for share in shares], seed=seed)
    for period in (0, 3):
        found = Counter(windows.place(period * PERIOD + i).source for i in range(PERIOD))
        for source, share in enumerate(shares):
            exact = PERIOD * share / sum(shares)
            # A source of next to no weight still gets one window, which others pay for.
            slack = 1 + sum(PERIOD * other / sum(shares) < 1 for other in shares)
            assert abs(found[source] - exact) <= (1 if min(shares) * PERIOD >= sum(shares) else slack)
            assert found[source] >= 1


def test_a_third_and_two_thirds_come_well_mixed() -> None:
    windows = mixed((1000, 1), (1000, 2))
    sources = [windows.place(i).source for i in range(PERIOD)]
    assert Counter(sources) == {0: 341, 1: 683}
    runs = max(len(run) for run in "".join(map(str, sources)).split("0"))
    assert runs < 30, "the sources are to alternate, not to come one after the other"
    other = mixed((1000, 1), (1000, 2), seed=1)
    assert sources != [other.place(i).source for i in range(PERIOD)], "in an order of the seed's own"


@settings(max_examples=25)
@given(
    tokens=st.integers(16, 400),
    length=st.integers(2, 8),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([1.0, 0.2, 7.0]),
)
def test_every_window_of_a_source_once_a_pass(tokens: int, length: int, seed: int, share: float) -> None:
    """In each pass, windows that do not overlap, that lie within the source, and that leave out less than two."""
    windows = mixed((tokens, share), (99, 1.0), length=length, seed=seed)
    passes: dict[int, list[int]] = {}
    last = 0
    for i in range(3 * PERIOD):
        place = windows.place(i)
        if place.source == 0:
            assert place.epoch - last in (0, 1), "passes come one after the other"
            last = place.epoch
            passes.setdefault(place.epoch, []).append(place.start)
    assert len(passes) >= 2
    whole = [sorted(passes[epoch]) for epoch in range(last)]
    for starts in whole:
        assert starts[0] >= 0
        assert starts[-1] + length <= tokens
        assert all(later - start == length for start, later in itertools.pairwise(starts))
        assert len(starts) * length > tokens - 2 * length
    assert len({len(starts) for starts in whole}) == 1


def test_each_pass_and_each_seed_has_an_order_of_its_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        windows = mixed((8 * 60, 1.0), seed=seed)
        places = [windows.place(i) for i in range(59 * 4)]
        return [place.start // 8 for place in places if place.epoch == epoch]

    orders = [order(seed, epoch) for seed in range(4) for epoch in range(3)]
    assert all(sorted(order) == list(range(59)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert len({windows_offset(epoch) for epoch in range(12)}) > 3, "passes cut at different places"


def windows_offset(epoch: int) -> int:
    return mixed((8 * 60, 1.0)).place(59 * epoch).start % 8


def test_sources_of_the_same_size_are_not_in_step() -> None:
    windows = mixed((8 * 200, 1.0), (8 * 200, 1.0))
    starts: dict[int, list[int]] = {0: [], 1: []}
    for i in range(300):
        place = windows.place(i)
        starts[place.source].append(place.start // 8)
    assert sum(a == b for a, b in zip(*starts.values(), strict=False)) < 10


def test_the_order_does_not_depend_on_the_size() -> None:
    long, short = mixed((500, 1), (900, 3), size=5000), mixed((500, 1), (900, 3), size=40)
    assert all(torch.equal(long[i]["input_ids"], short[i]["input_ids"]) for i in range(40))
    assert (len(long), len(short)) == (5000, 40)
    for beyond in (-1, 40):
        with pytest.raises(IndexError):
            short[beyond]


@settings(max_examples=40)
@given(index=st.integers(0, 10**12 - 1), seed=st.integers(0, 2**32 - 1))
def test_describe_names_what_is_read(index: int, seed: int) -> None:
    windows = mixed((1001, 1), (77, 3), size=10**12, seed=seed)
    item = windows[index]
    name, rest = windows.describe(index).split("@")
    start, turn = rest.removesuffix(")").split(" (pass ")
    source = int(name.removeprefix("s"))
    expected = torch.arange(source * 10**9 + int(start), source * 10**9 + int(start) + 8)
    assert torch.equal(item["input_ids"], expected)
    assert torch.equal(item["labels"], expected)
    assert item["index"] == index
    assert int(turn) == windows.place(index).epoch + 1
    assert all(value.dtype == torch.int64 for value in item.values())


def test_any_window_can_be_asked_for_at_once() -> None:
    """A window far out costs one read and no walk over those before it."""
    windows = mixed((10**13, 1), (1000, 1), size=10**15, length=128)
    began = time.perf_counter()
    for index in range(10**15 - 200, 10**15):
        windows[index]
    assert time.perf_counter() - began < 2
    assert sum(len(part.data.reads) for part in windows.mix) == 200  # type: ignore[attr-defined]


def test_a_source_of_less_than_two_windows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data s1: found 15 training tokens, expected at least 16 \(two windows\)$"):
        mixed((100, 1), (15, 1))
    mixed((16, 1))


def test_real_shards_give_the_window_that_is_named(tmp_path: Path) -> None:
    """Across the borders of shard files."""
    source = TokenData.open(write_source(tmp_path / "a", 5000), "train")
    whole = source.read(0, 5000)
    windows = WindowDataset([Ingredient("a", source, 1.0)], length=100, size=49, seed=3)
    for i in range(49):
        start = windows.place(i).start
        assert np.array_equal(windows[i]["input_ids"].numpy(), whole[start : start + 100])
