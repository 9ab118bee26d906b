"""One engine for many conversations at once: one copy of the weights, requests of all agents in one batch."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from plt_eval.engines.base import Completion, Engine, GenerationRequest

GATHER_S = 0.02
"""How long the first request of a batch waits for others, in seconds."""


class SharedEngine:
    """`complete` may be called from any thread. An engine that is not `concurrent` gets batches, from one thread of its
    own: whatever has come while it worked on the last."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.largest_batch = 0
        self._concurrent = bool(getattr(engine, "concurrent", False))
        self._waiting: deque[tuple[GenerationRequest, Future[Completion]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        if not self._concurrent:
            threading.Thread(target=self._serve, name="engine", daemon=True).start()

    def complete(self, request: GenerationRequest) -> Completion:
        """The completion of one request. Raises what the engine raises."""
        if self._concurrent:
            return next(iter(self.engine.generate([request])))
        future: Future[Completion] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append((request, future))
            self._changed.notify()
        return future.result()

    def close(self) -> None:
        """Refuse what comes and what waits; the batch under way is left to itself."""
        with self._changed:
            self._closed = True
            for _, future in self._waiting:
                future.set_exception(RuntimeError("the engine is closed"))
            self._waiting.clear()
            self._changed.notify()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._changed.wait_for(lambda: self._closed, timeout=GATHER_S)
                batch = {request.id: (request, future) for request, future in self._waiting}
                self._waiting.clear()
            self.largest_batch = max(self.largest_batch, len(batch))
            self._run(batch)

    def _run(self, batch: dict[str, tuple[GenerationRequest, Future[Completion]]]) -> None:
        try:
            for completion in self.engine.generate([request for request, _ in batch.values()]):
                batch.pop(completion.request_id)[1].set_result(completion)
            for request_id, (_, future) in batch.items():
                future.set_result(Completion(request_id, "", "error", error="the engine returned no completion"))
        except BaseException as error:  # handed to the threads that wait
            for _, future in batch.values():
                if not future.done():
                    future.set_exception(error)
