"""How much of vLLM's KV cache a PLT takes, in layers and blocks of pages.

    layers = PageLayers.of(config, groups=8, head_size=128)
    layers.full, layers.windows, layers.carry, layers.recent

Needs no vLLM: estimates use it, too. G key/value heads and K numbers of each are what a page of one layer has of a
token, twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from plt_model.configuration_plt import PLTConfig


@dataclass(frozen=True)
class PageLayers:
    """Layers of pages: `full` ones keep all tokens; `windows` and `carry` the last ones. `each` of the carry hold one
    pass' output; those beyond (R - 1) * each hold nothing, and keep vLLM from padding the full ones."""

    full: int
    windows: int
    carry: int
    each: int

    @classmethod
    def of(cls, config: PLTConfig, groups: int, head_size: int) -> PageLayers:
        """`groups`: G, of one rank. `head_size`: K, which a backend may have padded."""
        layers, later = config.num_hidden_layers, config.plt_num_loops - 1
        if config.plt_loop_mode == "sequential":
            return cls(layers * (later + 1), 0, 0, 0)
        windows = layers * later if config.plt_gswa else 0
        if not later or not config.one_trip_decode:
            return cls(layers, windows, 0, 0)
        each = ceil(config.hidden_size / (2 * groups * head_size))
        return cls(layers, windows, carry_layers(each * later, windows, layers), each)

    @property
    def recent(self) -> int:
        """Groups of `full` layers, vLLM's unit, that windows and carry make."""
        return ceil((self.windows + self.carry) / self.full)


def carry_layers(needed: int, windows: int, layers: int) -> int:
    """How many page layers the carry takes: `needed`, or more where that costs nothing and spares the shared cache.

    vLLM cuts all layers into groups of one size and pads the last group of each kind. With somewhat more windowed
    layers (windows and carry) than full ones it takes the larger number for that size, and pads the full layers, which
    alone grow with the context. With exactly as many, or half as many more, it does not.
    """
    if windows + needed <= layers:
        return layers - windows
    return max(needed, ceil(1.5 * layers) - windows)


def recent_blocks(window: int, block: int) -> int:
    """Blocks in which a request that decodes keeps its last `window` tokens and the new one, at most. (A window of 0
    keeps the token before: its carry is read.)"""
    return ceil(max(window, 1) / block) + 1
