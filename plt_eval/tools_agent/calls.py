"""Which tools an answer calls: as the protocol says, or as the model wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from plt_eval.engines.base import Completion
from plt_eval.engines.conversations import written_tool_calls


def calls_of(completion: Completion, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Name and arguments (JSON) of each call. What an endpoint states comes first; else the text is read: JSON in
    <tool_call>, or <function=name> with <parameter=name>, whose values are texts and get the types of `tools`."""
    stated = completion.detail.get("tool_calls")
    if stated:
        return [{"name": str(call["name"]), "arguments": str(call["arguments"])} for call in stated]
    calls = written_tool_calls(completion.text)
    if "<function=" not in completion.text:
        return calls
    kinds = {tool["function"]["name"]: tool["function"]["parameters"].get("properties", {}) for tool in tools}
    return [{**call, "arguments": _typed(call["arguments"], kinds.get(call["name"], {}))} for call in calls]


def _typed(arguments: str, kinds: Mapping[str, Any]) -> str:
    """Arguments whose texts stand for other values, as these; as they are where they are no JSON object."""
    try:
        given = json.loads(arguments)
        if not isinstance(given, dict):
            return arguments
        for name, value in given.items():
            if isinstance(value, str) and kinds.get(name, {}).get("type", "string") != "string":
                given[name] = _value(value)
        return json.dumps(given)
    except (ValueError, RecursionError):
        return arguments


def _value(text: str) -> Any:
    """What a text stands for, in JSON or as Python says it; itself where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)
