"""The two attentions of a PLT through torch's FlexAttention: one fused kernel, told by blocks which keys count.

The blocks are counted out, never searched for in an S x T mask: a query block of 128 positions reads the key blocks
from its first query's window (or from the start) to its last query, and compares positions only where it must.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

BLOCK = 128
"""Positions in a block."""
CPU_KEYS = 16
"""On a CPU keys are filled up to a multiple of this: torch's kernel with AVX2 vectors reads what was never written
where their number is 8 more than one (2.13; rows are off by whole units, at random)."""


def attend(
    q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, key_mask_BT: Tensor | None = None, *, window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v of the last S of T positions -> [B, H, S, K], over all positions up to the query's
    or, with a window, over it and `window` before it; masks as :func:`plt_model.attention_plt.causal_attention`.

    Compiled at the first call of a kind (device, type, heads, window, padding or none, gradients or none), some
    seconds each, and not again for other lengths. Raises whatever the compiler raises for what FlexAttention does not
    serve.
    """
    queries, keys = q_BHSK.shape[2], k_BGTK.shape[2]
    filled = -keys % CPU_KEYS if q_BHSK.device.type == "cpu" else 0  # beyond the last query, so that none sees them
    if filled:
        k_BGTK, v_BGTK = (pad(t, (0, 0, 0, filled)) for t in (k_BGTK, v_BGTK))
        key_mask_BT = None if key_mask_BT is None else pad(key_mask_BT, (0, filled))
    seen = _seen(q_BHSK, keys - queries, window, key_mask_BT)
    blocks = _blocks(queries, keys, window, q_BHSK.device, seen, filled)
    shapes = (len(q_BHSK) > 1, q_BHSK.shape[1], k_BGTK.shape[1], q_BHSK.shape[3])
    kind = (str(q_BHSK.device), q_BHSK.dtype, *shapes, window, key_mask_BT is None, torch.is_grad_enabled())
    out: Tensor = _compiled(kind)(q_BHSK, k_BGTK, v_BGTK, blocks)
    return out


@functools.cache
def _compiled(_: Hashable) -> Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]:
    """One compiled function a kind, each with code of its own: torch counts what it compiles beside the code, and after
    8 times would write every score out."""

    def run(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
        out: Tensor = flex_attention(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        return out

    own = types.FunctionType(run.__code__.replace(), run.__globals__, "run")
    compiled: Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor] = torch.compile(own, dynamic=True, fullgraph=True)
    return compiled


def _seen(
    q: Tensor, offset: int, window: int | None, key_mask_BT: Tensor | None
) -> Callable[[Any, Any, Any, Any], Tensor]:
    """Whether a query sees a key, by their places. The offset is a tensor, so that no chunk compiles anew."""
    shift = torch.full((), offset, device=q.device)

    def seen(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = query + shift
        found = key <= position
        if window is not None:
            found = found & (key >= position - window)
        if key_mask_BT is not None:
            found = (found & key_mask_BT[b, key]) | (key == position)
        return found

    return seen


def _blocks(
    queries: int,
    keys: int,
    window: int | None,
    device: torch.device,
    seen: Callable[[Any, Any, Any, Any], Tensor],
    filled: int = 0,
) -> BlockMask:
    """Which key blocks each query block reads: numbers [1, 1, Q] and indices [1, 1, Q, K] for Q and K blocks."""
    offset, rows, columns = keys - queries, -(-queries // BLOCK), -(-keys // BLOCK)
    first_query = torch.arange(rows, device=device) * BLOCK + offset
    last_query = (first_query + BLOCK - 1).clamp(max=keys - 1)
    first = torch.zeros_like(first_query) if window is None else (first_query - window).clamp(min=0) // BLOCK
    counts = last_query // BLOCK - first + 1
    indices = (first[:, None] + torch.arange(columns, device=device)).clamp(max=columns - 1)
    return BlockMask.from_kv_blocks(
        counts[None, None].int(),
        indices[None, None].int().contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen,
        seq_lengths=(queries, keys + filled),
    )
