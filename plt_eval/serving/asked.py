"""What a client may ask of `--engine transformers`, checked before the model sees it.

A field that would have no effect is refused, not ignored; so is a prompt that leaves no room for its answer.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plt_eval.engines.base import Decoding
from plt_eval.engines.hf_prompts import Job

Body = TypeVar("Body", bound=BaseModel)

GREEDY_BELOW = 1e-5
"""Temperatures below count as 0, as vLLM has it: logits divided by less may be no numbers any more."""

COMPLETION_TOKENS = 16
"""New tokens where a completion does not say how many: OpenAI's own number."""


class BadRequest(Exception):
    """The client's mistake: an HTTP status, OpenAI's code for it, the field, and a line of words."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        told = {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": self.code}
        return {"error": told}


@dataclass
class Asked:
    """One request: its prompt in tokens with how to go on, and what to hand back. `top` is how many alternatives each
    token's log-probability comes with (None: no log-probabilities). `tools` are those that the answer may call. `body`
    is what transformers' server gets to see. `gone` is set when nobody waits for the answer any more, and `failure` to
    what went wrong in handing the text on."""

    job: Job
    stream: bool
    body: dict[str, Any]
    top: int | None = None
    echo: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None


# --- the fields -----------------------------------------------------------------------------------------

Nothing = Annotated[float, Field(ge=0, le=0)]
"""A setting that may be said, but not changed."""


class StreamOptions(BaseModel):
    """A stream tells its usage at its end, asked or not."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None


class _Common(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Nothing | None = None
    frequency_penalty: Nothing | None = None
    user: str | None = None

    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    def decoding(self) -> Decoding:
        """OpenAI's defaults: temperature 1, and without a seed another answer each time."""
        seed = random.getrandbits(31) if self.seed is None else self.seed
        temperature = 1.0 if self.temperature is None else self.temperature
        return Decoding(
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed,
        )


class CompletionBody(_Common):
    """POST /v1/completions."""

    prompt: str
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Literal[1] | None = None


class Turn(BaseModel):
    """A message; what else it holds is the chat template's affair."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatBody(_Common):
    """POST /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto"] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# --- reading --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Reads bodies for one model. `tokens` are a text's, `templated` those of messages with tools and options of the
    template (both may raise: the reason is told); `context` is what prompt and answer may have together."""

    model: str
    context: int | None
    tokens: Callable[[str], list[int]]
    templated: Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, Mapping[str, Any]], list[int]]

    def completion(self, value: Any) -> Asked:
        """Raises BadRequest."""
        body = _parsed(CompletionBody, value)
        self._check_model(body.model)
        try:
            ids = self.tokens(body.prompt)
        except (UnicodeError, TypeError) as refused:  # half of a surrogate pair, which JSON can spell
            raise BadRequest("prompt: no text that can be written as UTF-8", param="prompt") from refused
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        if limit == 0 and not body.echo:
            raise BadRequest("max_tokens is 0: that has a use only with echo", param="max_tokens")
        job = self._job(ids, limit, body, chat=False)
        passed = {"model": body.model, "prompt": body.prompt, "max_tokens": limit, "stream": bool(body.stream)}
        return Asked(job, bool(body.stream), passed, body.logprobs, body.prompt if body.echo else None)

    def chat(self, value: Any) -> Asked:
        """Raises BadRequest."""
        body = _parsed(ChatBody, value)
        self._check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise BadRequest("top_logprobs has an effect only with logprobs", param="top_logprobs")
        if body.logprobs and body.tools:
            raise BadRequest("logprobs cannot be had together with tools", param="logprobs")
        messages = [_turn(i, turn.model_dump(exclude_none=True)) for i, turn in enumerate(body.messages)]
        ids = self._templated(messages, body)
        limit = body.max_completion_tokens or body.max_tokens
        if limit is None:
            limit = COMPLETION_TOKENS if self.context is None else max(1, self.context - len(ids))
        job = self._job(ids, limit, body, chat=True)
        passed: dict[str, Any] = {"model": body.model, "messages": messages, "stream": bool(body.stream)}
        passed |= {"max_tokens": limit, "chat_template_kwargs": body.chat_template_kwargs or {}}
        top = (body.top_logprobs or 0) if body.logprobs else None
        return Asked(job, bool(body.stream), passed, top, tools=body.tools or [])

    def _templated(self, messages: list[dict[str, Any]], body: ChatBody) -> list[int]:
        try:
            return self.templated(messages, body.tools, body.chat_template_kwargs or {})
        except BadRequest:
            raise
        except Exception as refused:  # a template is a program of the model's makers
            raise BadRequest(f"messages: {type(refused).__name__}: {refused}", param="messages") from refused

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise BadRequest(
                f"the model {name!r} does not exist; this server has {self.model!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _job(self, ids: list[int], limit: int, body: _Common, *, chat: bool) -> Job:
        if self.context is not None and len(ids) + limit > self.context:
            raise BadRequest(
                f"this model's maximum context length is {self.context} tokens; requested were {len(ids)} of the "
                f"prompt and {limit} new ones",
                code="context_length_exceeded",
            )
        if body.stream_options is not None and not body.stream:
            raise BadRequest("stream_options has an effect only with stream", param="stream_options")
        stops = body.stops()
        if any(_is_no_text(stop) for stop in stops):
            raise BadRequest("stop: no text that can be written as UTF-8", param="stop")
        return Job("", ids, limit, stops, chat, body.decoding())


def _turn(i: int, message: dict[str, Any]) -> dict[str, Any]:
    """The message as chat templates read it: its parts as one text, the arguments of its calls as objects; all else as
    it is. Raises BadRequest."""
    content = message.get("content", "")
    turn = message | {"content": content if isinstance(content, str) else _text(i, content)}
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise BadRequest(f"messages.{i}.tool_calls: expected a list", param="messages")
        turn["tool_calls"] = [_call(f"messages.{i}.tool_calls.{j}", call) for j, call in enumerate(calls)]
    return turn


def _text(i: int, parts: list[dict[str, Any]]) -> str:
    """A line for each part, as vLLM has it."""
    where = f"messages.{i}.content"
    for part in parts:
        if part.get("type") != "text":
            raise BadRequest(f"{where}: the model reads text alone, found {part.get('type')}", param="messages")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise BadRequest(f"{where}: expected parts with a type and a text alone", param="messages")
    return "\n".join(part["text"] for part in parts)


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadRequest(f"{where}: expected a call with its function", param="messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise BadRequest(f"{where}.function.arguments: expected a JSON object", param="messages")
    return {**call, "function": {**function, "arguments": arguments}}


def _is_no_text(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _parsed(kind: type[Body], value: Any) -> Body:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            raise BadRequest(f"{where}: this server has no such setting", param=where) from error
        found = "" if fault["type"] == "missing" else f", found {str(fault['input'])[:60]!r}"
        raise BadRequest(f"{where or 'body'}: {fault['msg']}{found}", param=where or None) from error
