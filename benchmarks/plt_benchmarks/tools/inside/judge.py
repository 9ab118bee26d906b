"""The official verdicts, for one answer at a time: run in the package's environment, for as long as answers come.

Each request is judged in a fork of its own, so that none sees what another left behind. Nothing that a model wrote is
evaluated here: an answer whose decoding would is sent back, and calls of conversations come as what they gave.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .official import NAMES, make_handler, open_package
from .plain import unpacked

CPU_S = 60
SHOWN = 2000


class WouldEvaluate(BaseException):
    """The official decoder was about to evaluate what the model wrote."""


def main() -> None:
    """Answer requests, one line each."""
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    open_package()
    for name in ("model_handler.utils", "model_handler.api_inference.openai_completion", "eval_checker.eval_runner"):
        import_module(f"bfcl_eval.{name}")
    for line in sys.stdin:
        os.write(out, _forked(line) + b"\n")


def _forked(line: str) -> bytes:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        with os.fdopen(writing, "w") as pipe:
            pipe.write(json.dumps(_judged(line)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe_end:
        told = pipe_end.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return told
    if code in (-signal.SIGXCPU, -signal.SIGSEGV):
        return json.dumps({"valid": False, "why": f"the official checker ended with signal {-code}"}).encode()
    return json.dumps({"broken": f"the official checker ended with exit code {code}"}).encode()


def _judged(line: str) -> dict[str, Any]:
    kinds = {"single": _single, "conversation": _conversation, "table": _table}
    try:
        request = json.loads(line)
        return kinds[request["kind"]](request)
    except WouldEvaluate:
        return {"evaluates": True}
    except Exception as error:
        return {"valid": False, "why": f"the official checker raises {type(error).__name__}: {error}"[:SHOWN]}


def _refuse(source: str) -> Any:  # noqa: ARG001
    raise WouldEvaluate


# --- single turns -------------------------------------------------------------------------------------


def _single(request: dict[str, Any]) -> dict[str, Any]:
    runner = import_module("bfcl_eval.eval_checker.eval_runner")
    category, entry = request["category"], request["entry"]
    handler: Any = make_handler(request["mode"], _no_model)
    if "decoding" in request:
        handler = _Decoded(request["decoding"])
    else:
        vars(import_module("bfcl_eval.model_handler.utils"))["eval"] = _refuse
    found = _captured(runner)
    result, name = [{"id": entry["id"], "result": request["result"]}], NAMES[request["mode"]]
    if "relevance" in category:
        runner.relevance_file_runner(handler, result, [entry], name, category, Path())
    else:
        answers = [{"id": entry["id"], "ground_truth": request["answer"]}]
        language = {"java": "Java", "javascript": "JavaScript"}.get(category, "Python")
        runner.ast_file_runner(handler, result, [entry], answers, language, category, name, Path())
    return _verdict(found)


class _Decoded:
    """A handler for an answer that was decoded elsewhere."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told

    def decode_ast(self, result: Any, language: str = "Python") -> Any:  # noqa: ARG002
        """What the decoder gave, or the error that it raised."""
        if "error" in self._told:
            raise ValueError(self._told["error"])
        return unpacked(self._told["decoded"])


def _captured(runner: Any) -> list[dict[str, Any]]:
    """The rows that the official runner is going to write to its score file."""
    rows: list[dict[str, Any]] = []
    runner.write_list_of_dicts_to_file = lambda _, found, __: rows.extend(found)
    return rows


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if rows[0]["accuracy"] == 1:
        return {"valid": True}
    row = rows[1]
    error = row.get("error")
    kind = row.get("error_type")
    if isinstance(error, dict):
        kind, error = error.get("error_type"), error.get("error_message")
    if isinstance(error, list):
        error = "; ".join(map(str, error))
    return {"valid": False, "why": str(error)[:SHOWN], "kind": str(kind)}


# --- conversations ------------------------------------------------------------------------------------


def _conversation(request: dict[str, Any]) -> dict[str, Any]:
    """`turns` is what the sandbox told: it may be anything, and counts for what it says."""
    checker: Any = import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
    runner = import_module("bfcl_eval.eval_checker.eval_runner")
    entry = request["entry"]
    executed = _Executed(request["turns"], checker.execute_multi_turn_func_call)
    checker.execute_multi_turn_func_call = executed
    found = _captured(runner)
    runner.multi_turn_runner(
        executed,
        [{"id": entry["id"], "result": [turn["steps"] for turn in request["turns"]]}],
        [entry],
        [{"id": entry["id"], "ground_truth": request["answer"]}],
        NAMES[request["mode"]],
        entry["id"].rsplit("_", 1)[0],
        Path(),
    )
    return _verdict(found)


class _Executed:
    """Stands for the model's side: a handler that knows how steps were decoded, and the results and states of executing
    them. The gold calls are executed here, by the official function."""

    def __init__(self, turns: list[dict[str, Any]], official: Any) -> None:
        self._official = official
        self._steps = [
            ([str(result) for result in results], turn["state"]) for turn in turns for results in turn["results"]
        ]

    def decode_execute(self, step: dict[str, Any]) -> list[str]:
        """The calls of a step, or the error that decoding raised."""
        if "error" in step:
            raise ValueError(step["error"])
        return [str(call) for call in step["calls"]]

    def __call__(self, *, model_name: str, involved_classes: list[str], **request: Any) -> tuple[list[str], Any]:
        if model_name.endswith("_ground_truth"):
            done: tuple[list[str], Any] = self._official(
                model_name=model_name, involved_classes=involved_classes, **request
            )
            return done
        results, state = self._steps.pop(0)
        return results, {name: _instance(name, state[name]) for name in involved_classes}


def _instance(name: str, state: dict[str, Any]) -> Any:
    """An object of the official class with that state."""
    utils = import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils")
    files = import_module("bfcl_eval.eval_checker.multi_turn_eval.func_source_code.gorilla_file_system")
    kind = getattr(import_module(utils.CLASS_FILE_PATH_MAPPING[name]), name)
    classes = {"File": files.File, "Directory": files.Directory}
    made = kind.__new__(kind)
    vars(made).update({key: unpacked(value, classes) for key, value in state.items()})
    return made


# --- the leaderboard's own arithmetic -----------------------------------------------------------------


def _table(request: dict[str, Any]) -> dict[str, Any]:
    """The official table for `accuracies` (category -> accuracy and count): file name -> row, unrounded."""
    helper: Any = import_module("bfcl_eval.eval_checker.eval_runner_helper")
    tables: dict[str, dict[str, Any]] = {}

    def keep(data: list[Any], file_path: Path, header: list[str], **_: Any) -> None:
        tables[file_path.name] = dict(zip(header, data[0], strict=True))

    helper.write_score_csv_file = keep
    model = NAMES["prompt"]
    table = {model: {name: {"accuracy": a, "total_count": n} for name, (a, n) in request["accuracies"].items()}}
    helper.generate_leaderboard_csv(table, Path())
    return {"tables": tables}


def _no_model(messages: list[Any], tools: list[Any]) -> Any:  # noqa: ARG001
    raise AssertionError("no model is asked here")
