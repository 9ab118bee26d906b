"""The Triton kernels of gated sliding-window attention, and the autograd function that launches them.

    forward_kernel             a block of queries: global branch, local branch, gate, mix
    dots_kernel                per query and head, dy . y_branch for both branches, and the gate's gradient
    query_gradient_kernel      a block of queries, against both branches' keys
    key_gradient_kernel        a block of one branch's keys and values, against all queries that see them

With p the softmax of a branch, w its share of the mix (g or 1 - g) and y_branch = p v:
dv = (w p)^T dy, ds = w p * (dy v^T - dy . y_branch), dq = ds k / sqrt(K), dk = ds^T q / sqrt(K), dg = dy . (y_global -
y_local). Saved for this: y, the difference of the branches (y_global = y + (1 - g) difference, y_local = y - g
difference) and the log-sum-exp of each row. Every sum is one program's, in a fixed order.

Names follow the package (B, H, G, S, T, U, K); inside kernels, rows are queries and columns are keys, and a key's
number i is a query's position when i = s + N - S, N being the number of keys of the branch. Log-sum-exps are in base
2. PADDED: there is a key mask. DOT: the type that products multiply in. K is padded to KP, a power of two.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = 1.4426950408889634
MAX_HEAD_SIZE = 256
DOTS_ROWS = 64
"""Queries per program of dots_kernel, which only reads and adds."""

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _load(pointer, stride, rows, count, K: tl.constexpr, KP: tl.constexpr, CHECKED: tl.constexpr):
    """[rows, KP]: rows of K numbers; zeros beyond K and, where CHECKED, at rows from `count` on."""
    dims = tl.arange(0, KP)
    at = pointer + rows[:, None].to(tl.int64) * stride + dims[None, :]
    if K != KP:
        if CHECKED:
            x = tl.load(at, mask=(rows[:, None] < count) & (dims[None, :] < K), other=0.0)
        else:
            x = tl.load(at, mask=dims[None, :] < K, other=0.0)
    elif CHECKED:
        x = tl.load(at, mask=rows[:, None] < count, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _store(pointer, stride, rows, count, x, K: tl.constexpr, KP: tl.constexpr):
    dims = tl.arange(0, KP)
    at = pointer + rows[:, None].to(tl.int64) * stride + dims[None, :]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=(rows[:, None] < count) & (dims[None, :] < K))


@triton.jit
def _seen(i, j, real, window, WINDOWED: tl.constexpr, PADDED: tl.constexpr):
    """Does the query at i see the key at j? `real`: j is no padding. (Both broadcast against each other.)"""
    seen = j <= i
    if WINDOWED:
        seen = seen & (j >= i - window)
    if PADDED:
        seen = seen & (real | (i == j))
    return seen


@triton.jit
def _softmax_over(
    q, mixed, top, total, k, v, k_stride, v_stride, key_mask, rows, start, stop, keys, window, scale,
    K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with an online softmax over keys start..stop: `mixed` (of values) and `total` are sums under `top`."""
    for first in tl.range(start, stop, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        keys_block = _load(k, k_stride, columns, keys, K, KP, CHECKED).to(DOT)
        scores = tl.dot(q, tl.trans(keys_block), input_precision=PRECISION)
        if CHECKED:
            real = 1
            if PADDED:
                real = (tl.load(key_mask + columns, mask=columns < keys, other=0) != 0)[None, :]
            seen = _seen(rows[:, None], columns[None, :], real, window, WINDOWED, PADDED)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        values_block = _load(v, v_stride, columns, keys, K, KP, CHECKED).to(DOT)
        mixed = tl.dot(weights.to(DOT), values_block, mixed * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
    return mixed, top, total


@triton.jit
def _normalised(mixed, top, total):
    """A finished softmax -> its result and log-sum-exp. (Rows past the last query may have seen nothing.)"""
    total = tl.where(total > 0, total, 1.0)
    return mixed / total[:, None], top + tl.log2(total)


@triton.jit
def _first_reached(first_row, keys, S, window):
    """The first key in reach of the window of query `first_row`."""
    return tl.maximum(0, first_row + keys - S - window)


@triton.jit(do_not_specialize=["S", "T", "U", "window"])
def forward_kernel(
    q, k, v, own_k, own_v, gate, key_mask, y, difference, lse, own_lse,
    q_strides, k_strides, v_strides, own_k_strides, own_v_strides, gate_strides, mask_stride, y_strides,
    S, T, U, window, scale,
    SHARED_BY: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LOCAL: tl.constexpr, PADDED: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the last queries have most to read: they go first
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // SHARED_BY
    rows = first_row + tl.arange(0, ROWS)
    at_stat = (batch * tl.num_programs(1) + head) * S + rows
    q_block = _load(q + batch * q_strides[0] + head.to(tl.int64) * q_strides[1], q_strides[2], rows, S, K, KP, True)
    q_block = q_block.to(DOT)
    if PADDED:
        key_mask += batch * mask_stride

    k += batch * k_strides[0] + group.to(tl.int64) * k_strides[1]
    v += batch * v_strides[0] + group.to(tl.int64) * v_strides[1]
    mixed = tl.zeros((ROWS, KP), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    stop = tl.minimum(T, first_row + ROWS + T - S)
    checked = 0
    if not PADDED:
        checked = (first_row + T - S + 1) // COLUMNS * COLUMNS  # every query of the block sees all keys before this one
        mixed, top, total = _softmax_over(
            q_block, mixed, top, total, k, v, k_strides[2], v_strides[2], key_mask, rows + (T - S), 0, checked, T,
            window, scale, K, KP, COLUMNS, False, False, False, DOT, PRECISION,
        )  # fmt: skip
    mixed, top, total = _softmax_over(
        q_block, mixed, top, total, k, v, k_strides[2], v_strides[2], key_mask, rows + (T - S), checked, stop, T,
        window, scale, K, KP, COLUMNS, True, False, PADDED, DOT, PRECISION,
    )  # fmt: skip
    mixed, row_lse = _normalised(mixed, top, total)
    if SAVE:
        tl.store(lse + at_stat, row_lse, mask=rows < S)

    if LOCAL:
        own_k += batch * own_k_strides[0] + group.to(tl.int64) * own_k_strides[1]
        own_v += batch * own_v_strides[0] + group.to(tl.int64) * own_v_strides[1]
        if PADDED:
            key_mask += T - U
        own = tl.zeros((ROWS, KP), tl.float32)
        top = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        start, stop = _first_reached(first_row, U, S, window), tl.minimum(U, first_row + ROWS + U - S)
        own, top, total = _softmax_over(
            q_block, own, top, total, own_k, own_v, own_k_strides[2], own_v_strides[2], key_mask, rows + (U - S),
            start, stop, U, window, scale, K, KP, COLUMNS, True, True, PADDED, DOT, PRECISION,
        )  # fmt: skip
        own, row_lse = _normalised(own, top, total)
        at_gate = gate + batch * gate_strides[0] + head.to(tl.int64) * gate_strides[1] + rows * gate_strides[2]
        g = tl.load(at_gate, mask=rows < S, other=0.0).to(tl.float32)[:, None]
        apart = mixed - own
        mixed = own + g * apart
        if SAVE:
            tl.store(own_lse + at_stat, row_lse, mask=rows < S)
            at_y = batch * y_strides[0] + head.to(tl.int64) * y_strides[1]
            _store(difference + at_y, y_strides[2], rows, S, apart, K, KP)
    _store(y + batch * y_strides[0] + head.to(tl.int64) * y_strides[1], y_strides[2], rows, S, mixed, K, KP)


@triton.jit(do_not_specialize=["S"])
def dots_kernel(
    dy, y, difference, gate, dots, own_dots, d_gate, dy_strides, y_strides, gate_strides, S,
    K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    at_stat = (batch * tl.num_programs(1) + head) * S + rows
    dy_block = _load(dy + batch * dy_strides[0] + head * dy_strides[1], dy_strides[2], rows, S, K, KP, True)
    dy_block = dy_block.to(tl.float32)
    at_y = batch * y_strides[0] + head * y_strides[1]
    dot = tl.sum(dy_block * _load(y + at_y, y_strides[2], rows, S, K, KP, True).to(tl.float32), 1)
    if LOCAL:
        apart = _load(difference + at_y, y_strides[2], rows, S, K, KP, True).to(tl.float32)
        dot_apart = tl.sum(dy_block * apart, 1)
        at_gate = gate + batch * gate_strides[0] + head * gate_strides[1] + rows * gate_strides[2]
        g = tl.load(at_gate, mask=rows < S, other=0.0).to(tl.float32)
        tl.store(own_dots + at_stat, dot - g * dot_apart, mask=rows < S)
        tl.store(d_gate + at_stat, dot_apart.to(d_gate.dtype.element_ty), mask=rows < S)
        dot += (1 - g) * dot_apart
    tl.store(dots + at_stat, dot, mask=rows < S)


@triton.jit
def _query_gradient_over(
    dq, q, dy, share, lse, dots, k, v, k_stride, v_stride, key_mask, rows, start, stop, keys, window, scale,
    K: tl.constexpr, KP: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, still to be divided by sqrt(K), and what keys start..stop add to it."""
    for first in tl.range(start, stop, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        keys_block = _load(k, k_stride, columns, keys, K, KP, CHECKED).to(DOT)
        values_block = _load(v, v_stride, columns, keys, K, KP, CHECKED).to(DOT)
        scores = tl.dot(q, tl.trans(keys_block), input_precision=PRECISION)
        if CHECKED:
            real = 1
            if PADDED:
                real = (tl.load(key_mask + columns, mask=columns < keys, other=0) != 0)[None, :]
            seen = _seen(rows[:, None], columns[None, :], real, window, WINDOWED, PADDED)
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores * scale - lse[:, None]) * share[:, None]
        d_weights = tl.dot(dy, tl.trans(values_block), input_precision=PRECISION)
        d_scores = weights * (d_weights - dots[:, None])
        dq = tl.dot(d_scores.to(DOT), keys_block, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["S", "T", "U", "window"])
def query_gradient_kernel(
    q, k, v, own_k, own_v, gate, key_mask, dy, lse, own_lse, dots, own_dots, dq,
    q_strides, k_strides, v_strides, own_k_strides, own_v_strides, gate_strides, mask_stride, dy_strides, dq_strides,
    S, T, U, window, scale, softmax_scale,
    SHARED_BY: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    LOCAL: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = head // SHARED_BY
    rows = first_row + tl.arange(0, ROWS)
    at_stat = (batch * tl.num_programs(1) + head) * S + rows
    q_block = _load(q + batch * q_strides[0] + head * q_strides[1], q_strides[2], rows, S, K, KP, True).to(DOT)
    dy_block = _load(dy + batch * dy_strides[0] + head * dy_strides[1], dy_strides[2], rows, S, K, KP, True).to(DOT)
    share = tl.full((ROWS,), 1.0, tl.float32)
    if LOCAL:
        at_gate = gate + batch * gate_strides[0] + head * gate_strides[1] + rows * gate_strides[2]
        share = tl.load(at_gate, mask=rows < S, other=0.0).to(tl.float32)
    if PADDED:
        key_mask += batch * mask_stride

    k += batch * k_strides[0] + group * k_strides[1]
    v += batch * v_strides[0] + group * v_strides[1]
    row_lse = tl.load(lse + at_stat, mask=rows < S, other=float("inf"))
    row_dots = tl.load(dots + at_stat, mask=rows < S, other=0.0)
    dq_block = tl.zeros((ROWS, KP), tl.float32)
    stop = tl.minimum(T, first_row + ROWS + T - S)
    checked = 0
    if not PADDED:
        checked = (first_row + T - S + 1) // COLUMNS * COLUMNS
        dq_block = _query_gradient_over(
            dq_block, q_block, dy_block, share, row_lse, row_dots, k, v, k_strides[2], v_strides[2], key_mask,
            rows + (T - S), 0, checked, T, window, scale, K, KP, COLUMNS, False, False, False, DOT, PRECISION,
        )  # fmt: skip
    dq_block = _query_gradient_over(
        dq_block, q_block, dy_block, share, row_lse, row_dots, k, v, k_strides[2], v_strides[2], key_mask,
        rows + (T - S), checked, stop, T, window, scale, K, KP, COLUMNS, True, False, PADDED, DOT, PRECISION,
    )  # fmt: skip

    if LOCAL:
        own_k += batch * own_k_strides[0] + group * own_k_strides[1]
        own_v += batch * own_v_strides[0] + group * own_v_strides[1]
        row_lse = tl.load(own_lse + at_stat, mask=rows < S, other=float("inf"))
        row_dots = tl.load(own_dots + at_stat, mask=rows < S, other=0.0)
        if PADDED:
            key_mask += T - U
        start, stop = _first_reached(first_row, U, S, window), tl.minimum(U, first_row + ROWS + U - S)
        dq_block = _query_gradient_over(
            dq_block, q_block, dy_block, 1 - share, row_lse, row_dots, own_k, own_v, own_k_strides[2],
            own_v_strides[2], key_mask, rows + (U - S), start, stop, U, window, scale,
            K, KP, COLUMNS, True, True, PADDED, DOT, PRECISION,
        )  # fmt: skip
    _store(dq + batch * dq_strides[0] + head * dq_strides[1], dq_strides[2], rows, S, dq_block * softmax_scale, K, KP)


@triton.jit
def _key_gradient_over(
    dk, dv, q, dy, gate, lse, dots, k, v, real, q_stride, dy_stride, gate_stride, columns, start, stop, S, offset,
    window, scale,
    K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, CHECKED: tl.constexpr, GATED: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, still to be divided by sqrt(K), and dv, and what queries start..stop add. Scores are held as [keys, queries],
    so that no product needs one transposed."""
    for first in tl.range(start, stop, ROWS):
        rows = first + tl.arange(0, ROWS)
        q_block = _load(q, q_stride, rows, S, K, KP, True).to(DOT)
        dy_block = _load(dy, dy_stride, rows, S, K, KP, True).to(DOT)
        row_lse = tl.load(lse + rows, mask=rows < S, other=float("inf"))
        row_dots = tl.load(dots + rows, mask=rows < S, other=0.0)
        scores = tl.dot(k, tl.trans(q_block), input_precision=PRECISION)
        if CHECKED:
            seen = _seen((rows + offset)[None, :], columns[:, None], real, window, WINDOWED, PADDED)
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores * scale - row_lse[None, :])
        if GATED:
            share = tl.load(gate + rows * gate_stride, mask=rows < S, other=0.0).to(tl.float32)
            if WINDOWED:
                share = 1 - share
            weights = weights * share[None, :]
        dv = tl.dot(weights.to(DOT), dy_block, dv, input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(dy_block), input_precision=PRECISION)
        d_scores = weights * (d_weights - row_dots[None, :])
        dk = tl.dot(d_scores.to(DOT), q_block, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["S", "N", "window"])
def key_gradient_kernel(
    q, k, v, gate, key_mask, dy, lse, dots, dk, dv,
    q_strides, k_strides, v_strides, gate_strides, mask_stride, dy_strides, dk_strides, dv_strides,
    S, N, window, scale, softmax_scale,
    SHARED_BY: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GATED: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For N keys of one branch: the global one, or (WINDOWED) the local one."""
    first_column = tl.program_id(0) * COLUMNS  # the first keys are seen by most queries: they go first as it is
    group, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = first_column + tl.arange(0, COLUMNS)
    k_block = _load(k + batch * k_strides[0] + group * k_strides[1], k_strides[2], columns, N, K, KP, True).to(DOT)
    v_block = _load(v + batch * v_strides[0] + group * v_strides[1], v_strides[2], columns, N, K, KP, True).to(DOT)
    real = 1
    if PADDED:
        real = (tl.load(key_mask + batch * mask_stride + columns, mask=columns < N, other=0) != 0)[:, None]
    last_own = first_column + COLUMNS - 1 - (N - S)  # the query at the block's last key
    start, stop = tl.maximum(0, first_column - (N - S)), S
    if WINDOWED:
        stop = tl.minimum(S, last_own + window + 1)
    checked = stop  # from here on every query of the branch sees every key of the block
    if not WINDOWED and not PADDED:
        checked = tl.minimum(S, start + tl.cdiv(tl.maximum(0, last_own - start), ROWS) * ROWS)

    dk_block = tl.zeros((COLUMNS, KP), tl.float32)
    dv_block = tl.zeros((COLUMNS, KP), tl.float32)
    for head in range(group * SHARED_BY, (group + 1) * SHARED_BY):
        q_head = q + batch * q_strides[0] + head * q_strides[1]
        dy_head = dy + batch * dy_strides[0] + head * dy_strides[1]
        at_stat = (batch * (tl.num_programs(1) * SHARED_BY) + head) * S
        gate_head, gate_stride = gate, 0
        if GATED:
            gate_head, gate_stride = gate + batch * gate_strides[0] + head * gate_strides[1], gate_strides[2]
        dk_block, dv_block = _key_gradient_over(
            dk_block, dv_block, q_head, dy_head, gate_head, lse + at_stat, dots + at_stat, k_block, v_block, real,
            q_strides[2], dy_strides[2], gate_stride, columns, start, checked, S, N - S, window, scale,
            K, KP, ROWS, True, GATED, WINDOWED, PADDED, DOT, PRECISION,
        )  # fmt: skip
        if not WINDOWED and not PADDED:
            dk_block, dv_block = _key_gradient_over(
                dk_block, dv_block, q_head, dy_head, gate_head, lse + at_stat, dots + at_stat, k_block, v_block, real,
                q_strides[2], dy_strides[2], gate_stride, columns, checked, S, S, N - S, window, scale,
                K, KP, ROWS, False, GATED, False, False, DOT, PRECISION,
            )  # fmt: skip
    at_dk, at_dv = batch * dk_strides[0] + group * dk_strides[1], batch * dv_strides[0] + group * dv_strides[1]
    _store(dk + at_dk, dk_strides[2], columns, N, dk_block * softmax_scale, K, KP)
    _store(dv + at_dv, dv_strides[2], columns, N, dv_block, K, KP)


@dataclass(frozen=True)
class Tiles:
    """How one kernel cuts its work: queries and keys per step, and what a program gets."""

    rows: int
    columns: int
    warps: int
    stages: int


def tiles(kernel: str, padded_size: int, dtype: torch.dtype) -> Tiles:
    """The tiles of "forward", "query" or "key" for heads of `padded_size` numbers. Chosen for Hopper, so that operands
    fit its 227 KiB of shared memory and sums its registers."""
    if dtype == torch.float32:
        if padded_size > 128:
            return Tiles(16, 16, 4, 1)
        return Tiles(64, 32, 4, 2) if kernel == "forward" else Tiles(32, 32, 4, 2)
    if padded_size > 128:
        return {"forward": Tiles(64, 64, 8, 2), "query": Tiles(64, 32, 8, 2), "key": Tiles(32, 64, 8, 2)}[kernel]
    # With more rows or stages for "key", or half the warps, the sums no longer fit the registers.
    return {"forward": Tiles(128, 64, 8, 3), "query": Tiles(128, 64, 8, 2), "key": Tiles(32, 128, 8, 2)}[kernel]


@dataclass(frozen=True)
class _Inputs:
    """What one call reads; neither own keys and values nor a gate for the global branch alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    own_k: Tensor | None
    own_v: Tensor | None
    gate: Tensor | None
    key_mask: Tensor | None
    window: int

    def arguments(self) -> dict[str, Any]:
        """What the kernels over blocks of queries are given of it, by the names they have for it."""
        tensors = {name: getattr(self, name) for name in ("q", "k", "v", "own_k", "own_v", "gate")}
        return {
            **tensors,
            **{f"{name}_strides": _strides(x) for name, x in tensors.items()},
            **_mask_arguments(self.key_mask),
            "S": self.q.shape[2],
            "T": self.k.shape[2],
            "U": 0 if self.own_k is None else self.own_k.shape[2],
            "LOCAL": self.own_k is not None,
            **self.scores(),
        }

    def scores(self) -> dict[str, Any]:
        """What all kernels that compute scores are given."""
        return {
            "window": self.window,
            "scale": self.softmax_scale * LOG2_E,
            "SHARED_BY": self.q.shape[1] // self.k.shape[1],
            "DOT": _dot_type(self.q.dtype),
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        }

    @property
    def softmax_scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def heads(self) -> dict[str, int]:
        size = self.q.shape[-1]
        return {"K": size, "KP": max(16, triton.next_power_of_2(size))}

    def cut(self, kernel: str) -> dict[str, int]:
        """The kernel's tiles and what its programs get."""
        tile = tiles(kernel, self.heads()["KP"], self.q.dtype)
        return {
            **self.heads(),
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    """What products multiply in. The interpreter multiplies bfloat16 wrongly (as bits), and there gets float32."""
    if dtype == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of the first three axes; the last axis of what has four is contiguous."""
    return (0, 0, 0) if x is None else tuple(x.stride()[:3])


def _mask_arguments(key_mask: Tensor | None) -> dict[str, Any]:
    stride = 0 if key_mask is None else key_mask.stride(0)
    return {"key_mask": key_mask, "mask_stride": stride, "PADDED": key_mask is not None}


@dataclass(frozen=True)
class _Saved:
    """What the forward kernel leaves for the gradient beside y: the branches' difference [B, H, S, K], in y's layout,
    and the branches' log-sum-exps [B, H, S] in float32."""

    difference: Tensor | None = None
    lse: Tensor | None = None
    own_lse: Tensor | None = None


def _forward(x: _Inputs, *, save: bool) -> tuple[Tensor, _Saved]:
    y, saved = _empty_result(x.q), _Saved()
    if save:
        saved = _Saved(None, _empty_stat(x.q))
        if x.own_k is not None:
            saved = _Saved(_empty_result(x.q), saved.lse, _empty_stat(x.q))
    cut = x.cut("forward")
    forward_kernel[_query_grid(x.q, cut["ROWS"])](
        **x.arguments(), **cut, y=y, difference=saved.difference, lse=saved.lse, own_lse=saved.own_lse,
        y_strides=_strides(y), SAVE=save,
    )  # fmt: skip
    return y, saved


def _empty_result(q: Tensor) -> Tensor:
    """[B, H, S, K] that lies in memory as [B, S, H, K], which is how a model's next projection reads it."""
    batch, heads, queries, size = q.shape
    return q.new_empty((batch, queries, heads, size)).transpose(1, 2)


def _empty_stat(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _query_grid(q: Tensor, rows: int) -> tuple[int, int, int]:
    batch, heads, queries, _ = q.shape
    return triton.cdiv(queries, rows), heads, batch


class _Attention(torch.autograd.Function):
    """The forward kernel, and the others where gradients are asked for."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x = _Inputs(*inputs)
        tensors = inputs[:-1]
        y, saved = _forward(x, save=True)
        ctx.window = x.window
        ctx.save_for_backward(*tensors, y, saved.difference, saved.lse, saved.own_lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, y, difference, lse, own_lse = ctx.saved_tensors
        x, dy = _Inputs(*tensors, ctx.window), _last_axis_contiguous(dy)  # type: ignore[call-arg]
        needs = dict(zip(("q", "k", "v", "own_k", "own_v", "gate"), ctx.needs_input_grad, strict=False))
        d_q = d_k = d_v = d_own_k = d_own_v = None
        with _device_of(dy):
            dots, own_dots, d_gate = _dots(x, y, difference, dy)
            if needs["q"]:
                d_q = _query_gradient(x, dy, (lse, own_lse), (dots, own_dots))
            if needs["k"] or needs["v"]:
                d_k, d_v = _key_gradient(x, dy, lse, dots, own=False)
            if needs["own_k"] or needs["own_v"]:
                d_own_k, d_own_v = _key_gradient(x, dy, own_lse, own_dots, own=True)
        return d_q, d_k, d_v, d_own_k, d_own_v, d_gate, None, None


def _dots(x: _Inputs, y: Tensor, difference: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy . y_branch of the global and the local branch [B, H, S], and the gate's gradient."""
    dots, own_dots, d_gate = _empty_stat(x.q), None, None
    if x.gate is not None:
        own_dots, d_gate = _empty_stat(x.q), torch.empty(x.gate.shape, dtype=x.gate.dtype, device=x.gate.device)
    dots_kernel[_query_grid(x.q, DOTS_ROWS)](
        dy=dy, y=y, difference=difference, gate=x.gate, dots=dots, own_dots=own_dots, d_gate=d_gate,
        dy_strides=_strides(dy), y_strides=_strides(y), gate_strides=_strides(x.gate), S=x.q.shape[2],
        **x.heads(), ROWS=DOTS_ROWS, LOCAL=x.gate is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dots, own_dots, d_gate


def _query_gradient(
    x: _Inputs, dy: Tensor, lse: tuple[Tensor, Tensor | None], dots: tuple[Tensor, Tensor | None]
) -> Tensor:
    dq, cut = torch.empty_like(x.q), x.cut("query")
    query_gradient_kernel[_query_grid(x.q, cut["ROWS"])](
        **x.arguments(), **cut, dy=dy, lse=lse[0], own_lse=lse[1], dots=dots[0], own_dots=dots[1], dq=dq,
        dy_strides=_strides(dy), dq_strides=_strides(dq), softmax_scale=x.softmax_scale,
    )  # fmt: skip
    return dq


def _key_gradient(x: _Inputs, dy: Tensor, lse: Tensor, dots: Tensor | None, *, own: bool) -> tuple[Tensor, Tensor]:
    k, v = (x.own_k, x.own_v) if own else (x.k, x.v)
    assert k is not None
    assert v is not None
    batch, groups, keys, _ = k.shape
    dk, dv, cut = torch.empty_like(k), torch.empty_like(v), x.cut("key")
    key_gradient_kernel[triton.cdiv(keys, cut["COLUMNS"]), groups, batch](
        **x.scores(), **cut, **_mask_arguments(None if x.key_mask is None else x.key_mask[:, -keys:]),
        q=x.q, k=k, v=v, gate=x.gate, dy=dy, lse=lse, dots=dots, dk=dk, dv=dv,
        q_strides=_strides(x.q), k_strides=_strides(k), v_strides=_strides(v), gate_strides=_strides(x.gate),
        dy_strides=_strides(dy), dk_strides=_strides(dk), dv_strides=_strides(dv), S=x.q.shape[2], N=keys,
        softmax_scale=x.softmax_scale, GATED=x.gate is not None, WINDOWED=own,
    )  # fmt: skip
    return dk, dv


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own_k: Tensor | None,
    own_v: Tensor | None,
    gate: Tensor | None,
    key_mask: Tensor | None,
    *,
    window: int,
) -> Tensor:
    """G-SWA, or causal attention where own keys, own values and gate are None; shapes and errors: see the package."""
    _check(_Inputs(q, k, v, own_k, own_v, gate, key_mask, window))
    q, k, v = (_last_axis_contiguous(x) for x in (q, k, v))
    own_k, own_v = (None if x is None else _last_axis_contiguous(x) for x in (own_k, own_v))
    tensors = (q, k, v, own_k, own_v)
    mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    with _device_of(q):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, gate)):
            y: Tensor = _Attention.apply(*tensors, gate, mask, window)
            return y
        return _forward(_Inputs(q, k, v, own_k, own_v, gate, mask, window), save=False)[0]


def _last_axis_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _check(x: _Inputs) -> None:
    """ValueError for what the kernels would read wrongly."""
    if x.q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q is {x.q.dtype}: the kernels take float32, float16 and bfloat16")
    batch, heads, queries, size = x.q.shape
    groups, keys = x.k.shape[1:3]
    if size > MAX_HEAD_SIZE:
        raise ValueError(f"heads have size {size}: the kernels take at most {MAX_HEAD_SIZE}")
    if heads % groups:
        raise ValueError(f"q has {heads} heads: expected a multiple of k's {groups}")
    if not 1 <= queries <= keys:
        raise ValueError(f"q has {queries} queries: expected 1 to {keys}, the number of keys")
    key_shape = (batch, groups, keys, size)
    expected = {"k": key_shape, "v": key_shape, "key_mask": (batch, keys)}
    if x.own_k is not None:
        own_keys = x.own_k.shape[2]
        if x.window < 0 or not queries <= own_keys <= keys:
            raise ValueError(
                f"window is {x.window} and own_k has {own_keys} positions: expected at least 0, "
                f"and {queries} (the queries) to {keys} (all keys)"
            )
        own_shape = (batch, groups, own_keys, size)
        expected |= {"own_k": own_shape, "own_v": own_shape, "gate": (batch, heads, queries)}
    for name, shape in expected.items():
        _check_tensor(name, getattr(x, name), shape, x.q)


def _check_tensor(name: str, found: Tensor | None, shape: tuple[int, ...], q: Tensor) -> None:
    if found is None:
        return
    if tuple(found.shape) != shape:
        raise ValueError(f"{name} has shape {list(found.shape)}: expected {list(shape)}")
    if found.device != q.device:
        raise ValueError(f"{name} is on {found.device}: expected {q.device}, where q is")
    if name not in ("gate", "key_mask") and found.dtype != q.dtype:
        raise ValueError(f"{name} is {found.dtype}: expected {q.dtype}, as q is")
