"""What is set, and what is refused in one line, when an engine starts.

vLLM calls :class:`PLTChecks` before it builds anything, and the model calls :func:`refuse_unsound` once more when it is
built: until then vLLM fills in settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
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

ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary positions that vLLM and transformers compute alike, and what either reads of them. Of other kinds and
keys they differ: longrope's factors follow the text's length in transformers, and the server's context in vLLM."""


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
        _warn_of_rows(vllm_config)
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
    for kind in ("decode", "prefill"):
        ranks = getattr(parallel, f"{kind}_context_parallel_size")
        if ranks > 1:
            yield (
                "context parallel splits the windows over ranks: "
                f"use --tensor-parallel-size, not --{kind}-context-parallel-size {ranks}"
            )
    if parallel.use_ubatching:
        yield "dual batch overlap cuts batches in its own way: leave --enable-dbo and --ubatch-size out"
    if cache.cache_dtype not in ("auto", dtype):
        scheme = getattr(model.hf_config, "quantization_config", None)
        yield (
            f"--kv-cache-dtype is {cache.cache_dtype}"
            f"{' (auto takes what the checkpoint asks for)' if scheme else ''}: expected "
            f"{dtype if scheme else f'auto or {dtype}'}, since the pages also hold states, which have no scales"
        )
    if cache.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill leaves out later passes of the prompt: leave it out"
    if vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        yield (
            "KV connectors and offloading move pages layer by layer and would leave the carry behind: "
            "leave --kv-transfer-config and --kv-offloading-size out"
        )
    offload = vllm_config.offload_config
    if offload.prefetch.offload_group_size > 0 or offload.offload_backend == "prefetch":
        yield (
            "weights that are fetched layer by layer do not fit, every pass needs all layers: "
            "use --cpu-offload-gb, not --offload-group-size"
        )
    if speculative is not None and speculative.method not in DRAFTERS:
        yield f"speculative method is {speculative.method!r}: expected one of {', '.join(DRAFTERS)}"
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") not in ("", "0"):
        yield "attention has no breaks for graphs: set VLLM_USE_BREAKABLE_CUDAGRAPH=0"
    yield from _unsound_rope(model.hf_config, model.max_model_len)


def _unsound_rope(config: PLTConfig, max_model_len: int) -> Iterator[str]:
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        yield f"rope_type is {kind!r}: expected one of {', '.join(ROPE_KEYS)}"
        return
    known = {"rope_type", "type", "rope_theta", *ROPE_KEYS[kind]}
    for key, value in rope.items():
        if key not in known and (key, value) != ("partial_rotary_factor", 1):
            yield f"rope_parameters has {key} {value!r}, which vLLM and transformers read differently: leave it out"
    reach = config.max_position_embeddings
    if kind == "yarn":
        reach = int(rope["original_max_position_embeddings"] * rope["factor"])
    elif kind == "linear":
        reach = int(reach * rope["factor"])
    if max_model_len > reach:
        yield f"--max-model-len is {max_model_len}: expected at most {reach}, where rope_type {kind} ends"


def _warn_of_loops(vllm_config: VllmConfig) -> None:
    """A loop count that the checkpoint was not trained for."""
    model = vllm_config.model_config
    loops, trained = model.hf_config.plt_num_loops, _loops_on_disk(model.model, model.revision, type(model.hf_config))
    if trained is not None and loops != trained:
        logger.warning("%s was trained with plt_num_loops %d and runs with %d", model.model, trained, loops)


def _loops_on_disk(name: str, revision: str | None, config_class: Any) -> int | None:
    """The checkpoint's own loop count, of a folder or a name on the hub; None where no config.json can be read."""
    offline = constants.HF_HUB_OFFLINE
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, revision=revision, local_files_only=offline)
    except (OSError, ValueError):
        return None
    default: int = config_class.plt_num_loops
    loops = values.get("plt_num_loops", default)
    return loops if isinstance(loops, int) else None


def _warn_of_rows(vllm_config: VllmConfig) -> None:
    """More rows in a step than in the run by which vLLM measures how much memory a step takes."""
    scheduler, loops = vllm_config.scheduler_config, vllm_config.model_config.hf_config.plt_num_loops
    rows, measured = loops * scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    if one_trip(vllm_config) and rows > measured:
        logger.warning(
            "%d passes of --max-num-seqs %d are %d rows in a step, and memory is measured with "
            "--max-num-batched-tokens %d: it may run out; raise the latter to %d, or lower the former to %d",
            *(loops, scheduler.max_num_seqs, rows, measured, rows, measured // loops),
        )


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
