"""The two attentions of a PLT: causal over everything, and causal over a window.

    B batch   H query heads   G key/value heads (H a multiple of G)   S queries   T keys   K head size

In both the S queries are the last S of the T positions. The backends say the same thing:

    eager               writes the whole softmax out in float32 (or wider): the truth the others are tested against
    sdpa                torch's fused kernels on slices: no S x S mask is ever built, and the window costs O(S * w)
    flash_attention_2   calls the flash-attn package
    flex_attention      torch's FlexAttention, compiled, with block masks
    triton              plt_model.kernels: both attentions and their gated mix in one kernel, see `gated_attention`

:func:`chosen` picks one. Where one cannot serve some inputs (a type, padding, one new token against a cache), `sdpa`
does for these.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = ("eager", "sdpa", "flash_attention_2", "flex_attention", "triton")

HALF = (torch.float16, torch.bfloat16)
KERNEL_TYPES = (*HALF, torch.float32)

CAUSAL_BLOCK = 512
"""Queries per slice where causal attention needs a mask: it holds CAUSAL_BLOCK x T booleans at most (of 256 to 2048,
512 and 1024 measured the fastest on CPU)."""

WINDOW_BLOCK = 128
"""Queries per slice of window attention: each reads 128 + w keys (of 64 to 1024, 64 and 128 measured the fastest on
CPU: 27 ms against 99 ms for 1024 at S = 2048, H = 8, K = 64, w = 64)."""


def chosen(name: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend for `name`, one of BACKENDS or "auto", and why, in a few words.

    auto: on a GPU the Triton kernels, else flash-attn, else sdpa; on a CPU sdpa. Raises ValueError for a name that is
    none, and for one that cannot be had on this device or in this type, saying what is missing.
    """
    device = torch.device(device)
    if name == "auto":
        for backend in ("triton", "flash_attention_2") if device.type == "cuda" else ():
            if _missing(backend, device, dtype) is None:
                return backend, "the fastest that this device and type allow"
        return "sdpa", "the fastest that this device and type allow"
    if name not in BACKENDS:
        raise ValueError(f"{name!r} is no attention of a PLT: expected auto or one of {', '.join(BACKENDS)}")
    missing = _missing(name, device, dtype)
    if missing is not None:
        raise ValueError(f"{name} cannot be had: {missing}")
    return name, "as asked for"


def _missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What `name` lacks here; None where it runs."""
    if name == "flash_attention_2":
        if find_spec("flash_attn") is None:
            return "the package flash_attn is not installed"
        if device.type != "cuda" or dtype not in HALF:
            return f"it takes float16 and bfloat16 on a GPU, not {_short(dtype)} on {device.type!r}"
    if name == "flex_attention":
        return _no_compiler(device)
    if name == "triton":
        if dtype not in KERNEL_TYPES:
            return f"it takes float32, float16 and bfloat16, not {_short(dtype)}"
        if find_spec("plt_model") is None:
            return "its kernels are in the package plt_model, which is not installed"
        from plt_model.kernels import KernelUnavailable, require_triton

        try:
            require_triton(device)
        except KernelUnavailable as unavailable:
            return str(unavailable)
    return None


def _no_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks here."""
    if device.type == "cuda":
        return None if find_spec("triton") else "it is compiled with the package triton, which is not installed"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "it is compiled, and there is no C++ compiler here"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gated_attention(
    q_BHSK: Tensor,
    shared: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    gate_BHS: Tensor,
    key_mask_BT: Tensor | None = None,
    *,
    window: int,
    backend: str,
) -> Tensor:
    """g * causal_attention(q, shared) + (1 - g) * window_attention(q, own) -> [B, H, S, K], in one kernel where the
    backend has one: `triton`, for all types but float64 and heads up to 256."""
    if _triton_serves(backend, q_BHSK):
        from plt_model.kernels.gswa_prefill import gswa

        q, k, v, own_k, own_v = _as_autocast(q_BHSK, *shared, *own)
        return gswa(q, k, v, own_k, own_v, gate_BHS, window=window, key_mask_BT=key_mask_BT)
    global_ = causal_attention(q_BHSK, *shared, key_mask_BT, backend=backend)
    own_mask = None if key_mask_BT is None else key_mask_BT[:, -own[0].shape[2] :]
    local = window_attention(q_BHSK, *own, own_mask, window=window, backend=backend)
    return mixed(gate_BHS, global_, local)


def mixed(gate_BHS: Tensor, global_BHSK: Tensor, local_BHSK: Tensor) -> Tensor:
    """g * global + (1 - g) * local."""
    g = gate_BHS[..., None]
    return g * global_BHSK + (1 - g) * local_BHSK


def causal_attention(
    q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, key_mask_BT: Tensor | None = None, *, backend: str
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with every query seeing itself and all positions before it -> [B, H, S, K].

    `key_mask_BT` is False at padding, which no other position may see (a padded query still sees itself, so that its
    unused result is finite).
    """
    q_BHSK, k_BGTK, v_BGTK = _as_autocast(q_BHSK, k_BGTK, v_BGTK)
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
    if _triton_serves(backend, q_BHSK):
        from plt_model.kernels.gswa_prefill import causal

        return causal(q_BHSK, k_BGTK, v_BGTK, key_mask_BT=key_mask_BT)
    if _flex_serves(backend, q_BHSK, key_mask_BT):
        return _flex(q_BHSK, k_BGTK, v_BGTK, key_mask_BT, None)
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
    q_BHSK, k_BGTK, v_BGTK = _as_autocast(q_BHSK, k_BGTK, v_BGTK)
    queries, keys = q_BHSK.shape[2], k_BGTK.shape[2]
    if backend == "eager":
        mask = _mask(0, queries, keys - queries, 0, keys, window, key_mask_BT, q_BHSK.device)
        return _eager(q_BHSK, k_BGTK, v_BGTK, mask)
    if key_mask_BT is None and queries == 1 and keys <= window + 1:
        return attend_all(q_BHSK, k_BGTK, v_BGTK, backend=backend)
    if _flex_serves(backend, q_BHSK, key_mask_BT):
        return _flex(q_BHSK, k_BGTK, v_BGTK, key_mask_BT, window)
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


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the type that autocast computes in, where it is on: queries and keys come out of their rotation in
    float32, values do not, and kernels take one type."""
    device = tensors[0].device.type
    if (
        not torch.amp.is_autocast_available(device)
        or not torch.is_autocast_enabled(device)
        or tensors[0].dtype == torch.float64
    ):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _triton_serves(backend: str, q_BHSK: Tensor) -> bool:
    return backend == "triton" and q_BHSK.dtype in KERNEL_TYPES and q_BHSK.shape[3] <= 256


def _flex_serves(backend: str, q_BHSK: Tensor, key_mask_BT: Tensor | None) -> bool:
    """One query alone is quicker without. On a CPU FlexAttention has no backward pass, and the C++ that torch 2.13
    writes for padding of varying lengths does not compile; on a GPU it takes no float64 and no heads below 16."""
    if backend != "flex_attention" or q_BHSK.shape[2] == 1:
        return False
    if q_BHSK.is_cuda:
        return q_BHSK.dtype in KERNEL_TYPES and q_BHSK.shape[3] >= 16
    return key_mask_BT is None and not (torch.is_grad_enabled() and q_BHSK.requires_grad)


def _flex(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, key_mask_BT: Tensor | None, window: int | None) -> Tensor:
    from .attention_flex import attend

    return attend(q_BHSK, k_BGTK, v_BGTK, key_mask_BT, window=window)


def _flash_serves(backend: str, q_BHSK: Tensor, key_mask_BT: Tensor | None) -> bool:
    return backend == "flash_attention_2" and key_mask_BT is None and q_BHSK.dtype in HALF and q_BHSK.is_cuda


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
