"""Many requests through a few slots: each gets the next free one, and comes back as soon as it is done.

    session = DecodeSession(model, slots=8)
    for result in session.run([Request("first", [5, 7, 9], max_new_tokens=100), ...]):
        print(result.key, result.tokens, result.reason)

The batch never waits for its longest text: a slot that gets free reads the next prompt at once, and when none is left
the live slots move together and the step shrinks. What a request gets depends on itself alone, neither on its
neighbours nor on the order.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor

from ..modeling_plt import PLTForCausalLM
from .cache import StaticCache
from .compiled import fast_step, reach_bucket
from .prefill import CHUNK, SIDE_BY_SIDE, read_prompts, side_by_side
from .sampling import next_tokens
from .step import DecodeStep

SYNC_EVERY = {"cpu": 1, "cuda": 8}
"""Steps between two looks of the host at the new tokens: on a GPU each look costs a wait for the device."""

ROUNDED = 64
"""A capacity that the session chooses is a multiple of this."""


@dataclass(frozen=True)
class Request:
    """One text to write. `key` is unique in a run.

    stop_ids: tokens that end the text and are not part of it.
    stopped: asked on the host after each new token, with all of them so far (not to be changed); True ends the text.
    temperature, top_p: as in :func:`plt_model.decode.sampling.next_tokens`; 0 is greedy.
    stream: draws in [0, 1), one a token and at most max_new_tokens; some more than the text has tokens may be taken.
    """

    key: str
    prompt: list[int]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    stopped: Callable[[list[int]], bool] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stream: Iterator[float] | None = None


@dataclass(frozen=True)
class Result:
    """A text: its tokens without the stop id (but with what made `stopped` end it), why it ended, and the seconds
    from the reading of its prompt to its last token."""

    key: str
    tokens: list[int]
    reason: Literal["stop", "length"]
    seconds: float
    prompt_tokens: int


class DecodeSession:
    """Decodes with one model, for any number of runs.

    slots: requests decoded at once, at most. capacity: tokens of prompt and text that a slot holds; None: what the
    requests of a run need. chunk: prompt positions read at once. compile: see `fast_step`. sync_every: steps between
    two looks at the new tokens (None: 1 on a CPU, 8 on a GPU). What the session decides by itself it says through
    `notify`. Packs the model's weights (see :class:`DecodeStep`) and allocates nothing else until a run begins.
    Raises ValueError for a setting out of range and a model whose passes need a trip each.
    """

    def __init__(
        self,
        model: PLTForCausalLM,
        *,
        slots: int,
        capacity: int | None = None,
        chunk: int | None = CHUNK,
        compile: str = "auto",
        sync_every: int | None = None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        for name, value in (("slots", slots), ("capacity", capacity), ("chunk", chunk), ("sync_every", sync_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        self.model, self.slots, self.capacity, self.chunk, self.notify = model, slots, capacity, chunk, notify
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.sync_every = SYNC_EVERY.get(self.device.type, 1) if sync_every is None else sync_every
        self.fast = fast_step(DecodeStep(model), compile=compile, notify=notify)
        self.step: Callable[[StaticCache, Tensor, int], Tensor] = self.fast

    @property
    def about(self) -> str:
        """What decodes, in words."""
        return self.fast.about

    def run(
        self, requests: Iterable[Request], *, more: Callable[[], Iterable[Request]] | None = None
    ) -> Iterator[Result]:
        """Results, each as soon as it is there. Everything the run holds goes when the iterator ends or is closed.

        `more` is asked between steps for requests that have come meanwhile, and needs a session with a capacity; the
        run ends when nothing is left to do and it has nothing either.

        Raises ValueError, before any work, naming the key: an empty prompt, a token outside the vocabulary, a request
        beyond the capacity, a setting out of range, a key that came before. From the first result on: the same for
        what `more` brings, whose keys are only compared with each other; MemoryError or torch.OutOfMemoryError, at once
        when the cache does not fit; and whatever a request's `stopped` or `stream` raises, after the results that are
        there have been handed out.
        """
        if more is not None and self.capacity is None:
            raise ValueError("requests that come later need a session with a capacity")
        waiting = list(requests)
        self._check(waiting)
        return _Run(self, waiting, more).results() if waiting else iter(())

    def _check(self, requests: list[Request]) -> None:
        seen: set[str] = set()
        for request in requests:
            if request.key in seen:
                raise ValueError(f"request {request.key!r}: another one has this key")
            seen.add(request.key)
            _check_settings(request)
            _check_prompt(request, self.model.config.vocab_size)
            size = len(request.prompt) + request.max_new_tokens
            if self.capacity is not None and size > self.capacity:
                raise ValueError(
                    f"request {request.key!r}: {len(request.prompt)} tokens of prompt and {request.max_new_tokens} new "
                    f"ones do not fit the capacity of {self.capacity}"
                )


def _check_settings(request: Request) -> None:
    where = f"request {request.key!r}"
    if request.max_new_tokens < 1:
        raise ValueError(f"{where}: max_new_tokens is {request.max_new_tokens}: expected at least 1")
    if not 0 <= request.temperature < float("inf"):
        raise ValueError(f"{where}: temperature is {request.temperature}: expected 0 or more")
    if not 0 <= request.top_p <= 1:
        raise ValueError(f"{where}: top_p is {request.top_p}: expected a number from 0 to 1")
    if request.temperature > 0 and request.stream is None:
        raise ValueError(f"{where}: temperature is {request.temperature} and there is no stream to draw from")


def _check_prompt(request: Request, vocabulary: int) -> None:
    where, prompt = f"request {request.key!r}", request.prompt
    if not prompt:
        raise ValueError(f"{where}: the prompt has no tokens: expected at least one")
    wrong = next((token for token in (min(prompt), max(prompt)) if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(f"{where}: token {wrong} in the prompt: expected 0 to {vocabulary - 1}")


class _Row:
    """A request that is being decoded."""

    def __init__(self, request: Request, started: float) -> None:
        self.request, self.started = request, started
        self.tokens: list[int] = []
        self.reason: Literal["stop", "length"] | None = None

    @property
    def left(self) -> int:
        """New tokens still allowed."""
        return self.request.max_new_tokens - len(self.tokens)

    @property
    def read(self) -> int:
        """Tokens in its slot: all but the newest, which the next step reads."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def take(self, new: Iterable[int]) -> None:
        """Append the new tokens, up to the one that ends the text."""
        request = self.request
        for token in new:
            if token in request.stop_ids:
                self.reason = "stop"
                return
            self.tokens.append(token)
            if request.stopped is not None and request.stopped(self.tokens):
                self.reason = "stop"
            elif not self.left:
                self.reason = "length"
            if self.reason is not None:
                return

    def choice(self, count: int) -> list[float]:
        """Temperature, top_p and the draws of the next `count` steps (those past the last token count for nothing)."""
        request = self.request
        if request.temperature == 0 or request.stream is None:
            return [0.0, 1.0] + [0.0] * count
        wanted = min(count, self.left)
        drawn = [float(draw) for draw in itertools.islice(request.stream, wanted)]
        if len(drawn) < wanted:
            made = len(self.tokens) + len(drawn)
            raise ValueError(f"request {request.key!r}: its stream ended after {made} draws: expected one a token")
        return [request.temperature, request.top_p, *drawn] + [0.0] * (count - wanted)

    def result(self) -> Result:
        assert self.reason is not None
        seconds = time.monotonic() - self.started
        return Result(self.request.key, self.tokens, self.reason, seconds, len(self.request.prompt))


class _Run:
    """One run: who waits, who is in which slot. Live rows are in the first slots whenever a step is taken."""

    def __init__(
        self, session: DecodeSession, requests: list[Request], more: Callable[[], Iterable[Request]] | None
    ) -> None:
        self.session, self.waiting, self.more = session, deque(requests), more
        slots = session.slots if more is not None else min(session.slots, len(requests))
        self.rows: list[_Row | None] = [None] * slots
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        # With room for a whole round after a row's last token; without it, rounds get shorter towards the end.
        needed = -(-(longest + session.sync_every) // ROUNDED) * ROUNDED
        if session.fast.compiling:  # few sizes, so that runs share what was compiled
            needed = reach_bucket(needed, needed * 2)
        self.capacity = needed if session.capacity is None else session.capacity
        self.failure: Exception | None = None

    def results(self) -> Iterator[Result]:
        self.cache = _allocated(self.session, len(self.rows), self.capacity)
        try:
            while self._work():
                while self.waiting and None in self.rows:
                    yield from self._admit()
                    self._fail()
                self._close_gaps()
                if any(self.rows):
                    yield from self._round()
                    self._fail()
        finally:
            self.session.fast.release()
            del self.cache  # also when an error's traceback keeps this frame

    def _work(self) -> bool:
        """Whether anything is left to do, once what has come meanwhile is among it."""
        if self.more is not None:
            new = list(self.more())
            self.session._check(new)
            self.waiting.extend(new)
        return bool(self.waiting) or any(self.rows)

    def _fail(self) -> None:
        """Raise what a request raised, now that the results of its round are out."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            try:
                raise failure
            finally:
                del failure

    # --- prompts --------------------------------------------------------------------------------------

    def _admit(self) -> list[Result]:
        """Read the next prompts and put them into free slots; results of those that end with their first token."""
        session = self.session
        lengths = (len(request.prompt) for request in self.waiting)
        positions = min(session.chunk or CHUNK, SIDE_BY_SIDE.get(session.device.type, CHUNK))
        count = side_by_side(lengths, most=self.rows.count(None), positions=positions)
        started = time.monotonic()
        rows = [_Row(self.waiting.popleft(), started) for _ in range(count)]
        caches, logits = read_prompts(session.model, [row.request.prompt for row in rows], chunk=session.chunk)
        first = _chosen(logits, self._choices(rows, 1), 0)
        done = self._take(rows, first[:, None].tolist())
        for row, cache in zip(rows, caches, strict=True):
            if row.reason is None and self.failure is None:
                slot = self.rows.index(None)
                self.cache.adopt(slot, cache)
                self.rows[slot] = row
        return done

    def _close_gaps(self) -> None:
        """Move live rows from the end into free slots before them."""
        live = [slot for slot, row in enumerate(self.rows) if row is not None]
        for hole in range(len(live)):
            if self.rows[hole] is None:
                source = live.pop()
                self.cache.move(source, hole)
                self.rows[hole], self.rows[source] = self.rows[source], None

    # --- steps ----------------------------------------------------------------------------------------

    def _round(self) -> list[Result]:
        """Up to `sync_every` steps, then one look at their tokens."""
        rows = [row for row in self.rows if row is not None]
        longest = max(row.read for row in rows)
        steps = min(self.session.sync_every, max(row.left for row in rows), self.cache.capacity - longest)
        new = self._steps(rows, steps, self.session.fast.reach(longest + steps, self.cache.capacity))
        done = self._take(rows, new)
        self.rows = [None if row is None or row.reason is not None else row for row in self.rows]
        return done

    @torch.no_grad()
    def _steps(self, rows: list[_Row], steps: int, reach: int) -> list[list[int]]:
        """The tokens [n, steps] of the live rows. Slots up to the next power of two run along from length 0."""
        bucket = min(1 << (len(rows) - 1).bit_length(), len(self.rows))
        idle = bucket - len(rows)
        if idle:
            self.cache.lengths[len(rows) : bucket] = 0
        choices = self._choices(rows, steps, idle)
        tokens = torch.tensor([row.tokens[-1] for row in rows] + [0] * idle, device=self.session.device)
        new = torch.empty(bucket, steps, dtype=torch.long, device=self.session.device)
        for i in range(steps):
            tokens = _chosen(self.session.step(self.cache, tokens, reach), choices, i)
            new[:, i] = tokens
        found: list[list[int]] = new.tolist()
        return found[: len(rows)]

    def _choices(self, rows: list[_Row], steps: int, idle: int = 0) -> _Choices | None:
        """How the rows choose their tokens, in one transfer; None when all are greedy."""
        if all(row.request.temperature == 0 for row in rows):
            return None
        table = [row.choice(steps) for row in rows] + [[0.0, 1.0] + [0.0] * steps] * idle
        held = torch.tensor(table, dtype=torch.float64).to(self.session.device)
        cut = any(row.request.temperature > 0 and row.request.top_p < 1 for row in rows)
        return _Choices(held[:, 0], held[:, 1] if cut else None, held[:, 2:])

    def _take(self, rows: list[_Row], new: list[list[int]]) -> list[Result]:
        """Hand each row its new tokens; the results of those that are done. What a request raises waits until these
        are out."""
        for row, tokens in zip(rows, new, strict=True):
            try:
                row.take(tokens)
            except Exception as error:
                error.add_note(f"request {row.request.key!r}")
                self.failure = self.failure or error
        return [row.result() for row in rows if row.reason is not None]


@dataclass(frozen=True)
class _Choices:
    temperature_N: Tensor
    top_p_N: Tensor | None
    draws_NS: Tensor


def _chosen(logits_NV: Tensor, choices: _Choices | None, step: int) -> Tensor:
    if choices is None:
        return next_tokens(logits_NV)
    return next_tokens(logits_NV, choices.temperature_N, choices.top_p_N, choices.draws_NS[:, step])


def _allocated(session: DecodeSession, slots: int, capacity: int) -> StaticCache:
    """The cache of a run. Raises MemoryError where it does not fit on a CPU (torch's own error on a GPU)."""
    config, dtype = session.model.config, session.dtype
    plan = StaticCache(config, slots=slots, capacity=capacity, dtype=dtype, device="meta")
    size = sum(plan.nbytes().values())
    what = f"a cache of {slots} slots of {capacity} tokens ({size / 1e9:.2f} GB)"
    if session.device.type == "cpu" and size > psutil.virtual_memory().available:
        raise MemoryError(f"{what} does not fit: {psutil.virtual_memory().available / 1e9:.2f} GB of memory are free")
    session.notify(f"decoding with {what}")
    try:
        with torch.inference_mode(False):  # one made in inference mode could not be written outside
            return StaticCache(config, slots=slots, capacity=capacity, dtype=dtype, device=session.device)
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise MemoryError(f"{what} does not fit") from error
        raise


__all__ = ["DecodeSession", "Request", "Result"]
