"""What a PLT does not run exactly with is refused when the engine starts, in one line that names the option."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm_cases import CHECKPOINT

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pipeline parallel": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
    "fp8 cache": ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype is fp8"),
    "unknown option": ({"additional_config": {"plt": {"carrry": "zero"}}}, "'carrry'"),
    "unknown value": ({"additional_config": {"plt": {"trips": "two"}}}, "plt.trips is 'two'"),
    "not an object": ({"additional_config": {"plt": "each"}}, "plt is 'each'"),
    "shared cache prefill": ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    "offloading": ({"kv_offloading_size": 0.01}, "--kv-offloading-size"),
    "no loops": ({"hf_overrides": {"plt_num_loops": 0}}, "plt_num_loops is 0"),
    "drafts of another model": (
        {"speculative_config": {"method": "draft_model", "model": str(CHECKPOINT), "num_speculative_tokens": 2}},
        "speculative method is 'draft_model'",
    ),
    "context parallel": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        "context parallel",
    ),
    "window": ({"hf_overrides": {"plt_window_size": [4, 4]}}, "plt_window_size is [4, 4]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what: str) -> None:
    options, named = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(named)) as refused:
        start(CHECKPOINT, **options)
    told = str(refused.value).split(" [type=")[0].splitlines()  # pydantic's own words stand around ours
    assert len(told) == 2, told


def start(folder: Path, **options: Any) -> None:
    LLM(str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=128, **options)
