"""A conversation of mini-swe-agent with one of our engines: what it sends, what it reads as actions, and what it leaves
out when the model's context is full.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from plt_benchmarks.protocols import Message, Prompt, Role
from plt_eval.engines.base import Completion, Decoding, GenerationRequest, ToolMessage
from plt_eval.engines.conversations import SharedEngine, refused_for_length, written_tool_calls
from plt_eval.errors import UserError

POLICY = "oldest-steps-first"
"""System prompt and issue stay; the oldest answers go with what followed them, and a line says how many. What the
newest step alone has too much is cut out of its middle."""
ACTION = r"```mswea_bash_command\s*\n(.*?)\n```"
HEAD = 2
"""Messages that always stay: the system prompt and the issue."""
CUTS = 12
TURN = "\n\n### {role}\n"
"""What separates the turns of a transcript, for models without a chat template."""


class EngineTrouble(Exception):
    """The engine gave up on a request after its own retries."""


@dataclass(frozen=True)
class _Function:
    name: str
    arguments: str


@dataclass(frozen=True)
class _ToolCall:
    """A tool call as mini-swe-agent reads it."""

    id: str
    function: _Function


class _Configuration:
    """What mini-swe-agent asks of a model's configuration."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return dict(self._values)


@dataclass
class ChatModel:
    """One conversation; a mini-swe-agent Model. `templates` is the "model" part of its configuration.

    `context` is the limit of prompt and answer together, in tokens (None: the engine's own, if it knows one).
    `left_out` counts the messages that the last prompt went without.
    """

    shared: SharedEngine
    request_id: str
    decoding: Decoding
    templates: Mapping[str, Any]
    max_new_tokens: int
    actions: str = "text"
    context: int | None = None
    steps: int = 0
    seconds: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    left_out: int = 0
    chat: bool = False
    config: Any = field(init=False)

    def __post_init__(self) -> None:
        self.config = _Configuration({"actions": self.actions, "context_policy": POLICY})
        if self.context is None:
            self.context = getattr(self.shared.engine, "context", None)

    # --- what mini-swe-agent calls ------------------------------------------------------------------------

    def query(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> dict[str, Any]:
        """The next answer with its actions. Raises FormatError and ContextExceeded (both: mini-swe-agent's kind of
        interruption), EngineTrouble, and what the engine raises."""
        self.steps += 1
        started = time.monotonic()
        completion = self._complete([self._message(message) for message in messages if message["role"] != "exit"])
        self.seconds += time.monotonic() - started
        self.chat = completion.chat
        self.prompt_tokens = _sum(self.prompt_tokens, completion.prompt_tokens)
        self.completion_tokens = _sum(self.completion_tokens, completion.completion_tokens)
        calls = self._tool_calls(completion)
        actions = self._parse(completion, calls)
        message: dict[str, Any] = {"role": "assistant", "content": completion.text}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": vars(call.function)} for call in calls
            ]
        message["extra"] = {
            "actions": actions,
            "cost": 0.0,
            "timestamp": time.time(),
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "left_out_messages": self.left_out,
        }
        return message

    def format_message(self, **message: Any) -> dict[str, Any]:
        return message

    def format_observation_messages(
        self, message: Mapping[str, Any], outputs: list[dict[str, Any]], template_vars: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        template = self.templates["observation_template"]
        if self.actions == "tools":
            from minisweagent.models.utils.actions_toolcall import format_toolcall_observation_messages

            found: list[dict[str, Any]] = format_toolcall_observation_messages(
                actions=message.get("extra", {}).get("actions", []),
                outputs=outputs,
                observation_template=template,
                template_vars=template_vars,
                multimodal_regex="",
            )
            return found
        from minisweagent.models.utils.actions_text import format_observation_messages

        told: list[dict[str, Any]] = format_observation_messages(
            outputs, observation_template=template, template_vars=template_vars
        )
        return told

    def get_template_vars(self, **_: Any) -> dict[str, Any]:
        return self.config.model_dump()  # type: ignore[no-any-return]

    def serialize(self) -> dict[str, Any]:
        return {
            "info": {"config": {"model": self.config.model_dump(), "model_type": f"plt-eval {type(self).__name__}"}}
        }

    # --- asking ---------------------------------------------------------------------------------------------

    def _complete(self, messages: list[Message]) -> Completion:
        """The engine's answer to as much of `messages` as fits."""
        dropped, cut = 0, 0
        for _ in range(CUTS + len(messages)):
            kept = _without(messages, dropped, cut)
            request = self._request(kept, len(messages) - len(kept))
            size = self._tokens(request)
            reserve = self._reserve()
            if self.context is not None and size is not None and size + reserve > self.context:
                dropped, cut = self._less(messages, dropped, cut)
                continue
            if self.context is not None and size is not None:
                limit = min(self.max_new_tokens, self.context - size)
                request = replace(request, decoding=replace(request.decoding, max_new_tokens=limit))
            try:
                completion = self.shared.complete(request)
            except UserError as refused:
                if not refused_for_length(refused):
                    raise
                dropped, cut = self._less(messages, dropped, cut)
                continue
            if completion.error is not None:
                raise EngineTrouble(completion.error)
            self.left_out = len(messages) - len(kept)
            return completion
        raise _context_exceeded()

    def _less(self, messages: list[Message], dropped: int, cut: int) -> tuple[int, int]:
        """Leave out more: the older half of the steps that are left, and when one is left, more of its middle."""
        steps = _step_starts(messages)
        if dropped < len(steps) - 1:
            return dropped + max(1, (len(steps) - 1 - dropped) // 4), cut
        if cut < CUTS and len(messages) > HEAD:
            return dropped, cut + 1
        raise _context_exceeded()

    def _request(self, messages: list[Message], left_out: int) -> GenerationRequest:
        if left_out:
            note = f"\n\n({left_out} earlier messages of this conversation are left out here: they did not fit.)"
            issue = messages[HEAD - 1]
            messages = [*messages[: HEAD - 1], replace(issue, content=issue.content + note), *messages[HEAD:]]
        transcript = "".join(TURN.format(role=turn.role) + turn.content for turn in messages)
        prompt = Prompt(
            text=transcript.lstrip() + TURN.format(role="assistant"),
            stop=("\n### ",),
            messages=tuple(messages),
            max_new_tokens=self.max_new_tokens,
        )
        return GenerationRequest(
            f"{self.request_id}.{self.steps}",
            prompt,
            self.decoding,
            tools=self._tools(),
            conversation=self.request_id,
        )

    def _reserve(self) -> int:
        """Tokens of the context that belong to the answer, at least."""
        return min(self.max_new_tokens, (self.context or 0) // 4)

    def _tokens(self, request: GenerationRequest) -> int | None:
        count = getattr(self.shared.engine, "count_tokens", None)
        return None if count is None else int(count(request))

    def _message(self, message: Mapping[str, Any]) -> Message:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = json.dumps(content)
        role: Role = message["role"]
        if message.get("tool_calls") or role == "tool":
            calls = tuple(message.get("tool_calls") or ())
            return ToolMessage(role, content, tool_calls=calls, tool_call_id=str(message.get("tool_call_id") or ""))
        return Message(role, content)

    # --- actions --------------------------------------------------------------------------------------------

    def _tools(self) -> tuple[Mapping[str, Any], ...]:
        if self.actions != "tools":
            return ()
        from minisweagent.models.utils.actions_toolcall import BASH_TOOL

        return (BASH_TOOL,)

    def _tool_calls(self, completion: Completion) -> list[_ToolCall]:
        if self.actions != "tools":
            return []
        stated = completion.detail.get("tool_calls") or written_tool_calls(completion.text)
        return [
            _ToolCall(str(call.get("id") or f"call_{self.steps}_{i}"), _Function(call["name"], call["arguments"]))
            for i, call in enumerate(stated)
        ]

    def _parse(self, completion: Completion, calls: list[_ToolCall]) -> list[dict[str, Any]]:
        reason = {"finish_reason": completion.finish_reason}
        template = self.templates["format_error_template"]
        if self.actions == "tools":
            from minisweagent.models.utils.actions_toolcall import parse_toolcall_actions

            found: list[dict[str, Any]] = parse_toolcall_actions(
                calls, format_error_template=template, template_kwargs=reason
            )
            return found
        from minisweagent.models.utils.actions_text import parse_regex_actions

        return parse_regex_actions(
            completion.text, action_regex=ACTION, format_error_template=template, template_kwargs=reason
        )


def _step_starts(messages: Sequence[Message]) -> list[int]:
    """Where each step begins: at an assistant's answer, or, before the first, right after the head."""
    starts = [i for i in range(HEAD, len(messages)) if messages[i].role == "assistant"]
    return starts if starts[:1] == [HEAD] or len(messages) <= HEAD else [HEAD, *starts]


def _without(messages: list[Message], dropped: int, cut: int) -> list[Message]:
    """`messages` without the first `dropped` steps; each of the rest at most as long as `cut` halvings leave it."""
    starts = _step_starts(messages)
    kept = messages[:HEAD] + (messages[starts[dropped] :] if dropped and starts else messages[HEAD:])
    if not cut:
        return kept
    most = max(64, max(len(turn.content) for turn in kept[HEAD:]) >> cut)
    return kept[:HEAD] + [replace(turn, content=_middle_cut(turn.content, most)) for turn in kept[HEAD:]]


def _middle_cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _context_exceeded() -> Exception:
    from minisweagent.exceptions import LimitsExceeded

    exceeded: Exception = LimitsExceeded(
        {
            "role": "exit",
            "content": "ContextExceeded",
            "extra": {"exit_status": "ContextExceeded", "submission": ""},
        }
    )
    return exceeded


def _sum(total: int | None, more: int | None) -> int | None:
    return total if more is None else (total or 0) + more
