"""What a checkpoint may say otherwise than the fixtures' does, against plt_model in this environment, in float64."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_cases import SHAPE, Measured, assert_exact, logits_of, reference, save, weights
from vllm_engine import BLOCK, Answer, Ask, Engine, opened

from plt_model import PLTForCausalLM

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "beta_fast": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.5,
    "truncate": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # Several at once by default, each alone in slow.
    "state before the norm, gate on queries, biases, small heads, YaRN": {
        "plt_num_loops": 3,
        "plt_normalize_per_loop": False,
        "plt_hidden_scale": 0.1,
        "plt_gate_use_hidden_states": False,
        "attention_bias": True,
        "head_dim": 16,
        "rope_parameters": YARN,
    },
    "no scale of the embeddings, one key head, tied, wide window, odd heads, Llama 3's RoPE": {
        "plt_num_loops": 4,
        "plt_emb_scale": None,
        "plt_hidden_scale": 0.4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "plt_window_size": [40, 0],
        "head_dim": 48,
        "rope_parameters": LLAMA3,
    },
    "state before the norm": {"plt_normalize_per_loop": False, "plt_hidden_scale": 0.1},
    "no scales": {"plt_emb_scale": None, "plt_hidden_scale": None},
    "gate on queries": {"plt_gate_use_hidden_states": False},
    "gate on queries, padded heads": {"plt_gate_use_hidden_states": False, "head_dim": 48},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "heads of 16": {"head_dim": 16},
    "heads of 48": {"head_dim": 48},
    "heads of 64": {"head_dim": 64},
    "one key head": {"num_key_value_heads": 1},
    "a key head for each": {"num_key_value_heads": 4},
    "window of the token itself": {"plt_window_size": [0, 0]},
    "window of a block less one": {"plt_window_size": [BLOCK - 1, 0]},
    "window of two blocks": {"plt_window_size": [2 * BLOCK, 0]},
    "six loops": {"plt_num_loops": 6},
    "a wide model of one layer": {"hidden_size": 160, "num_hidden_layers": 1},
    "five layers": {"num_hidden_layers": 5},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "YaRN": {"rope_parameters": YARN},
    "Llama 3's RoPE": {"rope_parameters": LLAMA3},
    "dynamic RoPE": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "sequential": {"plt_loop_mode": "sequential"},
    "no shift": {"plt_clp_shift": False},
    "no local branch": {"plt_gswa": False},
    "no shift, no local branch": {"plt_clp_shift": False, "plt_gswa": False},
}
TOGETHER = 2
"""How many of them run by default."""


def texts_of(lengths: tuple[int, ...], vocabulary: int = SHAPE["vocab_size"]) -> list[list[int]]:
    draw = random.Random(str(lengths))
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def compare(what: str, model: PLTForCausalLM, prompt: list[int], answer: Answer) -> float:
    expected = logits_of(model, (prompt + answer.tokens)[:-1])
    error = assert_exact(what, len(prompt), answer.first, answer.logits, expected[answer.first :])
    assert answer.tokens == answer.logits[len(prompt) - 1 - answer.first :].argmax(-1).tolist()
    return error


def check(what: str, engine: Engine, model: PLTForCausalLM, measured: Measured) -> None:
    """Prompts and decodes mixed, in pieces; then prefix hits."""
    prompts = texts_of((70, 1, 35, 12))
    asks = [Ask(prompt, new=10, at=3 * i) for i, prompt in enumerate(prompts)]
    answers = engine.run(*asks, budget=30)
    assert any(step.mixed for step in engine.steps)
    again = engine.go_on(Ask(prompts[0], new=10, whole=False), Ask(prompts[2], new=10, whole=False))
    assert [answer.cached for answer in again] == [2 * BLOCK, BLOCK]
    for prompt, answer in [*zip(prompts, answers, strict=True), (prompts[0], again[0]), (prompts[2], again[1])]:
        error = compare(f"{what}, prompt of {len(prompt)}, {answer.cached} cached", model, prompt, answer)
        measured.keep("variants", model.config.plt_num_loops, error)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if i >= TOGETHER else []) for i, n in enumerate(VARIANTS)]
)
def test_variant(name: str, tmp_path: Path, measured: Measured) -> None:
    settings = {**SHAPE, "plt_num_loops": 3, **VARIANTS[name]}
    model = save(settings, weights(settings, seed=len(name), gain=0.9), tmp_path).double()
    with opened(tmp_path, {"max_num_seqs": 4}) as engine:
        check(name, engine, model, measured)


def test_older_names_of_the_gate_and_loops_from_the_config(tmp_path: Path, measured: Measured) -> None:
    settings = {**SHAPE, "plt_num_loops": 2}
    model = save(settings, weights(settings), tmp_path).double()
    file = tmp_path / "model.safetensors"
    renamed = {name.replace("plt_gate", "loop_gate_proj"): tensor for name, tensor in load_file(file).items()}
    assert any("loop_gate_proj" in name for name in renamed)
    save_file(renamed, file, {"format": "pt"})
    with opened(tmp_path) as engine:
        check("older names of the gate", engine, model, measured)


def test_bfloat16_is_as_near_as_plt_models_own(tmp_path: Path) -> None:
    settings = {**SHAPE, "plt_num_loops": 2}
    truth = save(settings, weights(settings), tmp_path).double()
    rounded = reference(tmp_path, torch.bfloat16)
    prompts = texts_of((70, 35))
    with opened(tmp_path, {"dtype": "bfloat16"}) as engine:
        answers = engine.run(*[Ask(prompt, new=4, at=i) for i, prompt in enumerate(prompts)], budget=40)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = (prompt + answer.tokens)[:-1]
        exact = logits_of(truth, ids)
        ours, its = ((logits - exact).abs() for logits in (logits_of(rounded, ids), answer.logits))
        assert 1e-4 < its.mean() < 1.5 * ours.mean()
        assert its.max() < 2 * ours.max()
