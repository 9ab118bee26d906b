"""How likely a model finds continuations of contexts. A context that several requests share is read once.

Requests are grouped by their context's tokens. A group of one is read whole, several side by side. The contexts of
larger groups (the choices of a question) are read alone, and what the cache then holds is repeated for the
continuations: of C context tokens and n choices, n * C tokens become C.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor

from plt_eval.engines.base import Loglikelihood, LoglikelihoodRequest
from plt_eval.engines.hf_batches import BatchSize
from plt_eval.engines.hf_prompts import Prompts
from plt_model.decode.prefill import CHUNK, SIDE_BY_SIDE, read_prompt, side_by_side


@dataclass(frozen=True)
class _Group:
    """One context, and the continuations that follow it, each with its request's id."""

    context: list[int]
    choices: list[tuple[str, list[int]]]

    @property
    def order(self) -> tuple[bool, int, str]:
        """Shared contexts first, each kind from the longest on: memory runs out at once or never."""
        longest = max(len(continuation) for _, continuation in self.choices)
        return len(self.choices) == 1, -len(self.context) - longest, self.choices[0][0]


class Likelihoods:
    """Scores requests with a causal language model, `batch` sequences at a time. `shares`: the model is a PLT, whose
    cache can be repeated; other architectures read every request whole."""

    def __init__(self, model: Any, prompts: Prompts, batch: BatchSize, *, shares: bool) -> None:
        self.model, self.prompts, self.batch, self.shares = model, prompts, batch, shares

    def score(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:
        """In an order of its own. Trailing spaces of the context count as the continuation's, as the tokens that span
        the border do. Raises UserError when memory runs out for good."""
        yield from self.score_tokens((one.id, *self.prompts.border(one)) for one in requests)

    def score_tokens(self, requests: Iterable[tuple[str, list[int], list[int]]]) -> Iterator[Loglikelihood]:
        """What `score` does, of requests in tokens: (id, context, continuation), at least one token of context each."""
        waiting = deque(sorted(self._groups(requests), key=lambda group: group.order))
        while waiting:
            groups = _take(waiting, self.batch.size, SIDE_BY_SIDE.get(self.model.device.type, CHUNK))
            scored = None
            with self.batch.guard(sum(len(group.choices) for group in groups)):
                scored = self._score(groups)
            if scored is None:
                waiting.extendleft(reversed(groups))
            else:
                yield from scored

    def _groups(self, requests: Iterable[tuple[str, list[int], list[int]]]) -> list[_Group]:
        groups: dict[tuple[int, ...], _Group] = {}
        alone: list[_Group] = []
        for request_id, context, continuation in requests:
            if self.shares:
                group = groups.setdefault(tuple(context), _Group(context, []))
                group.choices.append((request_id, continuation))
            else:
                alone.append(_Group(context, [(request_id, continuation)]))
        return [*groups.values(), *alone]

    @torch.inference_mode()
    def _score(self, groups: list[_Group]) -> list[Loglikelihood]:
        alone = all(len(group.choices) == 1 for group in groups)
        return self._read_whole(groups) if alone else self._read_shared(groups)

    def _read_whole(self, groups: list[_Group]) -> list[Loglikelihood]:
        """Every context with its only continuation."""
        ids, mask = self._pad([group.context + group.choices[0][1] for group in groups], left=False)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        scored = []
        for row, group in zip(logits, groups, strict=True):
            ((request_id, continuation),) = group.choices
            start = len(group.context) - 1
            scored.append(_scored(request_id, continuation, row[start : start + len(continuation)]))
        return scored

    def _read_shared(self, groups: list[_Group]) -> list[Loglikelihood]:
        """The contexts, and then the continuations without their last tokens. A context's last token predicts the
        continuation's first."""
        ids, mask = self._pad([group.context for group in groups], left=True)
        cache, first = read_prompt(self.model, ids, mask_BS=None if bool(mask.all()) else mask.bool())
        choices = [(i, *choice) for i, group in enumerate(groups) for choice in group.choices]
        rows = torch.tensor([i for i, *_ in choices], device=ids.device)
        later = [continuation[:-1] for *_, continuation in choices]
        rest = first.new_zeros(len(choices), 0, first.shape[-1])
        if any(later):
            cache.batch_select_indices(rows)
            new, _ = self._pad(later, left=False)
            # What fills rows up on the right stands after all that is read.
            seen = torch.cat([mask[rows], torch.ones_like(new)], dim=1)
            rest = self.model(input_ids=new, attention_mask=seen, past_key_values=cache).logits
        return [
            _scored(request_id, continuation, torch.cat([first[i, None], rest[at, : len(continuation) - 1]]))
            for at, (i, request_id, continuation) in enumerate(choices)
        ]

    def _pad(self, sequences: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        return self.prompts.pad(sequences, left=left, device=self.model.device)


def _take(waiting: deque[_Group], size: int, positions: int) -> list[_Group]:
    """Off the front: groups of `size` choices together, or the first `size` choices of a larger one. Shared contexts
    only of about one length, as padding on the left costs what reading does, and of `positions` together."""
    first = waiting[0]
    if len(first.choices) > size:
        waiting[0] = _Group(first.context, first.choices[size:])
        return [_Group(first.context, first.choices[:size])]
    alone = len(first.choices) == 1
    like = takewhile(lambda group: (len(group.choices) == 1) == alone, waiting)
    count = sum(1 for rows in accumulate(len(group.choices) for group in like) if rows <= size)
    if not alone:
        count = side_by_side([len(group.context) for group in waiting], most=count, positions=positions)
    return [waiting.popleft() for _ in range(count)]


def _scored(request_id: str, continuation: list[int], logits_SV: Tensor) -> Loglikelihood:
    """logits_SV: what predicted each of the continuation's S tokens (an empty one has none)."""
    logprobs = logits_SV[: len(continuation)].float().log_softmax(-1)
    target = torch.tensor(continuation, device=logprobs.device, dtype=torch.long)
    total = float(logprobs.gather(-1, target[:, None]).double().sum())
    return Loglikelihood(request_id, total, len(continuation), bool((logprobs.argmax(-1) == target).all()))
