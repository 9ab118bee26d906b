"""What a PLT does not run exactly with is refused when the engine starts, in one line that names the option."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig
from vllm import LLM, EngineArgs
from vllm_cases import CHECKPOINT

from plt_model import PLTConfig
from plt_model.vllm.checks import _loops_on_disk

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
    "decode context parallel": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
        "--decode-context-parallel-size 2",
    ),
    "prefill context parallel": ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
    "dual batch overlap": ({"enable_dbo": True}, "--enable-dbo"),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config",
    ),
    "weights fetched by layer": ({"offload_group_size": 2}, "--offload-group-size"),
    "the checkpoint's own fp8 cache": (
        {
            "dtype": "bfloat16",
            "hf_overrides": {
                "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
            },
        },
        "--kv-cache-dtype is fp8_e4m3 (auto takes what the checkpoint asks for): expected bfloat16",
    ),
    "window": ({"hf_overrides": {"plt_window_size": [4, 4]}}, "plt_window_size is [4, 4]"),
    **{
        f"RoPE, {named}": ({"hf_overrides": {"rope_parameters": {"rope_theta": 1e4, **rope}}, **more}, named)
        for rope, more, named in (
            ({"rope_type": "default", "partial_rotary_factor": 0.5}, {}, "partial_rotary_factor 0.5"),
            ({"rope_type": "dynamic", "factor": 2.0, "alpha": 2.0}, {}, "alpha 2.0"),
            ({"rope_type": "proportional", "factor": 2.0}, {}, "rope_type is 'proportional'"),
            (
                {"rope_type": "dynamic", "factor": 2.0},
                {"max_model_len": 257},
                "--max-model-len is 257: expected at most 256",
            ),
            (
                {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
                {"max_model_len": 129},
                "--max-model-len is 129: expected at most 128",
            ),
            (
                {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 16,
                    "long_factor": [2.0] * 16,
                    "original_max_position_embeddings": 64,
                },
                {},
                "rope_type is 'longrope'",
            ),
        )
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_line(what: str) -> None:
    options, named = REFUSED[what]
    if torch.cuda.device_count() == 1 and "parallel" in what:
        pytest.skip("vLLM itself refuses it on one GPU")
    with pytest.raises(ValueError, match=re.escape(named)) as refused:
        start(CHECKPOINT, **options)
    told = str(refused.value).split(" [type=")[0].splitlines()  # pydantic's own words stand around ours
    assert len(told) == 2, told


@pytest.mark.slow
def test_heads_that_draft_are_refused(tmp_path: Path) -> None:
    LlamaConfig(vocab_size=61, hidden_size=96, num_hidden_layers=1, architectures=["LlamaForCausalLM"]).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="speculative method is 'eagle'"):
        start(
            CHECKPOINT,
            speculative_config={"method": "eagle", "model": str(tmp_path), "num_speculative_tokens": 2},
        )


def test_graphs_with_breaks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="set VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        start(CHECKPOINT)


def test_loops_that_a_checkpoint_was_trained_for_are_read_of_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--some--plt"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    (cached / "snapshots" / ("1" * 40)).mkdir(parents=True)
    shutil.copy(CHECKPOINT / "config.json", cached / "snapshots" / ("1" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert _loops_on_disk("some/plt", None, PLTConfig) == 4
    assert _loops_on_disk("some/other", None, PLTConfig) is None


def test_more_rows_than_memory_is_measured_with_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    for sequences, told in ((32, False), (33, True)):
        caplog.clear()
        options = {"max_num_seqs": sequences, "max_num_batched_tokens": 128, "skip_tokenizer_init": True}
        EngineArgs(str(CHECKPOINT), dtype="float32", max_model_len=128, **options).create_engine_config()
        assert ("4 passes of --max-num-seqs" in caplog.text) == told


def start(folder: Path, **options: Any) -> None:
    LLM(str(folder), **{"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128, **options})
