"""Measurements on what each loop would predict: p(r) = softmax(Head(h(r))), the logit lens on loops.

Source: arXiv 2606.18023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from ..chunks import OutputChunk
from ..registry import Reads, Values, register

UNMOVED = 1e-5
"""Output shift in nats up to which a token counts as not moved: what rounding alone makes in float32."""


class _OfOutputs:
    """What measurements on outputs share."""

    reads: ClassVar[Reads] = "outputs"
    follows_model: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    positioned: ClassVar[bool] = True


@register
class LogitLensRank(_OfOutputs):
    """1 + how many tokens p(r) puts above the true next token -> [B, n], for r = 1..R; 1..V.

    Tokens that are level with it count half, as in a tie that is broken at random: logits of half precision tie often.
    The mean is ruled by the few tokens that no loop foresees; variant `log` is the mean of the rank's natural
    logarithm. The last token of a sample has no next one and is left out.
    """

    name = "logit_lens_rank"
    title = "Logit-lens rank"
    equation = "1 + #{v: p_v(r) > p_y(r)} + #{v != y: p_v(r) = p_y(r)} / 2, y the true next token"
    unit = "rank, 1 is best (log: its natural logarithm)"
    definition = "rank of the true next token if decoding stopped after loop r; falling with r is refinement"
    variants = ("", "log")

    def measure(self, chunk: OutputChunk) -> Iterator[Values]:
        for r in range(1, chunk.loops + 1):
            log_p = chunk.log_p(r)
            true = log_p.gather(-1, chunk.targets_Bn[..., None])
            above, level = (log_p > true).sum(-1), (log_p == true).sum(-1) - 1
            value = (1 + above + level / 2.0).where(true[..., 0].isfinite(), torch.nan).double()
            yield Values(r, "", value, chunk.has_target)
            yield Values(r, "log", value.log(), chunk.has_target)


@register
class NextTokenNLL(_OfOutputs):
    """-ln p(r)(true next token) -> [B, n], in nats, for r = 1..R. The last token of a sample is left out."""

    name = "next_token_nll"
    title = "Next-token loss of each loop"
    equation = "-ln p_y(r), y the true next token"
    unit = "nats"
    definition = "the loss if decoding stopped after loop r"
    variants = ("",)

    def measure(self, chunk: OutputChunk) -> Iterator[Values]:
        for r in range(1, chunk.loops + 1):
            yield Values(r, "", -chunk.log_p(r).gather(-1, chunk.targets_Bn[..., None])[..., 0], chunk.has_target)


@register
class OutputShift(_OfOutputs):
    """Delta_p(r) = KL(p(r) || p(r-1)) -> [B, n], in nats, for r = 2..R (equation 9)."""

    name = "output_shift"
    title = "Output shift"
    equation = "Delta_p(r) = KL(p(r) || p(r-1))   (9)"
    unit = "nats"
    definition = "how far loop r changes the prediction: the gain"
    variants = ("",)

    def measure(self, chunk: OutputChunk) -> Iterator[Values]:
        for r in range(2, chunk.loops + 1):
            yield Values(r, "", chunk.shift(r))


@register
class OutputEntropy(_OfOutputs):
    """H(p(r)) = -sum_v p_v ln p_v -> [B, n], in nats, for r = 1..R."""

    name = "output_entropy"
    title = "Output entropy"
    equation = "H(p(r)) = -sum_v p_v(r) ln p_v(r)"
    unit = "nats"
    definition = "how uncertain the prediction after loop r is"
    variants = ("",)

    def measure(self, chunk: OutputChunk) -> Iterator[Values]:
        for r in range(1, chunk.loops + 1):
            yield Values(r, "", -torch.einsum("bnv,bnv->bn", chunk.p(r), chunk.log_p(r)))


@register
class PeakLoop(_OfOutputs):
    """Share of tokens whose peak loop r* = argmax_r Delta_p(r), r = 2..R, is r -> [B, n] of 0 and 1.

    The first loop wins a tie. Not defined for a token that no loop moves by more than UNMOVED, as a sample's first ones
    in a PLT: their left neighbour is nothing in every loop. A token with a non-finite shift counts in no loop: it is
    reported as non-finite.
    """

    name = "peak_loop"
    title = "Token breadth"
    equation = "share of tokens with argmax_s Delta_p(s) = r"
    unit = "share of tokens"
    definition = "for how many tokens loop r is the one that changes the prediction most"
    variants = ("",)
    positioned = False

    def measure(self, chunk: OutputChunk) -> Iterator[Values]:
        if chunk.loops < 2:
            return
        shifts = torch.stack([chunk.shift(r) for r in range(2, chunk.loops + 1)])
        peak, sound, moved = shifts.argmax(0), shifts.isfinite().all(0), shifts.amax(0) > UNMOVED
        for i in range(len(shifts)):
            yield Values(i + 2, "", (peak == i).double().where(sound, torch.nan), ~sound | moved)
