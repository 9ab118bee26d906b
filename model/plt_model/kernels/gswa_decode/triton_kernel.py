"""gswa_decode in triton: one launch reads every key and value once, a second one puts the parts together.

Launch 1, a program for (part, group, slot): parts 0..P-1 each hold an equal share of the slot's length of the shared
cache, against the R * H / G rows of the group (passes and heads folded into the rows of the matrix product, which
wants 16); parts P.. are the rings, each against the H / G rows of its pass. Every part leaves its own softmax
average, and the logarithm of its sum, in float32. Launch 2, a program for (row, slot): averages the parts of the
shared cache by their sums, and mixes in the ring's.

P depends on shapes and on the device alone; the lengths are read on the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
_ROW_BYTES = 16384
"""Bytes of keys that a program reads at once; three times that of keys and of values are in flight."""
_PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True)
class Plan:
    """What of a launch is fixed by shapes: parts of the cache, rings, and the tile sizes."""

    splits: int
    rings: int
    rows: int
    heads_per_group: int
    size: int
    block_rows: int
    block_keys: int
    block_size: int
    warps: int
    stages: int


def plan(
    *,
    slots: int,
    loops: int,
    heads: int,
    groups: int,
    size: int,
    reach: int,
    rings: int,
    itemsize: int,
    processors: int,
) -> Plan:
    """How a call of these shapes is cut up, on a device of so many processors."""
    rows = loops * heads // groups
    block_size = max(16, triton.next_power_of_2(size))
    block_rows = max(16, triton.next_power_of_2(rows))
    block_keys = max(16, min(128, _ROW_BYTES // (block_size * itemsize)))
    if block_rows * block_size > 64 * 128:  # the running averages of all rows live in registers
        block_keys = min(block_keys, 32)
    wanted = min(_PROGRAMS_PER_PROCESSOR * processors // (max(slots, 1) * groups), -(-reach // block_keys), 128)
    splits = 1 << max(wanted, 1).bit_length() - 1  # the merge works on powers of two
    return Plan(
        splits=splits,
        rings=rings,
        rows=rows,
        heads_per_group=heads // groups,
        size=size,
        block_rows=block_rows,
        block_keys=block_keys,
        block_size=block_size,
        warps=4 if block_rows <= 64 else 8,
        stages=3,
    )


@triton.jit
def parts_kernel(
    q, keys, values, ring_keys, ring_values, lengths, averages, sums,
    q_n, q_r, q_h, q_k,
    k_n, k_g, k_t, k_k,
    v_n, v_g, v_t, v_k,
    rk_n, rk_r, rk_g, rk_t, rk_k,
    rv_n, rv_r, rv_g, rv_t, rv_k,
    l_n, reach, ring_reach, scale,
    SPLITS: tl.constexpr, RINGS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    part, group, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + slot * l_n).to(tl.int32)
    # Which rows, which keys: a share of the shared cache for all passes, or a whole ring for its own pass.
    first, stop, first_row, row_count = 0, tl.minimum(length, reach), 0, ROWS
    k_base, v_base, k_step, v_step = keys + slot * k_n + group * k_g, values + slot * v_n + group * v_g, k_t, v_t
    k_unit, v_unit = k_k, v_k
    if part < SPLITS:
        share = tl.cdiv(tl.cdiv(stop, SPLITS), BLOCK_KEYS) * BLOCK_KEYS
        first = part * share
        stop = tl.minimum(stop, first + share)
    elif RINGS > 0:
        ring = part - SPLITS
        k_base = ring_keys + slot * rk_n + ring * rk_r + group * rk_g
        v_base = ring_values + slot * rv_n + ring * rv_r + group * rv_g
        k_step, v_step, k_unit, v_unit = rk_t, rv_t, rk_k, rv_k
        stop = tl.minimum(length, ring_reach)
        first_row, row_count = (ring + 1) * HEADS, HEADS

    row, size = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_SIZE)
    of_pass, of_head = (first_row + row) // HEADS, group * HEADS + (first_row + row) % HEADS
    row_ok, size_ok = row < row_count, size < SIZE
    q_at = q + slot * q_n + of_pass[:, None] * q_r + of_head[:, None] * q_h + size[None, :] * q_k
    x = tl.load(q_at, mask=row_ok[:, None] & size_ok[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    average = tl.zeros([BLOCK_ROWS, BLOCK_SIZE], tl.float32)
    for begin in range(first, stop, BLOCK_KEYS):
        place = begin + tl.arange(0, BLOCK_KEYS)
        seen = place < stop
        ok = seen[:, None] & size_ok[None, :]
        far = place.to(tl.int64)
        k = tl.load(k_base + far[:, None] * k_step + size[None, :] * k_unit, mask=ok, other=0.0)
        v = tl.load(v_base + far[:, None] * v_step + size[None, :] * v_unit, mask=ok, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * fade + tl.sum(weights, 1)
        average = average * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher

    # A part without a key has a sum of zero, whose logarithm is -inf, and an average of zero.
    out_row = ((slot * tl.num_programs(1) + group) * (SPLITS + RINGS) + part) * ROWS + row
    some = tl.where(total > 0, total, 1.0)
    tl.store(sums + out_row, tl.where(total > 0, top + tl.log2(some), float("-inf")), mask=row_ok)
    average_at = averages + out_row[:, None] * SIZE + size[None, :]
    tl.store(average_at, average / some[:, None], mask=row_ok[:, None] & size_ok[None, :])


@triton.jit
def merge_kernel(
    averages, sums, gate, lengths, y, g_n, g_r, g_h, l_n, groups,
    SPLITS: tl.constexpr, RINGS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row, group, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    part, size = tl.arange(0, SPLITS), tl.arange(0, BLOCK_SIZE)
    size_ok = size < SIZE
    start = (slot * groups + group) * (SPLITS + RINGS) * ROWS
    places = start + part * ROWS + row
    logs = tl.load(sums + places)
    top = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top))
    weights = weights / tl.maximum(tl.sum(weights, 0), 1e-30)
    held = tl.load(averages + places[:, None] * SIZE + size[None, :], mask=size_ok[None, :], other=0.0)
    mixed = tl.sum(held * weights[:, None], 0)
    of_pass, of_head = row // HEADS, group * HEADS + row % HEADS
    if RINGS > 0:
        later = of_pass > 0
        g = tl.load(gate + slot * g_n + (of_pass - 1) * g_r + of_head * g_h, mask=later, other=1.0).to(tl.float32)
        ring_at = averages + (start + (SPLITS + of_pass - 1) * ROWS + row % HEADS) * SIZE + size
        local = tl.load(ring_at, mask=size < tl.where(later, SIZE, 0), other=0.0)
        mixed = g * mixed + (1.0 - g) * local
    mixed = tl.where(tl.load(lengths + slot * l_n) > 0, mixed, 0.0)
    out = y + ((slot * (ROWS // HEADS) + of_pass) * (groups * HEADS) + of_head) * SIZE + size
    tl.store(out, mixed.to(y.dtype.element_ty), mask=size_ok)


def launch(
    q_NRHK: Tensor,
    keys_NGTK: Tensor,
    values_NGTK: Tensor,
    ring_keys_NrGwK: Tensor | None,
    ring_values_NrGwK: Tensor | None,
    gate_NrH: Tensor | None,
    lengths_N: Tensor,
) -> Tensor:
    """The two launches -> y [N, R, H, K]."""
    slots, loops, heads, size = q_NRHK.shape
    groups, reach = keys_NGTK.shape[1:3]
    ring_k = keys_NGTK[:, None] if ring_keys_NrGwK is None else ring_keys_NrGwK  # a stand-in that nothing reads
    ring_v = values_NGTK[:, None] if ring_values_NrGwK is None else ring_values_NrGwK
    gate = q_NRHK[..., 0] if gate_NrH is None else gate_NrH
    cut = plan(
        slots=slots, loops=loops, heads=heads, groups=groups, size=size, reach=reach,
        rings=0 if ring_keys_NrGwK is None else loops - 1, itemsize=keys_NGTK.element_size(),
        processors=_processors(q_NRHK.device),
    )  # fmt: skip
    y = torch.empty(q_NRHK.shape, dtype=q_NRHK.dtype, device=q_NRHK.device)
    parts = cut.splits + cut.rings
    averages = torch.empty(slots, groups, parts, cut.rows, size, dtype=torch.float32, device=q_NRHK.device)
    sums = torch.empty(slots, groups, parts, cut.rows, dtype=torch.float32, device=q_NRHK.device)
    if not slots:
        return y
    parts_kernel[(parts, groups, slots)](
        q_NRHK, keys_NGTK, values_NGTK, ring_k, ring_v, lengths_N, averages, sums,
        *q_NRHK.stride(), *keys_NGTK.stride(), *values_NGTK.stride(), *ring_k.stride(), *ring_v.stride(),
        lengths_N.stride(0), reach, ring_k.shape[-2], size**-0.5 * LOG2_E,
        **parts_constants(cut, upcast=not isinstance(parts_kernel, triton.JITFunction)),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    merge_kernel[(cut.rows, groups, slots)](
        averages, sums, gate, lengths_N, y, *gate.stride(), lengths_N.stride(0), groups,
        **merge_constants(cut), num_warps=4,
    )  # fmt: skip
    return y


def parts_constants(cut: Plan, *, upcast: bool) -> dict[str, int | bool]:
    """The compile-time values of `parts_kernel`. `upcast`: to float32 before products (triton's interpreter multiplies
    the bits of bfloat16)."""
    return {
        "SPLITS": cut.splits, "RINGS": cut.rings, "ROWS": cut.rows, "HEADS": cut.heads_per_group, "SIZE": cut.size,
        "BLOCK_ROWS": cut.block_rows, "BLOCK_KEYS": cut.block_keys, "BLOCK_SIZE": cut.block_size, "UPCAST": upcast,
    }  # fmt: skip


def merge_constants(cut: Plan) -> dict[str, int | bool]:
    """The compile-time values of `merge_kernel`."""
    return {
        "SPLITS": cut.splits, "RINGS": cut.rings, "ROWS": cut.rows, "HEADS": cut.heads_per_group, "SIZE": cut.size,
        "BLOCK_SIZE": cut.block_size,
    }  # fmt: skip


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; in the interpreter, few, so that small inputs are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
