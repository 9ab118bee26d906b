"""Decoding by transformers' generate(): for models of any architecture, a batch at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from plt_eval.engines.base import Completion
from plt_eval.engines.hf_batches import BatchSize
from plt_eval.engines.hf_prompts import Job, Prompts, StopCheck
from plt_eval.errors import UserError


class GenerateDecoder:
    """Completions by `model.generate`; each batch is yielded when the last of its rows is done."""

    name = "generate"

    def __init__(self, model: Any, prompts: Prompts, batch: BatchSize) -> None:
        self.model, self.prompts, self.batch = model, prompts, batch

    def __str__(self) -> str:
        return self.name

    def decode(self, jobs: list[Job]) -> Iterator[Completion]:
        """In the order given. Raises UserError when memory runs out for good."""
        yield from self.batch.batched(jobs, self._decode_batch)

    @torch.inference_mode()
    def _decode_batch(self, jobs: list[Job]) -> list[Completion]:
        started = time.monotonic()
        ids, mask = self.prompts.pad([job.ids for job in jobs], left=True, device=self.model.device)
        done = RowsDone(jobs, ids.shape[1], self.prompts.tokenizer)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max(job.limit for job in jobs),
                do_sample=False,
                eos_token_id=list(self.prompts.eos) or None,
                pad_token_id=self.prompts.pad_id,
            ),
            logits_processor=sampling(jobs),
            stopping_criteria=StoppingCriteriaList([done]),
        )
        seconds = time.monotonic() - started
        tokens = [new[:length] for new, length in zip(out[:, ids.shape[1] :].tolist(), done.lengths, strict=True)]
        return [self._completion(job, new, seconds) for job, new in zip(jobs, tokens, strict=True)]

    def _completion(self, job: Job, new: list[int], seconds: float) -> Completion:
        end = next((i for i, token in enumerate(new) if token in self.prompts.eos), None)
        return self.prompts.completion(job, new[:end], ended=end is not None, seconds=seconds)


class RowsDone(StoppingCriteria):
    """A row is done when it has its own number of tokens, or when one of its own stop strings has appeared. `lengths`:
    how many new tokens each row had then (None: not yet); what follows is padding."""

    def __init__(self, jobs: list[Job], prompt_width: int, tokenizer: Any) -> None:
        self.jobs, self.width = jobs, prompt_width
        self.stopped = [StopCheck(job.stops, tokenizer) for job in jobs]
        self.lengths: list[int | None] = [None] * len(jobs)

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        new = input_ids[:, self.width :]
        for i, (job, stopped) in enumerate(zip(self.jobs, self.stopped, strict=True)):
            if self.lengths[i] is None and (new.shape[1] >= job.limit or stopped(new[i, -stopped.tail :].tolist())):
                self.lengths[i] = new.shape[1]
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)


class SeededSampling(LogitsProcessor):
    """Draws each row's next token with random numbers of its own, by the inverse of the cumulative distribution."""

    def __init__(self, jobs: list[Job]) -> None:
        self.draws = [job.draws() for job in jobs]

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        draws = torch.tensor([[next(draw)] for draw in self.draws], dtype=torch.float64)
        token = torch.searchsorted(cumulative, draws.to(scores.device) * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


def sampling(jobs: list[Job]) -> LogitsProcessorList:
    """What draws the next tokens of one batch. Raises UserError where its jobs are not decoded alike."""
    decoding = jobs[0].decoding
    if any(job.decoding != decoding for job in jobs):
        raise UserError("one batch cannot mix decoding settings")
    chain = LogitsProcessorList()
    if decoding.temperature > 0:
        chain.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_p < 1:
            chain.append(TopPLogitsWarper(decoding.top_p))
        chain.append(SeededSampling(jobs))
    return chain
