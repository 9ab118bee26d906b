"""A batch's attention metadata in two parts: decode rows, whose passes share one trip, and the rest.

vLLM builds metadata for a whole batch, each attention backend its own. The backends here are the user's with another
builder: it cuts the batch after its leading requests of one token and has the backend's builders make the metadata of
either part. vLLM brings such requests to the front because `reorder_batch_threshold` asks for it; in any other order
fewer rows would share a trip, and all would be right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from .checks import one_trip

TRIPS, ROWS, BOTH = "trips", "rows", "both"
"""Which part a layer reads: the rest, the decode rows, or both."""


@dataclass
class SplitMetadata:
    """decodes: how many tokens, each of a request of its own, lead the batch; decode: their metadata, rest: that of all
    tokens after them (None where there are none, or where no layer of the group reads it)."""

    decodes: int
    decode: Any
    rest: Any


@dataclass
class Part:
    """What the layers see of a part of the batch. Without metadata (vLLM's profiling runs) they see nothing."""

    name: str
    tokens: slice
    metadata: Mapping[str, SplitMetadata] | None
    slot_mapping: Mapping[str, Tensor]
    _cut: dict[int, Tensor] = field(default_factory=dict)

    def of(self, layer: str) -> Any:
        """A layer's metadata."""
        return None if self.metadata is None else getattr(self.metadata[layer], self.name)

    def slots(self, layer: str) -> Tensor | None:
        """Where a layer writes its keys and values [T]: block * block size + offset, or -1."""
        of_batch = self.slot_mapping.get(layer)
        if of_batch is None:
            return None
        if id(of_batch) not in self._cut:  # layers of one group share it
            self._cut[id(of_batch)] = of_batch[self.tokens]
        return self._cut[id(of_batch)]


def leading_decodes(common: CommonAttentionMetadata, block: int) -> int:
    """How many requests from the batch's front on have one token, and the token before it from an earlier step.

    A request may hit blocks in the prefix cache that another one computes in this very step. What it starts with then
    waits for that one's passes, each in turn, as only the rest does. Such a request starts at a block's first place.
    """
    if common.num_reqs == 1:
        return int(common.max_query_len == 1)
    starts = common.query_start_loc_cpu.numpy()
    lengths = starts[1:] - starts[:-1]
    later = lengths != 1
    if common.seq_lens_cpu_upper_bound is not None:
        stop = common.seq_lens_cpu_upper_bound.numpy()
        begin = stop - lengths
        (suspects,) = np.nonzero((lengths == 1) & (begin % block == 0) & (begin > 0))
        if len(suspects):
            place = begin[suspects, None]
            later[suspects] |= ((begin < place) & (stop >= place)).any(axis=1)
    return int(later.argmax()) if later.any() else len(lengths)


def requests(common: CommonAttentionMetadata, start: int, stop: int, first: int, last: int) -> CommonAttentionMetadata:
    """The requests [start, stop), which hold the tokens [first, last)."""

    def each(per_request: Any) -> Any:
        return None if per_request is None else per_request[start:stop]

    starts_cpu = common.query_start_loc_cpu[start : stop + 1] - first
    return CommonAttentionMetadata(
        query_start_loc=common.query_start_loc[start : stop + 1] - first,
        query_start_loc_cpu=starts_cpu,
        seq_lens=common.seq_lens[start:stop],
        num_reqs=stop - start,
        num_actual_tokens=last - first,
        max_query_len=int((starts_cpu[1:] - starts_cpu[:-1]).max()),
        max_seq_len=common.max_seq_len,
        block_table_tensor=common.block_table_tensor[start:stop],
        slot_mapping=common.slot_mapping[first:last],
        causal=common.causal,
        positions=None if common.positions is None else common.positions[first:last],
        is_prefilling=each(common.is_prefilling),
        seq_lens_cpu_upper_bound=each(common.seq_lens_cpu_upper_bound),
    )


Build = Callable[[AttentionMetadataBuilder[Any] | None, CommonAttentionMetadata], Any]


def with_head_size(vllm_config: VllmConfig, size: int) -> VllmConfig:
    """A configuration whose model has heads of `size` numbers: that of the pages, where heads are padded. Triton's
    builder takes the model's, and makes its buffers as large."""
    model = vllm_config.model_config
    if size == model.get_head_size():
        return vllm_config
    padded = copy(vllm_config)
    padded.model_config = copy(model)
    padded.model_config.get_head_size = lambda: size
    return padded


class SplitBuilder(AttentionMetadataBuilder[SplitMetadata]):
    """Has the backend's own builders (`real`) make the metadata of the parts that its layers read; without such a
    class, for the carry, the parts are cut and handed on."""

    real: ClassVar[type[AttentionMetadataBuilder[Any]] | None] = None

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.one_trip = one_trip(vllm_config)
        self.block = vllm_config.cache_config.block_size
        roles = {vllm_config.compilation_config.static_forward_context[name].role for name in layer_names}
        self.role = roles.pop() if len(roles) == 1 else BOTH
        # One for each part that is read: a builder may keep what it builds in buffers of its own.
        seen = with_head_size(vllm_config, kv_cache_spec.head_size)
        self.builders = [
            self.real(kv_cache_spec, layer_names, seen, device) if self.real and self.role != other else None
            for other in (TRIPS, ROWS)
        ]
        asked = [builder.reorder_batch_threshold for builder in self.builders if builder is not None]
        self.reorder_batch_threshold = (asked[0] if asked else None) or 1

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        if cls.real is None:
            return AttentionCGSupport.ALWAYS
        return cls.real.get_cudagraph_support(vllm_config, kv_cache_spec)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SplitMetadata:
        def build(builder: AttentionMetadataBuilder[Any] | None, common: CommonAttentionMetadata) -> Any:
            return builder.build(common_prefix_len, common, fast_build) if builder else common

        common = common_attn_metadata
        if self._may_be_replayed(common):  # a graph is of all of the batch
            return self._split(common, common.num_reqs, build)
        return self._split(common, leading_decodes(common, self.block) if self.one_trip else 0, build)

    def _may_be_replayed(self, common: CommonAttentionMetadata) -> bool:
        """Whether there can be a graph of this batch as decode rows. With speculation graphs are of the drafts' length,
        and a step without drafts is eager. (vLLM settles its mode after it has made the builders.)"""
        compilation, speculative = self.vllm_config.compilation_config, self.vllm_config.speculative_config
        if speculative is not None:
            lengths = speculative.num_speculative_tokens_per_batch_size or ()
            if all(drafts for *_, drafts in lengths):
                return False
        return bool(
            common.max_query_len == 1
            and compilation.cudagraph_mode.has_full_cudagraphs()
            and common.num_reqs <= (compilation.max_cudagraph_capture_size or 0)
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> SplitMetadata:
        def build(builder: AttentionMetadataBuilder[Any] | None, common: CommonAttentionMetadata) -> Any:
            return builder.build_for_cudagraph_capture(common) if builder else common

        common = common_attn_metadata
        return self._split(common, common.num_reqs if common.max_query_len == 1 else 0, build)

    def _split(self, common: CommonAttentionMetadata, first: int, build: Build) -> SplitMetadata:
        """`first` requests lead, of one token each."""
        (of_decode, of_rest), count = self.builders, common.num_reqs
        first = first if self.one_trip else 0
        if first == count:
            return SplitMetadata(first, build(of_decode, common) if self.role != TRIPS else None, None)
        if first == 0:
            return SplitMetadata(0, None, build(of_rest, common) if self.role != ROWS else None)
        decode, rest = None, None
        if self.role != TRIPS:
            decode = build(of_decode, requests(common, 0, first, 0, first))
        if self.role != ROWS:
            rest = build(of_rest, requests(common, first, count, first, common.num_actual_tokens))
        return SplitMetadata(first, decode, rest)


class WorkspaceBuilder(SplitBuilder):
    """For backends whose builders share one workspace of hundreds of MiB, which vLLM passes around."""

    def _get_workspace_buffer(self) -> Any:
        first, *others = (builder for builder in self.builders if builder is not None)
        buffer = first._get_workspace_buffer()
        for builder in others:
            builder.set_workspace_buffer(buffer)
        return buffer

    def set_workspace_buffer(self, workspace_buffer: Any) -> None:
        for builder in self.builders:
            if builder is not None:
                builder.set_workspace_buffer(workspace_buffer)


@cache
def split_backend(real: type[AttentionBackend]) -> type[AttentionBackend]:
    """The attention backend `real` with split metadata."""
    of_real = real.get_builder_cls()
    base = WorkspaceBuilder if hasattr(of_real, "set_workspace_buffer") else SplitBuilder
    return _backend(f"PLT{real.__name__}", real, type(f"PLT{of_real.__name__}", (base,), {"real": of_real}))


@cache
def carry_backend(real: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend for the carry, whose pages must be those of `real`."""
    return _backend(f"PLTCarryOn{real.__name__}", real, SplitBuilder)


def _backend(name: str, real: type[AttentionBackend], builder: type[SplitBuilder]) -> type[AttentionBackend]:
    no = staticmethod(lambda: False)
    # The cut is made by the query lengths that the host knows.
    overrides = {"get_builder_cls": staticmethod(lambda: builder), "supports_device_cpu_query_lens_mismatch": no}
    return type(name, (real,), overrides)
