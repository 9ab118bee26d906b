"""Tiny checkpoints with visible weights, and the texts whose logits plt_model has computed (make_fixtures.py).

Needs no vLLM: the script that makes the fixtures runs in the main environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plt_model import PLTConfig, PLTForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "checkpoint"
"""The fixtures' weights, those of a model with four loops: with fewer, it is the same model cut short."""

LOOPS = (1, 2, 3, 4)

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "plt_num_loops": 4,
    "plt_window_size": [8, 0],
    "plt_emb_scale": 0.8,
    "plt_hidden_scale": 0.6,
    "plt_normalize_per_loop": True,
    "plt_gate_use_hidden_states": True,
    "eos_token_id": 2,
}


def weights(settings: Mapping[str, Any], seed: int = 0, gain: float = 1.1) -> dict[str, Tensor]:
    """Random weights, bf16 numbers in float32, large enough in every part (gates, biases and norms too) for a slip to
    show, and not so large that float32's rounding would grow over the passes: plt_model itself is off by 5e-6."""
    model = PLTForCausalLM(PLTConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif noise.dim() == 2 and "embed" not in name:
            noise = gain * noise / noise.shape[1] ** 0.5
        elif "embed" in name and settings.get("tie_word_embeddings"):
            noise = 0.3 * noise  # they are the head's weights, too: logits of its usual size
        made[name] = noise.bfloat16().float()
    return made


def save(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> PLTForCausalLM:
    """Write a checkpoint in bf16, which is exact -> the model that it holds, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    config = PLTConfig(**settings, architectures=["IQuestPLTCoderForCausalLM"], dtype="float32")
    config.save_pretrained(folder)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return reference(folder)


def reference(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> PLTForCausalLM:
    """plt_model's own model of a checkpoint."""
    config = PLTConfig.from_pretrained(folder, **overrides)
    return PLTForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="eager").eval()


def logits_of(model: PLTForCausalLM, ids: list[int]) -> Tensor:
    """[S, V], in one pass over the whole text."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


@dataclass(frozen=True)
class Text:
    """A prompt, its greedy continuation at some loop count, and the logits [S-1, V] of every position but the last."""

    name: str
    prompt: list[int]
    continuation: list[int]
    logits: Tensor = field(repr=False)

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.continuation


def texts(loops: int) -> dict[str, Text]:
    told = json.loads((FIXTURES / "texts.json").read_text())
    logits = load_file(FIXTURES / "logits.safetensors")
    return {
        name: Text(name, prompt, told["continuations"][str(loops)][name], logits[f"{loops}.{name}"])
        for name, prompt in told["prompts"].items()
    }


TOLERANCE = 5e-5
"""Largest difference allowed in a logit, in float32."""

VISIBLE = 1e-2
"""A mistake must move a logit by more than this, or the tests could not see it."""


def off(logits: Tensor, expected: Tensor) -> Tensor:
    """Largest absolute difference at each position; infinite where it is not a number."""
    assert logits.shape == expected.shape, f"logits {tuple(logits.shape)} against {tuple(expected.shape)}"
    return (logits - expected).abs().nan_to_num(float("inf")).amax(-1)


def assert_exact(
    what: str, prompt: int, first: int, logits: Tensor, expected: Tensor, tolerance: float = TOLERANCE
) -> float:
    """Logits of positions from `first` on, of a text whose prompt has `prompt` tokens -> how far off the worst is."""
    errors = off(logits, expected)
    wrong = [i for i, error in enumerate(errors.tolist()) if error > tolerance]
    if wrong:
        position = first + wrong[0]
        where = "in the prompt" if position < prompt - 1 else f"decode step {position - prompt + 1}"
        raise AssertionError(
            f"{what}: {len(wrong)} of {len(errors)} positions are off, first {position} ({where}) by "
            f"{errors[wrong[0]]:.3g}, at worst {first + int(errors.argmax())} by {errors.max():.3g}; "
            f"allowed {tolerance:g}"
        )
    return float(errors.max())


class Said(Protocol):
    """What an engine answered: tokens, and logits [positions, V] from position `first` on."""

    tokens: list[int]
    logits: Tensor
    first: int


class Measured:
    """Compares what an engine said with what plt_model computes, and keeps the largest error of each scenario."""

    def __init__(self, errors: dict[str, dict[int, float]]) -> None:
        self.errors = errors

    def exact(self, scenario: str, loops: int, said: Said, text: Text, prompt: int = 0) -> None:
        """A text of the fixtures, or the rest of it after a `prompt` of other length than its own."""
        prompt = prompt or len(text.prompt)
        expected = text.logits[said.first : said.first + len(said.logits)]
        what = f"{scenario}, R={loops}, text {text.name!r}"
        error = assert_exact(what, prompt, said.first, said.logits, expected)
        rest = text.ids[prompt : prompt + len(said.tokens)]
        assert prompt < len(text.prompt) or said.tokens == rest, f"{what}: said {said.tokens}, not {rest}"
        self.keep(scenario, loops, error)

    def keep(self, scenario: str, loops: int, error: float) -> None:
        by_loops = self.errors.setdefault(scenario, {})
        by_loops[loops] = max(error, by_loops.get(loops, 0.0))
