"""The official Terminal-Bench runners themselves, on two tasks of two lines, with a small chat server as the model.

Minutes each; they need the environments `terminal` and `terminal-2`, a Docker daemon with Compose, and debootstrap.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from plt_benchmarks.terminal import TERMINAL_2_ENVIRONMENT, TERMINAL_ENVIRONMENT, compose_plugin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.docker,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(compose_plugin() is None, reason="Docker's Compose plugin is not installed"),
    pytest.mark.skipif(shutil.which("debootstrap") is None, reason="debootstrap is not installed"),
]
IMAGE = "plt-eval-terminal-base:latest"
WORDS = ("bye", "hello")
COMPOSE = """
version: "2.4"
services:
  client:
    build: {context: .}
    image: ${T_BENCH_TASK_DOCKER_CLIENT_IMAGE_NAME}
    container_name: ${T_BENCH_TASK_DOCKER_CLIENT_CONTAINER_NAME}
    command: ["sh", "-c", "sleep infinity"]
    environment: ["TEST_DIR=${T_BENCH_TEST_DIR}"]
    volumes:
      - ${T_BENCH_TASK_LOGS_PATH}:${T_BENCH_CONTAINER_LOGS_PATH}
      - ${T_BENCH_TASK_AGENT_LOGS_PATH}:${T_BENCH_CONTAINER_AGENT_LOGS_PATH}
"""
TOML = """
version = "1.0"
[verifier]
timeout_sec = 120.0
[agent]
timeout_sec = 120.0
[environment]
build_timeout_sec = 600.0
"""


@pytest.fixture(scope="module")
def image() -> None:
    script = Path(__file__).parents[2] / "scripts" / "make_terminal_base.sh"
    subprocess.run([str(script), IMAGE], check=True, timeout=600)


class _Chat(BaseHTTPRequestHandler):
    """Answers in Terminus 2's form: writes the word that the task names (or another), then says that it is done."""

    word: str | None = None
    down = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.down:
            self.send_error(500)
            return
        done = any(turn["role"] == "assistant" for turn in body["messages"])
        found = re.search(r"Write the word (\w+)", json.dumps(body["messages"]))
        word = self.word or (found[1] if found else "")
        command = {"keystrokes": f"echo {word} > /app/word.txt\n", "duration": 0.5}
        told = {"analysis": "", "plan": "", "commands": [] if done else [command], "task_complete": done}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(told)}}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        row = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        text = json.dumps({**row, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def endpoint() -> Iterator[tuple[str, type[_Chat]]]:
    class Chat(_Chat):
        """With settings of its own."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Chat
    server.shutdown()


def write_tasks(folder: Path, suite: str) -> None:
    for word in WORDS:
        task = folder / f"say-{word}"
        (task / "tests").mkdir(parents=True)
        test = f'def test_the_word():\n    assert open("/app/word.txt").read().strip() == "{word}"\n'
        (task / "tests" / "test_outputs.py").write_text(test)
        ask = f"Write the word {word} into /app/word.txt."
        run = "python3 -m pytest -rA $TEST_DIR/test_outputs.py"
        if suite == "terminal":
            (task / "task.yaml").write_text(
                json.dumps({"instruction": ask, "difficulty": "easy", "disable_asciinema": True})
            )
            (task / "Dockerfile").write_text(f"FROM {IMAGE}\nWORKDIR /app\n")
            (task / "docker-compose.yaml").write_text(COMPOSE)
            (task / "run-tests.sh").write_text(f"#!/bin/bash\n{run}\n")
        else:
            (task / "environment").mkdir()
            (task / "environment" / "Dockerfile").write_text(f"FROM {IMAGE}\nWORKDIR /app\n")
            (task / "task.toml").write_text(TOML)
            (task / "instruction.md").write_text(ask)
            reward = "/logs/verifier/reward.txt"
            run = run.replace("$TEST_DIR", "/tests")
            (task / "tests" / "test.sh").write_text(f"#!/bin/bash\n{run} && echo 1 > {reward} || echo 0 > {reward}\n")


@pytest.mark.usefixtures("image")
@pytest.mark.parametrize("suite", ["terminal", "terminal-2"])
def test_right_wrong_and_no_answers(suite: str, endpoint: tuple[str, type[_Chat]], tmp_path: Path) -> None:
    environment = TERMINAL_ENVIRONMENT if suite == "terminal" else TERMINAL_2_ENVIRONMENT
    if not environment.present:
        pytest.skip(f"environment {environment.name} is not installed: plt-eval install {environment.name}")
    write_tasks(tmp_path / "tasks", suite)
    address, chat = endpoint

    def run(model: str, *more: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "plt_eval", "run", "--suite", suite, "--engine", "openai", "--json"]
        command += ["--endpoint", address, "--api-model", model, "--data", str(tmp_path / "tasks"), *more]
        done = subprocess.run(
            [*command, "--results", str(tmp_path / "runs")], capture_output=True, text=True, check=False, timeout=580
        )
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, json.loads(done.stdout)[0]["metrics"]

    code, metrics = run("right")
    assert (code, metrics[f"{suite}.resolved"]["value"], metrics[f"{suite}.resolved"]["n"]) == (0, 1.0, 2)
    chat.word = "nothing"
    code, metrics = run("wrong", "--limit", "1")
    assert (code, metrics[f"{suite}.resolved"]["value"], metrics[f"{suite}.resolved"]["n"]) == (0, 0.0, 1)
    chat.down = True
    assert run("down", "--limit", "1") == (1, {}), "it is missing, and no failure"
    left = subprocess.check_output(["docker", "ps", "--all", "--format", "{{.Names}}"], text=True)
    assert "say-" not in left
