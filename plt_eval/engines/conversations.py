"""What conversations of several turns need of an engine: one copy of the weights for all, requests of all in one batch,
and the calls of tools that an answer writes.
"""

from __future__ import annotations

import json
import re
import threading
from collections import deque
from concurrent.futures import Future

from plt_eval.engines.base import Completion, Engine, GenerationRequest
from plt_eval.errors import UserError
from plt_eval.records import storable

GATHER_S = 0.02
"""How long the first request of a batch waits for others, in seconds."""
_REFUSED = re.compile(
    r"HTTP (400|413|422).*(context_length_exceeded|maximum context length|context (length|window)|prompt is too long)",
    re.IGNORECASE | re.DOTALL,
)
_TOOL_JSON = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_TOOL_XML = re.compile(r"<function=(\w+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=(\w+)>\n?(.*?)\n?</parameter>", re.DOTALL)


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


def refused_for_length(error: UserError) -> bool:
    """Whether an endpoint refused a request because it does not fit into the model's context."""
    return bool(_REFUSED.search(str(error)))


def written_tool_calls(text: str) -> list[dict[str, str]]:
    """Tool calls as models write them: JSON in <tool_call>, or <function=name> with <parameter=name>. Without lone
    surrogates, which JSON can write and no request can hold."""
    calls = []
    for found in _TOOL_JSON.finditer(text):
        try:
            value = json.loads(found[1])
            arguments = value.get("arguments", {})
            written = arguments if isinstance(arguments, str) else json.dumps(arguments)
            name = str(value.get("name"))
        except (ValueError, RecursionError):
            continue
        calls.append({"name": storable(name), "arguments": storable(written)})
    for found in _TOOL_XML.finditer(text):
        arguments = {parameter[1]: parameter[2] for parameter in _PARAMETER.finditer(found[2])}
        calls.append({"name": found[1], "arguments": json.dumps(arguments)})
    return calls
