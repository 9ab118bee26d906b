"""A model whose answers are written down: behind an endpoint, and as the decoder of an in-process engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from plt_eval.engines.base import Completion
from plt_eval.engines.hf_prompts import Job, Prompts

Answer = Callable[[list[dict[str, Any]]], str]


def block(command: str) -> str:
    """An answer with one command."""
    return f"THOUGHT: go on.\n\n```mswea_bash_command\n{command}\n```"


FIX = "sed -i 's/return a - b/return a + b/' calc.py"
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && cat patch.txt"
SOLUTION = ("cat calc.py", FIX, "git diff -- calc.py > patch.txt", SUBMIT)


def by_step(commands: Sequence[str]) -> Answer:
    """The n-th command after n - 1 answers, the last one for ever."""

    def answer(messages: list[dict[str, Any]]) -> str:
        step = sum(message["role"] == "assistant" for message in messages)
        return block(commands[min(step, len(commands) - 1)])

    return answer


class ScriptedServer(ThreadingHTTPServer):
    """The chat service; `answer` says what to, `refuse_over` refuses longer conversations as vLLM does (characters)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Answer = by_step(SOLUTION)
        self.as_tool_call = False
        self.refuse_over: int | None = None
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def options(self) -> list[str]:
        """What to tell `plt-eval run`."""
        return ["--engine", "openai", "--endpoint", self.url, "--api-model", "org/scripted"]


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, status = self.server, 200
        with server.lock:
            server.asked.append(body)
        size = sum(len(message["content"]) for message in body["messages"])
        if server.refuse_over is not None and size > server.refuse_over:
            status = 400
            told: dict[str, Any] = {"error": {"message": "This model's maximum context length is 99 tokens."}}
        else:
            text = server.answer(body["messages"])
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if server.as_tool_call:
                command = text.split("```")[1].removeprefix("mswea_bash_command\n").strip()
                function = {"name": "bash", "arguments": json.dumps({"command": command})}
                message = {"role": "assistant", "content": None}
                message["tool_calls"] = [{"id": f"call_{len(server.asked)}", "type": "function", "function": function}]
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            told = {"choices": [choice], "usage": {"prompt_tokens": size, "completion_tokens": len(text)}}
        payload = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class ScriptedDecoder:
    """In place of a model's decoder: the engine's own prompts, tokens and texts, but the tokens are written down."""

    name = "scripted"

    def __init__(self, prompts: Prompts, answer: Callable[[str], str]) -> None:
        self.prompts, self.answer = prompts, answer
        self.batches: list[int] = []
        self.read: list[str] = []

    def decode(self, jobs: list[Job]) -> Iterator[Completion]:
        self.batches.append(len(jobs))
        for job in jobs:
            text = self.prompts.tokenizer.decode(job.ids)
            self.read.append(text)
            new = self.prompts.tokens(self.answer(text), add_special_tokens=False)
            yield self.prompts.completion(job, new, ended=True, seconds=0.0)
