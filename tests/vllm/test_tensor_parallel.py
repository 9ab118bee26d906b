"""Two ranks of one model, here two processes on CPUs: the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_variants import check
from vllm_cases import CHECKPOINT, SHAPE, Measured, save, texts, weights
from vllm_engine import BLOCK, Ask, opened

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="vLLM gives each rank a GPU, and there is one"),
]


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_two_ranks(loops: int, measured: Measured) -> None:
    told = texts(loops)
    names = ("long", "even", "short", "edge")
    options = {
        "hf_overrides": {"plt_num_loops": loops},
        "tensor_parallel_size": 2,
        "prefix_cache_retention_interval": BLOCK if loops > 1 else 0,
    }
    with opened(CHECKPOINT, options) as engine:
        answers = engine.run(*[Ask(told[n].prompt, 14, at=2 * i) for i, n in enumerate(names)], budget=40)
        assert any(step.mixed for step in engine.steps)
        for name, answer in zip(names, answers, strict=True):
            measured.exact("tensor parallel 2", loops, answer, told[name])
        (hit,) = engine.go_on(Ask(told["sibling"].prompt, 14, whole=False))
        assert hit.cached == 2 * BLOCK
        measured.exact("tensor parallel 2", loops, hit, told["sibling"])


@pytest.mark.parametrize("loops", [1, 4])
def test_two_ranks_repeat_the_one_key_head(loops: int, tmp_path: Path, measured: Measured) -> None:
    settings = {**SHAPE, "plt_num_loops": loops, "num_key_value_heads": 1}
    model = save(settings, weights(settings), tmp_path).double()
    options = {"tensor_parallel_size": 2, "prefix_cache_retention_interval": BLOCK if loops > 1 else 0}
    with opened(tmp_path, options) as engine:
        check("tensor parallel 2, one key head", engine, model, measured)
