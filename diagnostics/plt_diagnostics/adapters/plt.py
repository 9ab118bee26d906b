"""The adapter of the Parallel Loop Transformer and of its sequential baseline.

The loops are run through the model's own layers; queries, keys and gates are read off them. Where those of all layers
and loops fit KEEP_BYTES they are kept during the one forward pass; where they do not, the layers are run once more,
all loops of one layer together, so that those of one layer are held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from plt_model import PLTForCausalLM

from .hooks import Capture, heads
from .protocol import Branch, LoopBranches, LoopRun, Shape, State, right_padded

KEEP_BYTES = 512 * 2**20
"""Queries, keys and gates of one batch that are kept rather than computed again."""

Rope = tuple[Tensor, Tensor]
Shared = list[tuple[Tensor | None, Tensor | None]]


class PLTAdapter:
    """:class:`plt_diagnostics.adapters.protocol.LoopedModel` for a :class:`plt_model.PLTForCausalLM`."""

    def __init__(self, model: PLTForCausalLM, *, keep_bytes: int = KEEP_BYTES) -> None:
        config = model.config
        self.model = model
        self.sequential = config.plt_loop_mode == "sequential"
        self.name = "plt-sequential" if self.sequential else "plt"
        assert config.head_dim is not None  # the configuration fills in what was left out
        assert config.num_key_value_heads is not None
        self._size, self._key_heads = config.head_dim, config.num_key_value_heads
        self.shape = Shape(
            loops=config.plt_num_loops,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            width=config.hidden_size,
            vocab=config.vocab_size,
        )
        self.hands_on: State = "normed" if config.plt_normalize_per_loop else "raw"
        self.shifts = not self.sequential and config.plt_clp_shift
        self.device, self.dtype = model.device, model.dtype
        self._keep_bytes = keep_bytes

    def run(self, ids_BS: Tensor, mask_BS: Tensor, *, further: bool, keep: bool) -> LoopRun:
        """As the protocol says. Loop R+1 exists where loop R is one of the later loops (R >= 2): a model of one loop
        was never taught to run another."""
        base = self.model.model
        embeds = base.embed_tokens(ids_BS)
        run = LoopRun(ids_BS, mask_BS, None if right_padded(mask_BS) else mask_BS, [embeds])
        keep = keep and self._kept_bytes(ids_BS) <= self._keep_bytes
        rope = self._rope(run)
        shared: Shared = [(None, None)] * self.shape.layers
        for loop in range(self.shape.loops):
            with Capture(self._attentions() if keep else [], ("q_proj", "k_proj", "plt_gate")) as capture:
                state, shared = self._loop(loop, self._input(run, loop), shared, rope, run.key_mask_BS)
            run.raw.append(state)
            if keep:
                run.kept.append([self._taken(capture, i, rope) for i in range(self.shape.layers)])
        if further and self.shape.loops > 1:
            last = self.shape.loops
            run.further, _ = self._loop(last, self._input(run, last), shared, rope, run.key_mask_BS)
        return run

    def attention(self, run: LoopRun) -> Iterator[list[LoopBranches]]:
        """As the protocol says."""
        if run.kept:
            kept = [iter(loop) for loop in run.kept]
            for _ in range(self.shape.layers):
                yield self._branches([next(loop) for loop in kept])
            run.kept.clear()
            return
        rope = self._rope(run)
        states = [self._input(run, loop) for loop in range(self.shape.loops)]
        for i, attention in enumerate(self._attentions()):
            shared: Shared = [(None, None)]
            taken = []
            for loop in range(self.shape.loops):
                with Capture([attention], ("q_proj", "k_proj", "plt_gate")) as capture:
                    states[loop], shared = self._loop(
                        loop, states[loop], shared, rope, run.key_mask_BS, layers=slice(i, i + 1)
                    )
                taken.append(self._taken(capture, 0, rope))
            yield self._branches(taken)

    def as_first(self, run: LoopRun, state_BSD: Tensor) -> Tensor:
        """The state as the loops hand it on, through the layers with plain causal attention: no shift, no embedding."""
        x = self.model.model.handed_on(state_BSD)
        shared: Shared = [(None, None)] * self.shape.layers
        return self._loop(0, x, shared, self._rope(run), run.key_mask_BS)[0]

    def loop_input(self, run: LoopRun, handed_on_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """a * E and b * z; the sequential baseline reads z alone."""
        if self.sequential:
            return handed_on_BSD.new_zeros(()), handed_on_BSD
        return self.model.model.loop_terms(run.raw[0], handed_on_BSD)

    def norm(self, raw_BSD: Tensor) -> Tensor:
        """The model's final norm."""
        normed: Tensor = self.model.model.norm(raw_BSD)
        return normed

    def logits(self, raw_BND: Tensor) -> Tensor:
        """The final norm and the head."""
        logits: Tensor = self.model.lm_head(self.norm(raw_BND))
        return logits

    def _attentions(self) -> list[Any]:
        return [layer.self_attn for layer in self.model.model.layers]

    def _rope(self, run: LoopRun) -> Rope:
        return self.model.model.rope(run.raw[0], mask=run.key_mask_BS)

    def _input(self, run: LoopRun, loop: int) -> Tensor:
        """What the loop (from 0) reads: [B, S, D]."""
        base = self.model.model
        if loop == 0:
            return run.raw[0]
        state = base.handed_on(run.raw[loop])
        if self.sequential:
            return state
        kept, handed_on = base.loop_terms(run.raw[0], base.shifted(state, loop, run.key_mask_BS))
        return kept + handed_on

    def _loop(
        self, loop: int, x: Tensor, shared: Shared, rope: Rope, mask: Tensor | None, layers: slice = slice(None)
    ) -> tuple[Tensor, Shared]:
        """One loop (from 0) through the layers -> its state, and the keys and values that later loops read."""
        new: Shared = []
        for layer, (keys, values) in zip(self.model.model.layers[layers], shared, strict=True):
            x, keys, values, _ = layer(
                x, keys, values, index=loop, rope=rope, mask=mask, past=0, local=self.model.config.plt_gswa
            )
            new.append((None, None) if self.sequential else (keys, values))
        return x, new

    def _taken(self, capture: Capture, layer: int, rope: Rope) -> tuple[Tensor, Tensor, Tensor | None]:
        """What one call of a layer attended with: post-RoPE q and k, and the gate, if it has one."""
        q, k = (heads(capture.take(layer, part)[0], self._size) for part in ("q_proj", "k_proj"))
        gates = capture.take(layer, "plt_gate")
        return *apply_rotary_pos_emb(q, k, *rope), gates[0] if gates else None

    def _branches(self, loops: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[LoopBranches]:
        scale = self._size**-0.5
        first_keys = loops[0][1]
        found: list[LoopBranches] = []
        for q, own_keys, gate in loops:
            if self.sequential or gate is None:
                found.append((Branch("global", q, own_keys if self.sequential else first_keys, scale),))
                continue
            window = self.model.config.window
            # In half precision 1 - gate rounds, and the mixture would miss 1 by up to 0.2%.
            gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
            found.append(
                (
                    Branch("global", q, first_keys, scale, None, gate),
                    Branch("local", q, own_keys, scale, window, 1 - gate),
                )
            )
        return found

    def _kept_bytes(self, ids_BS: Tensor) -> int:
        each = (self.shape.heads + self._key_heads) * self._size + self.shape.heads
        return ids_BS.numel() * each * self.shape.layers * self.shape.loops * int(self.dtype.itemsize)
