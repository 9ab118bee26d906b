"""Fused gated sliding-window attention (G-SWA) over many queries, forward and backward: prompts and training.

    from plt_model.kernels.gswa_prefill import causal, gswa
    y = gswa(q, shared_k, shared_v, own_k, own_v, gate, window=64)     # a later pass
    y = causal(q, k, v)                                                # pass 0

One forward kernel reads a block of queries once, runs the global and the local branch over it and writes their gated
mix. The local branch visits only the keys in reach, forward and backward, so it costs O(S * w); no score ever leaves
the chip. Gradients are summed in a fixed order: the same inputs give the same bits. `naive.py` is the definition.
"""

from __future__ import annotations

import importlib
from types import ModuleType

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
    """As :func:`plt_model.kernels.gswa_prefill.naive.gswa`, in one kernel -> [B, H, S, K]; differentiable in q, both
    pairs of keys and values, and the gate.

    q, keys and values share a type (float32, float16 or bfloat16; sums are float32) and may be views, transposed ones
    say; so may the gate, of any of these types. The S queries are the last S of T positions, own keys are of the last
    U, S <= U <= T. Memory beside the result: the gradient needs one more tensor of the result's size (what the two
    branches differ by) and 2 floats a query and head.

    Raises KernelUnavailable (a ValueError) without triton or off CUDA, ValueError for shapes and types that do not fit.
    """
    kernel = _kernel(q_BHSK)
    y: Tensor = kernel.attend(
        q_BHSK, shared_k_BGTK, shared_v_BGTK, own_k_BGUK, own_v_BGUK, gate_BHS, key_mask_BT, window=window
    )
    return y


def causal(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, *, key_mask_BT: Tensor | None = None) -> Tensor:
    """The global branch alone, as :func:`plt_model.kernels.gswa_prefill.naive.causal` -> [B, H, S, K].

    Types, views, gradients and errors as :func:`gswa`.
    """
    y: Tensor = _kernel(q_BHSK).attend(q_BHSK, k_BGTK, v_BGTK, None, None, None, key_mask_BT, window=0)
    return y


def _kernel(q_BHSK: Tensor) -> ModuleType:
    from .. import require_triton

    require_triton(q_BHSK.device)
    return importlib.import_module(f"{__name__}.triton_kernel")
