"""The attention of one decode step, all passes of every slot at once, in two kernel launches.

    y = gswa_decode(q, keys, values, ring_keys, ring_values, gate, lengths)

    N slots   R passes   H query heads   G key/value heads   K head size   T capacity   w window   r = R - 1

Row 0 of a slot is pass 0: plain attention to the shared cache. Row i >= 1 is pass i: g * global + (1 - g) * local,
global being the same attention to the shared cache, local the attention to the ring of pass i. The shared keys and
values of a slot and group are read once for all R * H / G rows that want them. `naive.gswa_decode` says the same in
plain torch and is the truth; `triton_kernel` holds the kernels and is imported by the first call, never before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import require_triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
MOST_ROWS = 128
"""Rows (R * H / G) that one program holds in its registers."""


def why_not(q_NRHK: Tensor, keys_NGTK: Tensor) -> str | None:
    """What about these inputs the kernel cannot serve, in a few words; None when it can serve them."""
    rows = q_NRHK.shape[1] * q_NRHK.shape[2] // keys_NGTK.shape[1]
    if q_NRHK.dtype not in DTYPES:
        return f"{q_NRHK.dtype} (it takes float32, float16 and bfloat16)"
    if q_NRHK.shape[3] > LARGEST_HEAD:
        return f"heads of {q_NRHK.shape[3]} (it takes up to {LARGEST_HEAD})"
    if rows > MOST_ROWS:
        return f"{rows} rows a key/value head (it takes up to {MOST_ROWS})"
    return None


def gswa_decode(
    q_NRHK: Tensor,
    keys_NGTK: Tensor,
    values_NGTK: Tensor,
    ring_keys_NrGwK: Tensor | None,
    ring_values_NrGwK: Tensor | None,
    gate_NrH: Tensor | None,
    lengths_N: Tensor,
) -> Tensor:
    """The mixed heads of one new token's R passes -> y [N, R, H, K], of q's type.

    lengths: tokens in each slot, the new one included (its keys and values are already written); places of the cache
    from there on are never read. Entry j of a ring counts where j < min(length, w + 1). Without rings (R = 1, or no
    local branch) every row is the plain attention. A slot of length 0 gives zeros. Any strides; computed in float32.

    Nothing is read back from the device and what is launched depends on shapes alone, so that a CUDA graph can hold
    the call. The rounding depends on how many slots run at once (the keys are split to fill the device), the result
    otherwise does not. Raises ValueError for shapes that contradict one another and for what `why_not` names,
    KernelUnavailable (a ValueError) without triton or off CUDA.
    """
    _check(q_NRHK, keys_NGTK, values_NGTK, ring_keys_NrGwK, ring_values_NrGwK, gate_NrH, lengths_N)
    y: Tensor = torch.ops.plt_model.gswa_decode(
        q_NRHK, keys_NGTK, values_NGTK, ring_keys_NrGwK, ring_values_NrGwK, gate_NrH, lengths_N
    )
    return y


def _check(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor | None, ring_v: Tensor | None, gate: Tensor | None, lengths: Tensor
) -> None:
    slots, loops, heads, size = q.shape
    groups = k.shape[1]
    if k.shape != v.shape or k.shape[0] != slots or k.shape[3] != size or heads % groups:
        raise ValueError(
            f"keys {list(k.shape)} and values {list(v.shape)} do not fit queries {list(q.shape)}: "
            "expected [N, G, T, K] twice for [N, R, H, K], H a multiple of G"
        )
    if lengths.shape != (slots,):
        raise ValueError(f"lengths has shape {list(lengths.shape)}: expected [{slots}]")
    parts = (ring_k, ring_v, gate)
    if any(part is None for part in parts) != all(part is None for part in parts):
        raise ValueError("ring_keys, ring_values and gate go together: give all three or none")
    if ring_k is not None and ring_v is not None and gate is not None:
        ring = (slots, loops - 1, groups, ring_k.shape[-2], size)
        if loops < 2 or ring_k.shape != ring or ring_v.shape != ring or gate.shape != (slots, loops - 1, heads):
            raise ValueError(
                f"ring_keys {list(ring_k.shape)}, ring_values {list(ring_v.shape)} and gate {list(gate.shape)} do not "
                f"fit queries {list(q.shape)} and keys {list(k.shape)}: expected [N, R-1, G, w+1, K] twice, [N, R-1, H]"
            )
    reason = why_not(q, k)
    if reason is not None:
        raise ValueError(f"the decode kernel does not take {reason}")


@torch.library.custom_op("plt_model::gswa_decode", mutates_args=())
def _gswa_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    gate: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    require_triton(q.device)
    from .triton_kernel import launch

    return launch(q, keys, values, ring_keys, ring_values, gate, lengths)


@_gswa_decode.register_fake
def _(q: Tensor, *_: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


__all__ = ["gswa_decode", "why_not"]
