"""Weights that are loaded in one piece, as a server starts, and in several, as they are updated while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm import EngineArgs
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm_cases import CHECKPOINT

from plt_model.vllm.model import PLTForCausalLM


@pytest.fixture
def model(tmp_path: Path) -> Iterator[PLTForCausalLM]:
    """Its weights are still to be loaded."""
    arguments = EngineArgs(str(CHECKPOINT), dtype="float32", skip_tokenizer_init=True)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'store'}", 0, "gloo")
        initialize_model_parallel()
        yield PLTForCausalLM(vllm_config=config)
    cleanup_dist_env_and_memory()


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return load_file(CHECKPOINT / "model.safetensors")


def test_one_tensor_after_another(model: PLTForCausalLM, tensors: dict[str, Tensor]) -> None:
    model.load_weights(tensors.items())
    whole = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.zero_()
    for tensor in tensors.items():
        model.load_weights([tensor])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, whole[name].data, rtol=0, atol=0)


def test_a_whole_checkpoint_without_gates_is_refused(model: PLTForCausalLM, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="the checkpoint holds no gates: it can run plt_num_loops 1, not 4"):
        model.load_weights((name, tensor) for name, tensor in tensors.items() if ".plt_gate." not in name)
