"""What is estimated: a model's shape, without its weights.

shape = Shape.named("7b")
shape.parameters, shape.at(2).kv_heads, shape.model(2)      # a model on the meta device: no memory is taken
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from plt_eval.bench.subjects import SHAPES
from plt_eval.errors import UserError
from plt_eval.models import resolve_models
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.loading import read_config

if TYPE_CHECKING:
    from pathlib import Path

ALIASES = {"40m": "medium"}
LEAST_PARAMETERS, MOST_PARAMETERS = 1e9, 1e12
"""What --params can be: smaller models are nothing like a small 7B."""

GATED = {"plt_gate_use_hidden_states": True}


@dataclass(frozen=True)
class Shape:
    """`name` says which; `loops` is the checkpoint's own count, where there is one; `fields` are PLTConfig's."""

    name: str
    fields: tuple[tuple[str, Any], ...]
    loops: int | None = None

    @classmethod
    def named(cls, name: str) -> Shape:
        """One of the shapes of `plt-eval bench`. Raises UserError."""
        key = ALIASES.get(name.lower(), name.lower())
        if key not in SHAPES:
            raise UserError(f"--shape {name}: expected one of {', '.join([*SHAPES, *ALIASES])}")
        return cls(key, _frozen({**SHAPES[key], **GATED}))

    @classmethod
    def checkpoint(cls, name: str) -> Shape:
        """That of a checkpoint folder or a bundled model. Raises UserError and CheckpointError."""
        resolved = resolve_models(name, None)[0]
        folder: Path = resolved.folder
        config = read_config(folder)
        if config.plt_loop_mode != "plt":
            raise UserError(f"--model {name}: it is the sequential baseline; only a PLT's costs are known")
        return cls.of_config(name, config, config.plt_num_loops)

    @classmethod
    def of_config(cls, name: str, config: PLTConfig, loops: int | None = None) -> Shape:
        """That of a configuration, whatever its loop count."""
        known = PLTConfig().to_dict()
        fields = {key: value for key, value in config.to_dict().items() if key in known}
        for noise in ("architectures", "transformers_version", "dtype", "model_type", "plt_num_loops", "rope_theta"):
            fields.pop(noise, None)
        return cls(name, _frozen(fields), loops)

    @classmethod
    def sized(cls, parameters: float) -> Shape:
        """The released 7B made smaller or larger, in all its measures. Raises UserError."""
        if not LEAST_PARAMETERS <= parameters <= MOST_PARAMETERS:
            raise UserError(
                f"--params {parameters:g}: expected {LEAST_PARAMETERS:g} to {MOST_PARAMETERS:g}; smaller ones by "
                "--shape or --model"
            )
        base = PLTConfig()
        scale = (parameters / Shape.named("7b").parameters) ** (1 / 3)
        heads = 8 * max(1, round(5 * scale))
        hidden = 128 * heads
        fields = {
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": 128 * round(5.4 * hidden / 128),
            **GATED,
        }
        one, two = (cls("", _frozen({**fields, "num_hidden_layers": count})).parameters for count in (1, 2))
        layers = max(1, round((parameters - one) / (two - one)) + 1)
        named = f"{parameters / 1e9:.3g}B, {layers} layers of width {hidden} and vocabulary {base.vocab_size}"
        return cls(named, _frozen({**fields, "num_hidden_layers": layers}))

    def at(self, loops: int) -> PLTConfig:
        """The configuration at a loop count."""
        return _config(self.fields, loops)

    def model(self, loops: int) -> PLTForCausalLM:
        """The model at a loop count, with shapes and no numbers."""
        return _model(self.fields, loops)

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.model(1).parameters())

    @property
    def layer_parameters(self) -> int:
        """Of all layers: what every pass multiplies with."""
        return sum(weight.numel() for weight in self.model(2).model.layers.parameters())


def _frozen(fields: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, _tuple(value)) for key, value in fields.items()))


def _tuple(value: Any) -> Any:
    if isinstance(value, dict):
        return ("{}", *((key, _tuple(inner)) for key, inner in sorted(value.items())))
    return tuple(value) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple):
        if value and value[0] == "{}":
            return {key: _thawed(inner) for key, inner in value[1:]}
        return list(value)
    return value


@cache
def _config(fields: tuple[tuple[str, Any], ...], loops: int) -> PLTConfig:
    return PLTConfig(**{key: copy.deepcopy(_thawed(value)) for key, value in fields}, plt_num_loops=loops)


@cache
def _model(fields: tuple[tuple[str, Any], ...], loops: int) -> PLTForCausalLM:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # two bytes: whoever needs others multiplies
    try:
        with torch.device("meta"):
            model: PLTForCausalLM = PLTForCausalLM(_config(fields, loops)).eval()
    finally:
        torch.set_default_dtype(before)
    return model


__all__ = ["ALIASES", "LEAST_PARAMETERS", "MOST_PARAMETERS", "Shape"]
