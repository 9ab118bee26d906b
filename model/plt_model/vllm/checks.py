"""What is set, and what is refused in one line, when an engine starts.

vLLM calls :class:`PLTChecks` before it builds anything, and the model calls :func:`refuse_unsound` once more when it is
built: until then vLLM fills in settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.utils.math_utils import round_up

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from plt_model.configuration_plt import PLTConfig

logger = init_logger(__name__)

RETENTION = 512
"""Tokens between two places of a cached text at which its windows and carry are kept, so that another text that begins
alike can go on from there. vLLM's default keeps them at a prompt's end only. Denser costs cache for the windows: with a
window of 64 and blocks of 16, every 512 tokens one eighth of what every block would."""

DRAFTERS = ("ngram", "ngram_gpu", "suffix")
"""Speculative methods whose drafts come from the text: no second model with pages of its own."""


@dataclass(frozen=True)
class Options:
    """`--additional-config '{"plt": {...}}'`.

    trips: "one" (decode rows: all passes in one trip through the layers) or "each" (R trips, for comparison).
    carry: "keep", or "zero", which loses what a token hands on to the next: a fault on purpose, for tests.
    """

    trips: str = "one"
    carry: str = "keep"

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """Raises ValueError for what is no option."""
        given: Any = vllm_config.additional_config
        given = given.get("plt", {}) if isinstance(given, dict) else {}
        allowed = {"trips": ("one", "each"), "carry": ("keep", "zero")}
        if not isinstance(given, dict):
            raise ValueError(f"--additional-config: plt is {given!r}: expected an object with {' or '.join(allowed)}")
        for key, value in given.items():
            if key not in allowed:
                raise ValueError(f"--additional-config: plt has no option {key!r}: expected {' or '.join(allowed)}")
            if value not in allowed[key]:
                raise ValueError(f"--additional-config: plt.{key} is {value!r}: expected {' or '.join(allowed[key])}")
        return cls(**given)


def one_trip(vllm_config: VllmConfig) -> bool:
    """Whether decode rows take one trip: later passes exist, none needs the same token's pass before, and it is asked
    for."""
    config = vllm_config.model_config.hf_config
    return bool(config.plt_num_loops > 1 and config.one_trip_decode and Options.of(vllm_config).trips == "one")


class PLTChecks(VerifyAndUpdateConfig):
    """What vLLM calls for our architectures."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises ValueError."""
        _validate(vllm_config.model_config.hf_config)
        options = Options.of(vllm_config)
        refuse_unsound(vllm_config)
        if options.carry == "zero":
            logger.warning("plt.carry is zero: outputs are wrong on purpose")
        _warn_of_loops(vllm_config)
        _set_compilation(vllm_config)
        _set_retention(vllm_config)


def _validate(config: PLTConfig) -> None:
    """What --hf-overrides left of the configuration."""
    try:
        config.validate()
    except StrictDataclassError as refused:
        raise ValueError(f"config.json with --hf-overrides: {' '.join(str(refused).split())}") from refused


def refuse_unsound(vllm_config: VllmConfig) -> None:
    """Raises ValueError for the first setting that a PLT does not run exactly with, saying what to do."""
    for reason in _unsound(vllm_config):
        raise ValueError(f"a PLT on vLLM: {reason}")


def _unsound(vllm_config: VllmConfig) -> Iterator[str]:
    parallel, cache, model = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.model_config
    speculative = vllm_config.speculative_config
    dtype = str(model.dtype).removeprefix("torch.")
    if parallel.pipeline_parallel_size > 1:
        yield (
            "pipeline parallel does not fit, every pass needs all layers: "
            f"use --tensor-parallel-size, not --pipeline-parallel-size {parallel.pipeline_parallel_size}"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallel splits the windows over ranks: use --tensor-parallel-size"
    if parallel.use_ubatching:
        yield "dual batch overlap cuts batches in its own way: leave --enable-dbo and --ubatch-size out"
    if cache.cache_dtype not in ("auto", dtype):
        yield (
            f"--kv-cache-dtype is {cache.cache_dtype}: expected auto or {dtype}, "
            "since the pages also hold states, which have no scales"
        )
    if cache.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill leaves out later passes of the prompt: leave it out"
    if vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        yield (
            "KV connectors and offloading move pages layer by layer and would leave the carry behind: "
            "leave --kv-transfer-config and --kv-offloading-size out"
        )
    if speculative is not None and speculative.method not in DRAFTERS:
        yield f"speculative method is {speculative.method!r}: expected one of {', '.join(DRAFTERS)}"
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") not in ("", "0"):
        yield "attention has no breaks for graphs: set VLLM_USE_BREAKABLE_CUDAGRAPH=0"


def _warn_of_loops(vllm_config: VllmConfig) -> None:
    """A loop count that the checkpoint was not trained for."""
    model = vllm_config.model_config
    loops, trained = model.hf_config.plt_num_loops, _loops_on_disk(model.model, type(model.hf_config))
    if trained is not None and loops != trained:
        logger.warning("%s was trained with plt_num_loops %d and runs with %d", model.model, trained, loops)


def _loops_on_disk(folder: str, config_class: Any) -> int | None:
    """The checkpoint's own loop count; None where no config.json can be read."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    default: int = config_class.plt_num_loops
    loops = values.get("plt_num_loops", default)
    return loops if isinstance(loops, int) else None


def _set_compilation(vllm_config: VllmConfig) -> None:
    """Eager, with CUDA graphs of uniform decode batches, which hold all that torch.compile would spare there. Graphs of
    mixed batches cannot hold how a batch is split."""
    compilation = vllm_config.compilation_config
    if compilation.mode not in (None, CompilationMode.NONE):
        logger.warning("a PLT is not compiled: compilation mode %s is replaced with NONE", compilation.mode)
    compilation.mode = CompilationMode.NONE
    graphs = compilation.cudagraph_mode
    if graphs is None or graphs in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_AND_PIECEWISE):
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    elif graphs == CUDAGraphMode.PIECEWISE:
        compilation.cudagraph_mode = CUDAGraphMode.NONE
    if graphs not in (None, compilation.cudagraph_mode):
        logger.warning("cudagraph_mode %s is replaced with %s", graphs, compilation.cudagraph_mode)


def _set_retention(vllm_config: VllmConfig) -> None:
    """Windows and carry are kept every RETENTION tokens, unless --prefix-cache-retention-interval says how often. (0 is
    vLLM's default, and cannot be told from a user's.)"""
    cache, config = vllm_config.cache_config, vllm_config.model_config.hf_config
    windowed = config.plt_num_loops > 1 and config.plt_loop_mode == "plt" and (config.plt_gswa or config.plt_clp_shift)
    paged_apart = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    if cache.prefix_cache_retention_interval == 0 and cache.enable_prefix_caching and windowed and paged_apart:
        block = cache.block_size if cache.user_specified_block_size else 1
        cache.prefix_cache_retention_interval = round_up(RETENTION, block)
