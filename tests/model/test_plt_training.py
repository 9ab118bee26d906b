"""Training: the loss and every gradient, through all passes, against the differentiable reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plt_cases import (
    BACKENDS,
    MODES,
    assert_close,
    build,
    left_padded,
    row,
    tiny,
    tokens,
)
from reference import Reference, next_token_loss
from torch import Tensor

from plt_model import PLTCache, PLTConfig, PLTForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")

IGNORE = -100


def right_padded(rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """-> input_ids, attention_mask and labels (-100 at padding), each [B, longest]."""
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(r)) for r in rows]
    ids = torch.tensor([r + pad for r, pad in zip(rows, pads, strict=True)])
    mask = torch.tensor([[1] * len(r) + pad for r, pad in zip(rows, pads, strict=True)])
    return ids, mask, ids.masked_fill(mask == 0, IGNORE)


def expected_gradients(
    model: PLTForCausalLM, settings: dict[str, Any], ids: list[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's loss on one request and its gradients, by parameter."""
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters()}
    loss = next_token_loss(Reference(settings, weights).run(ids).logits, ids)
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    zero = {name: torch.zeros_like(w) for name, w in weights.items()}
    return loss.detach(), {n: zero[n] if g is None else g for n, g in zip(weights, found, strict=True)}


def gradients(model: PLTForCausalLM, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """The model's gradients, by parameter (zeros where a parameter takes no part)."""
    model.zero_grad()
    model(ids, **{"labels": ids, **inputs}).loss.backward()
    return {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in model.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, what=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_loss_is_cross_entropy(dtype: torch.dtype) -> None:
    model = build(tiny(), dtype=dtype)
    rows = [tokens(9), tokens(9, seed=1)]
    ids = torch.tensor(rows)
    with torch.no_grad():
        out = model(ids, labels=ids)
    by_row = [next_token_loss(logits.double(), ids) for logits, ids in zip(out.logits, rows, strict=True)]
    # transformers computes the loss in float32, whatever the model's type.
    assert out.loss.item() == pytest.approx(torch.stack(by_row).mean().item(), abs=2e-6)


def test_only_labelled_tokens_count() -> None:
    model = build(tiny())
    ids, labels = tokens(9), tokens(9)
    for t in (0, 3, 4, 8):
        labels[t] = IGNORE
    with torch.no_grad():
        out = model(row(ids), labels=row(labels))
    assert out.loss.item() == pytest.approx(next_token_loss(out.logits[0], labels).item(), abs=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [True, False], ids=["gate-hidden", "gate-query"])
@pytest.mark.parametrize("normalize", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("loops", [1, 2, 3], ids="R{}".format)
def test_every_gradient(loops: int, normalize: bool, gate: bool, backend: str) -> None:
    settings = tiny(plt_num_loops=loops, plt_normalize_per_loop=normalize, plt_gate_use_hidden_states=gate)
    model = build(settings, backend=backend).train()
    ids = tokens(9)
    _, expected = expected_gradients(model, settings, ids)
    found = gradients_in_float64(model, ids)
    assert_same_gradients(found, expected)
    if loops > 1:
        assert all(gradient.abs().max() > 1e-6 for gradient in found.values())


def gradients_in_float64(model: PLTForCausalLM, ids: list[int]) -> dict[str, Tensor]:
    """Through the logits, with a loss in float64 (the model's own loss is computed in float32)."""
    model.zero_grad()
    next_token_loss(model(row(ids)).logits[0], ids).backward()
    return {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [m for m in MODES if m != "plt"])
def test_every_gradient_of_the_baselines(mode: str, backend: str) -> None:
    settings = tiny(**MODES[mode], plt_num_loops=3, num_key_value_heads=1)
    model = build(settings, backend=backend).train()
    ids = tokens(9)
    assert_same_gradients(gradients_in_float64(model, ids), expected_gradients(model, settings, ids)[1])


@pytest.mark.parametrize("window", [0, 1, 64], ids="w{}".format)
def test_every_gradient_at_other_windows(window: int) -> None:
    settings = tiny(plt_window_size=[window, 0], tie_word_embeddings=True, attention_bias=True)
    model = build(settings, backend="sdpa").train()
    ids = tokens(9)
    assert_same_gradients(gradients_in_float64(model, ids), expected_gradients(model, settings, ids)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_across_slices(backend: str) -> None:
    """A request longer than a slice of queries: the fast backend against the plain one."""
    settings = tiny(plt_num_loops=2, num_hidden_layers=1, num_attention_heads=2, plt_window_size=[5, 0])
    model = build(settings, backend=backend).train()
    ids = tokens(530)
    assert_same_gradients(gradients_in_float64(model, ids), expected_gradients(model, settings, ids)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_models_own_loss_has_these_gradients(backend: str) -> None:
    settings = tiny()
    model = build(settings, backend=backend).train()
    ids = tokens(9)
    loss, expected = expected_gradients(model, settings, ids)
    found = gradients(model, row(ids))
    assert model(row(ids), labels=row(ids)).loss.item() == pytest.approx(loss.item(), abs=2e-6)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_changes_nothing(backend: str, mode: str, reentrant: bool) -> None:
    model = build(tiny(**MODES[mode]), backend=backend).train()
    ids = torch.tensor([tokens(9), tokens(9, seed=1)])
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.model.layers[0].input_layernorm.register_forward_hook(count)
    checkpointed = gradients(model, ids)
    handle.remove()
    assert calls == 2 * model.config.plt_num_loops, "the layers were not computed again on the way back"
    assert_same_gradients(checkpointed, plain)


def test_checkpointing_leaves_evaluation_alone() -> None:
    model = build(tiny(), backend="sdpa")
    ids = row(tokens(6))
    with torch.no_grad():
        expected = model(ids).logits
        model.gradient_checkpointing_enable()
        cache = PLTCache(model.config)
        pieces = [model(p, past_key_values=cache, use_cache=True).logits for p in (ids[:, :4], ids[:, 4:])]
    assert_close(torch.cat(pieces, dim=1), expected)


@pytest.mark.parametrize("gate", [True, False], ids=["gate-hidden", "gate-query"])
def test_a_new_model_blends_evenly(gate: bool) -> None:
    torch.manual_seed(1)
    model = PLTForCausalLM(PLTConfig(**tiny(plt_gate_use_hidden_states=gate))).eval()
    for name, weight in model.named_parameters():
        if "plt_gate.weight" in name or "plt_gate.bias" in name:
            assert not weight.any()
    with torch.no_grad():
        out = model(row(tokens(9)), output_loop_states=True)
    assert len(out.loop_gates) == 2
    assert all((gate == 0.5).all() for gate in out.loop_gates)


@pytest.mark.parametrize("gate", [True, False], ids=["gate-hidden", "gate-query"])
def test_a_gate_at_zero_learns(gate: bool) -> None:
    """Zero is no dead point: the gates of a new model have gradients."""
    torch.manual_seed(1)
    model = PLTForCausalLM(PLTConfig(**tiny(plt_gate_use_hidden_states=gate, initializer_range=0.5))).train()
    found = gradients(model, row(tokens(9)))
    for i in range(2):
        for part in ("weight", "bias"):
            assert found[f"model.layers.{i}.self_attn.plt_gate.{part}"].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "labels-alone"])
def test_right_padding_is_ignored(masked: bool, backend: str) -> None:
    """Causal attention never reads what follows, so a mask is not even needed."""
    model = build(tiny(), backend=backend).train()
    rows = [tokens(9), tokens(5, seed=1), tokens(2, seed=2)]
    ids, mask, labels = right_padded(rows)
    found = gradients(model, ids, labels=labels, attention_mask=mask if masked else None)
    model.zero_grad()
    count = sum(len(r) - 1 for r in rows)
    loss = sum(next_token_loss(model(row(r)).logits[0], r) * ((len(r) - 1) / count) for r in rows)
    loss.backward()
    for name, weight in model.named_parameters():
        assert_close(found[name], weight.grad, 1e-5, f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_is_ignored(backend: str) -> None:
    model = build(tiny(), backend=backend).train()
    rows = [tokens(9), tokens(5, seed=1)]
    ids, mask, where = left_padded(rows)
    model.zero_grad()
    logits = model(ids, attention_mask=mask, position_ids=where).logits
    (next_token_loss(logits[0], rows[0]) + next_token_loss(logits[1, 4:], rows[1])).backward()
    found = {n: w.grad.clone() for n, w in model.named_parameters()}
    model.zero_grad()
    sum(next_token_loss(model(row(r)).logits[0], r) for r in rows).backward()
    for name, weight in model.named_parameters():
        assert_close(found[name], weight.grad, what=f"gradient of {name}")


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    model = PLTForCausalLM(PLTConfig(**tiny())).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([tokens(16, seed=s) for s in range(4)])
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
