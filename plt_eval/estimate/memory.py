"""Bytes: what weights, sequences and a training process hold.

The in-process engine's slots are those of plt_model.decode (plt_eval.bench.floor has their bytes). vLLM keeps pages of
BLOCK tokens of one layer, as plt_model.vllm.layout lays them out: those of all tokens, and those of the last ones, for
windows and carry.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch

from plt_eval.bench.floor import kv_bytes, weight_bytes
from plt_eval.estimate.shapes import Shape
from plt_model import PLTConfig
from plt_model.training.recipe import Recipe
from plt_model.vllm.layout import PageLayers, recent_blocks

Engine = Literal["session", "vllm"]
GIB = 1 << 30
BLOCK = 16
"""Tokens of a page: vLLM's default on a GPU."""

USABLE = {"session": 0.8, "vllm": 0.92}
"""Of the memory that weights leave free (session: plt_eval.engines.hf_session), or of all memory (vLLM's default)."""

SPARE = 2 * GIB
"""What reading prompts takes besides, on a GPU: 0.7 GiB above the model were measured for chunks of 2,048 tokens at the
7B shape, cache included, and CUDA with its libraries holds some hundred MiB."""

SAVED = {"float32": 1.37, "bf16": 1.54}
"""What autograd keeps of a layer's pass, over the widths that `_layer_width` adds up: counted with saved-tensor hooks
on the 39M shape on a CPU, R = 2 and 3."""


@dataclass(frozen=True)
class KVMemory:
    """Bytes of one sequence: pass 0's keys and values, the windows of later passes, carried states, and what pages
    leave unused (0 without pages)."""

    shared: int
    windows: int
    carry: int
    unused: int = 0

    @property
    def total(self) -> int:
        return self.shared + self.windows + self.carry + self.unused


def element_size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def weights_on_disk(shape: Shape, dtype: str) -> int:
    """All weights, once."""
    return shape.parameters * element_size(dtype)


def weights_read(shape: Shape, loops: int, dtype: str) -> int:
    """What one decoding step reads of them."""
    return weight_bytes(shape.model(loops)) * element_size(dtype) // 2


def slot(config: PLTConfig, context: int, dtype: str) -> KVMemory:
    """One sequence of the in-process engine."""
    return KVMemory(**kv_bytes(config, slots=1, context=context, dtype=getattr(torch, dtype)))


def pages(config: PLTConfig, context: int, dtype: str, tensor_parallel: int = 1, block: int = BLOCK) -> KVMemory:
    """One sequence of vLLM on each of its GPUs, while it decodes. `block`: tokens of a page."""
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    heads = max(1, config.num_key_value_heads // tensor_parallel)
    page = block * 2 * heads * config.head_dim * element_size(dtype)
    layers, blocks = PageLayers.of(config, heads, config.head_dim), ceil(context / block)
    recent = min(blocks, recent_blocks(config.window, block)) * page
    carry = layers.each * (config.plt_num_loops - 1)
    return KVMemory(
        shared=layers.full * blocks * page,
        windows=layers.windows * recent,
        carry=carry * recent,
        unused=(layers.recent * layers.full - layers.windows - carry) * recent,
    )


def sequence(engine: Engine, config: PLTConfig, context: int, dtype: str, tensor_parallel: int = 1) -> KVMemory:
    """One sequence on one GPU."""
    if engine == "session":
        return slot(config, context, dtype)
    return pages(config, context, dtype, tensor_parallel)


def sequences_that_fit(engine: Engine, memory: float, weights: int, one: KVMemory) -> int:
    """How many sequences of that size one GPU of `memory` bytes holds beside `weights` bytes; 0 where not even the
    weights fit."""
    left = (memory * USABLE[engine] if engine == "vllm" else memory) - weights - SPARE
    if engine == "session":
        left *= USABLE[engine]
    return max(0, int(left // one.total))


# --- training -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process: its share of weights, gradients and the optimizer's two moments (float32); copies of
    weights and gradients; activations; logits and the loss."""

    state: int
    copies: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.state + self.copies + self.activations + self.logits


def training_memory(shape: Shape, recipe: Recipe, loops: int, world: int, *, sharded: bool) -> TrainingMemory:
    """Of one of `world` processes."""
    config = shape.at(loops)
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    narrow = config.num_key_value_heads * config.head_dim
    half = recipe.precision == "bf16"
    size, parameters, layers = 2 if half else 4, shape.parameters, config.num_hidden_layers
    share = max(1, recipe.batch // world)
    tokens = recipe.sequence_length * min(share, recipe.micro_batch or share)
    if sharded:  # the root's embedding and head stay gathered; of the layers one in use and the next, and a gradient
        copies = size * (parameters - shape.layer_parameters) + 3 * size * shape.layer_parameters // layers
    else:  # autocast keeps its weights until they are used backward; DDP has gradients a second time, in buckets
        copies = 2 * parameters * half + 4 * parameters * (world > 1)
    one_layer = int(_layer_width(config) * SAVED["bf16" if half else "float32"])
    if recipe.gradient_checkpointing:
        kept = loops * (layers + 2) * config.hidden_size + (loops > 1) * layers * 2 * narrow + one_layer
    else:
        kept = loops * layers * one_layer
    logits = config.vocab_size * ((2 if half else 0) + 4 + 4)
    return TrainingMemory(16 * parameters // (world if sharded else 1), copies, tokens * size * kept, tokens * logits)


def _layer_width(config: PLTConfig) -> int:
    """Numbers a token that a layer's pass makes: queries and the heads' output, keys and values, four in the
    feed-forward part, and about six of the model's width."""
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    wide, narrow = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return 2 * wide + 2 * narrow + 4 * config.intermediate_size + 6 * config.hidden_size


__all__ = [
    "BLOCK",
    "GIB",
    "Engine",
    "KVMemory",
    "TrainingMemory",
    "element_size",
    "pages",
    "sequence",
    "sequences_that_fit",
    "slot",
    "training_memory",
    "weights_on_disk",
    "weights_read",
]
