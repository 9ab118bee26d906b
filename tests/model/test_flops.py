"""The operations that utilisation is computed from, against torch's own counter and a count by hand."""

from __future__ import annotations

import pytest
import torch
from plt_cases import build, tiny
from torch.utils.flop_counter import FlopCounterMode

from plt_model import PLTConfig
from plt_model.training.flops import forward_flops, peak_flops, training_flops

LENGTH = 24


def pairs(window: int | None = None) -> float:
    """Query-key pairs per token of LENGTH causal tokens, each seeing `window` positions to its left (None: all)."""
    seen = [t + 1 if window is None else min(t, window) + 1 for t in range(LENGTH)]
    return sum(seen) / LENGTH


@pytest.mark.parametrize("loops", [1, 2, 4], ids="R{}".format)
def test_matrix_products_are_those_that_torch_counts(loops: int) -> None:
    settings = tiny(plt_num_loops=loops)
    model = build(settings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(LENGTH)[None] + 3, use_cache=False)
    products = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    counted = sum(count for op, count in products.items() if op in ("aten.mm", "aten.addmm"))
    config = PLTConfig(**settings)
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    expected = forward_flops(config, LENGTH) - attention * (
        loops * pairs() + (loops - 1) * min(config.window + 1, (LENGTH + 1) / 2)
    )
    # torch counts the gates' small projections too, which utilisation leaves out.
    gates = 2 * config.hidden_size * config.num_attention_heads * config.num_hidden_layers * (loops - 1) * LENGTH
    assert counted - gates == pytest.approx(expected * LENGTH, rel=1e-9)


def test_attention_in_windows_is_counted_as_such() -> None:
    config = PLTConfig(**tiny(plt_num_loops=2, plt_window_size=[2, 0]))
    without = PLTConfig(**tiny(plt_num_loops=2, plt_window_size=[2, 0], plt_gswa=False))
    scores = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    found = (forward_flops(config, LENGTH) - forward_flops(without, LENGTH)) / scores
    assert found == pytest.approx(pairs(window=2), rel=0.05)


def test_training_is_three_forwards() -> None:
    config = PLTConfig(**tiny())
    assert training_flops(config, LENGTH) == 3 * forward_flops(config, LENGTH)


def test_devices_are_known_by_name() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("something new") is None
