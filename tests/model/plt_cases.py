"""What the model's tests share: the fixtures, tiny random models, and comparisons.

A model under test is described by `settings`, a plain mapping with the keys of a config.json: the same mapping makes
the real model (through PLTConfig) and the slow reference (which knows nothing of PLTConfig).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from reference import Reference, Trace
from safetensors.torch import load_file
from torch import Tensor, nn

from plt_model import PLTConfig, PLTForCausalLM

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "plt"
FIXTURE_NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
BACKENDS = ("eager", "sdpa")

EXACT = 1e-9
"""Largest difference allowed in float64."""

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name),
    reason="needs a C++ compiler",
)

SHIPPED = 5e-5
"""Largest difference allowed from the fixtures in float32."""

VISIBLE = 1e-2
"""A mistake must move the logits by more than this, or the tests could not see it."""

MODES: dict[str, dict[str, Any]] = {
    "plt": {},
    "sequential": {"plt_loop_mode": "sequential"},
    "no-shift": {"plt_clp_shift": False},
    "no-gswa": {"plt_gswa": False},
    "no-shift-no-gswa": {"plt_clp_shift": False, "plt_gswa": False},
}

SHAPE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "plt_num_loops": 3,
    "plt_window_size": [3, 0],
    "plt_emb_scale": 0.8,
    "plt_hidden_scale": 0.6,
    "plt_gate_use_hidden_states": True,
    "eos_token_id": 2,
}


def quick(examples: int) -> hypothesis_settings:
    """Hypothesis, the same examples every time."""
    return hypothesis_settings(max_examples=examples, derandomize=True, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Fixture:
    """A released-format checkpoint with what the vendor's code computed from it."""

    name: str
    folder: Path
    config: dict[str, Any]
    ids: list[int]
    prefill: int | None
    weights: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def chunks(self) -> list[int]:
        """Where pieces begin: every token after the prefill, or three arbitrary places."""
        return [17, 20, 21] if self.prefill is None else list(range(self.prefill, len(self.ids)))


def fixture(name: str) -> Fixture:
    folder = FIXTURES / name
    case = json.loads((folder / "case.json").read_text())
    return Fixture(
        name=name,
        folder=folder,
        config=json.loads((folder / "config.json").read_text()),
        ids=case["input_ids"],
        prefill=case["prefill"],
        weights=load_file(folder / "model.safetensors"),
        expected=load_file(folder / "expected.safetensors"),
    )


def tiny(**overrides: Any) -> dict[str, Any]:
    """Settings of a tiny model."""
    return {**SHAPE, **overrides}


def build(
    settings: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float64, backend: str = "eager"
) -> PLTForCausalLM:
    """A model with random weights, large enough in every part (gates and norms too) for a slip to show."""
    model = PLTForCausalLM(PLTConfig(**settings)).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif noise.dim() == 2 and "embed" not in name:
                noise = 1.5 * noise / noise.shape[1] ** 0.5
            weight.copy_(noise)
    model.set_attn_implementation(backend)
    return model


def reference_of(model: PLTForCausalLM, settings: Mapping[str, Any], mistake: str | None = None) -> Reference:
    """The slow reference with the model's weights."""
    return Reference(settings, {name: w.detach() for name, w in model.named_parameters()}, mistake)


def tokens(count: int, seed: int = 0, vocabulary: int = SHAPE["vocab_size"]) -> list[int]:
    """A random request (no token 0, 1 or 2: those are for padding, beginning and end)."""
    draw = random.Random(f"{count} {seed}")
    return [draw.randrange(3, vocabulary) for _ in range(count)]


def row(ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)])


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """-> input_ids, attention_mask and position_ids, each [B, longest]."""
    longest = max(len(r) for r in rows)
    ids = torch.tensor([[pad] * (longest - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, positions(mask)


def positions(mask: Tensor) -> Tensor:
    """Positions within each request, counted from its first token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite when it is not a number."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} against {tuple(expected.shape)}"
    if not found.numel():
        return 0.0
    return (found.detach().double() - expected.detach().double()).abs().nan_to_num(float("inf")).max().item()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = EXACT, what: str = "") -> None:
    difference = gap(found, expected)
    assert difference <= tolerance, f"{what}: differs by {difference:.3g}, allowed {tolerance:.3g}"


def assert_same_run(out: Any, trace: Trace, tolerance: float = EXACT, *, row: int = 0, skip: int = 0) -> None:
    """All that a forward pass with output_loop_states says about one row, after `skip` padded positions."""
    assert_close(out.logits[row, skip:], trace.logits, tolerance, "logits")
    assert len(out.loop_states) == len(out.loop_normed) == len(trace.states)
    for r, (raw, normed) in enumerate(zip(trace.states, trace.normed, strict=True)):
        assert_close(out.loop_states[r][row, skip:], raw, tolerance, f"loop_states of pass {r}")
        assert_close(out.loop_normed[r][row, skip:], normed, tolerance, f"loop_normed of pass {r}")


def assert_same_gates(out: Any, trace: Trace, tolerance: float = EXACT, *, row: int = 0, skip: int = 0) -> None:
    assert len(out.loop_gates) == len(trace.gates)
    for r, gates in enumerate(trace.gates):
        expected = torch.stack(gates).transpose(1, 2)  # [L, H, S]
        assert_close(out.loop_gates[r][:, row, :, skip:], expected, tolerance, f"gates of pass {r + 1}")


@contextmanager
def counted_calls(model: PLTForCausalLM) -> Iterator[dict[str, int]]:
    """Counts, while open: calls of "layer", and the most calls of any one weight matrix in the layers ("matrix")."""
    counts = {"layer": 0, "matrix": 0}
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, _args: Any, _output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        counts["matrix"] = max(n for m, n in calls.items() if isinstance(m, nn.Linear)) if calls else 0
        counts["layer"] = sum(n for m, n in calls.items() if m in layers)

    layers = set(model.model.layers)
    watched = [m for layer in layers for m in layer.modules() if m is layer or isinstance(m, nn.Linear)]
    handles = [module.register_forward_hook(count) for module in watched]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
