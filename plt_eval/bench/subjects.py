"""The models that are timed: a named shape with random weights or a checkpoint, at several loop counts.

All loop counts run the same tensors (a PLT's weights do not depend on its loops), so that no model is in a cache that
another is not, and a 7B shape is held once.

    family = Family.random("medium", dtype=torch.bfloat16, device=torch.device("cpu"), seed=0)
    family.model(2), family.model(4), family.llama()
    family.wide()                       # the same in float32: what the gates compare with
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from plt_eval.errors import UserError
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.attention_plt import chosen
from plt_model.loading import load_model

Mode = Literal["plt", "sequential"]

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "plt_window_size": [32, 0],
    },
    "small": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "plt_window_size": [16, 0],
    },
    "medium": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "plt_window_size": [64, 0],
    },
    "7b": {},
}
"""By name, what differs from PLTConfig's own shape, which is the released 7B."""


class Family:
    """One set of weights at any loop count. `name` says which."""

    def __init__(self, name: str, base: PLTForCausalLM) -> None:
        self.name, self._base = name, base
        self._models: dict[tuple[int, Mode], PLTForCausalLM] = {}
        self._wide: Family | None = None

    @classmethod
    def random(cls, shape: str, *, dtype: torch.dtype, device: torch.device, seed: int) -> Family:
        """Random weights of a named shape, large enough in every part (gates and norms too) for a slip to show."""
        config = PLTConfig(**SHAPES[shape], plt_gate_use_hidden_states=True, plt_emb_scale=0.8, plt_hidden_scale=0.6)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                model = PLTForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        _draw(model, seed)
        return cls(f"random {shape}", model)

    @classmethod
    def checkpoint(cls, folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> Family:
        """A checkpoint's weights; `dtype` None is its own. Raises CheckpointError, and UserError for one whose passes
        take a trip each, which none of this is about."""
        model = load_model(folder, dtype=dtype, device=device)
        if not model.config.one_trip_decode:
            raise UserError(f"--model {folder}: it is a baseline (loop mode or no shift) that takes a trip a pass")
        return cls(folder.resolve().name, model)

    @property
    def config(self) -> PLTConfig:
        config: PLTConfig = self._base.config
        return config

    @property
    def dtype(self) -> torch.dtype:
        return self._base.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._base.lm_head.weight.device

    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(weight.numel() for weight in self._base.parameters())

    def attention(self, name: str | None) -> str:
        """Let all models that are made from now on use this implementation (None: the fastest here), and say which it
        is. Raises UserError for one that this machine or model cannot run."""
        try:
            implementation, _ = chosen(name or "auto", self.device, self.dtype)
            self._base.set_attn_implementation(implementation)
            with torch.no_grad():
                self.model(2)(torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        except (ValueError, ImportError, NotImplementedError) as error:
            raise UserError(f"--attention {name}: {error}") from error
        self._models.clear()
        return str(self._base.config._attn_implementation or "sdpa")

    def model(self, loops: int, *, mode: Mode = "plt") -> PLTForCausalLM:
        """The model at a loop count, on the family's tensors; the same object each time."""
        key = (loops, mode)
        if key not in self._models:
            self._models[key] = at_loops(self._base, loops, mode)
        return self._models[key]

    def wide(self) -> Family:
        """The same weights in float32 (the family itself where it is that, or wider)."""
        if self.dtype in (torch.float32, torch.float64):
            return self
        if self._wide is None:
            self._wide = Family(self.name, copy.deepcopy(self._base).float())
        return self._wide

    def forget_wide(self) -> None:
        """Free the float32 weights, once nothing needs them."""
        self._wide = None

    def llama(self) -> LlamaForCausalLM:
        """transformers' own Llama on the family's tensors: what a PLT of one loop is."""
        return as_llama(self._base)


def at_loops(model: PLTForCausalLM, loops: int, mode: Mode = "plt") -> PLTForCausalLM:
    """A model that shares every tensor with `model` and runs `loops` passes."""
    other: PLTForCausalLM = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    other.config.plt_num_loops = loops
    other.config.plt_loop_mode = mode
    other.generation_config.eos_token_id = None  # a text ends where the bench says
    other.generation_config.pad_token_id = 0
    return other


def as_llama(model: PLTForCausalLM) -> LlamaForCausalLM:
    """See Family.llama."""
    config = model.config
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters attention_bias mlp_bias"
    )
    mapped = LlamaConfig(**{name: getattr(config, name) for name in same.split()}, pad_token_id=0, eos_token_id=None)
    mapped._attn_implementation = "sdpa"
    with torch.device("meta"):
        llama = LlamaForCausalLM(mapped)
    tensors = {name: weight for name, weight in model.state_dict().items() if ".plt_gate." not in name}
    llama.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        llama.tie_weights()
    llama.model.rotary_emb = LlamaRotaryEmbedding(mapped).to(model.lm_head.weight.device)
    llama.generation_config.eos_token_id = None
    llama.generation_config.pad_token_id = 0
    return llama.eval()


def prompt(count: int, vocabulary: int, *, seed: int, batch: int = 1) -> Tensor:
    """Random token ids [batch, count], the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (batch, count), generator=generator)


@torch.no_grad()
def _draw(model: nn.Module, seed: int) -> None:
    """Normal numbers: matrices keep the size of what they multiply, norms stand around 1."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(generator=generator)
        if "norm" in name:
            weight.mul_(0.1).add_(1)
        elif weight.dim() == 2 and "embed" not in name:
            weight.mul_(weight.shape[1] ** -0.5)
