"""The decode step's attention in plain torch, written to be read: the truth that the kernel is tested against.

N slots   R passes   H query heads   G key/value heads   K head size   T capacity   w window   r = R - 1
"""

from __future__ import annotations

import torch
from torch import Tensor


def gswa_decode(
    q_NRHK: Tensor,
    keys_NGTK: Tensor,
    values_NGTK: Tensor,
    ring_keys_NrGwK: Tensor | None,
    ring_values_NrGwK: Tensor | None,
    gate_NrH: Tensor | None,
    lengths_N: Tensor,
) -> Tensor:
    """As the kernel of the same name, slot by slot, in at least float32 -> y [N, R, H, K] of q's type."""
    wide = torch.promote_types(q_NRHK.dtype, torch.float32)
    y = torch.zeros(q_NRHK.shape, dtype=wide, device=q_NRHK.device)
    for n, length in enumerate(lengths_N.tolist()):
        if not length:
            continue
        q = q_NRHK[n].to(wide)
        y[n] = _attend(q, keys_NGTK[n, :, :length].to(wide), values_NGTK[n, :, :length].to(wide))
        if ring_keys_NrGwK is None or ring_values_NrGwK is None or gate_NrH is None:
            continue
        for i in range(1, q.shape[0]):
            ring_k, ring_v = (ring[n, i - 1, :, :length].to(wide) for ring in (ring_keys_NrGwK, ring_values_NrGwK))
            g = gate_NrH[n, i - 1].to(wide)[:, None]
            y[n, i] = g * y[n, i] + (1 - g) * _attend(q[i : i + 1], ring_k, ring_v)[0]
    return y.to(q_NRHK.dtype)


def _attend(q_RHK: Tensor, k_GTK: Tensor, v_GTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, every row against every key -> [R, H, K]."""
    heads = q_RHK.shape[1] // k_GTK.shape[0]
    k_HTK, v_HTK = k_GTK.repeat_interleave(heads, dim=0), v_GTK.repeat_interleave(heads, dim=0)
    scores = torch.einsum("rhk,htk->rht", q_RHK, k_HTK) * q_RHK.shape[-1] ** -0.5
    return torch.einsum("rht,htk->rhk", scores.softmax(dim=-1), v_HTK)
