"""The official package, opened with what judging and prompting need of it.

Importing `bfcl_eval` as it is asks for dozens of packages: clients of every model vendor. None of them takes part in
building a prompt or in judging, so empty modules stand in for them; what does the work is the official code, unchanged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

PROMPT, NATIVE = "prompt", "native"
NAMES = {PROMPT: "plt-eval", NATIVE: "plt-eval-FC"}
"""What the official code knows a model by; it looks for the letters FC."""

Asked = Callable[[list[Any], list[dict[str, Any]]], Any]


def _same(function: Any) -> Any:
    return function


def _config(native: bool) -> Any:
    return SimpleNamespace(
        display_name="plt-eval", url="", org="", license="", input_price=None, output_price=None,
        is_fc_model=native, underscore_to_dot=native,
    )  # fmt: skip


def _stand_ins() -> dict[str, dict[str, Any]]:
    return {
        "bfcl_eval.constants.model_config": {
            "MODEL_CONFIG_MAPPING": {NAMES[PROMPT]: _config(False), NAMES[NATIVE]: _config(True)}
        },
        "openai": {"OpenAI": lambda **_: None, "RateLimitError": type("RateLimitError", (Exception,), {})},
        "tenacity": {
            "retry": lambda **_: _same,
            **dict.fromkeys(
                ("retry_if_exception_message", "retry_if_exception_type", "wait_random_exponential"), lambda *_, **__: 0
            ),
        },
        "overrides": {"final": _same, "override": _same},
        "tqdm": {"tqdm": lambda items, **_: items},
        "dotenv": {"load_dotenv": lambda **_: None},
        "numpy": {},
        "pandas": {},
    }


_NO_PARSERS = {
    f"bfcl_eval.model_handler.parser.{language}_parser": f"parse_{name}_function_call"
    for language, name in (("java", "java"), ("js", "javascript"))
}


def open_package(*, parsers: bool = True) -> None:
    """Make `bfcl_eval` importable, and writing nowhere but into the working directory. Without `parsers` it reads no
    Java and JavaScript, and needs no compiled packages."""
    os.environ["BFCL_PROJECT_ROOT"] = os.getcwd()
    for name, parts in _stand_ins().items():
        _put(name, parts)
    if not parsers:
        for name, function in _NO_PARSERS.items():
            _put(name, {function: _unread})


def _put(name: str, parts: Mapping[str, Any]) -> None:
    module = ModuleType(name)
    vars(module).update(parts)
    sys.modules[name] = module


def _unread(text: str) -> Any:  # noqa: ARG001
    raise RuntimeError("Java and JavaScript are read elsewhere")


def make_handler(mode: str, asked: Asked) -> Any:
    """The official handler for chat models, asking `asked(messages, tools)` instead of a server."""
    module: Any = import_module("bfcl_eval.model_handler.api_inference.openai_completion")
    handler = module.OpenAICompletionsHandler(NAMES[mode], 0.0)
    handler.is_fc_model = mode == NATIVE
    handler._query_prompting = lambda data: (asked(data["message"], []), 0.0)
    handler._query_FC = lambda data: (asked(data["message"], data["tools"]), 0.0)
    return handler


def answer_of(said: Mapping[str, Any]) -> Any:
    """What a server would have answered: `said` has "text" and "calls", each with id, name and arguments."""
    calls = [
        SimpleNamespace(
            id=call["id"], type="function", function=SimpleNamespace(name=call["name"], arguments=call["arguments"])
        )
        for call in said.get("calls") or ()
    ]
    message = SimpleNamespace(role="assistant", content=said["text"], tool_calls=calls or None)
    return SimpleNamespace(
        choices=[SimpleNamespace(message=message)], usage=SimpleNamespace(prompt_tokens=0, completion_tokens=0)
    )


def plain_message(message: Any) -> dict[str, Any]:
    """A message of the conversation in JSON types: role, content, and what belongs to calls."""
    if isinstance(message, dict):
        return {key: message[key] for key in ("role", "content", "tool_call_id") if key in message}
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": vars(call.function)} for call in message.tool_calls
        ]
    return told


class Question(BaseException):
    """The official code wants the model's next answer. No Exception: it would be taken for a failure of the model."""

    def __init__(self, messages: Sequence[Any], tools: list[dict[str, Any]]) -> None:
        super().__init__()
        self.told = {"messages": [plain_message(message) for message in messages], "tools": tools}


def conversation(entry: dict[str, Any], mode: str, said: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The official inference on `entry` with the answers `said` so far: {"messages", "tools"} of the next question, or
    {"done": result} in the official form. `entry` is changed on the way."""
    waiting = list(said)

    def asked(messages: list[Any], tools: list[dict[str, Any]]) -> Any:
        if not waiting:
            raise Question(messages, tools)
        return answer_of(waiting.pop(0))

    try:
        result, _ = make_handler(mode, asked).inference(entry, False, True)
    except Question as question:
        return question.told
    except Exception as error:  # as the official command records it
        return {"done": f"Error during inference: {error}"}
    return {"done": result}


def data_folder() -> Path:
    """Where the package keeps its data."""
    return Path(import_module("bfcl_eval.constants.eval_config").PROMPT_PATH)
