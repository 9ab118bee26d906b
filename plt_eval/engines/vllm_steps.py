"""One thread that owns a vLLM engine, starts, steps and ends it, and that any thread may ask at any time.

    steps = Steps(lambda: start(model=...))
    for written in steps.run([Asked("a", [1, 5, 7], SamplingParams(...)), ...]):
        ...                        # each when it ends, whoever else is asking

What comes while others are written joins them at the next step: conversations do not wait for each other.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from plt_eval.engines.hf_prompts import StopCheck
from plt_eval.engines.vllm_start import end, give_memory_back, threads_kept

STOPS_EVERY = 8
"""New tokens between two looks for stop strings. A look costs tens of microseconds; what is written past a stop string
until then is thrown away."""

CLOSING_S = 60.0
"""How long the step under way may take to end when the engine is closed, in seconds."""

CLOSED = "the engine is closed"

R = TypeVar("R")


@dataclass(frozen=True)
class Asked:
    """Tokens to go on from, and vLLM's SamplingParams. `stops` end the text too."""

    key: str
    ids: list[int]
    params: Any
    stops: StopCheck | None = None


@dataclass(frozen=True)
class Written:
    """What came of it: the new tokens, without the one that ended them (`ended`) and what followed a stop string.
    `output` is vLLM's last RequestOutput. `seconds` begin when vLLM got it."""

    asked: Asked
    tokens: list[int]
    ended: bool
    output: Any
    seconds: float


@dataclass
class _Live:
    """A request, and who waits for it."""

    asked: Asked
    outbox: queue.SimpleQueue[Written | BaseException]
    tokens: list[int] = field(default_factory=list)
    began: float = 0.0


class Steps:
    """`start` makes the vllm.LLM, in the thread that will step it. Raises what it raises."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._names = map(str, itertools.count())
        self._waiting: deque[tuple[str, _Live]] = deque()
        self._running: dict[str, _Live] = {}
        self._broken: BaseException | None = None
        self._gate = threading.Lock()
        self._over = False
        self._llm: Any = None
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(started,), name="vllm", daemon=True)
        self._thread.start()
        started.result()

    @property
    def max_model_len(self) -> int:
        """Tokens that fit: prompt and answer together."""
        return int(self._llm.llm_engine.model_config.max_model_len)

    # --- for anybody ----------------------------------------------------------------------------------

    def run(self, asked: Sequence[Asked]) -> Iterator[Written]:
        """Each when it ends. What has not ended when the iterator is closed is given up. Raises what vLLM raises, and
        RuntimeError when the engine is closed."""
        if not asked:
            return
        outbox: queue.SimpleQueue[Written | BaseException] = queue.SimpleQueue()
        named = {next(self._names): _Live(one, outbox) for one in asked}
        self._tell(lambda: self._take(named))
        try:
            for _ in range(len(named)):
                result = outbox.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            self._inbox.put(lambda: self._give_up(named))

    def call(self, work: Callable[[Any], R]) -> R:
        """work(llm), between two steps, in the thread that owns it. Raises RuntimeError when the engine is closed."""
        future: Future[R] = Future()

        def told() -> None:
            try:
                future.set_result(work(self._llm))
            except BaseException as error:  # handed to who asked
                future.set_exception(error)

        self._tell(told)
        return future.result()

    def close(self) -> None:
        """End the engine when its step has ended. Who still waits for it gets a RuntimeError."""
        self._inbox.put(None)
        self._thread.join(CLOSING_S)

    def _tell(self, work: Callable[[], object]) -> None:
        with self._gate:
            if self._over:
                raise RuntimeError(CLOSED)
            self._inbox.put(work)

    # --- in the thread --------------------------------------------------------------------------------

    def _serve(self, started: Future[None]) -> None:
        with threads_kept():
            try:
                self._llm = self._start()
            except BaseException as error:  # handed to who waits for it
                started.set_exception(error)
                return
            self._seats = int(self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs)
            started.set_result(None)
            while self._hear():
                self._step()
            self._refuse_the_rest()
            end(self._llm)
            self._llm = None
            give_memory_back()

    def _hear(self) -> bool:
        """Do what was asked for; with nothing to step, wait for it. False when it is over."""
        while True:
            busy = bool(self._running or self._waiting)
            try:
                told = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if told is None:
                return False
            told()

    def _refuse_the_rest(self) -> None:
        """Nobody may wait for what will not come."""
        with self._gate:
            self._over = True
        self._fail(RuntimeError(CLOSED))
        while not self._inbox.empty():
            told = self._inbox.get()
            if told is not None:
                told()

    def _take(self, named: dict[str, _Live]) -> None:
        if self._broken is not None:
            next(iter(named.values())).outbox.put(self._broken)
        else:
            self._waiting.extend(named.items())

    def _give_up(self, named: dict[str, _Live]) -> None:
        self._waiting = deque(item for item in self._waiting if item[0] not in named)
        left = [name for name in named if self._running.pop(name, None) is not None]
        if left:
            self._llm.llm_engine.abort_request(left)

    def _step(self) -> None:
        try:
            self._seat()
            for output in self._llm.llm_engine.step():
                self._read(output)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Whoever waits, and whoever asks from here on, gets the error."""
        self._broken = error
        for live in (*self._running.values(), *(live for _, live in self._waiting)):
            live.outbox.put(error)
        self._running.clear()
        self._waiting.clear()

    def _seat(self) -> None:
        """Give vLLM as many as it works on at a time: what waits there would only count as time of its own."""
        from vllm.inputs.engine import tokens_input

        while self._waiting and len(self._running) < self._seats:
            name, live = self._waiting.popleft()
            live.began = time.monotonic()
            self._running[name] = live
            self._llm.llm_engine.add_request(name, tokens_input(live.asked.ids), live.asked.params)

    def _read(self, output: Any) -> None:
        """New tokens of a request: has it ended?"""
        live = self._running.get(output.request_id)
        if live is None:
            return
        (new,) = output.outputs
        seen = len(live.tokens)
        live.tokens += new.token_ids
        ended = new.finish_reason == "stop"
        if ended:
            live.tokens.pop()
        stop = None if live.asked.stops is None else live.asked.stops.first(live.tokens, seen)
        if stop is None and not output.finished:
            return
        del self._running[output.request_id]
        if not output.finished:
            self._llm.llm_engine.abort_request([output.request_id])
        tokens, seconds = live.tokens[:stop], time.monotonic() - live.began
        live.outbox.put(Written(live.asked, tokens, ended and stop is None, output, seconds))
