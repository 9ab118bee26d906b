"""What touches a model's calls, and runs in the sandbox: the official decoding of some answers, which evaluates what
the model wrote; the execution of calls for the judge; and conversations, in which calls are executed as they come.

Reads one request from standard input, and writes one answer to standard output. No gold answer is ever here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from .official import conversation, make_handler, open_package
from .plain import packed


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    out = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    open_package(parsers=False)
    answers: dict[str, Callable[[dict[str, Any]], Any]] = {"decode": decode, "execute": execute, "converse": converse}
    told = json.dumps(answers[request["kind"]](request)).encode()
    while told:
        told = told[os.write(out, told) :]
    os._exit(0)


def decode(request: dict[str, Any]) -> dict[str, Any]:
    """The calls that an answer in Python's syntax holds, by the official decoder."""
    handler = make_handler(request["mode"], _no_model)
    try:
        return {"decoded": packed(handler.decode_ast(request["result"], "Python"))}
    except Exception as error:
        return {"error": str(error)}


def execute(request: dict[str, Any]) -> dict[str, Any]:
    """Each turn's steps as they were decoded, what their calls gave, and the state that the turn left behind."""
    utils = import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils")
    handler, entry = make_handler(request["mode"], _no_model), request["entry"]
    long_context = "long_context" in entry["id"].rsplit("_", 1)[0]
    turns = []
    for steps in request["turns"]:
        turn: dict[str, Any] = {"steps": [], "results": [], "state": None}
        turns.append(turn)
        for step in steps:
            try:
                calls = handler.decode_execute(step)
                empty = utils.is_empty_execute_response(calls)
            except Exception as error:
                turn["steps"].append({"error": str(error)})
                continue
            turn["steps"].append({"calls": [str(call) for call in calls]})
            if empty:
                continue
            results, instances = utils.execute_multi_turn_func_call(
                calls, entry["initial_config"], entry["involved_classes"], "model", entry["id"], long_context, True
            )
            turn["results"].append([str(result) for result in results])
            turn["state"] = {name: _state(instance) for name, instance in instances.items()}
    return {"turns": turns}


def converse(request: dict[str, Any]) -> dict[str, Any]:
    """The next question of a conversation."""
    return conversation(request["entry"], request["mode"], request["said"])


def _state(instance: Any) -> dict[str, Any]:
    return {name: packed(value) for name, value in vars(instance).items() if not name.startswith("_")}


def _no_model(messages: list[Any], tools: list[Any]) -> Any:  # noqa: ARG001
    raise AssertionError("no model is asked here")
