"""Which requests of a batch are decode rows, where a CUDA graph may be replayed and where none is; what backends are
told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_speculative import NGRAM
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm_cases import CHECKPOINT
from vllm_engine import BLOCK

from plt_model.vllm.metadata import SplitBuilder

DYNAMIC = {**NGRAM, "num_speculative_tokens_per_batch_size": [[1, 4, 3], [5, 256, 0]]}


@pytest.mark.parametrize(
    ("mode", "largest", "speculation", "rows"),
    [
        (CUDAGraphMode.NONE, 2, None, 1),
        (CUDAGraphMode.FULL_DECODE_ONLY, 2, None, 2),
        (CUDAGraphMode.FULL_DECODE_ONLY, 1, None, 1),
        (CUDAGraphMode.FULL_DECODE_ONLY, 2, NGRAM, 1),
        (CUDAGraphMode.FULL_DECODE_ONLY, 2, DYNAMIC, 2),
    ],
)
def test_a_token_after_a_block_of_this_step_is_a_decode_row_only_where_a_graph_asks_for_it(
    mode: CUDAGraphMode, largest: int, speculation: dict[str, Any] | None, rows: int
) -> None:
    arguments = EngineArgs(
        str(CHECKPOINT), dtype="float32", skip_tokenizer_init=True, block_size=BLOCK, speculative_config=speculation
    )
    config = arguments.create_engine_config()
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    builder = SplitBuilder(spec, [], config, torch.device("cpu"))
    config.compilation_config.cudagraph_mode = mode  # vLLM, too, settles it afterwards
    config.compilation_config.max_cudagraph_capture_size = largest
    # The first request's token is the last of a block, the second's the first after it.
    assert builder.build(0, batch([BLOCK, BLOCK + 1])).decodes == rows


def test_builders_are_told_the_size_of_padded_heads() -> None:
    made = []

    def real(_spec: Any, _names: list[str], config: VllmConfig, _device: torch.device) -> SimpleNamespace:
        made.append((config.model_config.get_head_size(), config.compilation_config))
        return SimpleNamespace(reorder_batch_threshold=1)

    ours = type("Ours", (SplitBuilder,), {"real": staticmethod(real)})
    config = EngineArgs(str(CHECKPOINT), dtype="float32", skip_tokenizer_init=True).create_engine_config()
    for size in (32, 48):
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=size, dtype=torch.float32)
        ours(spec, [], config, torch.device("cpu"))
    assert [size for size, _ in made] == [32, 32, 48, 48]
    assert all(compilation is config.compilation_config for _, compilation in made)
    assert config.model_config.get_head_size() == 32


def batch(lengths: list[int]) -> CommonAttentionMetadata:
    """Requests of one token each."""
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=len(lengths),
        max_query_len=1,
        max_seq_len=max(lengths),
        block_table_tensor=torch.zeros(len(lengths), 2, dtype=torch.int32),
        slot_mapping=torch.zeros(len(lengths), dtype=torch.int64),
    )
