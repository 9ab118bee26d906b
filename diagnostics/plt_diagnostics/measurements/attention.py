"""Measurements on attention: how focused a loop's heads are, whether it re-routes, how alike its heads are, its gate.

A_q(r, h) is the distribution of head h over positions at query q: of a G-SWA loop the mixture
g * A_global + (1 - g) * A_local (variant `mixed`); its branches are reported alone as `global` and `local`. For loop 1
there is one distribution, `mixed`. Source: arXiv 2606.18023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import AttentionBlock, Distribution, LoopAttention
from ..rank import rank_of_gram
from ..registry import Reads, Values, register


class _OfAttention:
    """What measurements on attention share."""

    reads: ClassVar[Reads] = "attention"
    follows_model: ClassVar[bool] = False
    layered: ClassVar[bool] = True
    positioned: ClassVar[bool] = True


@register
class AttentionEntropy(_OfAttention):
    """H_q(r, h) = -sum_k A_qk ln A_qk -> [B, H, n], in nats, for r = 1..R (equation 7); 0..ln(q + 1)."""

    name = "attention_entropy"
    title = "Attention entropy"
    equation = "H_q(r,h) = -sum_k A_qk ln A_qk   (7)"
    unit = "nats"
    definition = "how diffuse (large) or focused (small) heads are; of the gate-mixed distribution, and of each branch"
    variants = ("mixed", "global", "local")

    def measure(self, chunk: AttentionBlock) -> Iterator[Values]:
        for r, loop in enumerate(chunk.loops, 1):
            yield Values(r, "mixed", loop.mixed.entropy())
            if loop.gate_BHn is not None:
                for name, branch in loop.branches.items():
                    yield Values(r, name, branch.entropy())


@register
class AttentionKL(_OfAttention):
    """D_KL(r) = (1/HS) sum_{h,q} KL(A_q(r, h) || A_q(r-1, h)) -> [B, H, n], in nats, for r = 2..R (equation 8).

    Supports: `mixed` and `global` distributions of all loops live on all positions up to the query, so both are finite
    (a gate of exactly 0 or 1 counts as the smallest normal number, see plt_diagnostics.attention). `local` compares
    windows with windows, and for r = 2 with loop 1's plain distribution, which is positive on all of the window; the
    other direction would be infinite, which is why the newer loop stands on the left, as in the paper. `global` of
    loop 2 is compared with loop 1's plain distribution too.
    """

    name = "attention_kl"
    title = "Inter-loop attention KL"
    equation = "D_KL(r) = (1/HS) sum_{h,q} KL(A_q(r,h) || A_q(r-1,h))   (8)"
    unit = "nats"
    definition = "re-routing: how far a loop's attention is from that of the loop before; near 0 routing is frozen"
    variants = ("mixed", "global", "local")

    def measure(self, chunk: AttentionBlock) -> Iterator[Values]:
        for r, (before, loop) in enumerate(zip(chunk.loops, chunk.loops[1:], strict=False), 2):
            yield Values(r, "mixed", loop.mixed.kl(before.mixed))
            if loop.gate_BHn is not None:
                for name, branch in loop.branches.items():
                    yield Values(r, name, branch.kl(_same(name, before)))


def _same(name: str, loop: LoopAttention) -> Distribution:
    """The branch of this name; of a loop that has no such branch the whole distribution."""
    return loop.branches[name] if loop.gate_BHn is not None else loop.mixed


@register
class HeadRank(_OfAttention):
    """Effective rank of the H x S matrix of the heads' attention rows at a query -> [B, n], for r = 1..R; 1..H.

    Measured at up to 256 queries a sample, evenly spaced from the last one back.
    """

    name = "head_rank"
    title = "Head diversity (effective rank)"
    equation = "exp(-sum_i s_i ln s_i), s = normalised singular values of the H x S attention rows at a query"
    unit = "heads, 1..H"
    definition = "how many different things the heads of a layer attend to"
    variants = ("",)

    def measure(self, chunk: AttentionBlock) -> Iterator[Values]:
        for r in range(1, len(chunk.loops) + 1):
            yield Values(r, "", _spread(rank_of_gram(chunk.grams[r - 1]), chunk), chunk.sampled_Bn)


@register
class HeadCosine(_OfAttention):
    """Mean cosine over all pairs of different heads' attention rows at a query -> [B, n], for r = 1..R; 0..1.

    At the same queries as head_rank. Not defined for one head.
    """

    name = "head_cosine"
    title = "Head similarity (mean pairwise cosine)"
    equation = "mean over h < h' of cos(A_q(r,h), A_q(r,h'))"
    unit = "cosine, 0..1"
    definition = "how redundant the heads of a layer are"
    variants = ("",)

    def measure(self, chunk: AttentionBlock) -> Iterator[Values]:
        for r in range(1, len(chunk.loops) + 1):
            cosines = chunk.cosines[r - 1]
            heads = cosines.shape[-1]
            if heads > 1:
                off = cosines.sum((-1, -2)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
                yield Values(r, "", _spread(off / (heads * (heads - 1)), chunk), chunk.sampled_Bn)


@register
class Gate(_OfAttention):
    """Mean of g over heads and positions -> [B, H, n], for the loops that have a gate; 0..1."""

    name = "gate"
    title = "Gate (weight of the global branch)"
    equation = "mean over h, q of g(r)"
    unit = "weight, 0..1"
    definition = "near 1 a loop relies on loop 1's frozen keys and values, near 0 on its own fresh window"
    variants = ("",)

    def measure(self, chunk: AttentionBlock) -> Iterator[Values]:
        for r, loop in enumerate(chunk.loops, 1):
            if loop.gate_BHn is not None:
                yield Values(r, "", loop.gate_BHn)


def _spread(values_Br: Tensor, chunk: AttentionBlock) -> Tensor:
    """Values of the sampled queries at their places among all queries of the block."""
    spread = torch.zeros(chunk.sampled_Bn.shape, dtype=values_Br.dtype, device=values_Br.device)
    spread[:, chunk.rows] = values_Br
    return spread
