"""A pre-allocated cache for decoding: slots that requests come and go in, without a byte being allocated on the way.

    cache = StaticCache(config, slots=8, capacity=4096, dtype=torch.bfloat16, device="cpu")
    cache.adopt(3, prefilled)      # a PLTCache of one sequence, read by the model, moves into slot 3

    L layers   N slots   G key/value heads   K head size   T capacity   R passes   w window   D model width

A slot of length n holds pass 0's keys and values at 0..n-1 of its row, and each later pass's last w + 1 in a ring:
position p at p mod (w + 1). Rotary positions are in the keys, so their order does not matter.
"""

from __future__ import annotations

from typing import Any

import torch

from ..cache_plt import PLTCache
from ..configuration_plt import PLTConfig


class StaticCache:
    """keys, values: L tensors [N, G, T, K]; ring_keys, ring_values: L tensors [N, R-1, G, w+1, K]; carry [N, R-1, D];
    lengths [N], the tokens that each slot has read."""

    def __init__(
        self, config: PLTConfig, *, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        assert config.num_key_value_heads is not None
        assert config.head_dim is not None
        loops, heads, size = config.plt_num_loops, config.num_key_value_heads, config.head_dim
        self.capacity, self.slots = capacity, slots
        self.window = config.window if config.plt_gswa else -1
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(slots, heads, capacity, size, **place) for _ in layers]
        self.values = [torch.zeros(slots, heads, capacity, size, **place) for _ in layers]
        ring = (slots, loops - 1, heads, self.window + 1, size)
        self.ring_keys = [torch.zeros(ring, **place) for _ in layers]
        self.ring_values = [torch.zeros(ring, **place) for _ in layers]
        self.carry = torch.zeros(slots, loops - 1, config.hidden_size, **place)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)

    @torch.no_grad()
    def adopt(self, slot: int, read: PLTCache) -> None:
        """Put a request into `slot`, whoever was there before. Raises ValueError where it does not fit."""
        length = int(read.get_seq_length())
        if length >= self.capacity:
            raise ValueError(f"{length} tokens and one more do not fit a capacity of {self.capacity}")
        kept = min(length, max(self.window, 0))
        places = torch.arange(length - kept, length, device=self.lengths.device) % max(self.window + 1, 1)
        for i, layer in enumerate(read.layers):
            assert layer.keys is not None
            assert layer.values is not None
            if layer.keys.shape[0] != 1:
                raise ValueError(f"a slot takes one sequence, found {layer.keys.shape[0]}")
            # Masked places count for nothing only while they are finite: whatever stood there goes.
            for held in (self.keys[i], self.values[i], self.ring_keys[i], self.ring_values[i]):
                held[slot] = 0
            self.keys[i][slot, :, :length] = layer.keys[0]
            self.values[i][slot, :, :length] = layer.values[0]
            if layer.window_keys is not None and len(places):
                self.ring_keys[i][slot][:, :, places] = layer.window_keys[0, :, :, -len(places) :]
                self.ring_values[i][slot][:, :, places] = layer.window_values[0, :, :, -len(places) :]
        self.carry[slot] = 0 if read.carry is None else read.carry[0]
        self.lengths[slot] = length

    @torch.no_grad()
    def move(self, source: int, target: int) -> None:
        """Copy a slot's request into another slot, so that the live ones can be the first ones."""
        for held in (*self.keys, *self.values, *self.ring_keys, *self.ring_values, self.carry, self.lengths):
            held[target] = held[source]

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part: "shared" (full caches), "windows" and "carry"."""
        parts = {
            "shared": [*self.keys, *self.values],
            "windows": [*self.ring_keys, *self.ring_values],
            "carry": [self.carry],
        }
        return {part: sum(tensor.nbytes for tensor in tensors) for part, tensors in parts.items()}
