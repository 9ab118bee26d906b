"""What the measurements on states and on outputs read; those on attention read plt_diagnostics.attention's blocks.

B batch   S tokens   n tokens of a slice   D model width   V vocabulary
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from .adapters.protocol import LoopedModel, LoopRun, State

STATES: Final[tuple[State, ...]] = ("raw", "normed")

HALF_ROUNDING: Final = 4
"""Machine epsilons of a state's norm up to which a difference of two half-precision states may be rounding alone. Of
states that are equal in exact arithmetic, 1.1 were measured (two layers)."""

WIDE_ROUNDING: Final = 64
"""The same of float32 and float64, where sums over hundreds of terms round too: 4.2 were measured."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class StateChunk:
    """The states of all loops of a batch. mask_BS: False at padding. has_left [B, S]: tokens with a left neighbour."""

    def __init__(self, model: LoopedModel, run: LoopRun) -> None:
        self._model, self._run = model, run
        self.loops = model.shape.loops
        self.shifts = model.shifts
        self.mask_BS = run.mask_BS
        self.has_left = torch.zeros_like(run.mask_BS)
        self.has_left[:, 1:] = run.mask_BS[:, 1:] & run.mask_BS[:, :-1]

    def state(self, state: State, loop: int) -> Tensor:
        """h(loop), raw or normed -> [B, S, D]; h(0) is the embedding."""
        return self.read(state, self._run.raw[loop])

    def read(self, state: State, raw_BSD: Tensor) -> Tensor:
        """A raw state, or what the final norm makes of it."""
        return _wide(self._model.norm(raw_BSD) if state == "normed" else raw_BSD)

    def step(self, state: State, loop: int) -> Tensor:
        """h(loop) - h(loop-1) -> [B, S, D]."""
        return self.state(state, loop) - self.state(state, loop - 1)

    def moved(self, state: State, loop: int, norm_BS: Tensor) -> Tensor:
        """Whether the loop's step, of norm `norm_BS`, is more than what rounding leaves of a zero one -> [B, S]."""
        dtype = self._run.raw[loop].dtype
        rounding = torch.finfo(dtype).eps * (HALF_ROUNDING if dtype.itemsize == 2 else WIDE_ROUNDING)
        rounded_BS: Tensor = rounding * torch.linalg.vector_norm(self.state(state, loop), dim=-1)
        return (norm_BS > rounded_BS) | ~norm_BS.isfinite()

    def as_next(self, loop: int) -> Tensor | None:
        """The block once more on h(loop), as loop+1 runs it -> raw [B, S, D], None where there is no such loop."""
        return self._run.raw[loop + 1] if loop < self.loops else self._run.further

    def as_first(self, loop: int) -> Tensor:
        """The block once more on h(loop), as loop 1 runs it -> raw [B, S, D]."""
        return self._model.as_first(self._run, self._run.raw[loop])

    def loop_input(self, loop: int) -> tuple[Tensor, Tensor]:
        """a * E and b * z(loop-1), not shifted."""
        handed_on = self._run.raw[loop - 1]
        if self._model.hands_on == "normed":
            handed_on = self._model.norm(handed_on)
        kept, term = self._model.loop_input(self._run, handed_on)
        return _wide(kept), _wide(term)


class OutputChunk:
    """What all loops predict after the tokens first..first+n. targets_Bn: the next tokens; has_target: whether there
    is one."""

    def __init__(self, model: LoopedModel, run: LoopRun, first: int, stop: int) -> None:
        self._model, self._run, self._slice = model, run, slice(first, stop)
        self.loops = model.shape.loops
        ids, mask = run.ids_BS, run.mask_BS
        self.targets_Bn = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)[:, first:stop]
        next_real = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
        self.has_target = (mask & next_real)[:, first:stop]
        self._log_p: dict[int, Tensor] = {}
        self._p: dict[int, Tensor] = {}
        self._shift: dict[int, Tensor] = {}

    def log_p(self, loop: int) -> Tensor:
        """ln p(loop) -> [B, n, V]."""
        if loop not in self._log_p:
            logits = self._model.logits(self._run.raw[loop][:, self._slice])
            self._log_p[loop] = torch.log_softmax(_wide(logits), dim=-1)
        return self._log_p[loop]

    def p(self, loop: int) -> Tensor:
        """p(loop) -> [B, n, V]."""
        if loop not in self._p:
            self._p[loop] = self.log_p(loop).exp()
        return self._p[loop]

    def shift(self, loop: int) -> Tensor:
        """KL(p(loop) || p(loop-1)) in nats -> [B, n]. What rounding leaves below 0 is 0."""
        if loop not in self._shift:
            ratio = self.log_p(loop) - self.log_p(loop - 1)
            self._shift[loop] = torch.einsum("bnv,bnv->bn", self.p(loop), ratio).clamp_min(0)
        return self._shift[loop]
