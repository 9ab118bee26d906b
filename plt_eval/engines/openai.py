"""Any OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, hosted models.

    engine = OpenAIEngine(endpoint="http://127.0.0.1:8000/v1", model="my-model", api="completions")

What is sent, and what is not:
- `completions` sends the prompt's text; `chat` sends its messages. The chat protocol has no portable way to begin the
  assistant's answer, so a prompt's prefill is not sent, and the chat stop strings that go with a prefill (they would
  end an answer at its opening code fence) are not used then.
- Servers take at most four stop strings: the first four are sent, and all of them are enforced here.
- A seed is sent when temperature > 0, derived from (seed, request id), so every sample has a stream of its own.
- The key comes from the environment alone, and is never part of the engine's identity. Every endpoint gets it.

Refusals that a retry cannot cure (400, 401, 404, ...) end the run at once. Everything else (429, 5xx, time-outs, lost
connections, unreadable answers, among them those that the server broke off) is tried again with growing, jittered
waits; a request that never succeeds becomes a completion with `error`, and many of those in a row end the run.

With several endpoints (which one is asked when: plt_eval.engines.endpoints) all that holds of a round: what fails at
one is tried at the others at once, and only when none of them gives an answer there is a wait. A refusal counts when
nobody takes the request. One of the request itself (400, 413, 422) says nothing of the endpoint; any other puts it out.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines.base import (
    Completion,
    FinishReason,
    GenerationRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    ToolMessage,
    first_stop,
)
from plt_eval.engines.endpoints import (
    LOOPS_HEADER,
    Closed,
    Endpoint,
    Endpoints,
    checked_endpoints,
    served_identity,
    served_name,
)
from plt_eval.errors import UserError, one_line
from plt_eval.records import storable
from plt_eval.workers import as_completed

if TYPE_CHECKING:
    from plt_eval.engines.checkpoint import ServedModel

SERVER_STOPS = 4
"""Stop strings that every server takes."""
RETRIED = frozenset({408, 409, 425, 429})
"""Refusals worth another try, besides 5xx."""
OF_THE_REQUEST = frozenset({400, 413, 422})
"""Refusals of what a request holds (it is too long, ...). All others are of whoever asks, or of what is asked for."""
GIVE_UP_AFTER = 16
"""Requests in a row that may fail for good before the run ends."""
LOOK_S = 10.0
"""How long an endpoint may take to say which models it serves, in seconds."""
MOST_BYTES = 64 << 20
"""Of an answer. A prompt's log-probabilities are the longest ones: some 100 bytes a token."""
FINISHED: dict[str, FinishReason] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "stop_sequence"), "stop"),
    **dict.fromkeys(("tool_calls", "function_call", "content_filter"), "stop"),
    **dict.fromkeys(("length", "model_length", "repetition"), "length"),
}
"""How servers say that an answer is whole, or as long as it may be. Any other reason (abort, error, ...) is theirs."""
UNREADABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
"""What reading an answer may raise that is not as it should be."""

R = TypeVar("R")


class OpenAIEngine:
    """Draws completions from `endpoint` (the address up to and including /v1), or from several that serve one model.

    `concurrency` requests are under way at a time at each endpoint. A request gets `retries` more tries after its first
    (with several endpoints: rounds), waiting about `backoff_s` * 2^try seconds in between (or what Retry-After says, at
    most `max_wait_s`), and each try `timeout_s` seconds (where the server falls silent in mid-answer, so many more).
    `served_as` stands for the addresses in the identity. `notify` is told of trouble, once a kind, and of every change
    of an endpoint's state.
    """

    name = "openai"
    concurrent = True

    def __init__(
        self,
        *,
        endpoint: str | Sequence[str],
        model: str,
        api: Literal["chat", "completions"] = "chat",
        api_key: str | None = None,
        served_as: str | None = None,
        checkpoint: ServedModel | None = None,
        concurrency: int = 8,
        retries: int = 6,
        timeout_s: float = 600.0,
        backoff_s: float = 1.0,
        max_wait_s: float = 60.0,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        import httpx

        self._notify = notify or _ignore
        urls = checked_endpoints([endpoint] if isinstance(endpoint, str) else endpoint, self._notify)
        self._served = served_name(urls, served_as)
        self._renamed = served_as is not None
        self._model = model
        self._checkpoint = checkpoint
        self._api = api
        self._path = "/chat/completions" if api == "chat" else "/completions"
        self._concurrency = concurrency
        self._retries = retries
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._max_wait_s = max_wait_s
        self._told: set[str] = set()
        self._told_loops = False
        self._failed_in_a_row = 0
        self._lock = threading.Lock()
        self._looking = threading.Lock()
        self._looked = False
        self._jitter = random.Random()
        self._key = _checked_key(api_key or "")
        self._endpoints = Endpoints(
            urls, at_a_time=concurrency, backoff_s=backoff_s, max_wait_s=max_wait_s, notify=self._notify
        )
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}  # how large: known while it comes
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connections = (concurrency + 1) * len(urls)  # one to look
        self._client = httpx.Client(
            headers=headers,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def identity(self) -> dict[str, Any]:
        """The server does not say which weights it holds: the addresses and the model's name must do, or the name and
        the checkpoint that the user vouches for."""
        return {**served_identity(self._model, self._checkpoint), "endpoint": self._served, "api": self._api}

    def facts(self) -> dict[str, str]:
        """The server does not say how it computes. Where the identity does not say it: who was asked."""
        if not (self._endpoints.several or self._renamed):
            return {}
        urls = ", ".join(endpoint.url for endpoint in self._endpoints.all)
        return {"endpoints": urls, "requests_at_a_time": f"{self._concurrency} each"}

    def health(self) -> list[str]:
        """How each of several endpoints does, a line each."""
        return self._endpoints.health()

    @property
    def takes_tools(self) -> bool:
        """The chat service does; whether the model behind it does, the server says when it is asked."""
        return self._api == "chat"

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """Completions as they arrive. Raises UserError when the endpoints refuse or stay down."""
        self._look()
        yield from as_completed(self._complete, requests, workers=self._workers(requests))

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:
        """Through completions with `echo` and `logprobs`. Raises UserError when the server has neither."""
        if self._api != "completions":
            raise UserError(f"{self._served}: log-likelihoods need --api completions, not {self._api}")
        self._look()
        yield from as_completed(self._likelihood, requests, workers=self._workers(requests))

    def check_served(self) -> None:
        """Ask each endpoint what it serves. Raises UserError for one that says that it runs another loop count than
        `checkpoint`; one that is not there says nothing."""
        import httpx

        for endpoint in self._endpoints.all:
            with suppress(httpx.RequestError):
                self._models(endpoint)

    def close(self) -> None:
        """Ends waits between retries, closes connections, and tells what each of several endpoints has done."""
        self._endpoints.close()
        self._client.close()
        for line in self._endpoints.summary():
            self._notify(line)

    def _workers(self, requests: Iterable[Any]) -> int:
        most = self._concurrency * len(self._endpoints.all)
        return max(1, min(most, len(requests))) if isinstance(requests, Sized) else most

    # --- one request ----------------------------------------------------------------------------------

    def _complete(self, request: GenerationRequest) -> Completion:
        chat = self._api == "chat"
        stops = _stops(request.prompt, chat=chat)
        started = time.monotonic()
        try:
            answer, _ = self._post(self._body(request, stops), _Drawn.read, request.conversation)
        except _GaveUp as failure:
            self._count(failed=True, why=str(failure))
            return Completion(request.id, "", "error", chat=chat, error=str(failure))
        self._count(failed=False)
        text = answer.text[: first_stop(answer.text, filter(None, stops))]
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
            echo, endpoint = self._post(body, _Echo.read)
        except _GaveUp as failure:
            where = "" if self._endpoints.several else f"{self._endpoints.all[0].url}: "
            raise UserError(f"{where}no log-likelihood for {request.id}: {failure}") from failure
        return echo.likelihood(request, endpoint.url)

    def _count(self, *, failed: bool, why: str = "") -> None:
        with self._lock:
            self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
            down = self._failed_in_a_row >= GIVE_UP_AFTER
        if not down:
            return
        if self._endpoints.several:
            raise UserError(f"{GIVE_UP_AFTER} requests in a row failed for good; {self._endpoints.troubles()}")
        where = self._endpoints.all[0].url
        raise UserError(f"{where}: {GIVE_UP_AFTER} requests in a row failed for good, the last with: {why}")

    # --- rounds of exchanges ----------------------------------------------------------------------------

    def _post(self, body: dict[str, Any], read: Callable[[Any], R], conversation: str = "") -> tuple[R, Endpoint]:
        """An answer through `read`, and whose it is. Raises UserError for a refusal, _GaveUp after the last try."""
        sent = storable(json.dumps(body, ensure_ascii=False, separators=(",", ":"))).encode()
        said: dict[str, str] = {}
        tried = 0
        while tried <= self._retries:
            try:
                done = self._round(sent, read, conversation)
                if isinstance(done, tuple):
                    return done
                said |= done.said
                before, tried = tried, tried + max(1, done.timeouts)
                if done.refusal and (done.unanimous or tried > self._retries):
                    raise UserError(done.refusal)
                if tried <= self._retries and self._sleep(before, done.wait):
                    tried -= 1  # an endpoint that comes and goes does not use up anybody's patience
            except Closed:
                raise _GaveUp("the engine was closed") from None
        trouble = "; ".join(f"{url}: {words}" for url, words in said.items())
        if not self._endpoints.several:
            trouble = next(iter(said.values()))
        raise _GaveUp(f"{trouble} (after {self._retries + 1} tries)")

    def _round(self, body: bytes, read: Callable[[Any], R], conversation: str) -> tuple[R, Endpoint] | _Lost:
        """The first answer of the endpoints that can be asked now, or what all of them said instead."""
        lost = _Lost()
        asked: list[Endpoint] = []
        while (endpoint := self._endpoints.take(asked, conversation)) is not None:
            asked.append(endpoint)
            try:
                answer = self._ask(endpoint, body, read, conversation)
            except _Failed as failure:
                lost.add(endpoint, failure)
                self._tell(endpoint, str(failure))
            else:
                for other, refusal in lost.refusals.items():
                    self._endpoints.refused(other, refusal)
                return answer, endpoint
            finally:
                self._endpoints.release(endpoint)
        if not self._endpoints.in_service():
            lost.refusal = "; ".join(self._refused(each, each.out) for each in self._endpoints.all)
            lost.unanimous = True
        elif lost.refusals:
            first, refusal = next(iter(lost.refusals.items()))
            lost.refusal, lost.unanimous = self._refused(first, refusal), len(lost.refusals) == len(asked)
        return lost

    def _refused(self, endpoint: Endpoint, refusal: str) -> str:
        without = self._path == "/chat/completions" and "chat template" in refusal
        hint = "; --api completions asks without one" if without else ""
        return f"{endpoint.url}{self._path} refused: {refusal}{hint}"

    def _ask(self, endpoint: Endpoint, body: bytes, read: Callable[[Any], R], conversation: str) -> R:
        """One exchange, of which the endpoint's state is told. Raises _Failed."""
        import httpx

        pool, wait, timeout = self._endpoints, None, False
        try:
            if endpoint.down and pool.several:
                self._models(endpoint)  # a server that hangs is not worth a whole time-out
            started = time.monotonic()
            code, headers, said = self._exchanged("POST", endpoint, self._path, self._timeout_s, body)
        except httpx.RequestError as error:
            trouble, timeout = _words(error), isinstance(error, httpx.ReadTimeout)
        else:
            if code == 200:
                try:
                    answer = read(json.loads(said))
                except UNREADABLE as error:
                    trouble = f"unreadable answer ({one_line(self._hide_key(_words(error)))})"
                else:
                    pool.answered(endpoint, time.monotonic() - started, conversation)
                    return answer
            else:
                trouble = f"HTTP {code}: {_server_message(self._hide_key(said.decode(errors='replace')))}"
                if code < 500 and code not in RETRIED:
                    if code not in OF_THE_REQUEST:
                        pool.put_out(endpoint, trouble)
                    raise _Failed(trouble, refused=code in OF_THE_REQUEST)
                wait = _retry_after(headers.get("Retry-After"))
                if code == 429 or wait is not None:
                    pool.busy(endpoint, trouble, wait)
                    raise _Failed(trouble, wait=wait)
        pool.failed(endpoint, trouble)
        raise _Failed(trouble, timeout=timeout)

    def _exchanged(
        self, method: str, endpoint: Endpoint, path: str, within_s: float, body: bytes | None = None
    ) -> tuple[int, Mapping[str, str], bytearray]:
        """Status, headers and body of an answer, however slow or long the server would make it. Raises
        httpx.RequestError, and UserError for a server that runs another loop count."""
        import httpx

        deadline = time.monotonic() + within_s
        timeout = httpx.Timeout(within_s, connect=min(within_s, LOOK_S))
        said = bytearray()
        with self._client.stream(method, endpoint.url + path, content=body, timeout=timeout) as response:
            self._hear_loops(endpoint, response.headers.get(LOOPS_HEADER))
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise httpx.DecodingError(f"Content-Encoding {encoding[:40]!r}, though identity was asked for")
            for piece in response.iter_raw():
                said += piece
                if len(said) > MOST_BYTES:
                    raise httpx.ReadError(f"an answer of more than {MOST_BYTES >> 20} MiB")
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"no whole answer in {within_s:g} s")
        return response.status_code, response.headers, said

    def _hear_loops(self, endpoint: Endpoint, told: str | None) -> None:
        """Servers of ours say how many loops the model runs. Raises UserError where the record would say otherwise."""
        if told is None:
            return
        told = one_line(told, 20)
        runs = f"{endpoint.url} runs R={told}"
        if self._checkpoint is None:
            with self._lock:
                new, self._told_loops = not self._told_loops, True
            if new:
                self._notify(f"{runs}: `plt-eval run --model FOLDER --loops {told}` records what is served")
        elif told != str(self._checkpoint.loops):
            raise UserError(f"{runs}, expected R={self._checkpoint.loops}: --loops says so, or the checkpoint")

    def _sleep(self, attempt: int, asked: float | None) -> bool:
        """Wait for the next round: whether the wait was cut short, as an endpoint came back."""
        wait = self._backoff_s * 2**attempt * self._jitter.uniform(0.5, 1.0)
        if asked is not None:
            wait = asked + self._backoff_s * self._jitter.uniform(0.0, 0.5)
        return self._endpoints.pause(min(wait, self._max_wait_s))

    def _hide_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _tell(self, endpoint: Endpoint, trouble: str) -> None:
        kind = trouble.partition(":")[0]
        with self._lock:
            new = kind not in self._told
            self._told.add(kind)
        if new and not endpoint.out:
            self._notify(f"{endpoint.url}: {trouble}; trying {'elsewhere' if self._endpoints.several else 'again'}")

    # --- a look at each of several --------------------------------------------------------------------------

    def _look(self) -> None:
        """Before the first request: which of several endpoints are there, and serve the model."""
        with self._looking:
            if self._looked or not self._endpoints.several:
                return
            self._looked = True
            self._say_where_the_key_goes()
            urls = self._endpoints.all
            without = [found for found in as_completed(self._looked_at, urls, workers=len(urls)) if found]
        if without:
            listed = sorted({name for _, names in without for name in names})
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            self._notify(
                f"--api-model {self._model} is not among what {', '.join(sorted(url for url, _ in without))} "
                f"{'serves' if len(without) == 1 else 'serve'}: {', '.join(listed[:3]) or 'nothing'}{more}"
            )

    def _looked_at(self, endpoint: Endpoint) -> tuple[str, set[str]] | None:
        """Its address and what it serves, if the model is not among that; an endpoint that is not there is down."""
        import httpx

        try:
            names = self._models(endpoint)
        except httpx.RequestError as error:
            self._endpoints.failed(endpoint, _words(error), surely=True)
            return None
        return None if names is None or self._model in names else (endpoint.url, names)

    def _models(self, endpoint: Endpoint) -> set[str] | None:
        """What an endpoint says that it serves; None if it does not say. Raises httpx.RequestError when it is not
        there."""
        _, _, said = self._exchanged("GET", endpoint, "/models", min(LOOK_S, self._timeout_s))
        try:
            return {str(model["id"]) for model in json.loads(said)["data"]}
        except UNREADABLE:
            return None

    def _say_where_the_key_goes(self) -> None:
        plain = [one.url for one in self._endpoints.all if one.url.startswith("http://")]
        if self._key and 0 < len(plain) < len(self._endpoints.all):
            self._notify(f"the API key goes to every endpoint, to {', '.join(plain)} without encryption")


# --- answers ------------------------------------------------------------------------------------------


class _GaveUp(Exception):
    """The last try failed too; says how."""


class _Failed(Exception):
    """An exchange without an answer; says why. `refused`: for what the request holds. `wait`: what the server asked
    for, in seconds. `timeout`: it took as long as an exchange may."""

    def __init__(
        self, trouble: str, *, refused: bool = False, wait: float | None = None, timeout: bool = False
    ) -> None:
        super().__init__(trouble)
        self.refused = refused
        self.wait = wait
        self.timeout = timeout


class _Lost:
    """A round without an answer: what each endpoint said, how many let it wait in vain (which costs time, so that each
    counts as a try), how long to wait now (None: nobody says), and whether it was a refusal, and everybody's."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self.refusals: dict[Endpoint, str] = {}
        self.refusal = ""
        self.unanimous = False
        self.timeouts = 0
        self._waits: list[float | None] = []

    def add(self, endpoint: Endpoint, failure: _Failed) -> None:
        """One more did not answer."""
        self.said[endpoint.url] = str(failure)
        self._waits.append(failure.wait)
        self.timeouts += failure.timeout
        if failure.refused:
            self.refusals[endpoint] = str(failure)

    @property
    def wait(self) -> float | None:
        """The shortest, where everybody asked for one."""
        waits = [wait for wait in self._waits if wait is not None]
        return min(waits) if waits and len(waits) == len(self._waits) else None


class _Drawn:
    """The one choice of a chat or text completion. `read` raises one of UNREADABLE for anything else, and for an answer
    that is not said to have ended: half an answer must not be judged."""

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
        if reason is None:
            raise ValueError("the server does not say why it ended: no finish_reason")
        calls = []
        if "message" in choice:
            calls = [_call(call) for call in choice["message"].get("tool_calls") or ()]
            text = choice["message"].get("content")
            if text is None:
                text = ""  # a refusal, or thinking that used up every token
        else:
            text = choice["text"]
        if not isinstance(text, str):
            raise TypeError(f"expected text, found {type(text).__name__}")
        usage = value.get("usage")
        return cls(storable(text), FINISHED[reason], usage if isinstance(usage, dict) else {}, calls)


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
        except (*UNREADABLE, OverflowError) as error:
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
    except (ValueError, OverflowError):
        return None


def _first_choice(value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and "choices" not in value:
        raise ValueError(_server_message(json.dumps(value)))
    choice = value["choices"][0]
    if not isinstance(choice, dict):
        raise TypeError(f"choice is {type(choice).__name__}")
    reason = choice.get("finish_reason")
    if reason is not None and reason not in FINISHED:
        raise ValueError(f"the server ended it: {reason!r}")
    return choice


def _call(stated: dict[str, Any]) -> dict[str, str]:
    """A call of a tool as the protocol has it, in texts that can be sent and stored."""
    name, arguments = stated["function"]["name"], stated["function"]["arguments"]
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": storable(stated["id"] or ""), "name": storable(name), "arguments": storable(written)}


def _checked_key(key: str) -> str:
    key = key.strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError("the API key holds characters that no HTTP header can carry; check the variable it is from")
    return key


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


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
    except (ValueError, RecursionError):
        pass
    return storable(one_line(text)) or "(no message)"


def _count_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
