"""The adapter of Ouro (arXiv 2510.25741), a universal transformer: h(r) = f(norm(h(r-1))), the same layers each loop.

What it relies on is what the public model shows: the modules `model.embed_tokens`, `model.layers[i].self_attn` with
`q_proj` and `k_proj`, `model.rotary_emb`, `model.norm` (called once a loop, its result handed on), `lm_head`, and
`model.total_ut_steps`. The model's own forward runs; states, queries and keys are read off it by hooks.

Every loop attends causally to its own keys: one branch, no gate (the model's exit gate chooses a loop, it mixes no
attention). Nothing is shifted and no embedding added, so a further loop is what the first one would do on norm(h(r)),
and as_next and as_first are the same.

The exit gate is not applied: every token takes all loops, as at the public threshold of 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .hooks import Calls, Capture, heads
from .hub import AdapterError, load_remote, one_line_errors, remote_config, require
from .protocol import Branch, LoopBranches, LoopRun, Shape, State, right_padded

KEEP_BYTES = 512 * 2**20
"""Queries and keys of one batch that are kept rather than computed again."""

PARTS = (
    "lm_head",
    "model.embed_tokens",
    "model.layers",
    "model.norm",
    "model.rotary_emb",
    "model.total_ut_steps",
    "config.total_ut_steps",
)
PROJECTIONS = ("q_proj", "k_proj")


def open_ouro(
    folder: Path,
    *,
    loops: int | None,
    loop_mode: str | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
    trust_remote_code: bool,
) -> OuroAdapter:
    """The adapter of a folder. `loops` replaces total_ut_steps: fewer is an earlier exit, which the model was trained
    for; more warns. Raises AdapterError."""
    if loop_mode is not None:
        raise AdapterError(f"loop_mode is {loop_mode!r}: an ouro model runs its loops in one way, so leave it unset")
    if loops is not None and loops < 1:
        raise AdapterError(f"loops is {loops}: expected at least 1")
    config = remote_config(folder, trust_remote_code=trust_remote_code)
    trained = getattr(config, "total_ut_steps", None)
    if loops is not None:
        config.total_ut_steps = loops
    model = load_remote(folder, config, dtype=dtype, device=device)
    if loops is not None and isinstance(trained, int) and loops > trained:
        warnings.warn(
            f"running {loops} loops on a checkpoint made for {trained}: none was trained beyond", stacklevel=3
        )
    return OuroAdapter(model)


@dataclass
class OuroRun(LoopRun):
    """A forward pass with how the model called its layers (at layer i's r-th call, loop r) and the rotary angles."""

    calls: Calls = field(default_factory=lambda: Calls([]))
    rope: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))


class OuroAdapter:
    """:class:`plt_diagnostics.adapters.protocol.LoopedModel` for an `OuroForCausalLM`."""

    name = "ouro"
    hands_on: State = "normed"
    shifts = False

    def __init__(self, model: Any, *, keep_bytes: int = KEEP_BYTES) -> None:
        require(model, PARTS, self.name)
        self.model, self.base = model, model.model
        self._attentions = [layer.self_attn for layer in self.base.layers]
        for attention in self._attentions:
            require(attention, (*PROJECTIONS, "head_dim"), self.name)
        self._check_rope()
        first = self._attentions[0]
        self._size = int(first.head_dim)
        self.shape = Shape(
            loops=int(self.base.total_ut_steps),
            layers=len(self._attentions),
            heads=first.q_proj.weight.shape[0] // self._size,
            width=self.base.embed_tokens.weight.shape[1],
            vocab=self.model.lm_head.weight.shape[0],
        )
        self._projected = sum(getattr(first, part).weight.shape[0] for part in PROJECTIONS)
        self.device, self.dtype = model.device, model.dtype
        self._keep_bytes = keep_bytes

    def run(self, ids_BS: Tensor, mask_BS: Tensor, *, further: bool, keep: bool) -> OuroRun:
        """As the protocol says. Loop R+1 always exists: it is the same block."""
        key_mask = None if right_padded(mask_BS) else mask_BS
        keep = keep and self._kept_bytes(ids_BS) <= self._keep_bytes
        loops = self.shape.loops + further
        with (
            self._loops(loops),
            Calls(self.base.layers) as calls,
            Calls([self.base.norm], inputs=True) as norm,
            Capture([self.base], ("embed_tokens", "rotary_emb")) as once,
            Capture(self._attentions if keep else [], PROJECTIONS) as capture,
            # On a CPU a RuntimeError is how torch says that memory ran out.
            one_line_errors(type(self.model).__name__, besides=(MemoryError, RuntimeError)),
        ):
            self.base(input_ids=ids_BS, attention_mask=key_mask, use_cache=False)
        raw = norm.inputs[0]
        if len(raw) != loops:
            raise AdapterError(
                f"{type(self.model).__name__} called its final norm {len(raw)} times in {loops} loops: the ouro "
                "adapter expects once a loop"
            )
        run = OuroRun(ids_BS, mask_BS, key_mask, [once.take(0, "embed_tokens")[0], *raw[: self.shape.loops]])
        cos, sin = once.take(0, "rotary_emb")[0]
        run.calls, run.rope = calls, (cos, sin)
        run.further = raw[-1] if further else None
        run.kept = [capture] if keep else []
        return run

    def attention(self, run: LoopRun) -> Iterator[list[LoopBranches]]:
        """As the protocol says. What was not kept is computed by running the layers once more, one at a time."""
        assert isinstance(run, OuroRun)
        if run.kept:
            capture: Capture = run.kept.pop()
            for i in range(self.shape.layers):
                yield self._branches(run, i, *(capture.take(i, part) for part in PROJECTIONS))
            return
        states = [run.raw[0], *(self.norm(raw) for raw in run.raw[1:-1])]
        for i, attention in enumerate(self._attentions):
            with Capture([attention], PROJECTIONS) as again:
                for loop in range(self.shape.loops):
                    states[loop] = run.calls.again(i, loop, states[loop])
            yield self._branches(run, i, *(again.take(0, part) for part in PROJECTIONS))

    def as_first(self, run: LoopRun, state_BSD: Tensor) -> Tensor:
        """norm(h) in the embedding's place."""
        assert isinstance(run, OuroRun)
        x = self.norm(state_BSD)
        for i in range(self.shape.layers):
            x = run.calls.again(i, 0, x)
        return x

    def loop_input(self, run: LoopRun, handed_on_BSD: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """0 and z: the next loop reads the state and nothing else."""
        return handed_on_BSD.new_zeros(()), handed_on_BSD

    def norm(self, raw_BSD: Tensor) -> Tensor:
        """The model's final norm."""
        normed: Tensor = self.base.norm(raw_BSD)
        return normed

    def logits(self, raw_BND: Tensor) -> Tensor:
        """The final norm and the head, as the model reads out at any of its loops."""
        logits: Tensor = self.model.lm_head(self.norm(raw_BND))
        return logits

    @contextmanager
    def _loops(self, count: int) -> Iterator[None]:
        """The model's forward takes this many loops meanwhile."""
        holders = (self.base, self.base.config)
        before = [holder.total_ut_steps for holder in holders]
        for holder in holders:
            holder.total_ut_steps = count
        try:
            yield
        finally:
            for holder, steps in zip(holders, before, strict=True):
                holder.total_ut_steps = steps

    def _branches(self, run: OuroRun, layer: int, queries: list[Tensor], keys: list[Tensor]) -> list[LoopBranches]:
        attention = self._attentions[layer]
        scale = float(getattr(attention, "scaling", self._size**-0.5))
        # transformers counts a token's own position in its window, a Branch does not.
        sliding = getattr(attention, "sliding_window", None)
        window = None if sliding is None else int(sliding) - 1
        found: list[LoopBranches] = []
        for q_BSX, k_BSX in list(zip(queries, keys, strict=True))[: self.shape.loops]:
            q, k = apply_rotary_pos_emb(heads(q_BSX, self._size), heads(k_BSX, self._size), *run.rope)
            found.append((Branch("global", q, k, scale, window),))
        return found

    def _kept_bytes(self, ids_BS: Tensor) -> int:
        """With those of a further loop, which come along."""
        count = ids_BS.numel() * self._projected * self.shape.layers * (self.shape.loops + 1)
        return int(count * self.dtype.itemsize)

    def _check_rope(self) -> None:
        """Rotary frequencies are not stored in a checkpoint: code written for another transformers leaves them as
        uninitialised memory, without a word."""
        frequencies = getattr(self.base.rotary_emb, "inv_freq", None)
        if frequencies is None:
            return
        sound = frequencies.isfinite().all() and (frequencies > 0).all() and (frequencies.diff() <= 0).all()
        if not bool(sound):
            raise AdapterError(
                f"{type(self.model).__name__} has rotary frequencies {frequencies.flatten()[:3].tolist()}, ...: "
                "expected falling numbers above 0; its code does not set them up under this version of transformers"
            )
