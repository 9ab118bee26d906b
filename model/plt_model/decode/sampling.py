"""The next token of every row: greedy, or drawn with a uniform number that the caller brings.

    tokens_N = next_tokens(logits_NV)                                           # greedy, all of them
    tokens_N = next_tokens(logits_NV, temperature_N, None, draws_N)             # no row has a top_p below 1
    tokens_N = next_tokens(logits_NV, temperature_N, top_p_N, draws_N)

A function of tensors alone: nothing waits for the device, and a compiler can take it with the step.

    N rows   V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor


def next_tokens(
    logits_NV: Tensor,
    temperature_N: Tensor | None = None,
    top_p_N: Tensor | None = None,
    draws_N: Tensor | None = None,
) -> Tensor:
    """Tokens [N], long. A row of temperature 0 takes its most likely token; another one divides its logits by the
    temperature, keeps the fewest tokens that hold `top_p` of the probability together (1 keeps all), and takes the
    token in which its draw u in [0, 1) falls: the first with u * sum(p) < cumulative p, in float64.

    temperature, top_p and draws are float64; no temperature means that every row is greedy, no top_p that none is
    below 1 (then nothing is sorted). Logits count in float32, as in `generate`, and a draw gives the token that
    `generate` gives with transformers' temperature and top-p warpers before an inverse-cumulative draw. A row whose
    logits are not numbers gets some token of the vocabulary and disturbs no other.
    """
    scores = logits_NV.float()
    greedy = scores.argmax(-1)
    if temperature_N is None:
        return greedy
    if draws_N is None:
        raise ValueError("sampling needs a draw for every row")
    warm = temperature_N > 0
    scores = scores / torch.where(warm, temperature_N, 1.0).to(scores.dtype)[:, None]
    if top_p_N is not None:
        scores = _nucleus(scores, top_p_N)
    cumulative = scores.double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(cumulative, draws_N[:, None] * cumulative[:, -1:], right=True)
    return torch.where(warm, drawn[:, 0].clamp(max=scores.shape[-1] - 1), greedy)


def _nucleus(scores_NV: Tensor, top_p_N: Tensor) -> Tensor:
    """-inf for the least likely tokens that hold at most 1 - top_p together; the likeliest stays in any case."""
    ordered, order = scores_NV.sort(descending=False)
    cumulative = ordered.softmax(-1).cumsum(-1)
    dropped = cumulative <= (1 - top_p_N).to(cumulative.dtype)[:, None]
    dropped &= (top_p_N < 1)[:, None]
    dropped[:, -1:] = False
    return scores_NV.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))


__all__ = ["next_tokens"]
