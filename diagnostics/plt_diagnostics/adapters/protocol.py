"""What the measurements need of a looped causal language model: its states, its attention, its head.

An adapter for another family is a class with the attributes and methods of :class:`LoopedModel`; nothing else in this
package knows any model by name. Loops are numbered as in the paper: h(0) is the embedding, h(r) the output of loop r.

    B batch   S tokens   D model width   R loops   L layers of the block   H query heads   G key heads   K head size

    model = open_model(Path("checkpoint"), loops=4)
    run = model.run(ids, mask, further=True, keep=True)
    for layer, loops in enumerate(model.attention(run)):
        ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

State = Literal["raw", "normed"]
"""Which of a loop's two states is read: before the final norm (raw) or after it (normed)."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a looped model: R, L, H, D and the vocabulary."""

    loops: int
    layers: int
    heads: int
    width: int
    vocab: int


@dataclass(frozen=True)
class Branch:
    """One softmax attention of one layer in one loop: softmax(scale * q k^T), causal.

    q_BHSK, k_BGSK: queries and keys as they are compared, after any rotary positions; H is a multiple of G.
    window: None sees everything before and itself; w sees itself and the w positions before it.
    weight_BHS: this branch's share of the mixture, None where a layer has one branch only. The shares sum to 1.
    """

    name: str
    q_BHSK: Tensor
    k_BGSK: Tensor
    scale: float
    window: int | None = None
    weight_BHS: Tensor | None = None


LoopBranches = tuple[Branch, ...]
"""One layer's attention in one loop. The first branch sees all that any other one sees."""


@dataclass
class LoopRun:
    """One forward pass over a batch.

    raw: h(0), h(1), ..., h(R), each [B, S, D] and before the final norm; h(0) is what enters loop 1, the embedding in a
    PLT.
    further: what loop R+1 would give, None where it was not asked for or where the model has no such loop.
    key_mask_BS: False at padding; None where no real token could see any padding (none, or all of it on the right).
    kept: whatever the adapter keeps for `attention`.
    """

    ids_BS: Tensor
    mask_BS: Tensor
    key_mask_BS: Tensor | None
    raw: list[Tensor]
    further: Tensor | None = None
    kept: list[Any] = field(default_factory=list)


@runtime_checkable
class LoopedModel(Protocol):
    """The adapter protocol.

    name: the adapter, as it stands in records.
    shape: the sizes.
    hands_on: which state of a loop the next loop reads.
    shifts: whether the next loop reads it shifted by one position (CLP); without a shift there is no effective offset
        cost.
    device, dtype: of the weights.
    """

    name: str
    shape: Shape
    hands_on: State
    shifts: bool
    device: torch.device
    dtype: torch.dtype

    def run(self, ids_BS: Tensor, mask_BS: Tensor, *, further: bool, keep: bool) -> LoopRun:
        """Read a batch. `further` asks for one loop more than R; `keep` says that `attention` will be asked for."""
        ...

    def attention(self, run: LoopRun) -> Iterator[list[LoopBranches]]:
        """Layer by layer, what each of the R loops attends with. Frees what it has yielded."""
        ...

    def as_first(self, run: LoopRun, state_BSD: Tensor) -> Tensor:
        """The shared block over a state h(r), run as loop 1 runs it -> raw [B, S, D]."""
        ...

    def loop_input(self, run: LoopRun, handed_on_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """What a later loop reads, as two terms [B, S, D] that are summed: what does not come from the loop before
        (a * E), and what does (b * z), the latter not shifted."""
        ...

    def norm(self, raw_BSD: Tensor) -> Tensor:
        """The final norm."""
        ...

    def logits(self, raw_BND: Tensor) -> Tensor:
        """Head(norm(h)) -> [B, N, V]."""
        ...


def right_padded(mask_BS: Tensor) -> bool:
    """Whether all padding stands to the right of every real token, where causal attention cannot see it."""
    return bool((mask_BS[:, :-1] | ~mask_BS[:, 1:]).all())
