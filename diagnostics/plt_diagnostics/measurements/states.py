"""Measurements on the hidden states of the loops: how far a loop moves them, where to, and how diverse they are.

h(r) is the output of loop r, h(0) the embedding; z(r) is h(r) as it is handed on to the next loop. Variant `raw` reads
states before the final norm, `normed` after it. Source: arXiv 2606.18023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from ..chunks import STATES, StateChunk
from ..rank import effective_rank
from ..registry import Reads, Values, register


class _OfStates:
    """What measurements on states share."""

    reads: ClassVar[Reads] = "states"
    follows_model: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    positioned: ClassVar[bool] = True


@register
class StepSize(_OfStates):
    """delta(r) = ||h(r) - h(r-1)||_2 over the D coordinates of a token -> [B, S], in units of the state.

    For r = 1..R; delta(1) is the first pass's own step away from the embedding.
    """

    name = "step_size"
    title = "Step size"
    equation = "delta(r) = ||h(r) - h(r-1)||_2"
    unit = "norm of the state"
    definition = "how far loop r moves a token's state"
    variants = ("raw", "normed")

    def measure(self, chunk: StateChunk) -> Iterator[Values]:
        for state in STATES:
            for r in range(1, chunk.loops + 1):
                yield Values(r, state, vector_norm(chunk.step(state, r), dim=-1))


@register
class AngularChange(_OfStates):
    """cos theta(r) = cos(h(r) - h(r-1), h(r-1) - h(r-2)) -> [B, S], for r = 2..R (equation 3).

    Not defined for a token that one of the two loops did not move by more than its rounding: what rounding makes of a
    zero step has no direction. Such tokens exist in every PLT: a first token reads zeros for its left neighbour in all
    loops, so that later loops leave it where it is, and its neighbours after it a loop later each.
    """

    name = "angular_change"
    title = "Update alignment"
    equation = "cos theta(r) = cos(h(r) - h(r-1), h(r-1) - h(r-2))   (3)"
    unit = "cosine, -1..1"
    definition = "1 keeps the direction of the update before, 0 is orthogonal to it, -1 reverses it (oscillation)"
    variants = ("raw", "normed")

    def measure(self, chunk: StateChunk) -> Iterator[Values]:
        for state in STATES:
            before: tuple[Tensor, Tensor, Tensor] | None = None
            for r in range(1, chunk.loops + 1):
                step = chunk.step(state, r)
                norm = vector_norm(step, dim=-1)
                moved = chunk.moved(state, r, norm)
                if before is not None:
                    old_step, old_norm, old_moved = before
                    yield Values(r, state, (step * old_step).sum(-1) / norm / old_norm, moved & old_moved)
                before = step, norm, moved


@register
class EffectiveRank(_OfStates):
    """exp(-sum_i s_i ln s_i), s the singular values of a sample's S x D state matrix divided by their sum -> [B], for
    r = 1..R (equation 4); 1..min(S, D). Padding is left out of the matrix. Not defined for a matrix of zeros.

    The default reads normed states, whose rows have one length each, so that no single large token sets the rank.
    """

    name = "effective_rank"
    title = "Effective rank"
    equation = "exp(-sum_i s_i ln s_i), s = normalised singular values of the S x D states   (4)"
    unit = "dimensions, 1..min(S, D)"
    definition = "how many directions the states of a sample use; a peak and then a fall is a narrowing"
    variants = ("normed", "raw")
    positioned = False

    def measure(self, chunk: StateChunk) -> Iterator[Values]:
        for state in STATES:
            for r in range(1, chunk.loops + 1):
                states = [rows[real] for rows, real in zip(chunk.state(state, r), chunk.mask_BS, strict=True)]
                ranks = torch.tensor([effective_rank(rows) for rows in states], dtype=torch.float64)
                zero = torch.tensor([not rows.any() for rows in states])
                yield Values(r, state, ranks.to(chunk.mask_BS.device), ~zero.to(chunk.mask_BS.device))


@register
class FixedPointGap(_OfStates):
    """Delta_FP(r) = ||h(r) - f(h(r))||_2 -> [B, S], for r = 1..R (equation 5), in units of the state.

    f applies the shared block once more, in one of two attention modes:
    as_next   as loop r+1 runs it: on a * E + b * shift(z(r)), gated over loop 1's keys and the loop's own window. For
              r < R this is the step to h(r+1); for r = R it takes a loop that the model was not trained for. Not
              defined for a PLT of one loop, which has no later loops.
    as_first  as loop 1 runs it: on z(r) in the embedding's place, plain causal attention over its own keys, no shift,
              no embedding added.
    """

    name = "fixed_point_gap"
    title = "Fixed-point gap"
    equation = "Delta_FP(r) = ||h(r) - f(h(r))||_2   (5)"
    unit = "norm of the state"
    definition = (
        "how far a token's state is from a fixed point of the shared block, applied once more as loop r+1 would "
        "(as_next) or as loop 1 did (as_first)"
    )
    variants = ("raw/as_next", "raw/as_first", "normed/as_next", "normed/as_first")

    def measure(self, chunk: StateChunk) -> Iterator[Values]:
        for r in range(1, chunk.loops + 1):
            for mode, again in (("as_next", chunk.as_next(r)), ("as_first", chunk.as_first(r))):
                if again is None:
                    continue
                for state in STATES:
                    gap = chunk.state(state, r) - chunk.read(state, again)
                    yield Values(r, f"{state}/{mode}", vector_norm(gap, dim=-1))


@register
class OffsetCost(_OfStates):
    """Omega(r) = (1/S) sum_i ||h_i(r-1) - h_{i-1}(r-1)||_2 -> [B, S], at the boundary into loop r = 2..R (equation 6).

    What putting the left neighbour's state in a token's place costs. The first token has no left neighbour and is left
    out. The default reads the state that is really shifted: what the model hands on.
    """

    name = "offset_cost"
    title = "Offset cost (CLP mismatch)"
    equation = "Omega(r) = (1/S) sum_i ||z_i(r-1) - z_{i-1}(r-1)||_2   (6)"
    unit = "norm of the state"
    definition = "what replacing a token's state by its left neighbour's costs on the way into loop r"
    variants = ("normed", "raw")
    follows_model = True

    def measure(self, chunk: StateChunk) -> Iterator[Values]:
        for state in STATES:
            for r in range(2, chunk.loops + 1):
                states = chunk.state(state, r - 1)
                yield Values(
                    r, state, _after_first(vector_norm(states[:, 1:] - states[:, :-1], dim=-1)), chunk.has_left
                )


@register
class EffectiveOffsetCost(_OfStates):
    """||b (z_i - z_{i-1})||_2 / ||a E_i + b z_{i-1}||_2 -> [B, S], into loop r = 2..R; a ratio without unit.

    The shift's distortion relative to what the loop reads: Omega as the model weighs it (a and b are its embedding and
    hidden scales; the released model has b = 0.053). First tokens are left out. Only for models that shift.
    """

    name = "effective_offset_cost"
    title = "Effective offset cost"
    equation = "||b (z_i(r-1) - z_{i-1}(r-1))|| / ||a E_i + b z_{i-1}(r-1)||"
    unit = "ratio"
    definition = "the shifted term's distortion relative to the input of loop r"
    variants = ("",)

    def measure(self, chunk: StateChunk) -> Iterator[Values]:
        if not chunk.shifts:
            return
        for r in range(2, chunk.loops + 1):
            kept, handed_on = chunk.loop_input(r)
            read = (kept if kept.dim() == 0 else kept[:, 1:]) + handed_on[:, :-1]
            size = _after_first(vector_norm(read, dim=-1))
            change = _after_first(vector_norm(handed_on[:, 1:] - handed_on[:, :-1], dim=-1))
            yield Values(r, "", change / size, chunk.has_left & (size != 0))


def _after_first(values_Bn: Tensor) -> Tensor:
    """Values of the tokens after the first, with a zero in front, which is not counted."""
    return pad(values_Bn, (1, 0))
