"""The model behind transformers' server: one thread decodes what all clients ask, side by side.

    writer = Writer(HFEngine("models/tiny-r2/model", loops=2))
    tokens = writer.write(asked)                          # waits; other threads may ask meanwhile
    rows = writer.score([1, 40, 41, 42], first=1, top=5)  # how likely tokens 40, 41, 42 were

Requests share the slots of a DecodeSession and enter it while it runs; a model whose passes need a trip each, or of
another architecture, writes one text after the other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from plt_eval.engines.base import Decoding
from plt_eval.engines.hf import HFEngine
from plt_eval.engines.hf_generate import sampling
from plt_eval.engines.hf_prompts import Job, StopCheck
from plt_eval.engines.hf_session import SessionDecoder, slots_that_fit
from plt_eval.errors import UserError, one_line
from plt_eval.serving.asked import Asked
from plt_model.decode.prefill import CHUNK
from plt_model.decode.session import DecodeSession, Request

SLOTS = 8
"""Requests decoded at a time, at most; fewer where their cache would not fit in memory."""

Told = Callable[[int], None]
"""Hears each new token."""


@dataclass(frozen=True)
class TokenScore:
    """A token, its log-probability (None where nothing precedes it), and the likeliest tokens with theirs."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Writer:
    """Decodes for many threads. `context` limits prompt and answer together (None: the model has no limit)."""

    def __init__(self, engine: HFEngine, context: int | None) -> None:
        self.engine, self.context = engine, context
        self._session = self._make_session()
        self._keys = count()
        self._waiting, self._counting = 0, threading.Lock()
        self._tasks: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._new: list[Request] = []
        self._open: dict[str, Future[list[int]]] = {}
        threading.Thread(target=self._serve, daemon=True, name="decoding").start()

    @property
    def about(self) -> str:
        """How it decodes, in words."""
        if self._session is None:
            return "generate, one request at a time"
        return f"session of {self._session.slots} slots ({self._session.about})"

    def write(self, asked: Asked, told: Told | None = None) -> list[int]:
        """The new tokens, without the one that ends the text; those of a stop string are among them. Ends early when
        the client is gone. Raises what the decoder and `told` raise."""
        if not asked.job.limit:
            return []
        written: Future[list[int]] = Future()
        with self._counted():
            self._tasks.put(partial(self._begin, asked, told, written))
            new = written.result()
        if asked.failure is not None:
            raise asked.failure
        return new

    @property
    def running(self) -> int:
        """Requests that are being decoded or wait for that."""
        return self._waiting

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._counting:
            self._waiting += 1
        try:
            yield
        finally:
            with self._counting:
                self._waiting -= 1

    def warm_up(self) -> None:
        """Write a token, so that what has to be compiled is, and what does not fit says so. Raises UserError."""
        job = Job("", [self.engine.prompts.first_id], 1, (), False, Decoding())
        try:
            self.write(Asked(job, False, {}))
        except (MemoryError, torch.OutOfMemoryError) as full:
            raise UserError(f"{one_line(full)}; a smaller --max-model-len takes less") from full

    def score(self, ids: list[int], *, first: int, top: int) -> list[TokenScore]:
        """Log-probabilities of the tokens from place `first` on, with the `top` likeliest at each place."""
        scored: Future[list[TokenScore]] = Future()
        self._tasks.put(partial(_settle, scored, partial(score, self.engine.model, ids, first=first, top=top)))
        return scored.result()

    # --- the decoding thread --------------------------------------------------------------------------

    def _make_session(self) -> DecodeSession | None:
        model, decoder = self.engine.model, self.engine.decoder
        if self.context is None or not isinstance(decoder, SessionDecoder):
            return None
        session = decoder.session
        session.capacity = -(-(self.context + session.sync_every) // 64) * 64
        session.slots = min(SLOTS, slots_that_fit(model.config, session.capacity, model.dtype, model.device))
        return session

    def _serve(self) -> None:
        while True:
            self._tasks.get()()
            requests, self._new = self._new, []
            if self._session is None or not requests:
                continue
            try:
                for result in self._session.run(requests, more=self._arrivals):
                    self._open.pop(result.key).set_result(result.tokens)
            except Exception as failure:  # whoever waits must hear of it, and the server goes on
                for written in self._open.values():
                    written.set_exception(failure)
                self._open.clear()
                self._new.clear()

    def _arrivals(self) -> list[Request]:
        """Requests that have come since, once what else has come is done."""
        while not self._tasks.empty():
            self._tasks.get()()
        new, self._new = self._new, []
        return new

    def _begin(self, asked: Asked, told: Told | None, written: Future[list[int]]) -> None:
        try:
            self._enter(asked, told, written)
        except Exception as failure:  # this request's alone: the thread serves the others
            written.set_exception(failure)

    def _enter(self, asked: Asked, told: Told | None, written: Future[list[int]]) -> None:
        check = _Watch(asked, told, StopCheck(asked.job.stops, self.engine.tokenizer))
        if asked.gone.is_set():
            written.set_result([])
        elif self._session is None:
            _settle(written, partial(generate, self.engine, asked.job, check))
        else:
            request = self._request(asked.job, check)
            self._open[request.key] = written
            self._new.append(request)

    def _request(self, job: Job, check: _Watch) -> Request:
        warm = job.decoding.temperature > 0
        return Request(
            key=str(next(self._keys)),
            prompt=job.ids,
            max_new_tokens=job.limit,
            stop_ids=frozenset(self.engine.prompts.eos),
            stopped=check,
            temperature=job.decoding.temperature,
            top_p=job.decoding.top_p if warm else 1.0,
            stream=job.draws() if warm else None,
        )


class _Watch:
    """Asked after each new token whether that was the last; passes it on. What `told` raises ends this text alone."""

    def __init__(self, asked: Asked, told: Told | None, stopped: StopCheck) -> None:
        self.asked, self.told, self.stopped = asked, told, stopped

    def __call__(self, new_ids: list[int]) -> bool:
        if self.asked.gone.is_set():
            return True
        if self.told is not None:
            try:
                self.told(new_ids[-1])
            except Exception as failure:
                self.asked.failure = failure
                return True
        return self.stopped(new_ids)


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except Exception as failure:
        future.set_exception(failure)


# --- other decoders -------------------------------------------------------------------------------------


class _Watched(StoppingCriteria):
    """A _Watch, as transformers' generate() asks it."""

    def __init__(self, check: _Watch, prompt: int, eos: tuple[int, ...]) -> None:
        self.check, self.prompt, self.eos = check, prompt, eos

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        new = input_ids[0, self.prompt :].tolist()
        done = new[-1] not in self.eos and self.check(new)
        return torch.tensor([done], device=input_ids.device)


@torch.inference_mode()
def generate(engine: HFEngine, job: Job, check: _Watch) -> list[int]:
    """The new tokens by transformers' generate(), without the one that ends the text."""
    ids = torch.tensor([job.ids], device=engine.model.device)
    eos = engine.prompts.eos
    out = type(engine.model).generate(
        engine.model,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=job.limit,
            do_sample=False,
            eos_token_id=list(eos) or None,
            pad_token_id=engine.prompts.pad_id,
        ),
        logits_processor=sampling([job]),
        stopping_criteria=StoppingCriteriaList([_Watched(check, len(job.ids), eos)]),
    )
    new: list[int] = out[0, len(job.ids) :].tolist()
    return new[:-1] if new and new[-1] in eos else new


@torch.inference_mode()
def score(model: Any, ids: list[int], *, first: int, top: int) -> list[TokenScore]:
    """See Writer.score. The text is read in chunks, so that no more than a chunk's logits are held."""
    return list(_scores(model, ids, first, top))


def _scores(model: Any, ids: list[int], first: int, top: int) -> Iterator[TokenScore]:
    if first == 0 and ids:
        yield TokenScore(ids[0], None, [])
    cache = None
    for at in range(0, len(ids) - 1, CHUNK):
        chunk = torch.tensor([ids[at : min(at + CHUNK, len(ids) - 1)]], device=model.device)
        out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        start = max(first - 1 - at, 0)  # place i predicts token i + 1
        logprobs = out.logits[0, start:].float().log_softmax(-1)
        best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        for i, row in enumerate(logprobs):
            token = ids[at + start + i + 1]
            alternatives = zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True)
            yield TokenScore(token, float(row[token]), list(alternatives))
