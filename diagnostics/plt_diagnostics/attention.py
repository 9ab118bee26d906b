"""Attention distributions of all loops of one layer, a block of queries at a time: no map is ever held whole.

    for block in blocks(branches, mask):
        block.loops[r - 1].mixed.p          # [B, H, n, T], loop r's distribution over the positions it can see

The distribution of a layer with several branches is their mixture over positions, sum_i w_i A_i: of a G-SWA loop,
g * A_global + (1 - g) * A_local, which is non-negative and sums to 1 (the local branch gives 0 outside its window).

Its logarithm is exact where p underflows: with one branch it is score - logsumexp, and where only the first branch
sees a position it is that + ln w. A weight of exactly 0 (a gate rounded to 0 or 1) counts as the smallest
normal number there, so that no divergence from such a distribution is infinite: at most 87.3 nats more in float32.
At a position that is not visible p and log p are both 0, so that products and differences vanish there.

All is computed in float32 or wider. Memory is O(B * H * n * S) for each of the R loops, n being chosen so that one
such array is of BLOCK_BYTES (at least 8 queries).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .adapters.protocol import Branch, LoopBranches

BLOCK_BYTES = 4 * 2**20
"""Of one array of a block on a CPU: larger ones leave its cache."""

ACCELERATOR_BLOCK_BYTES = 32 * 2**20
"""The same elsewhere, where many small blocks would spend their time on being launched."""


@dataclass(frozen=True)
class Distribution:
    """Attention probabilities of n queries over the positions start..start+T: p and log p, both [B, H, n, T], and both
    0 where a position is not visible."""

    p: Tensor
    log_p: Tensor
    start: int = 0

    def entropy(self) -> Tensor:
        """-sum_k p_k ln p_k, in nats -> [B, H, n]."""
        return -_dot(self.p, self.log_p)

    def kl(self, reference: Distribution) -> Tensor:
        """KL(self || reference) in nats -> [B, H, n]; the reference sees all that this one sees. What rounding leaves
        below 0 is 0."""
        columns = slice(self.start - reference.start, self.start - reference.start + self.p.shape[-1])
        return _dot(self.p, self.log_p - reference.log_p[..., columns]).clamp_min(0)


@dataclass(frozen=True)
class LoopAttention:
    """What one loop attends with in this block: its mixture, its branches by name, and the first branch's weight
    [B, H, n] (None with one branch)."""

    mixed: Distribution
    branches: dict[str, Distribution]
    gate_BHn: Tensor | None


@dataclass
class AttentionBlock:
    """Queries first..first+n of one layer, all loops. `sampled_Bn` marks the queries whose heads are compared."""

    layer: int
    first: int
    loops: list[LoopAttention]
    sampled_Bn: Tensor

    @property
    def stop(self) -> int:
        """The position after the last query."""
        return self.first + self.sampled_Bn.shape[1]

    @cached_property
    def rows(self) -> Tensor:
        """The queries of the block that are sampled in any row of the batch."""
        return self.sampled_Bn.any(0).nonzero()[:, 0]

    @cached_property
    def grams(self) -> list[Tensor]:
        """For each loop A A^T over positions, of the sampled queries' head rows: [B, rows, H, H] in float64."""
        found = []
        for loop in self.loops:
            heads_BrHT = loop.mixed.p[:, :, self.rows].transpose(1, 2).double()
            found.append(heads_BrHT @ heads_BrHT.transpose(-1, -2))
        return found

    @cached_property
    def cosines(self) -> list[Tensor]:
        """For each loop the cosines between heads at the sampled queries: [B, rows, H, H]."""
        found = []
        for gram in self.grams:
            norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()
            found.append(gram / norm[..., :, None] / norm[..., None, :])
        return found


def blocks(
    layer: int, loops: list[LoopBranches], key_mask_BS: Tensor | None, sampled_BS: Tensor
) -> Iterator[AttentionBlock]:
    """The distributions of one layer, block by block; see the module's own words.

    loops: for each loop its branches over the same S positions. key_mask_BS: False at padding that a real token could
    see; a padded query sees itself.
    """
    length = loops[0][0].q_BHSK.shape[2]
    loops = [tuple(_widened(branch) for branch in branches) for branches in loops]
    count = _queries_a_block(loops[0][0].q_BHSK, length)
    for first in range(0, length, count):
        stop = min(first + count, length)
        yield AttentionBlock(
            layer,
            first,
            [_mixture(branches, key_mask_BS, first, stop) for branches in loops],
            sampled_BS[:, first:stop],
        )


def _queries_a_block(q_BHSK: Tensor, length: int) -> int:
    batch, heads = q_BHSK.shape[:2]
    size = BLOCK_BYTES if q_BHSK.device.type == "cpu" else ACCELERATOR_BLOCK_BYTES
    return max(8, size // (batch * heads * length * torch.promote_types(q_BHSK.dtype, torch.float32).itemsize))


def _widened(branch: Branch) -> Branch:
    wide = torch.promote_types(branch.q_BHSK.dtype, torch.float32)
    weight = None if branch.weight_BHS is None else branch.weight_BHS.to(wide)
    return Branch(branch.name, branch.q_BHSK.to(wide), branch.k_BGSK.to(wide), branch.scale, branch.window, weight)


def _mixture(branches: LoopBranches, key_mask_BS: Tensor | None, first: int, stop: int) -> LoopAttention:
    found = {branch.name: _distribution(branch, key_mask_BS, first, stop) for branch in branches}
    whole = found[branches[0].name]
    gate = branches[0].weight_BHS
    if gate is None:
        return LoopAttention(whole, found, None)
    gate = gate[:, :, first:stop]
    tiny = torch.finfo(whole.p.dtype).tiny
    p = whole.p * gate[..., None]
    log_p = whole.log_p + gate.clamp_min(tiny).log()[..., None]
    start = min([found[branch.name].start for branch in branches[1:]], default=stop)
    near, near_log = p[..., start - whole.start :], log_p[..., start - whole.start :]
    for branch in branches[1:]:
        assert branch.weight_BHS is not None
        part = found[branch.name]
        near[..., part.start - start :] += part.p * branch.weight_BHS[:, :, first:stop, None]
    near_log.copy_(torch.maximum(near_log, near.clamp_min(tiny).log()))
    _hide(log_p, key_mask_BS, first, stop, whole.start, branches[0].window, 0.0)
    return LoopAttention(Distribution(p, log_p, whole.start), found, gate)


def _distribution(branch: Branch, key_mask_BS: Tensor | None, first: int, stop: int) -> Distribution:
    """Softmax over the visible positions of queries first..stop."""
    start = 0 if branch.window is None else max(0, first - branch.window)
    q = branch.q_BHSK[:, :, first:stop] * branch.scale
    k = branch.k_BGSK[:, :, start:stop]
    batch, heads, count, size = q.shape
    folded = q.reshape(batch, k.shape[1], heads // k.shape[1] * count, size)
    scores = (folded @ k.transpose(-1, -2)).view(batch, heads, count, stop - start)
    _hide(scores, key_mask_BS, first, stop, start, branch.window, float("-inf"))
    log_p = torch.log_softmax(scores, dim=-1)
    p = log_p.exp()
    _hide(log_p, key_mask_BS, first, stop, start, branch.window, 0.0)
    return Distribution(p, log_p, start)


def _hide(
    x: Tensor, key_mask_BS: Tensor | None, first: int, stop: int, start: int, window: int | None, value: float
) -> None:
    """Write `value` into x [B, H, n, T] where a query does not see a position. Without padding that is in the last n
    columns only, and, with a window, at the left."""
    plain = window is None and key_mask_BS is None
    left = first if plain else start
    i = torch.arange(first, stop, device=x.device)[:, None]
    j = torch.arange(left, stop, device=x.device)[None, :]
    hidden = j > i
    if window is not None:
        hidden |= j < i - window
    if key_mask_BS is not None:
        hidden = (hidden | ~key_mask_BS[:, None, None, left:stop]) & (i != j)
    x[..., left - start :].masked_fill_(hidden, value)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over the last axis."""
    return torch.einsum("bhqk,bhqk->bhq", a, b)
