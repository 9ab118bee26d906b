"""The two attentions of a PLT: causal over everything, and causal over a window.

    B batch   H query heads   G key/value heads (H a multiple of G)   S queries   T keys   K head size

In both the S queries are the last S of the T positions. Two backends say the same thing: `eager` writes the whole
softmax out in float32 (or wider) and is the truth the others are tested against; `sdpa` uses torch's fused kernels on
slices, so that no S x S mask is ever built and the window costs O(S * w); `flash_attention_2` calls the flash-attn
package, and falls back to `sdpa` where that cannot serve (padding, float32, CPU).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CAUSAL_BLOCK = 512
"""Queries per slice where causal attention needs a mask: it holds CAUSAL_BLOCK x T booleans at most (of 256 to 2048,
512 and 1024 measured the fastest on CPU)."""

WINDOW_BLOCK = 128
"""Queries per slice of window attention: each reads 128 + w keys (of 64 to 1024, 64 and 128 measured the fastest on
CPU: 27 ms against 99 ms for 1024 at S = 2048, H = 8, K = 64, w = 64)."""


def causal_attention(
    q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, key_mask_BT: Tensor | None = None, *, backend: str
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with every query seeing itself and all positions before it -> [B, H, S, K].

    `key_mask_BT` is False at padding, which no other position may see (a padded query still sees itself, so that its
    unused result is finite).
    """
    queries, keys = q_BHSK.shape[2], k_BGTK.shape[2]
    if backend == "eager":
        return _eager(
            q_BHSK,
            k_BGTK,
            v_BGTK,
            _mask(0, queries, keys - queries, 0, keys, None, key_mask_BT, q_BHSK.device),
        )
    if key_mask_BT is None and queries == 1:
        return attend_all(q_BHSK, k_BGTK, v_BGTK, backend=backend)
    if _flash_serves(backend, q_BHSK, key_mask_BT):
        return _flash(q_BHSK, k_BGTK, v_BGTK, window=-1)
    k_BHTK, v_BHTK = _expand(k_BGTK, q_BHSK), _expand(v_BGTK, q_BHSK)
    if key_mask_BT is None and queries == keys:
        return scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, is_causal=True)
    return _sliced(q_BHSK, k_BHTK, v_BHTK, key_mask_BT, window=None, block=CAUSAL_BLOCK)


def window_attention(
    q_BHSK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    key_mask_BT: Tensor | None = None,
    *,
    window: int,
    backend: str,
) -> Tensor:
    """As :func:`causal_attention`, but a query sees only itself and the `window` positions before it.

    T may be anything from S to S + w: the keys before the first query are what a cache kept.
    """
    queries, keys = q_BHSK.shape[2], k_BGTK.shape[2]
    if backend == "eager":
        mask = _mask(0, queries, keys - queries, 0, keys, window, key_mask_BT, q_BHSK.device)
        return _eager(q_BHSK, k_BGTK, v_BGTK, mask)
    if key_mask_BT is None and queries == 1 and keys <= window + 1:
        return attend_all(q_BHSK, k_BGTK, v_BGTK, backend=backend)
    if _flash_serves(backend, q_BHSK, key_mask_BT):
        return _flash(q_BHSK, k_BGTK, v_BGTK, window)
    return _sliced(q_BHSK, _expand(k_BGTK, q_BHSK), _expand(v_BGTK, q_BHSK), key_mask_BT, window, WINDOW_BLOCK)


def attend_all(
    q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, key_mask_BT: Tensor | None = None, *, backend: str
) -> Tensor:
    """Every query sees every unpadded key: the passes of one new token against all that came before -> [B, H, S, K].

    Heads that share keys are folded into query rows, so the keys are read once for all of them.
    """
    batch, heads, rows, size = q_BHSK.shape
    groups = k_BGTK.shape[1]
    mask = None if key_mask_BT is None else key_mask_BT[:, None, None, :]
    if backend == "eager":
        return _eager(
            q_BHSK, k_BGTK, v_BGTK, torch.ones((), dtype=torch.bool, device=q_BHSK.device) if mask is None else mask
        )
    folded = q_BHSK.reshape(batch, groups, heads // groups * rows, size)
    out = scaled_dot_product_attention(folded, k_BGTK, v_BGTK, attn_mask=mask)
    return out.reshape(batch, heads, rows, size)


def _flash_serves(backend: str, q_BHSK: Tensor, key_mask_BT: Tensor | None) -> bool:
    half = q_BHSK.dtype in (torch.float16, torch.bfloat16)
    return backend == "flash_attention_2" and key_mask_BT is None and half and q_BHSK.is_cuda


def _flash(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, window: int) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (q_BHSK, k_BGTK, v_BGTK))
    out: Tensor = flash_attn_func(q, k, v, causal=True, window_size=(window, 0 if window >= 0 else -1))
    return torch.transpose(out, 1, 2)


def _expand(x_BGTK: Tensor, q_BHSK: Tensor) -> Tensor:
    """Repeat key/value heads for the query heads that share them."""
    return x_BGTK.repeat_interleave(q_BHSK.shape[1] // x_BGTK.shape[1], dim=1)


def _mask(
    first: int,
    queries: int,
    offset: int,
    key_start: int,
    key_stop: int,
    window: int | None,
    key_mask_BT: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Who sees whom, for queries first..first+queries (at positions + offset) and keys key_start..key_stop."""
    i = torch.arange(first + offset, first + offset + queries, device=device)[:, None]
    j = torch.arange(key_start, key_stop, device=device)[None, :]
    seen = j <= i
    if window is not None:
        seen = seen & (j >= i - window)
    if key_mask_BT is None:
        return seen[None, None]
    real = key_mask_BT[:, None, key_start:key_stop]
    return ((seen & real) | (i == j))[:, None]


def _sliced(
    q_BHSK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, key_mask_BT: Tensor | None, window: int | None, block: int
) -> Tensor:
    """Attention slice by slice of queries, each against the keys that it may see at all."""
    queries, offset = q_BHSK.shape[2], k_BHTK.shape[2] - q_BHSK.shape[2]
    out = []
    for first in range(0, queries, block):
        count = min(block, queries - first)
        stop = first + count + offset
        start = 0 if window is None else max(0, first + offset - window)
        mask = _mask(first, count, offset, start, stop, window, key_mask_BT, q_BHSK.device)
        q, k, v = q_BHSK[:, :, first : first + count], k_BHTK[:, :, start:stop], v_BHTK[:, :, start:stop]
        out.append(scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def _eager(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask: Tensor) -> Tensor:
    """The reference: every score written out, softmax in at least float32."""
    wide = torch.promote_types(q_BHSK.dtype, torch.float32)
    k_BHTK, v_BHTK = _expand(k_BGTK, q_BHSK), _expand(v_BGTK, q_BHSK)
    scores = (q_BHSK @ k_BHTK.transpose(-1, -2)).to(wide) * q_BHSK.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    mixed: Tensor = weights.to(q_BHSK.dtype) @ v_BHTK
    return mixed
