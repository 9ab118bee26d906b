"""How likely a model in vLLM finds continuations of contexts.

A continuation's tokens but the last are read with the context, and their log-probabilities are those of the prompt;
the last one's, which is only predicted, is that of the first new token. So one-token answers (A, B, C, D) cost no more
than their context, which the prefix cache shares between them.

vLLM does not read its prefix cache where a prompt's log-probabilities are asked for, as it has none for what it finds
there. Only the continuation's are wanted here: the cache is read, and a request whose hit reaches into its continuation
is made again without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from plt_eval.engines.base import Loglikelihood
from plt_eval.engines.vllm_steps import Asked, Steps, Written
from plt_eval.errors import UserError


@dataclass(frozen=True)
class _Item:
    id: str
    context: list[int]
    continuation: list[int]

    @property
    def read(self) -> list[int]:
        """Every token but the last, which is only predicted."""
        return (self.context + self.continuation)[:-1]


def score(steps: Steps, requests: Iterable[tuple[str, list[int], list[int]]]) -> Iterator[Loglikelihood]:
    """Of requests in tokens: (id, context, continuation), at least one token of context each. In an order of its own.
    Raises UserError for what does not fit the context."""
    items = [_Item(*request) for request in requests]
    yield from (Loglikelihood(item.id, 0.0, 0, True) for item in items if not item.continuation)
    scored = {item.id: item for item in items if item.continuation}
    for item in scored.values():
        if len(item.read) >= steps.max_model_len:
            raise UserError(
                f"{item.id}: {len(item.read)} tokens are to be read, and vLLM's context holds "
                f"{steps.max_model_len - 1} beside the one it predicts (--max-model-len)"
            )
    # Neighbours share their contexts, and find each other's in the cache.
    ordered = sorted(scored.values(), key=lambda item: (-len(item.context), item.context, item.id))
    again = []
    for written in steps.run([_asked(item, cached=True) for item in ordered]):
        item = scored[written.asked.key]
        if _lacks(item, written):
            again.append(item)
        else:
            yield _likelihood(item, written)
    for written in steps.run([_asked(item, cached=False) for item in again]):
        yield _likelihood(scored[written.asked.key], written)


def _lacks(item: _Item, written: Written) -> bool:
    """Whether a hit reaches into the continuation: at the start, or of a request that was preempted while it was read
    (rows are then missing at the front)."""
    inner = len(item.continuation) - 1
    if not inner:
        return False
    cached, rows = written.output.num_cached_tokens or 0, written.output.prompt_logprobs
    return cached >= len(item.context) or len(rows) <= inner


def _asked(item: _Item, *, cached: bool) -> Asked:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    several = len(item.continuation) > 1
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=1 if several else None,
        logprob_token_ids=item.continuation[-1:],
        flat_logprobs=True,
        skip_reading_prefix_cache=several and not cached,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return Asked(item.id, item.read, params)


def _likelihood(item: _Item, written: Written) -> Loglikelihood:
    (new,) = written.output.outputs
    last = item.continuation[-1]
    logprobs = [new.logprobs[0][last].logprob]
    greedy = new.token_ids[0] == last
    inner = item.continuation[:-1]
    if inner:
        rows = written.output.prompt_logprobs
        for token, place in zip(inner, range(len(rows) - len(inner), len(rows)), strict=True):
            row = rows[place]
            logprobs.append(row[token].logprob)
            greedy = greedy and _is_greedy(token, row)
    return Loglikelihood(item.id, float(sum(logprobs)), len(item.continuation), greedy)


def _is_greedy(token: int, row: Any) -> bool:
    """Whether greedy decoding takes it: of tokens that are equally likely, the first."""
    best = max(row.values(), key=lambda found: found.logprob).logprob
    return bool(token == min(other for other, found in row.items() if found.logprob == best))
