"""Judging: official verdicts come from a process of the package's environment, what calls do from the sandbox."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from plt_benchmarks.outcomes import how_it_ended, told_by
from plt_benchmarks.protocols import Answer, Sample, Sandbox, SandboxOutcome, Score
from plt_benchmarks.tools.package import in_environment, sandbox_job

MOST_CHARACTERS = 2_000_000
"""Longer answers are wrong without being looked at."""
ROLES = ("system", "user", "assistant", "tool")


class Judge:
    """A process of inside.judge. One request at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="plt-eval-bfcl-")
        self._process = subprocess.Popen(
            in_environment("judge"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            cwd=self._folder.name,
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The process' answer. Raises BrokenJudge when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            told: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise BrokenJudge(f"the judging process ended ({error})") from error
        return told

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not read by a process that has ended
                if stream is not None:
                    stream.close()
        self._folder.cleanup()


class BrokenJudge(Exception):
    """The judging process is gone."""


class ToolsScorer:
    """Judges answers to any of the categories. Thread-safe; each thread that judges at a time has a process."""

    def __init__(self, mode: str, sandbox: Sandbox) -> None:
        self._mode = mode
        self._sandbox = sandbox
        self._lock = threading.Lock()
        self._closed = False
        self._idle: list[Judge] = [Judge()]

    def score(self, sample: Sample, answer: Answer) -> Score:
        """Value "right"; the detail says why not."""
        try:
            return self._score(sample, answer)
        except BrokenJudge as error:
            return Score(error=str(error))
        except RecursionError:
            return _wrong(answer.text, "the answer is nested too deeply")

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            self._closed = True
            for judge in self._idle:
                judge.close()
            self._idle.clear()

    def _score(self, sample: Sample, answer: Answer) -> Score:
        if len(answer.text) > MOST_CHARACTERS:
            return _wrong("", f"the answer has {len(answer.text)} characters")
        result = result_of(answer.text, sample.data["category"], self._mode)
        shown = answer.text
        if "multi_turn" in sample.data["category"]:
            return self._conversation(sample, result, shown)
        request = {
            "kind": "single",
            "mode": self._mode,
            "category": sample.data["category"],
            "entry": sample.data["entry"],
            "answer": sample.data["answer"],
            "result": result,
        }
        told = self._ask(request)
        if told.get("evaluates"):
            outcome = self._run({"kind": "decode", "mode": self._mode, "result": result})
            decoding = told_by(outcome, dict)
            if decoding is None or not decoding.keys() & {"decoded", "error"}:
                return _wrong(shown, f"decoding the answer: {how_it_ended(outcome)}")
            told = self._ask({**request, "decoding": decoding})
        return _verdict(told, shown)

    def _conversation(self, sample: Sample, turns: Any, shown: str) -> Score:
        entry = {key: value for key, value in sample.data["entry"].items() if key not in ("function", "question")}
        wanted = len(sample.data["answer"])
        if not isinstance(turns, list) or not all(isinstance(steps, list) for steps in turns):
            return _wrong(shown, "the conversation has no turns: it was not finished")
        if len(turns) != wanted:
            return _wrong(shown, f"the conversation ended in turn {len(turns)} of {wanted}")
        outcome = self._run({"kind": "execute", "mode": self._mode, "entry": entry, "turns": turns})
        executed = told_by(outcome, dict)
        if executed is None or not _well_formed(executed.get("turns"), wanted):
            return _wrong(shown, f"executing the calls: {how_it_ended(outcome)}")
        request = {"kind": "conversation", "mode": self._mode, "entry": entry, "answer": sample.data["answer"]}
        return _verdict(self._ask({**request, "turns": executed["turns"]}), shown)

    def _run(self, request: Mapping[str, Any]) -> SandboxOutcome:
        return self._sandbox.run(sandbox_job(request))

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        judge = self._taken()
        try:
            told = judge.ask(request)
        except BaseException:
            judge.close()
            raise
        with self._lock:
            if self._closed:
                judge.close()
            else:
                self._idle.append(judge)
        if "broken" in told:
            raise BrokenJudge(told["broken"])
        return told

    def _taken(self) -> Judge:
        with self._lock:
            if self._closed:
                raise BrokenJudge("the scorer is closed")
            return self._idle.pop() if self._idle else Judge()


def result_of(text: str, category: str, mode: str) -> Any:
    """An answer's text in the official form of results. A text is itself where texts are asked for; calls and
    conversations are JSON, and what is none counts as the text that it is."""
    if mode == "prompt" and "multi_turn" not in category:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _well_formed(turns: Any, wanted: int) -> bool:
    """Whether the sandbox told what it should have, in form."""
    return (
        isinstance(turns, list)
        and len(turns) == wanted
        and all(
            isinstance(turn, dict)
            and isinstance(turn.get("steps"), list)
            and isinstance(turn.get("results"), list)
            and all(isinstance(step, dict) for step in turn["steps"])
            and all(isinstance(results, list) for results in turn["results"])
            for turn in turns
        )
    )


def _verdict(told: Mapping[str, Any], shown: str) -> Score:
    if told["valid"]:
        return Score({"right": True}, judged=shown)
    kind = {"kind": told["kind"]} if "kind" in told else {}
    return Score({"right": False}, judged=shown, detail={"why": told["why"], **kind})


def _wrong(shown: str, why: str) -> Score:
    return Score({"right": False}, judged=shown, detail={"why": why})


def converse_step(sandbox: Sandbox, entry: Mapping[str, Any], mode: str, said: list[dict[str, Any]]) -> dict[str, Any]:
    """What the official package asks next in the conversation on `entry`, after the answers `said`: {"messages",
    "tools"}, or {"done": result}. Everything that was said before is executed again, in a sandbox of its own: a call
    that does not come to an end ends the conversation. Raises SandboxError and SuiteError."""
    outcome = sandbox.run(sandbox_job({"kind": "converse", "mode": mode, "entry": dict(entry), "said": said}))
    told = told_by(outcome, dict)
    if told is None or not ("done" in told or _is_question(told)):
        return {"done": f"Error during inference: executing the calls: {how_it_ended(outcome)}"}
    return told


def _is_question(told: Mapping[str, Any]) -> bool:
    messages, tools = told.get("messages"), told.get("tools")
    lists = isinstance(messages, list) and isinstance(tools, list)
    return lists and all(map(_is_turn, messages or ())) and all(map(_is_tool, tools or ()))


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        return False
    calls = turn.get("tool_calls") or []
    return isinstance(calls, list) and all(isinstance(call, dict) for call in calls)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    parameters = function.get("parameters")
    kinds = parameters.get("properties", {}) if isinstance(parameters, dict) else None
    return isinstance(kinds, dict) and all(isinstance(kind, dict) for kind in kinds.values())
