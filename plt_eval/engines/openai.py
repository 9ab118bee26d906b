"""Any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, hosted models.

    engine = OpenAIEngine(endpoint="http://127.0.0.1:8000/v1", model="my-model", api="completions")

What is sent, and what is not:
- `completions` sends the prompt's text; `chat` sends its messages. The chat protocol has no portable way to begin the
  assistant's answer, so a prompt's prefill is not sent, and the chat stop strings that go with a prefill (they would
  end an answer at its opening code fence) are not used then.
- Servers take at most four stop strings: the first four are sent, and all of them are enforced here.
- A seed is sent when temperature > 0, derived from (seed, request id), so every sample has a stream of its own.
- The key comes from the environment alone, and is never part of the engine's identity.

Refusals that a retry cannot cure (400, 401, 404, ...) end the run at once. Everything else (429, 5xx, time-outs, lost
connections, unreadable answers) is tried again with growing, jittered waits; a request that never succeeds becomes a
completion with `error`, and many of those in a row end the run.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines.base import (
    Completion,
    FinishReason,
    GenerationRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    ToolMessage,
)
from plt_eval.errors import UserError
from plt_eval.workers import as_completed

SERVER_STOPS = 4
"""Stop strings that every server takes."""
RETRIED = frozenset({408, 409, 425, 429})
"""Refusals worth another try, besides 5xx."""
GIVE_UP_AFTER = 16
"""Requests in a row that may fail for good before the endpoint counts as down."""

R = TypeVar("R")


class OpenAIEngine:
    """Draws completions from `endpoint` (the address up to and including /v1).

    `concurrency` requests are under way at a time. A request gets `retries` more tries after its first, waiting
    about `backoff_s` * 2^try seconds in between (or what Retry-After says, at most `max_wait_s`), and each try
    `timeout_s` seconds without a byte. `notify` is told of trouble, once a kind.
    """

    name = "openai"
    concurrent = True

    def __init__(
        self,
        *,
        endpoint: str,
        model: str,
        api: Literal["chat", "completions"] = "chat",
        api_key: str | None = None,
        concurrency: int = 8,
        retries: int = 6,
        timeout_s: float = 600.0,
        backoff_s: float = 1.0,
        max_wait_s: float = 60.0,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        import httpx

        self._endpoint = _checked_endpoint(endpoint)
        self._model = model
        self._api = api
        self._concurrency = concurrency
        self._retries = retries
        self._backoff_s = backoff_s
        self._max_wait_s = max_wait_s
        self._notify = notify or _ignore
        self._told: set[str] = set()
        self._failed_in_a_row = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._jitter = random.Random()
        self._key = _checked_key(api_key or "")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    def identity(self) -> dict[str, Any]:
        """The server does not say which weights it holds: its address and the model's name must do."""
        return {"model": self._model, "endpoint": self._endpoint, "api": self._api}

    def facts(self) -> dict[str, str]:
        """The server does not say how it computes."""
        return {}

    @property
    def takes_tools(self) -> bool:
        """The chat service does; whether the model behind it does, the server says when it is asked."""
        return self._api == "chat"

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """Completions as they arrive. Raises UserError when the endpoint refuses or stays down."""
        yield from as_completed(self._complete, requests, workers=self._concurrency)

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:
        """Through completions with `echo` and `logprobs`. Raises UserError when the server has neither."""
        if self._api != "completions":
            raise UserError(f"{self._endpoint}: log-likelihoods need --api completions, not {self._api}")
        yield from as_completed(self._likelihood, requests, workers=self._concurrency)

    def close(self) -> None:
        """Ends waits between retries and closes connections."""
        self._closed.set()
        self._client.close()

    # --- one request ----------------------------------------------------------------------------------

    def _complete(self, request: GenerationRequest) -> Completion:
        chat = self._api == "chat"
        stops = _stops(request.prompt, chat=chat)
        started = time.monotonic()
        try:
            answer = self._post(self._body(request, stops), _Drawn.read)
        except _GaveUp as failure:
            self._count(failed=True, why=str(failure))
            return Completion(request.id, "", "error", chat=chat, error=str(failure))
        self._count(failed=False)
        text = _cut(answer.text, stops)
        return Completion(
            request.id,
            text,
            answer.finish_reason if text == answer.text else "stop",
            chat=chat,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            seconds=time.monotonic() - started,
            detail={"tool_calls": answer.tool_calls} if answer.tool_calls else {},
        )

    def _body(self, request: GenerationRequest, stops: tuple[str, ...]) -> dict[str, Any]:
        prompt, decoding = request.prompt, request.decoding
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": decoding.max_new_tokens or prompt.max_new_tokens,
            "temperature": decoding.temperature,
        }
        if self._api == "chat":
            messages = [_turn(turn) for turn in prompt.messages]
            if request.tools:
                body["tools"] = [dict(tool) for tool in request.tools]
            body["messages"] = messages or [{"role": "user", "content": prompt.text}]
        else:
            body["prompt"] = prompt.text
        if stops:
            body["stop"] = list(stops[:SERVER_STOPS])
        if decoding.temperature > 0:
            body["top_p"] = decoding.top_p
            body["seed"] = derived_seed(decoding.seed, request.id)
        return body

    def _likelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        body = {
            "model": self._model,
            "prompt": request.context + request.continuation,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        try:
            echo = self._post(body, _Echo.read)
        except _GaveUp as failure:
            raise UserError(f"{self._endpoint}: no log-likelihood for {request.id}: {failure}") from failure
        return echo.likelihood(request, self._endpoint)

    def _count(self, *, failed: bool, why: str = "") -> None:
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
            down = self._failed_in_a_row >= GIVE_UP_AFTER
        if down:
            raise UserError(
                f"{self._endpoint}: {GIVE_UP_AFTER} requests in a row failed for good, the last with: {why}"
            )

    # --- one exchange ---------------------------------------------------------------------------------

    def _post(self, body: dict[str, Any], read: Callable[[Any], R]) -> R:
        """The server's answer through `read`. Raises UserError for a refusal, _GaveUp after the last try."""
        import httpx

        url = self._endpoint + ("/chat/completions" if self._api == "chat" else "/completions")
        for attempt in range(self._retries + 1):
            wait: float | None = None
            try:
                response = self._client.post(url, json=body)
            except httpx.RequestError as error:
                trouble = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.status_code == 200:
                    try:
                        return read(response.json())
                    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                        trouble = f"unreadable answer ({type(error).__name__}: {error})"
                else:
                    trouble = f"HTTP {response.status_code}: {self._hide_key(_server_message(response.text))}"
                    if response.status_code < 500 and response.status_code not in RETRIED:
                        raise UserError(f"{url} refused: {trouble}")
                    wait = _retry_after(response.headers.get("Retry-After"))
            if attempt < self._retries:
                self._tell(trouble)
                self._sleep(attempt, wait)
        raise _GaveUp(f"{trouble} (after {self._retries + 1} tries)")

    def _sleep(self, attempt: int, asked: float | None) -> None:
        wait = self._backoff_s * 2**attempt * self._jitter.uniform(0.5, 1.0)
        if asked is not None:
            wait = asked + self._backoff_s * self._jitter.uniform(0.0, 0.5)
        if self._closed.wait(min(wait, self._max_wait_s)):
            raise _GaveUp("the engine was closed")

    def _hide_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _tell(self, trouble: str) -> None:
        kind = trouble.partition(":")[0]
        with self._lock:
            new = kind not in self._told
            self._told.add(kind)
        if new:
            self._notify(f"{self._endpoint}: {trouble}; trying again")


# --- answers ------------------------------------------------------------------------------------------


class _GaveUp(Exception):
    """The last try failed too; says how."""


class _Drawn:
    """The one choice of a chat or text completion. `read` raises ValueError, TypeError, KeyError, IndexError or
    AttributeError for anything else."""

    def __init__(
        self, text: str, finish_reason: FinishReason, usage: dict[str, Any], tool_calls: list[dict[str, str]]
    ) -> None:
        self.text = text
        self.tool_calls = tool_calls
        self.finish_reason = finish_reason
        self.prompt_tokens = _count_or_none(usage.get("prompt_tokens"))
        self.completion_tokens = _count_or_none(usage.get("completion_tokens"))

    @classmethod
    def read(cls, value: Any) -> _Drawn:
        choice = _first_choice(value)
        reason = choice.get("finish_reason")
        calls = []
        if "message" in choice:
            calls = [
                {"id": call["id"], "name": call["function"]["name"], "arguments": call["function"]["arguments"]}
                for call in choice["message"].get("tool_calls") or ()
            ]
            text = choice["message"].get("content")
            if text is None and reason is not None:
                text = ""  # a refusal, or thinking that used up every token
        else:
            text = choice["text"]
        if not isinstance(text, str):
            raise TypeError(f"expected text, found {type(text).__name__}")
        usage = value.get("usage")
        return cls(text, "length" if reason == "length" else "stop", usage if isinstance(usage, dict) else {}, calls)


class _Echo:
    """The prompt's own tokens with their log-probabilities, as far as the server gave any."""

    def __init__(self, logprobs: Any) -> None:
        self.logprobs = logprobs

    @classmethod
    def read(cls, value: Any) -> _Echo:
        return cls(_first_choice(value).get("logprobs"))

    def likelihood(self, request: LoglikelihoodRequest, endpoint: str) -> Loglikelihood:
        """A token that begins in the context and ends in the continuation counts as the continuation's."""
        whole = request.context + request.continuation
        try:
            rows = list(zip(*(self.logprobs[name] for name in _ECHO_COLUMNS), strict=True))
            prompt_at = "".join(row[0] for row in rows).find(whole)
            begin, end = prompt_at + len(request.context), prompt_at + len(whole)
            total, count, greedy, place = 0.0, 0, True, 0
            for token, logprob, top in rows:
                if begin < place + len(token) and place < end:
                    total, count = total + logprob, count + 1
                    greedy = greedy and logprob >= max(top.values())
                place += len(token)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"{endpoint} gives no log-probabilities of a prompt (completions with echo and logprobs)"
            ) from error
        if prompt_at < 0 or not count:
            raise UserError(f"{endpoint} did not echo the prompt of {request.id}: no log-likelihood")
        return Loglikelihood(request.id, total, count, greedy)


# --- small parts --------------------------------------------------------------------------------------


_ECHO_COLUMNS = ("tokens", "token_logprobs", "top_logprobs")


def derived_seed(seed: int, request_id: str) -> int:
    """A seed of 31 bits for one request, the same wherever and whenever it is asked."""
    digest = hashlib.sha256(f"{seed}:{request_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def _checked_endpoint(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        port_is_number = parts.port is None or parts.port >= 0
    except ValueError as error:
        raise UserError(f"--endpoint {endpoint!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_number:
        raise UserError(f"--endpoint {endpoint!r}: expected an address like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "--endpoint must hold no user, password or query (it is stored with the run); use --api-key-env"
        )
    return endpoint.rstrip("/")


def _turn(turn: Message) -> dict[str, Any]:
    """A message as the chat protocol has it."""
    told: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if isinstance(turn, ToolMessage):
        if turn.tool_calls:
            told["tool_calls"] = [dict(call) for call in turn.tool_calls]
        if turn.tool_call_id:
            told["tool_call_id"] = turn.tool_call_id
    return told


def _stops(prompt: Prompt, *, chat: bool) -> tuple[str, ...]:
    if not chat:
        return prompt.stop
    return () if prompt.prefill else prompt.chat_stop


def _cut(text: str, stops: tuple[str, ...]) -> str:
    """`text` up to the first of `stops`."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of the header; None when absent or unreadable."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _first_choice(value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and "choices" not in value:
        raise ValueError(_server_message(json.dumps(value)))
    choice = value["choices"][0]
    if not isinstance(choice, dict):
        raise TypeError(f"choice is {type(choice).__name__}")
    return choice


def _checked_key(key: str) -> str:
    key = key.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("the API key holds characters that no HTTP header can carry; check the variable it is from")
    return key


def _ignore(message: str) -> None:
    """Nobody wants to know."""


def _server_message(body: str) -> str:
    """What the server says went wrong, in one line of at most 300 characters."""
    text = body
    try:
        value = json.loads(body)
        error = value.get("error", value) if isinstance(value, dict) else value
        message = error.get("message") if isinstance(error, dict) else error
        text = message if isinstance(message, str) else body
    except ValueError:
        pass
    return " ".join(text.split())[:300] or "(no message)"


def _count_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
