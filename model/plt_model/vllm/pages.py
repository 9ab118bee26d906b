"""The KV cache layers of a PLT, as vLLM's block manager sees them.

For each decoder layer, `attn` keeps pass 0's keys and values. `shared` and `rows` read them and keep nothing: `shared`
for one later pass, `rows` for all R passes of a token at once, the passes side by side as R * H query heads.
`local_p{r}` keeps the window of pass r. Beside them `carry.{j}` keep what each token hands on to the next: the outputs
of its passes 0..R-2. The carry has the windows' kind of pages, so blocks of it are allocated, freed, shared by prefix
and restored as theirs are. (vLLM wants exactly one integer in a layer's name.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from .layout import PageLayers
from .metadata import BOTH, Part, carry_backend, split_backend

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What heads are padded to where an attention backend does not take their own size."""


SHARES_NO_CACHE = ("FLEX_ATTENTION",)
"""Attention backends in which no layer reads another one's cache. They take heads of any size, so vLLM falls back on
them where no other does."""


def padded_head_size(size: int, vllm_config: VllmConfig) -> int:
    """The smallest size from `size` on that both attention backends take, over everything and over a window."""
    refused: set[str] = set()
    for candidate in (size, *(s for s in HEAD_SIZES if s > size)):
        try:
            backends = [real_backend(candidate, vllm_config, windowed) for windowed in (False, True)]
        except (ValueError, NotImplementedError):
            continue
        unfit = {backend.get_name() for backend in backends}.intersection(SHARES_NO_CACHE)
        refused |= unfit
        if not unfit and all(backend.supports_head_size(candidate) for backend in backends):
            return candidate
    but = f" ({', '.join(sorted(refused))} has no caches that layers share)" if refused else ""
    raise ValueError(f"head_dim is {size}: no attention backend of vLLM here takes it, padded or not{but}")


def real_backend(size: int, vllm_config: VllmConfig, windowed: bool) -> type[AttentionBackend]:
    """The attention backend that vLLM chooses."""
    dtype, kv_dtype = torch.get_default_dtype(), vllm_config.cache_config.cache_dtype
    chosen: type[AttentionBackend] = get_attn_backend(size, dtype, kv_dtype, has_sliding_window=windowed)
    return chosen


class PagedAttention(Attention):
    """An attention layer of vLLM on split metadata, its heads padded with zeros to a size that the backend takes.

    window: how many positions before its own a query sees; None for all.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        heads: int,
        groups: int,
        head_dim: int,
        role: str = BOTH,
        window: int | None = None,
        shares: str | None = None,
    ) -> None:
        self.role, self.head_dim = role, head_dim
        size = padded_head_size(head_dim, vllm_config)
        super().__init__(
            heads,
            size,
            head_dim**-0.5,
            num_kv_heads=groups,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=None if window is None else window + 1,
            prefix=prefix,
            kv_sharing_target_layer_name=shares,
            attn_backend=self.backend_on(real_backend(size, vllm_config, window is not None)),
        )

    def backend_on(self, real: Any) -> type[AttentionBackend]:
        return split_backend(real)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """vLLM frees what no later query sees: with a window of 0 that is the last token, whose carry is read."""
        spec = super().get_kv_cache_spec(vllm_config)
        if isinstance(spec, SlidingWindowSpec) and spec.sliding_window < 2:
            return replace(spec, sliding_window=2)
        return spec

    def write(self, k: Tensor, v: Tensor, part: Part) -> None:
        """Keep keys and values [T, G * K]."""
        slots = part.slots(self.layer_name)
        if slots is not None and part.metadata is not None:
            k, v = self._heads(k, self.num_kv_heads), self._heads(v, self.num_kv_heads)
            self.impl.do_kv_cache_update(self, k, v, self.kv_cache, slots)

    def attend(self, q: Tensor, part: Part) -> Tensor:
        """Attention of queries [T, H * K] -> [T, H, K]."""
        q = self._heads(q, self.num_heads)
        out, metadata = torch.empty_like(q), part.of(self.layer_name)
        if metadata is None:
            return out[..., : self.head_dim].zero_()
        self.impl.forward(self, q, None, None, self.kv_cache, metadata, output=out)
        return out if self.head_size == self.head_dim else out[..., : self.head_dim]

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        x = x.view(-1, heads, self.head_dim)
        missing = self.head_size - self.head_dim
        return pad(x, (0, missing)) if missing else x


class CarryPages(PagedAttention):
    """Pages of the windows' kind that hold a piece of the carry."""

    def backend_on(self, real: Any) -> type[AttentionBackend]:
        return carry_backend(real)

    def put(self, piece: Tensor, place: Place) -> None:
        """Write [T, 2 * G * K]. Padding goes to vLLM's null block, as zeros: kernels multiply what they find there
        by 0."""
        _, heads, _, width = self.kv_cache.shape
        piece = torch.where(place.real, piece, 0.0)
        self.kv_cache[place.block, :, place.offset] = piece.view(-1, heads, width)

    def get(self, place: Place) -> Tensor:
        """Read [N, 2 * G * K], zeros where there is nothing to read."""
        return torch.where(place.real, self.kv_cache[place.block, :, place.offset].flatten(1), 0.0)


@dataclass
class Place:
    """Where in the pages something is: block and offset [T], and whether it is anywhere [T, 1]."""

    block: Tensor
    offset: Tensor
    real: Tensor

    @classmethod
    def of_slots(cls, slots: Tensor, size: int) -> Place:
        """Slots as vLLM numbers them: block * block size + offset, -1 for nowhere."""
        at = slots.clamp(min=0)
        return cls(at // size, at % size, (slots >= 0)[:, None])

    @classmethod
    def before(cls, common: CommonAttentionMetadata, size: int) -> Place:
        """Of the token before each request's first one in the batch."""
        # Where all have one token, padding has 0, and ends at 0, too.
        beyond = 2 if common.max_query_len == 1 else common.query_start_loc.diff() + 1
        position = common.seq_lens - beyond
        at = position.clamp(min=0).long()
        block = common.block_table_tensor.gather(1, (at // size)[:, None])[:, 0]
        return cls(block.long(), at % size, (position >= 0)[:, None])


class Carry(nn.Module):
    """What each token hands on to the next one of its request: the outputs of passes 0..R-2. Where there is no token
    before, zeros."""

    def __init__(
        self, vllm_config: VllmConfig, prefix: str, *, groups: int, head_dim: int, window: int | None, zeroed: bool
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.width, self.zeroed, self.count = config.hidden_size, zeroed, config.plt_num_loops - 1
        size = padded_head_size(head_dim, vllm_config)
        layers = PageLayers.of(config, groups, size)
        self.capacity, self.each = 2 * groups * size, layers.each
        self.pages: Any = nn.ModuleList(
            CarryPages(
                vllm_config,
                f"{prefix}.{j}",
                heads=groups,
                groups=groups,
                head_dim=head_dim,
                window=1 if window is None else window,
            )
            for j in range(layers.carry)
        )

    def places(self, part: Part) -> CarryPlaces:
        """Where the tokens of a part, and those before them, have their carry."""
        to_read: dict[int, Place] = {}
        to_write: dict[int, Place] = {}
        out = []
        for pages in self.pages[: self.each * self.count]:
            size, common, slots = pages.kv_cache.shape[2], part.of(pages.layer_name), part.slots(pages.layer_name)
            key = id(common)  # pages of one group of vLLM's share it
            if key not in to_read:
                to_read[key] = Place.before(common, size)
                assert slots is not None
                to_write[key] = Place.of_slots(slots, size)
                if self.zeroed:
                    to_read[key].real = torch.zeros_like(to_read[key].real)
            out.append((to_read[key], to_write[key]))
        return out

    def read(self, index: int, places: CarryPlaces) -> Tensor:
        """Pass `index`'s output of the token before each request's first one [N, D]."""
        pieces = [pages.get(place) for pages, (place, _) in self._of_pass(index, places)]
        wide = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return wide if wide.shape[1] == self.width else wide[:, : self.width]

    def write(self, index: int, states: Tensor, places: CarryPlaces) -> None:
        """Keep pass `index`'s outputs [T, D] of all tokens of the part."""
        missing = self.each * self.capacity - self.width
        pieces = (pad(states, (0, missing)) if missing else states).chunk(self.each, dim=1)
        for piece, (pages, (_, place)) in zip(pieces, self._of_pass(index, places), strict=True):
            pages.put(piece, place)

    def _of_pass(self, index: int, places: CarryPlaces) -> list[tuple[Any, tuple[Place, Place]]]:
        own = slice(index * self.each, (index + 1) * self.each)
        return list(zip(self.pages[own], places[own], strict=True))


CarryPlaces = list[tuple[Place, Place]]
"""For each of the carry's pages where to read and where to write."""
