"""A cache full of requests, driven in any order and checked at every step against the slow reference."""

from __future__ import annotations

from typing import Any

import torch
from plt_cases import EXACT, assert_close, positions, reference_of, tokens
from reference import Trace
from torch import Tensor

from plt_model import PLTCache, PLTForCausalLM


class Slots:
    """Requests that share one batch. `rows` are their tokens so far, `masks` the attention mask of each."""

    def __init__(self, model: PLTForCausalLM, settings: dict[str, Any]) -> None:
        self.model, self.reference = model, reference_of(model, settings)
        self.cache = PLTCache(model.config)
        self.rows: list[list[int]] = []
        self.masks: list[list[int]] = []
        self.drawn = 0
        self.traces: dict[tuple[int, ...], Trace] = {}

    def start(self, lengths: list[int], chunks: list[int]) -> None:
        """Read new prompts, padded on the left, in pieces of `chunks` positions (the rest in one)."""
        longest = max(lengths)
        prompts = [self._draw(n) for n in lengths]
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        self.rows = [[] for _ in prompts]
        self.masks = [[] for _ in prompts]
        pads = [longest - len(p) for p in prompts]
        read = 0
        for size in [*chunks, longest]:
            stop = min(longest, read + size)
            if stop > read:
                real = [[int(t >= pad) for t in range(read, stop)] for pad in pads]
                self._read([p[read:stop] for p in padded], real)
            read = stop

    def append(self, count: int) -> None:
        """Every request goes on by `count` tokens, read together."""
        self._read([self._draw(count) for _ in self.rows], [[1] * count for _ in self.rows])

    def reorder(self, index: list[int], how: str = "reorder_cache") -> None:
        """Row b goes on as a copy of row index[b]; `how` is the cache's method."""
        getattr(self.cache, how)(torch.tensor(index))
        self._keep(index)

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self._keep([b for b in range(len(self.rows)) for _ in range(times)])

    def replace(self, row: int, length: int) -> None:
        """Slot `row` is given to a new request of `length` tokens, read on its own before."""
        prompt = self._draw(length)
        other = PLTCache(self.model.config)
        with torch.no_grad():
            self.model(torch.tensor([prompt]), past_key_values=other, use_cache=True)
        before = self.cache.get_seq_length()
        moved = self.cache.replace_row(row, other)
        assert moved == max(0, length - before)
        assert self.cache.get_seq_length() == max(before, length)
        self.masks = [[0] * moved + mask for mask in self.masks]
        self.masks[row] = [0] * (len(self.masks[row]) - length) + [1] * length
        self.rows[row] = prompt

    def restart(self, lengths: list[int], chunks: list[int]) -> None:
        """The cache is reset and serves another batch."""
        self.cache.reset()
        assert self.cache.get_seq_length() == 0
        assert self.cache.carry is None
        self.start(lengths, chunks)

    def check_carry(self) -> None:
        """The carried vectors are those of every request's last token."""
        if self.cache.loops == 1 or not self.rows[0]:
            return
        for b, ids in enumerate(self.rows):
            if ids and self.masks[b][-1]:
                assert_close(self.cache.carry[b], self._trace(ids).carry(len(ids) - 1), EXACT, "carry")

    def _read(self, pieces: list[list[int]], real: list[list[int]]) -> None:
        """One call of the model; compares the logits of every token that is not padding."""
        self.masks = [mask + more for mask, more in zip(self.masks, real, strict=True)]
        mask = torch.tensor(self.masks)
        size = len(pieces[0])
        with torch.no_grad():
            out = self.model(
                torch.tensor(pieces),
                attention_mask=mask,
                position_ids=positions(mask)[:, -size:],
                past_key_values=self.cache,
                use_cache=True,
            )
        assert out.past_key_values is self.cache
        assert self.cache.get_seq_length() == mask.shape[1]
        for b, (piece, of_row) in enumerate(zip(pieces, real, strict=True)):
            new = [token for token, is_real in zip(piece, of_row, strict=True) if is_real]
            self.rows[b] = self.rows[b] + new
            if new:
                self._compare(out.logits[b, -len(new) :], self.rows[b])

    def _compare(self, logits: Tensor, ids: list[int]) -> None:
        assert_close(logits, self._trace(ids).logits[-len(logits) :], EXACT, f"logits after {len(ids)} tokens")

    def _trace(self, ids: list[int]) -> Trace:
        """The reference's run of a request (copies of one request share it)."""
        key = tuple(ids)
        if key not in self.traces:
            self.traces[key] = self.reference.run(ids)
        return self.traces[key]

    def _draw(self, count: int) -> list[int]:
        self.drawn += 1
        return tokens(count, seed=self.drawn)

    def _keep(self, index: list[int]) -> None:
        self.rows = [list(self.rows[b]) for b in index]
        self.masks = [list(self.masks[b]) for b in index]
