"""What one trip for all passes is measured against: the same step, one trip a pass.

    step = DecodeStep(model)
    SequentialTrips(step)(cache, tokens_N, reach)      # the same PLT and the same StaticCache, R trips
    looped = LoopedTransformer(step)                   # the standard looped transformer on the same weights
    looped(looped.cache(slots=1, capacity=512), tokens_N, reach)

Both run the packed layers of the step that they are given, so that a ratio to it is of the trips alone. Nothing here
serves requests: `plt-eval bench` does the timing, and the tests hold the steps against the model.

    N slots   R passes   V vocabulary
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..cache_plt import PLTCache
from ..configuration_plt import PLTConfig
from .cache import StaticCache
from .step import DecodeStep


class SequentialTrips(nn.Module):
    """A PLT's new token in R trips, pass after pass: the logits and the cache of `step`, R times its reads."""

    def __init__(self, step: DecodeStep) -> None:
        super().__init__()
        self.step, self.config, self.model = step, step.config, step.model

    @torch.no_grad()
    def forward(self, cache: StaticCache, tokens_N: Tensor, reach: int) -> Tensor:
        """As DecodeStep.forward -> logits [N, V]."""
        base, slots = self.model.model, len(tokens_N)
        positions = cache.lengths[:slots]
        embeds = base.embed_tokens(tokens_N)[:, None]
        carry = cache.carry[:slots]
        x = embeds
        for loop in range(self.config.plt_num_loops):
            if loop:
                state, x = x, sum(base.loop_terms(embeds, carry[:, loop - 1 : loop]))
                carry[:, loop - 1 : loop].copy_(base.handed_on(state))
            x = _trip(self.step, cache, x, positions, reach, loop)
        logits: Tensor = self.step.head(base.norm(x[:, -1]))
        positions += 1
        return logits


class LoopedCache:
    """R full caches, one a pass: what the standard looped transformer keeps. `lengths` [N] as in StaticCache."""

    def __init__(self, config: PLTConfig, passes: list[StaticCache]) -> None:
        self.config, self.passes = config, passes
        self.slots, self.capacity = passes[0].slots, passes[0].capacity

    @property
    def lengths(self) -> Tensor:
        return self.passes[0].lengths

    def adopt(self, slot: int, read: PLTCache) -> None:
        """Put in what a model of the sequential loop mode has read of one sequence. Raises ValueError as
        StaticCache.adopt does."""
        layers = len(self.passes[0].keys)
        for loop, held in enumerate(self.passes):
            one = PLTCache(self.config)
            one.layers = read.layers[loop * layers : (loop + 1) * layers]
            held.adopt(slot, one)

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part, as StaticCache.nbytes."""
        parts = [held.nbytes() for held in self.passes]
        return {name: sum(part[name] for part in parts) for name in parts[0]}


class LoopedTransformer(nn.Module):
    """The standard looped transformer (plt_loop_mode "sequential") on the weights of `step`: each pass reads the one
    before it at the same token, and keeps all its own keys and values."""

    def __init__(self, step: DecodeStep) -> None:
        super().__init__()
        self.step, self.model = step, step.model
        self.config: PLTConfig = copy.deepcopy(step.config)
        self.config.plt_loop_mode = "sequential"

    def cache(self, *, slots: int, capacity: int) -> LoopedCache:
        """An empty cache of the weights' type, where they are."""
        one = copy.deepcopy(self.config)
        one.plt_num_loops = 1
        weight = self.model.lm_head.weight
        return LoopedCache(
            one,
            [
                StaticCache(one, slots=slots, capacity=capacity, dtype=weight.dtype, device=weight.device)
                for _ in range(self.config.plt_num_loops)
            ],
        )

    @torch.no_grad()
    def forward(self, cache: LoopedCache, tokens_N: Tensor, reach: int) -> Tensor:
        """As DecodeStep.forward -> logits [N, V]."""
        base, slots = self.model.model, len(tokens_N)
        positions = cache.lengths[:slots]
        x = base.embed_tokens(tokens_N)[:, None]
        for loop, held in enumerate(cache.passes):
            x = _trip(self.step, held, base.handed_on(x) if loop else x, positions, reach, 0)
        logits: Tensor = self.step.head(base.norm(x[:, -1]))
        positions += 1
        return logits


def _trip(step: DecodeStep, cache: StaticCache, x_N1D: Tensor, positions: Tensor, reach: int, loop: int) -> Tensor:
    """One pass through the layers -> [N, 1, D]."""
    cos, sin = step.rope(x_N1D, positions, cache.capacity)
    places = step.places(cache, positions, reach)
    for i, layer in enumerate(step.layers):
        held = (cache.keys[i], cache.values[i], cache.ring_keys[i], cache.ring_values[i])
        x_N1D = step.run_layer(layer, x_N1D, cos, sin, held, places, loop)
    return x_N1D
