"""An engine whose answers are what BFCL's problems want: a text, calls of tools, or a whole conversation.

What is said to the model, in which order, is the official package's: after each answer it is asked for the next
question, in the sandbox, where the calls of all answers so far are executed again. A conversation is one answer: its
steps are not stored one by one, and a conversation that was interrupted begins anew.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plt_benchmarks.protocols import Message, Sample, Sandbox
from plt_benchmarks.tools.scorer import converse_step
from plt_benchmarks.tools.suite import MAX_NEW_TOKENS, ToolsSuite, answer_text, transcript_prompt
from plt_eval.engines.base import (
    Completion,
    Engine,
    GenerationRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    ToolMessage,
    health_lines,
)
from plt_eval.engines.conversations import SharedEngine, refused_for_length
from plt_eval.errors import UserError
from plt_eval.tools_agent.calls import calls_of
from plt_eval.workers import as_completed

CONVERSATIONS = 16
"""Conversations at a time, where the user does not say."""
SPARE = 2
"""Tokens of the context that stay empty, as in the official handler of local models."""
STEPS_A_TURN = 21
"""Answers in one turn: the official limit of 20 steps, and the one that ends it."""
TOO_LONG = "Error during inference: the prompt does not fit into the model's context"
"""The answer to a question that leaves no room for one; it counts as the official command counts its own such lines."""
NO_END = "Error during inference: the conversation does not end"
"""The result of a conversation that goes on after all of its turns: calls have shaped what is asked next."""


class ToolsEngine:
    """Answers the problems of `suite`, by `engine`; an Engine. `conversations` are under way at a time.

    Raises UserError when functions are to be tools and the engine takes none.
    """

    def __init__(
        self,
        engine: Engine,
        suite: ToolsSuite,
        samples: Iterable[Sample],
        open_sandbox: Callable[[], Sandbox],
        *,
        conversations: int = CONVERSATIONS,
    ) -> None:
        self.name = engine.name
        self._engine = engine
        self._mode = suite.mode
        self._samples = {sample.id: sample for sample in samples}
        self._open_sandbox = open_sandbox
        self._conversations = conversations
        self._cores = threading.Semaphore(len(os.sched_getaffinity(0)))
        if suite.mode == "native" and not getattr(engine, "takes_tools", False):
            why = "--api completions has" if engine.name == "openai" else "the model's chat template has"
            raise UserError(f"--tool-calls native: {why} no tools; use --tool-calls prompt")

    def identity(self) -> Mapping[str, Any]:
        """The engine's own: how functions are told, and how conversations go, is the suite's version."""
        return self._engine.identity()

    def facts(self) -> Mapping[str, str]:
        return self._engine.facts()

    def health(self) -> Sequence[str]:
        """The engine's own."""
        return health_lines(self._engine)

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """Single turns first, in the engine's own batches; then conversations, each as it ends."""
        single: list[GenerationRequest] = []
        several: list[GenerationRequest] = []
        for request in requests:
            (several if self._talks(request) else single).append(request)
        fitting = []
        for request in single:
            fitted = fitted_request(self._engine, self._with_tools(request))
            if fitted is None:
                yield Completion(request.id, self.text(TOO_LONG), "length")
            else:
                fitting.append(fitted)
        if fitting:
            yield from map(self._answered, self._drawn(fitting))
        if not several:
            return
        sandbox = self._open_sandbox()
        shared = SharedEngine(self._engine)
        try:
            yield from as_completed(
                lambda request: _Conversation(self, shared, sandbox, request).held(),
                several,
                workers=min(self._conversations, len(several)),
            )
        finally:
            shared.close()

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:
        """The engine's own."""
        return self._engine.loglikelihood(requests)

    def close(self) -> None:
        """Nothing: the engine is closed by whoever opened it."""

    # --- single turns -------------------------------------------------------------------------------------

    def sample(self, request: GenerationRequest) -> Sample:
        """The problem that is asked."""
        return self._samples[request.id.rpartition("#")[0]]

    def _talks(self, request: GenerationRequest) -> bool:
        return "multi_turn" in self.sample(request).data["category"]

    def _drawn(self, requests: list[GenerationRequest]) -> Iterator[Completion]:
        """From an engine that knows its context all at once; from others one by one, since they refuse what is too
        long when they see it."""
        knows = getattr(self._engine, "context", None) is not None
        if knows or not getattr(self._engine, "concurrent", False):
            return self._engine.generate(requests)
        return as_completed(self._alone, requests, workers=min(self._conversations, len(requests)))

    def _alone(self, request: GenerationRequest) -> Completion:
        try:
            return next(iter(self._engine.generate([request])))
        except UserError as refused:
            if not refused_for_length(refused):
                raise
            return Completion(request.id, TOO_LONG, "length")

    def _with_tools(self, request: GenerationRequest) -> GenerationRequest:
        tools = self.sample(request).data["tools"] if self._mode == "native" else ()
        return replace(request, tools=tuple(tools))

    def _answered(self, completion: Completion) -> Completion:
        if self._mode == "prompt" or completion.error is not None:
            return completion
        sample = self._samples[completion.request_id.rpartition("#")[0]]
        calls = calls_of(completion, sample.data["tools"])
        told = [{call["name"]: call["arguments"]} for call in calls] if calls else completion.text
        return replace(completion, text=answer_text(told, self._mode), detail={"written": completion.text[:2000]})

    # --- for conversations --------------------------------------------------------------------------------

    def next_step(self, sandbox: Sandbox, sample: Sample, said: list[dict[str, Any]]) -> dict[str, Any]:
        """See converse_step. As many at a time as there are cores."""
        with self._cores:
            return converse_step(sandbox, sample.data["entry"], self._mode, said)

    def calls(self, completion: Completion, tools: list[dict[str, Any]]) -> list[dict[str, str]]:
        """The calls in an answer; none where functions are no tools."""
        return calls_of(completion, tools) if self._mode == "native" else []

    def text(self, result: Any) -> str:
        """The text of the Answer with that result."""
        return answer_text(result, self._mode)


@dataclass
class _Totals:
    """What a conversation took. A number of tokens that one step does not know is not known of all."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    seconds: float = 0.0
    steps: int = 0
    chat: bool = False
    cut: int = 0

    def add(self, completion: Completion) -> None:
        self.prompt_tokens = _sum(self.prompt_tokens, completion.prompt_tokens)
        self.completion_tokens = _sum(self.completion_tokens, completion.completion_tokens)
        self.steps += 1
        self.chat = completion.chat
        self.cut += completion.finish_reason == "length"


class _Conversation:
    """One conversation, from the first question to the last answer."""

    def __init__(self, tools: ToolsEngine, shared: SharedEngine, sandbox: Sandbox, request: GenerationRequest) -> None:
        self._tools = tools
        self._shared = shared
        self._sandbox = sandbox
        self._request = request
        self._sample = tools.sample(request)
        self._totals = _Totals()

    def held(self) -> Completion:
        """The whole conversation as one completion."""
        started = time.monotonic()
        question: dict[str, Any] = {"messages": self._sample.data["messages"], "tools": self._sample.data["tools"]}
        said: list[dict[str, Any]] = []
        most = STEPS_A_TURN * len(self._sample.data["entry"]["question"])
        while "done" not in question:
            if len(said) >= most:
                question = {"done": NO_END}
                break
            completion = self._asked(question)
            if completion is None:
                question = {"done": TOO_LONG}
                break
            if completion.error is not None:
                why = f"the engine gave up in step {len(said) + 1}: {completion.error}"
                return Completion(self._request.id, "", "error", error=why)
            self._totals.add(completion)
            calls = self._tools.calls(completion, question["tools"])
            named = [{"id": f"call_{len(said)}_{i}", **call} for i, call in enumerate(calls)]
            said.append({"text": completion.text, "calls": named})
            question = self._tools.next_step(self._sandbox, self._sample, said)
        return self._completion(question["done"], time.monotonic() - started)

    def _asked(self, question: Mapping[str, Any]) -> Completion | None:
        """The model's answer; None where the question does not fit into its context."""
        request = self._next_request(question)
        if request is None:
            return None
        try:
            return self._shared.complete(request)
        except UserError as refused:
            if refused_for_length(refused):
                return None
            raise

    def _next_request(self, question: Mapping[str, Any]) -> GenerationRequest | None:
        """The question as the engine takes it, with room for an answer; None where the context has none."""
        prompt = transcript_prompt([_message(turn) for turn in question["messages"]])
        request = GenerationRequest(
            f"{self._request.id}.{self._totals.steps}",
            prompt,
            self._request.decoding,
            tools=tuple(question["tools"]),
            conversation=self._request.id,
        )
        return fitted_request(self._shared.engine, request)

    def _completion(self, result: Any, seconds: float) -> Completion:
        totals = self._totals
        finished = isinstance(result, list)
        detail: dict[str, Any] = {"steps": totals.steps, "answers_cut": totals.cut}
        if finished:
            detail["turns"] = len(result)
        return Completion(
            self._request.id,
            self._tools.text(result),
            "stop" if finished else "length",
            chat=totals.chat,
            prompt_tokens=totals.prompt_tokens,
            completion_tokens=totals.completion_tokens,
            seconds=seconds,
            detail=detail,
        )


def fitted_request(engine: Engine, request: GenerationRequest) -> GenerationRequest | None:
    """The request, asking for no more than the rest of the model's context; None where there is no rest. As it is where
    the engine does not know."""
    context, count = getattr(engine, "context", None), getattr(engine, "count_tokens", None)
    if context is None or count is None:
        return request
    room = context - count(request) - SPARE
    if room < 1:
        return None
    wanted = request.decoding.max_new_tokens or MAX_NEW_TOKENS
    return replace(request, decoding=replace(request.decoding, max_new_tokens=min(wanted, room)))


def _message(turn: Mapping[str, Any]) -> Message:
    content = turn.get("content")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    if turn.get("tool_calls") or turn["role"] == "tool":
        calls = tuple(turn.get("tool_calls") or ())
        return ToolMessage(turn["role"], text, tool_calls=calls, tool_call_id=str(turn.get("tool_call_id") or ""))
    return Message(turn["role"], text)


def _sum(total: int | None, more: int | None) -> int | None:
    return None if total is None or more is None else total + more
