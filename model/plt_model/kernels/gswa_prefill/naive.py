"""Gated sliding-window attention (G-SWA) written out: the truth that the kernels are tested against.

    B batch   H query heads   G key/value heads (H a multiple of G)   S queries, the last S of T positions
    U positions of a pass's own keys (S <= U <= T, the last U)        K head size       w window

Every score is held in memory, so this is for small sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gswa(
    q_BHSK: Tensor,
    shared_k_BGTK: Tensor,
    shared_v_BGTK: Tensor,
    own_k_BGUK: Tensor,
    own_v_BGUK: Tensor,
    gate_BHS: Tensor,
    *,
    window: int,
    key_mask_BT: Tensor | None = None,
) -> Tensor:
    """y = g * softmax(q k^T / sqrt(K)) v over all positions up to the query's (shared k, v)
    + (1 - g) * the same over the query's own and the `window` positions before it (own k, v) -> [B, H, S, K].

    `key_mask_BT` is False at padding, which no other position may see; a padded query sees itself. Computed in float32
    or wider throughout, and rounded to q's type at the end.
    """
    own_mask = None if key_mask_BT is None else key_mask_BT[:, -own_k_BGUK.shape[2] :]
    global_ = _attention(q_BHSK, shared_k_BGTK, shared_v_BGTK, None, key_mask_BT)
    local = _attention(q_BHSK, own_k_BGUK, own_v_BGUK, window, own_mask)
    g = gate_BHS[..., None].to(global_.dtype)
    return (g * global_ + (1 - g) * local).to(q_BHSK.dtype)


def causal(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, *, key_mask_BT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over all positions up to the query's -> [B, H, S, K], masks as :func:`gswa`."""
    return _attention(q_BHSK, k_BGTK, v_BGTK, None, key_mask_BT).to(q_BHSK.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, key_mask: Tensor | None) -> Tensor:
    """One softmax attention of the last S of k's positions, in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    shared_by, offset = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = (x.to(wide).repeat_interleave(shared_by, dim=1) for x in (k, v))
    i = torch.arange(offset, k.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    seen = j <= i if window is None else (j <= i) & (j >= i - window)
    if key_mask is not None:
        seen = (seen & key_mask[:, None, None, :]) | (i == j)
    scores = (q.to(wide) @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    out: Tensor = exponentials / exponentials.sum(-1, keepdim=True) @ v
    return out
