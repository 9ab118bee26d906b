"""What turns prompts into text: the protocol every engine keeps, and the records it speaks in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from plt_benchmarks.protocols import Message, Prompt

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Decoding:
    """How text is drawn. temperature 0 is greedy. The random stream of a request depends on (seed, request id) alone,
    never on batching or order, so a resumed run draws what an uninterrupted one would."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    """Overrides the suite's own limit when set."""


@dataclass(frozen=True)
class ToolMessage(Message):
    """A turn that calls tools (the assistant's), or answers the call `tool_call_id` (the tool's); calls as the chat
    protocol has them."""

    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to draw. `id` is unique in the run: "<sample id>#<sample index>". `tools` are what the model may
    call, as JSON schemas of functions; only engines that take tools get any. `conversation` is what the turns of one
    conversation have in common: a server that has read the earlier ones answers sooner."""

    id: str
    prompt: Prompt
    decoding: Decoding = Decoding()
    tools: tuple[Mapping[str, Any], ...] = ()
    conversation: str = ""


def first_stop(text: str, stops: Iterable[str]) -> int | None:
    """Where the first stop string begins in `text`; None where there is none, and text[:None] is all of it."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)


@dataclass(frozen=True)
class Completion:
    """One drawn completion. `text` ends before any stop string. `chat` says that the prompt went through a chat
    template. `error` is set (and text empty) when the engine gave up on this request after its retries; such a
    completion is reported and tried again on resume, never scored. `detail` is what else is worth keeping, in JSON
    types; the suite's scorer gets it."""

    request_id: str
    text: str
    finish_reason: FinishReason
    chat: bool = False
    solution: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float | None = None
    error: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """How likely is `continuation` right after `context`?"""

    id: str
    context: str
    continuation: str


@dataclass(frozen=True)
class Loglikelihood:
    """Sum of log p over the continuation's tokens (nats), their number, and whether greedy decoding would have
    written exactly them."""

    request_id: str
    logprob: float
    tokens: int
    greedy: bool


class Engine(Protocol):
    """Turns requests into completions, in any order, each as soon as it is there.

    An engine may also have `concurrent` (true: generate may be called from several threads at once), `takes_tools`
    (whether requests may have tools), `context` (tokens that fit, None if it does not know) and
    `count_tokens(request)`; agents ask for them. One that asks several servers has `health()`: see health_lines.
    """

    name: str

    def identity(self) -> Mapping[str, Any]:
        """What decides the text besides the prompts, in JSON types: model and weights hash, loops, dtype, chat
        template hash... Two engines with equal identities may share samples; others never do."""
        ...

    def facts(self) -> Mapping[str, str]:
        """How it computes, as far as that is worth a record and does not decide which run this is: its decoder, its
        attention..."""
        ...

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]: ...

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]: ...

    def close(self) -> None: ...


@runtime_checkable
class Revisable(Protocol):
    """An engine whose answers may change within one run, as those of a file that its owner edits."""

    def current(self, key: tuple[str, int], text: str) -> bool:
        """Whether `text` is still the answer for (sample id, index)."""
        ...


def health_lines(engine: Engine) -> Sequence[str]:
    """How each of the servers that an engine asks does, for a display; nothing for an engine without several."""
    health = getattr(engine, "health", None)
    return [] if health is None else health()
