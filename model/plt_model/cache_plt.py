"""The PLT's memory of what it has read: one shared KV cache, small windows, and carried vectors.

    B batch   G key/value heads   K head size   T positions seen   w window   R passes   D model width

Per layer: keys and values of pass 0, [B, G, T, K] (post-RoPE), read by every pass; and for each later pass the last w
keys and values of its own, [B, R-1, G, w, K]. Per sequence: the last token's state of passes 0..R-2, [B, R-1, D], which
the next token's passes read. So memory is one cache and (R-1) windows, never R caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .configuration_plt import PLTConfig


class PLTCacheLayer(DynamicLayer):
    """One layer's share: the growing cache of pass 0 (inherited), and a window for each later pass.

    The windows are kept oldest first. Until w tokens were seen the left part holds zeros that no query may read; the
    number of valid entries is min(T, w).
    """

    is_croppable = False

    def __init__(self, windows: int = 0, window: int = 0) -> None:
        super().__init__()
        self.windows, self.window = windows, window
        self.window_keys: Tensor | None = None
        self.window_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, size = key_states.shape
        if self.windows:
            shape = (batch, self.windows, heads, self.window, size)
            self.window_keys, self.window_values = key_states.new_zeros(shape), value_states.new_zeros(shape)

    def update_window(self, keys: Tensor, values: Tensor, index: int, past: int) -> tuple[Tensor, Tensor]:
        """Append one pass's keys and values [B, G, S, K]; `past` tokens were seen before them.

        Returns the window before them and them together, [B, G, min(past, w) + S, K].
        """
        assert self.window_keys is not None
        assert self.window_values is not None
        valid = min(past, self.window)
        start = self.window - valid
        old_keys, old_values = self.window_keys[:, index], self.window_values[:, index]
        new_keys, new_values = torch.cat([old_keys, keys], dim=-2), torch.cat([old_values, values], dim=-2)
        kept = new_keys.shape[-2] - self.window
        self.window_keys = _with(self.window_keys, index, new_keys[..., kept:, :])
        self.window_values = _with(self.window_values, index, new_values[..., kept:, :])
        return new_keys[..., start:, :], new_values[..., start:, :]

    def update_windows(self, keys: Tensor, values: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Append one token to all windows at once; keys and values are [B, R-1, G, 1, K].

        Returns [B, R-1, G, min(past, w) + 1, K].
        """
        assert self.window_keys is not None
        assert self.window_values is not None
        start = self.window - min(past, self.window)
        all_keys = torch.cat([self.window_keys, keys], dim=-2)
        all_values = torch.cat([self.window_values, values], dim=-2)
        self.window_keys, self.window_values = all_keys[..., 1:, :].clone(), all_values[..., 1:, :].clone()
        return all_keys[..., start:, :], all_values[..., start:, :]

    def _select(self, rows: Tensor) -> None:
        for name in ("keys", "values", "window_keys", "window_values"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, rows.to(held.device)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            assert self.keys is not None
            self._select(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything: the next update starts a new sequence, of any batch size."""
        self.keys = self.values = self.window_keys = self.window_values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a PLT cache cannot take tokens back: its windows and carried states hold only the newest ones "
                "(assisted generation is not supported; use plain greedy or sampled decoding)"
            )


class PLTCache(Cache):
    """The cache of a :class:`PLTForCausalLM`; pass it as `past_key_values`, or let `generate` make it.

    In the sequential baseline every pass has a full cache of its own and layer i of pass r is slot r * L + i.
    """

    is_compileable = False

    def __init__(self, config: PLTConfig) -> None:
        loops = config.plt_num_loops
        self.sequential = config.plt_loop_mode == "sequential"
        windows = 0 if self.sequential or not config.plt_gswa else loops - 1
        slots = config.num_hidden_layers * (loops if self.sequential else 1)
        super().__init__(layers=[PLTCacheLayer(windows, config.window) for _ in range(slots)])
        self.loops = loops
        self.carry: Tensor | None = None
        """Last token's state of passes 0..R-2, [B, R-1, D]; None before the first token."""

    def _layers(self) -> list[PLTCacheLayer]:
        return list(self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.carry is not None:
            self.carry = self.carry.index_select(0, beam_idx.to(self.carry.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.carry is not None:
            self.carry = self.carry.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        """Forget everything; the object can then serve another batch."""
        super().reset()
        self.carry = None

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self._layers():
            layer.crop(tokens_to_remove)

    def replace_row(self, row: int, other: PLTCache) -> int:
        """Hand slot `row` to another request, whose prompt was read into `other` (batch 1).

        The shorter of the two histories is padded on the left. Returns by how many positions the kept rows moved to the
        right (0 unless the new request is the longer one): the caller pads their attention masks on the left by
        that many zeros and gives row `row` a mask that ends in `other`'s length of ones.
        Raises ValueError when the caches are of different models or `other` is not a single sequence.
        """
        if len(other.layers) != len(self.layers) or other.loops != self.loops:
            raise ValueError(f"cannot mix caches of different shape: {other.loops} loops against {self.loops}")
        held = other._layers()[0].keys
        if held is None or held.shape[0] != 1:
            raise ValueError(f"replace_row takes a cache of one sequence, found {0 if held is None else held.shape[0]}")
        mine, theirs = int(self.get_seq_length()), int(other.get_seq_length())
        for layer, source in zip(self._layers(), other._layers(), strict=True):
            for name in ("keys", "values"):
                held = _pad_left(getattr(layer, name), theirs - mine)
                held[row : row + 1] = _pad_left(getattr(source, name), mine - theirs)
                setattr(layer, name, held)
            for name in ("window_keys", "window_values"):
                held = getattr(layer, name)
                if held is not None:
                    held = held.clone()
                    held[row : row + 1] = getattr(source, name)
                    setattr(layer, name, held)
        if self.carry is not None and other.carry is not None:
            self.carry = self.carry.clone()
            self.carry[row : row + 1] = other.carry
        return max(0, theirs - mine)

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part: "shared" (full caches), "windows" and "carry"."""
        held: dict[str, list[Any]] = {
            "shared": [t for x in self._layers() for t in (x.keys, x.values)],
            "windows": [t for x in self._layers() for t in (x.window_keys, x.window_values)],
            "carry": [self.carry],
        }
        return {part: sum(t.nbytes for t in ts if t is not None) for part, ts in held.items()}


def _with(windows: Tensor, index: int, window: Tensor) -> Tensor:
    """A copy of [B, R-1, G, w, K] with one pass's window replaced (out of place, for autograd and inference mode)."""
    return torch.cat([windows[:, :index], window[:, None], windows[:, index + 1 :]], dim=1)


def _pad_left(x: Tensor, count: int) -> Tensor:
    """[B, G, T, K] -> a copy with `count` zero positions more on the left (none if count <= 0)."""
    return torch.nn.functional.pad(x, (0, 0, max(0, count), 0)).clone()


__all__ = ["PLTCache", "PLTCacheLayer"]
