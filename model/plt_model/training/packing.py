"""Which tokens a model sees, in which order: fixed for a seed, whatever the loop count and the number of processes.

Training data are cut into windows of `length` tokens. Window number i of the training comes from a source by the mix's
weights (exact in every period of `PERIOD` windows), and from a place in that source by a pseudo-random permutation of
its windows, a new one for every pass over it. Nothing is held in memory, and any i can be asked for at once: that is
what makes a resumed run read on where it stopped, and what makes runs with different loop counts match.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

PERIOD = 1024
"""The mix's weights are kept exactly (to one window) in every so many windows."""
_ROUNDS = 6


class TokenSource(Protocol):
    """A long run of tokens that can be read anywhere."""

    @property
    def tokens(self) -> int: ...

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]: ...


@dataclass(frozen=True)
class Ingredient:
    """One source of the mix; its weight is relative to the others'."""

    name: str
    data: TokenSource
    weight: float


@dataclass(frozen=True)
class Place:
    """Where a window comes from: pass number `epoch` over `source`, tokens from `start` on."""

    source: int
    epoch: int
    start: int


class WindowDataset(Dataset[dict[str, Tensor]]):
    """`size` windows of `length` tokens: {"input_ids": [length], "labels": [length], "index": []}, all int64.

    Raises ValueError for a source that is shorter than two windows.
    """

    def __init__(self, mix: Sequence[Ingredient], *, length: int, size: int, seed: int) -> None:
        for part in mix:
            if part.data.tokens < 2 * length:
                raise ValueError(
                    f"data {part.name}: found {part.data.tokens} training tokens, expected at least {2 * length} "
                    "(two windows)"
                )
        self.mix, self.length, self.size, self.seed = tuple(mix), length, size, seed
        quotas = _quotas([part.weight for part in mix])
        self._pattern = _pattern(quotas, seed)
        self._quotas = np.bincount(self._pattern, minlength=len(mix))
        self._before = np.stack([np.cumsum(self._pattern == s) - (self._pattern == s) for s in range(len(mix))])

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        place = self.place(index)
        ids = torch.from_numpy(self.mix[place.source].data.read(place.start, self.length))
        return {"input_ids": ids, "labels": ids, "index": torch.tensor(index)}

    def place(self, index: int) -> Place:
        """Where window `index` comes from."""
        period, phase = divmod(index, PERIOD)
        source = int(self._pattern[phase])
        turn = period * int(self._quotas[source]) + int(self._before[source, phase])
        # Every pass cuts its windows at another offset, so that what straddles two of them differs from pass to pass.
        count = (self.mix[source].data.tokens - self.length + 1) // self.length
        epoch, place = divmod(turn, count)
        key = _key(self.seed, source, epoch)
        offset = key % self.length
        return Place(source, epoch, offset + permuted(place, count, key) * self.length)

    def describe(self, index: int) -> str:
        """As in "python@81920 (pass 1)": enough to read the window again."""
        place = self.place(index)
        return f"{self.mix[place.source].name}@{place.start} (pass {place.epoch + 1})"


def permuted(index: int, count: int, key: int) -> int:
    """The image of `index` under the permutation of range(count) that `key` names: a Feistel network over the next even
    power of two, walked until it lands within `count`."""
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix64(right + (key ^ (turn * 0x9E3779B97F4A7C15))) & mask)
        index = left << half | right
        if index < count:
            return index


def _key(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8])


def _mix64(x: int) -> int:
    """splitmix64's finaliser: every bit of the result depends on every bit of x."""
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def _quotas(weights: Sequence[float]) -> list[int]:
    """Windows a period for each source, by the largest remainders; at least one each."""
    total = sum(weights)
    exact = [PERIOD * weight / total for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda s: (exact[s] - quotas[s], -s), reverse=True)
    for turn in range(abs(PERIOD - sum(quotas))):
        missing = PERIOD - sum(quotas)
        pick = by_remainder[turn % len(weights)] if missing > 0 else quotas.index(max(quotas))
        quotas[pick] += 1 if missing > 0 else -1
    return quotas


def _pattern(quotas: Sequence[int], seed: int) -> npt.NDArray[np.int64]:
    """Which source each window of a period comes from [PERIOD], in pseudo-random order."""
    rows = np.repeat(np.arange(len(quotas)), quotas)
    order = [permuted(i, PERIOD, _key(seed, -1, 0)) for i in range(PERIOD)]
    return rows[order].astype(np.int64)
