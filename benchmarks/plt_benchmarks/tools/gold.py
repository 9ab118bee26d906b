"""The data's own answers, as a model would have written them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
REFUSAL = "None of the functions can be used for this."


def gold_result(category: str, entry: Entry, answer: Sequence[Any] | None, *, native: bool) -> Any:
    """The answer in the official form of results: a text or calls; for a conversation, turns of steps of such."""
    if answer is None:
        if "irrelevance" in category:
            return REFUSAL
        return _native([(entry["function"][0]["name"], {})]) if native else f"[{entry['function'][0]['name']}()]"
    if "multi_turn" in category:
        return [[_step(entry, calls, native=native)] for calls in answer]
    functions = {function["name"]: function["parameters"] for function in entry["function"]}
    chosen = [(name, _arguments(given, functions.get(name))) for call in answer for name, given in call.items()]
    kinds = {name: parameters["properties"] for name, parameters in functions.items()}
    write = {"java": _java, "javascript": _javascript}.get(category)
    if write is None:
        return _native(chosen) if native else _text(chosen)
    written = [
        (name, {key: write(value, kinds.get(name, {}).get(key, {"type": "any"})) for key, value in given.items()})
        for name, given in chosen
    ]
    if native:
        return _native([(name, {key: _bare(value) for key, value in given.items()}) for name, given in written])
    return f"[{', '.join(_call(name, given) for name, given in written)}]"


# --- Python -------------------------------------------------------------------------------------------


def _arguments(given: Mapping[str, list[Any]], parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The first value of each parameter that is accepted; without those that may be left out and have no other, or that
    the function's description does not have."""
    known = {"properties": given, "required": (), **(parameters or {})}
    chosen = {}
    for name, values in given.items():
        first = _first(values)
        left_out = "" in values and name not in known["properties"]
        if (first != "" and not left_out) or name in known["required"]:
            chosen[name] = _value(first)
    return chosen


def _value(value: Any) -> Any:
    """In a dictionary that is an argument, or lies in a list that is one, each key has accepted values of its own."""
    if isinstance(value, dict):
        first = {key: _first(values) for key, values in value.items()}
        return {key: inner for key, inner in first.items() if inner != ""}
    return [_value(item) if isinstance(item, dict) else item for item in value] if isinstance(value, list) else value


def _first(values: Any) -> Any:
    """The first accepted value that is one; an empty text says that there may be none."""
    if not isinstance(values, list):
        return values
    return next((value for value in values if value != ""), "")


def _text(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    return f"[{', '.join(_call(name, {key: repr(value) for key, value in given.items()}) for name, given in calls)}]"


def _call(name: str, written: Mapping[str, str]) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in written.items())})"


def _native(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """Names as the protocol allows them: without dots."""
    return [{name.replace(".", "_"): json.dumps(given)} for name, given in calls]


# --- conversations ------------------------------------------------------------------------------------


def _step(entry: Entry, calls: Sequence[str], *, native: bool) -> Any:
    if not calls:
        return REFUSAL
    functions = {function["name"]: function for function in entry["function"]}
    for added in (entry.get("missed_function") or {}).values():
        functions |= {function["name"]: function for function in added}
    if not native:
        return f"[{', '.join(_with_keywords(call, functions) for call in calls)}]"
    told = []
    for call in calls:
        parsed = ast.parse(_with_keywords(call, functions), mode="eval").body
        assert isinstance(parsed, ast.Call)
        given = {str(word.arg): ast.literal_eval(word.value) for word in parsed.keywords}
        told.append({ast.unparse(parsed.func): json.dumps(given)})
    return told


def _with_keywords(call: str, functions: Mapping[str, Any]) -> str:
    """The call with all its arguments by name: the official decoder drops others."""
    parsed = ast.parse(call.strip(), mode="eval").body
    assert isinstance(parsed, ast.Call)
    names = list(functions[ast.unparse(parsed.func)]["parameters"]["properties"])
    words = [ast.keyword(name, value) for name, value in zip(names, parsed.args, strict=False)]
    return ast.unparse(ast.Call(parsed.func, [], [*words, *parsed.keywords]))


# --- Java and JavaScript ------------------------------------------------------------------------------


def _java(value: Any, kind: Mapping[str, Any]) -> str:
    """A value in Java, of the type that the function's description says, as the official reader understands it: it
    wants an Array's strings bare, and sees what is in a HashMap only where a text holds it."""
    name, inner = kind["type"], (kind.get("items") or {}).get("type", "any")
    if isinstance(value, list):
        if name == "Array":
            written = ", ".join(item if isinstance(item, str) else _java(item, {"type": inner}) for item in value)
            return '"new ' + _JAVA_NAMES.get(inner, "Object") + "[]{" + written + '}"'
        return f"new ArrayList<>(Arrays.asList({', '.join(_java(item, {'type': inner}) for item in value)}))"
    if isinstance(value, dict):
        puts = " ".join(f'put("{key}", {_java(item, {"type": "any"})});' for key, item in value.items())
        return f'"""new HashMap<String, Object>() {{{{ {puts} }}}}"""'
    if isinstance(value, str):
        return value if '"' in value else f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value}{ {'long': 'L', 'float': 'f'}.get(name, '') }"


_JAVA_NAMES = {"integer": "int", "long": "long", "String": "String", "char": "char", "double": "double"}


def _javascript(value: Any, kind: Mapping[str, Any]) -> str:
    """A value in JavaScript, of the type that the function's description says."""
    if isinstance(value, list):
        inner = kind.get("items") or {"type": "any"}
        return f"[{', '.join(_javascript(item, inner) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {_javascript(item, {"type": "String"})}' for key, item in value.items()) + "}"
    if isinstance(value, str):
        return _quoted(value) if kind["type"] in ("String", "any") else value
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value}{'n' if kind['type'] == 'Bigint' else ''}"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _bare(written: str) -> str:
    """As a JSON string's content, where quotes around a whole string are the protocol's own."""
    for quotes in ('"""', '"'):
        if written.startswith(quotes) and written.endswith(quotes):
            return written[len(quotes) : -len(quotes)]
    return written
