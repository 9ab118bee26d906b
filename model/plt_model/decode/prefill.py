"""Reading prompts before decoding: long ones in chunks, short ones of about one length side by side.

cache, logits_BV = read_prompt(model, ids_BS)             # one prompt, or several of one length
caches, logits_BV = read_prompts(model, [[5, 7, 9], [3]]) # several of any length: one cache each

B prompts   S tokens   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..cache_plt import PLTCache
from ..modeling_plt import PLTForCausalLM

CHUNK = 2048
"""Tokens read at once: what attention and the feed-forward hold beside the cache grows with it."""

SIDE_BY_SIDE = {"cpu": 256, "cuda": CHUNK}
"""Most positions, padding included, of prompts that are read together. On a CPU four prompts of 16 tokens took 0.45 of
the time of one after the other, four of 64 about 0.75, and four of 256 more time than alone (512 wide, 6 layers)."""

PADDED = 1.25
"""Most positions read a token of a padded batch: prompts of 40 and 50 tokens share a batch, of 10 and 50 do not."""


@torch.no_grad()
def read_prompt(
    model: PLTForCausalLM,
    ids_BS: Tensor,
    *,
    mask_BS: Tensor | None = None,
    chunk: int | None = CHUNK,
    cache: PLTCache | None = None,
) -> tuple[PLTCache, Tensor]:
    """Read S tokens of B prompts, `chunk` positions at a time (None: all at once).

    `cache` is what was read before (None: nothing); it grows. `mask_BS` is False at padding on the left, for prompts
    of different lengths; it cannot go with a cache. Returns the cache and the logits [B, V] after the last token.
    Raises ValueError for an empty prompt, a chunk below 1, and a mask with a cache.
    """
    if not ids_BS.shape[1]:
        raise ValueError("a prompt has no tokens: expected at least one")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: expected at least 1")
    if cache is not None and mask_BS is not None:
        raise ValueError("mask_BS says what of a whole prompt is padding: it cannot go with a cache")
    cache = PLTCache(model.config) if cache is None else cache
    size = ids_BS.shape[1] if chunk is None else chunk
    for first in range(0, ids_BS.shape[1], size):
        out = model(
            ids_BS[:, first : first + size],
            attention_mask=None if mask_BS is None else mask_BS[:, : first + size],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    logits: Tensor = out.logits[:, -1]
    return cache, logits


@torch.no_grad()
def read_prompts(
    model: PLTForCausalLM, prompts: Sequence[Sequence[int]], *, chunk: int | None = CHUNK
) -> tuple[list[PLTCache], Tensor]:
    """Read prompts side by side, the shorter ones padded on the left. Returns a cache of one sequence for each, and
    the logits [B, V] after the last tokens. The caches are views of one: give them to slots before the next ones are
    read. Raises ValueError for an empty prompt."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if not min(lengths):
        raise ValueError("a prompt has no tokens: expected at least one")
    device = model.lm_head.weight.device
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    starts = torch.tensor([longest - length for length in lengths], device=device)
    padded = min(lengths) < longest
    mask = torch.arange(longest, device=device) >= starts[:, None] if padded else None
    cache, logits = read_prompt(model, ids, mask_BS=mask, chunk=chunk)
    return [_of_one(model, cache, i, length) for i, length in enumerate(lengths)], logits


def side_by_side(lengths: Iterable[int], *, most: int, positions: int) -> int:
    """How many of the next prompts (their lengths, in order) to read together: at least 1, at most `most`, in no more
    than `positions` and no more than PADDED a token."""
    count = longest = total = 0
    for length in lengths:
        longest, total = max(longest, length), total + length
        wanted = longest * (count + 1)
        if count and (count == most or wanted > positions or wanted > PADDED * total):
            break
        count += 1
    return count


def _of_one(model: PLTForCausalLM, cache: PLTCache, row: int, length: int) -> PLTCache:
    """One sequence's share of a batch that was padded on the left, as views."""
    one = PLTCache(model.config)
    for mine, layer in zip(one.layers, cache.layers, strict=True):
        mine.keys, mine.values = (held[row : row + 1, :, -length:] for held in (layer.keys, layer.values))
        if layer.window_keys is not None:
            mine.window_keys, mine.window_values = (
                held[row : row + 1] for held in (layer.window_keys, layer.window_values)
            )
        mine.is_initialized = True
    one.carry = None if cache.carry is None else cache.carry[row : row + 1]
    return one


__all__ = ["CHUNK", "SIDE_BY_SIDE", "read_prompt", "read_prompts", "side_by_side"]
