"""A real local HTTP server that speaks the OpenAI protocol, and misbehaves when told to; or a process with one, which
adds up what the toy suite asks:

python bad_server.py PORT SLOW_S
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Server(ThreadingHTTPServer):
    """Answers with `plan`'s entries in turn, then like a good server. Remembers what it was asked."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.models: list[str] | None = None
        """What it says that it serves; None: it does not say."""
        self.loops: str | None = None
        """How many loops it says that the model runs."""
        self.frozen = False
        """It does not even say which models it serves."""
        self.plan: list[Reply] = []
        self.always: Reply | None = None
        self.asked: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.under_way = 0
        self.most_under_way = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.server.frozen:
            hang(self, {})
        elif self.path == "/count":
            send(self, 200, json.dumps(len(self.server.asked)).encode())
        elif self.server.models is None:
            send(self, 404, b'{"detail": "Not Found"}')
        else:
            send(self, 200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.headers_seen.append(dict(self.headers))
            server.paths.append(self.path)
            server.times.append(time.monotonic())
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            reply = server.plan.pop(0) if server.plan else server.always or good()
        try:
            reply(self, body)
        finally:
            with server.lock:
                server.under_way -= 1

    def log_message(self, format: str, *args: Any) -> None:
        pass


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    if handler.server.loops is not None:  # type: ignore[attr-defined]
        headers = {"X_PLT_Loops": handler.server.loops, **headers}  # type: ignore[attr-defined]
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def good(text: str = "42", reason: str | None = "stop", slow_s: float = 0.0) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        time.sleep(slow_s)
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
        if "messages" not in body:
            content = {"text": text}
        choice = {"index": 0, "finish_reason": reason, **content}
        answer = {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
        send(handler, 200, json.dumps(answer).encode())

    return reply


def summing(slow_s: float = 0.0) -> Reply:
    """The sum that is asked for, right two times in three: by prompt and seed alone, as a model's answer."""

    def reply(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        a, _, b, _ = prompt.split()
        luck = hashlib.sha256(f"{body.get('seed')}:{prompt}".encode()).digest()[0] % 3
        good(str(int(a) + int(b) + (luck == 0)), slow_s=slow_s)(handler, body)

    return reply


def status(code: int, message: str = "out of order", **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "x"}}).encode()
    return lambda handler, _: send(handler, code, body, **headers)


def raw(body: bytes) -> Reply:
    return lambda handler, _: send(handler, 200, body)


def drop(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_short(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"te')
    handler.wfile.flush()
    drop(handler, _)


def hang(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    handler.server.over.wait(60)  # type: ignore[attr-defined]
    handler.close_connection = True


class ServerProcess:
    """A process that sums, at a port of its own, which it has again after a restart."""

    def __init__(self, slow_s: float = 0.005) -> None:
        self.port = 0  # any that is free, and then that one again
        self._slow_s = slow_s
        self._process: subprocess.Popen[str] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [sys.executable, __file__, str(self.port), str(self._slow_s)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def count(self) -> int:
        """Completions it was asked for since it was started."""
        import httpx

        return int(httpx.get(f"http://127.0.0.1:{self.port}/count").json())


if __name__ == "__main__":
    one = Server(int(sys.argv[1]))
    one.models = ["m"]
    one.always = summing(float(sys.argv[2]))
    print(one.server_address[1], flush=True)
    one.serve_forever()
