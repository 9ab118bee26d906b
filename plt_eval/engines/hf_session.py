"""Decoding by plt_model's sessions: slots that are refilled at once, all loops of a token in one trip.

The decoder of every PLT whose loops can run so. Each completion is yielded when it ends, and gives its slot to the next
request: nothing waits for the longest of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Literal

import psutil
import torch

from plt_eval.engines.base import Completion
from plt_eval.engines.hf_batches import BatchSize
from plt_eval.engines.hf_prompts import Job, Prompts, StopCheck
from plt_eval.errors import UserError
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.decode.cache import StaticCache
from plt_model.decode.session import DecodeSession, Request

CACHE_SHARE = {"cuda": 0.8, "cpu": 0.5}
"""How much of the free memory the slots of an "auto" batch size may take; reading prompts needs the rest."""


class SessionDecoder:
    """Completions by a DecodeSession of `batch` slots ("auto": fewer where they would not fit in the free memory).

    `compile` is that of :func:`plt_model.decode.compiled.fast_step`. `notify` hears what
    the session decides.
    """

    name = "session"

    def __init__(
        self,
        model: PLTForCausalLM,
        prompts: Prompts,
        batch: BatchSize,
        *,
        compile: Literal["auto", "on", "off"] = "auto",
        notify: Callable[[str], None] = print,
    ) -> None:
        self.model, self.prompts, self.batch = model, prompts, batch
        self.compile, self.notify = compile, notify

    @cached_property
    def session(self) -> DecodeSession:
        """Made when it is first needed, as it packs the weights, and kept, as it may have compiled them."""
        return DecodeSession(self.model, slots=self.batch.size, compile=self.compile, notify=self._hear)

    def _hear(self, message: str) -> None:
        """Pass on what the session decides, but for the size of each run's cache."""
        if not message.startswith("decoding with a cache"):
            self.notify(message)

    def __str__(self) -> str:
        return f"{self.name} ({self.session.about})"

    def decode(self, jobs: list[Job]) -> Iterator[Completion]:
        """Started in the order given, yielded as they end. Where memory runs out, those that have not ended begin
        again in half the slots. Raises UserError when memory runs out for good."""
        waiting = {job.id: job for job in jobs}
        while waiting:
            session = self.session  # made first: what it holds of the weights is not free for slots
            session.slots = self._slots(waiting)
            with self.batch.guard(self.session.slots):
                yield from self._run(waiting)
                return

    def _slots(self, waiting: dict[str, Job]) -> int:
        slots = min(self.batch.size, len(waiting))
        if self.batch.fixed:
            return slots
        longest = max(len(job.ids) + job.limit for job in waiting.values())
        return min(slots, slots_that_fit(self.model.config, longest, self.model.dtype, self.model.device))

    def _run(self, waiting: dict[str, Job]) -> Iterator[Completion]:
        """What ends leaves `waiting`."""
        try:
            for result in self.session.run([self._request(job) for job in waiting.values()]):
                job = waiting.pop(result.key)
                yield self.prompts.completion(job, result.tokens, ended=result.reason == "stop", seconds=result.seconds)
        except ValueError as refused:
            if self.compile != "on":
                raise
            raise UserError(f"--compile on: {refused}") from refused

    def _request(self, job: Job) -> Request:
        """The job as the session takes it, its random numbers from their beginning."""
        warm = job.decoding.temperature > 0
        return Request(
            key=job.id,
            prompt=job.ids,
            max_new_tokens=job.limit,
            stop_ids=frozenset(self.prompts.eos),
            stopped=StopCheck(job.stops, self.prompts.tokenizer) if job.stops else None,
            temperature=job.decoding.temperature,
            top_p=job.decoding.top_p if warm else 1.0,
            stream=job.draws() if warm else None,
        )


def slots_that_fit(config: PLTConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many slots of `capacity` tokens the share CACHE_SHARE of the device's free memory holds; at least 1."""
    slot = sum(StaticCache(config, slots=1, capacity=capacity, dtype=dtype, device="meta").nbytes().values())
    return max(1, int(CACHE_SHARE[device.type] * _free_memory(device)) // slot)


def _free_memory(device: torch.device) -> int:
    """Bytes; on a GPU what torch keeps for later is free too."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
