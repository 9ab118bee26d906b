"""The launcher and the small parts: mistakes, processes, stop strings in streams."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, MutableMapping
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from contract import CONTEXT, save
from hypothesis import given
from hypothesis import strategies as st

from plt_benchmarks.protocols import Prompt
from plt_eval.cli.main import main
from plt_eval.engines import vllm_start
from plt_eval.engines.base import Decoding, GenerationRequest
from plt_eval.engines.hf import HFEngine
from plt_eval.engines.hf_prompts import Job, Prompts
from plt_eval.errors import MissingExtra, UserError
from plt_eval.models import resolve_model
from plt_eval.serving import command, transformers_server
from plt_eval.serving.answers import chat_answer, completion_answer
from plt_eval.serving.asked import Asked, BadRequest, Reader
from plt_eval.serving.child import Child, ServerDied, telling_line
from plt_eval.serving.command import Launch, ServeOptions, choose_engine, free_port, plan
from plt_eval.serving.front import ASKED, MAX_BODY, Front
from plt_eval.serving.settings import Settings
from plt_eval.serving.transformers_server import CutQueue, Streamer, generate, utils
from plt_eval.serving.writer import TokenScore, Writer
from plt_model import PLTConfig
from plt_model.tokenizer import byte_tokenizer

# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], "--model nowhere: no such model folder"),
        (["--model", "plt-tiny"], "choose one of plt-tiny:r1"),
        (["--model", "plt-tiny:r2", "stray"], "unexpected argument 'stray'"),
        (["--model", "plt-tiny:r2", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY: that environment variable"),
        (["--model", "plt-tiny:r2", "--tensor-parallel", "2"], "--tensor-parallel has no effect"),
        (["--model", "plt-tiny:r2", "--chat-template", "nowhere.jinja"], "no such file"),
        (["--model", "plt-tiny:r2", "--chat-template", sys.executable], "expected a Jinja template in UTF-8"),
        (["--model", "plt-tiny:r2", "--served-model-name", ""], "--served-model-name '': expected a name"),
        (["--model", "plt-tiny:r2", "--host", "203.0.113.7"], "--host 203.0.113.7 --port 8000: Cannot assign"),
        (["--model", "plt-tiny:r2", "--", "--port", "3"], "--port after --: give it before, as --port"),
        (["--model", "plt-tiny:r2", "--", "--quantization=bnb-4bit"], "--quantization after --: has no effect"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--engine", "transformers", *arguments])
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert words in told.err
    assert told.err.count("\n") == 1
    assert not told.out


@pytest.mark.parametrize("arguments", [["--bogus"], ["--port", "70000"], ["--engine", "sglang"], ["--loops", "0"], []])
def test_options_that_there_are_not(arguments: list[str]) -> None:
    model = ["--model", "plt-tiny:r2"] if arguments else []
    with pytest.raises(SystemExit) as ended:
        main(["serve", *model, *arguments])
    assert ended.value.code == 2


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--model", "plt-tiny:r2", "--engine", "transformers", "--port", str(port)])
        assert ended.value.code == 2
        assert f"--port {port}: Address already in use" in capsys.readouterr().err
    assert free_port("127.0.0.1", 0) > 0


def test_a_model_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found out by the server's process, which says it in our words."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        transformers_server.main([Settings(str(tmp_path), "tiny", None, "auto", "cpu").json()])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("plt-eval: error: ")
    assert "config.json: not valid JSON" in told
    assert told.count("\n") == 1


def test_what_the_servers_process_has_told_is_not_told_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys; print('plt-eval: error: no good', flush=True); sys.exit(2)"
    launch = Launch("transformers", (sys.executable, "-c", program), {}, "127.0.0.1", 9)
    monkeypatch.setattr(command, "plan", lambda *_: launch)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model", "plt-tiny:r2", "--engine", "transformers"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "plt-eval: error: no good\n"


def test_a_chat_template_that_is_none() -> None:
    with pytest.raises(UserError, match="--chat-template: line 1: "):
        transformers_server._use_template(byte_tokenizer(), "{% for")
    transformers_server._use_template(byte_tokenizer(), "{{ raise_exception('no') }}")


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_installed", lambda package: package not in ("vllm", "uvicorn"))
    with pytest.raises(MissingExtra, match=r"--engine vllm needs vllm.*plt-eval\[vllm\]"):
        choose_engine("vllm")
    with pytest.raises(MissingExtra, match=r"--engine transformers needs uvicorn.*plt-eval\[serve\]"):
        choose_engine("auto")
    monkeypatch.setattr(command, "_installed", lambda package: package != "vllm")
    assert choose_engine("auto") == "transformers"
    monkeypatch.setattr(command, "_installed", lambda _: True)
    assert choose_engine("auto") == "vllm"


# --- what is started ------------------------------------------------------------------------------------


def test_vllm_gets_model_loops_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_start, "check_installed", lambda _: None)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    options = ServeOptions(
        model="plt-tiny:r2",
        loops=3,
        port=0,
        dtype="float32",
        tokenizer="bytes",
        chat_template=template,
        tensor_parallel=2,
        max_model_len=512,
        rest=("--enforce-eager", "--max-num-seqs", "4"),
    )
    launch = plan(options, resolve_model(options.model, options.loops), "vllm", "sk-1", tmp_path)
    words = list(launch.command)
    assert words[:4] == [sys.executable, "-P", "-m", "vllm.entrypoints.launchers.api_server.entry"]
    given = dict(zip(words[4:-3:2], words[5:-3:2], strict=True))
    assert json.loads(given["--hf-overrides"]) == {"plt_num_loops": 3}
    assert given["--dtype"] == "float32"
    assert given["--tensor-parallel-size"] == "2"
    assert int(given["--kv-cache-memory-bytes"]) <= vllm_start.CPU_KV_BYTES // 2
    assert given["--max-model-len"] == "512"
    assert given["--generation-config"] == "vllm"
    assert given["--served-model-name"] == "plt-tiny:r2"
    assert (Path(given["--tokenizer"]) / "tokenizer.json").is_file()
    assert words[-3:] == ["--enforce-eager", "--max-num-seqs", "4"]
    assert given["--middleware"] == "plt_eval.serving.asgi.LoopsTold"
    assert dict(launch.environment) == {"VLLM_API_KEY": "sk-1", "PLT_EVAL_SERVED_LOOPS": "3"}
    assert "sk-1" not in " ".join(words)


OVERRIDES = ["--hf-overrides", "--hf_overrides", "--hf-overrides.plt_num_loops", "--hf-over"]


@pytest.mark.parametrize("word", OVERRIDES)
def test_overrides_of_ones_own_exclude_loops(word: str) -> None:
    options = ServeOptions(model="plt-tiny:r2", loops=2, rest=(word, "{}"))
    with pytest.raises(UserError, match="--hf-overrides"):
        command._check(options, "vllm")


@pytest.mark.parametrize("word", OVERRIDES)
def test_loops_that_are_not_known_are_not_told(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_start, "check_installed", lambda _: None)
    model = resolve_model("plt-tiny:r2")
    for rest, told in (((), "2"), ((word, "4"), None)):
        options = ServeOptions(model="plt-tiny:r2", port=0, rest=rest)
        launch = plan(options, model, "vllm", None, tmp_path)
        assert launch.environment["PLT_EVAL_SERVED_LOOPS"] == told
        assert ("--middleware" in launch.command) == (told is not None)
        assert ("--model plt-tiny:r2 --loops 2 " in command._ready(options, model, launch)) == (told is not None)


def test_only_a_plt_has_loops_to_tell(tmp_path: Path) -> None:
    assert PLTConfig.model_type == command.PLT
    options = ServeOptions(model=str(tmp_path))
    for config, loops, told in (
        ({"model_type": command.PLT, "plt_num_loops": 2}, None, 2),
        ({"model_type": command.PLT, "plt_num_loops": 2}, 4, 4),
        ({"model_type": command.PLT}, 3, 3),
        ({"model_type": command.PLT}, None, None),
        ({"model_type": "llama", "plt_num_loops": 2}, None, None),
        ([], None, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert command._loops(options, resolve_model(str(tmp_path), loops)) == told


@pytest.mark.parametrize(
    "word", ["--ssl-keyfile=key.pem", "--ssl_ciphers", "--uds", "--headless", "--config", "--hf-config-path"]
)
def test_options_by_which_the_server_could_not_be_asked(word: str) -> None:
    with pytest.raises(UserError, match=f"{word.split('=')[0].replace('_', '-')} after --: "):
        command._check(ServeOptions(model="plt-tiny:r2", rest=(word,)), "vllm")


@pytest.mark.parametrize(("engine", "variable"), list(command.KEY_VARIABLES.items()))
def test_a_key_that_nobody_asked_for_does_not_count(
    engine: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_start, "check_installed", lambda _: None)
    monkeypatch.setenv(variable, "sk-of-another-server")
    options = ServeOptions(model="plt-tiny:r2", port=0)
    launch = plan(options, resolve_model(options.model), engine, None, tmp_path)
    program = f"import os, time; print({variable!r} in os.environ, flush=True); time.sleep(600)"
    with Child([sys.executable, "-c", program], launch.environment) as child:
        assert first_line(child) == "False"


# --- processes ------------------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
LISTENING = """
import socket, time
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
time.sleep(600)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def started(program: str, **options: float) -> Child:
    return Child([sys.executable, "-c", program], {}, **options)


def first_line(child: Child) -> str:
    child.wait_until(lambda: bool(child.last), every_s=0.01)
    return child.last[0]


def test_a_child_ends_with_all_that_it_started() -> None:
    with started(PARENT) as child:
        grandchild = int(first_line(child))
        assert psutil.pid_exists(grandchild)
    assert child.process.returncode == -signal.SIGTERM
    _wait_gone(grandchild)


def test_a_child_that_does_not_listen_is_killed() -> None:
    with started(STUBBORN, grace_s=0.2) as child:
        assert first_line(child) == "up"
    assert child.process.returncode == -signal.SIGKILL


def test_a_child_does_not_outlive_a_parent_that_was_killed() -> None:
    program = """
import sys
from plt_eval.serving.child import Child
child = Child([sys.executable, "-c", "import time; time.sleep(600)"], {})
print(child.process.pid, flush=True)
child.wait()
"""
    with started(program) as parent:
        grandchild = int(first_line(parent))
        os.kill(parent.process.pid, signal.SIGKILL)
        _wait_gone(grandchild)


def _wait_gone(pid: int) -> None:
    until = time.monotonic() + 20
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until, f"process {pid} lives on"
            time.sleep(0.02)


def test_whether_it_is_the_child_that_listens() -> None:
    """Another server at the port answers too: it must not count as ours."""
    with socket.create_server(("127.0.0.1", 0)) as other, started(LISTENING) as child:
        port = int(first_line(child))
        assert child.listens(port)
        assert not child.listens(other.getsockname()[1])


def test_a_server_that_dies_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with started("raise RuntimeError('no room')") as child, pytest.raises(ServerDied) as died:
        child.wait_until(lambda: False)
    assert str(died.value) == "the server ended (exit code 1): RuntimeError: no room"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "it left no words"),
        (["loading", "bye", ""], "bye"),
        (["Traceback", "ValueError: a", "", "nanobind: leaked 1 instance"], "ValueError: a"),
        (
            [
                "(EngineCore pid=7) ERROR 11-27 [core.py:9] ValueError: no room for the KV cache",
                "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.",
            ],
            "ValueError: no room for the KV cache",
        ),
        (["torch.OutOfMemoryError: CUDA out of memory."], "torch.OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_the_telling_line(lines: list[str], told: str) -> None:
    assert telling_line(lines) == told


# --- decoding -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("loop_mode", ["plt", "sequential"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_writer_writes_what_the_engine_does(folder: Path, loop_mode: str, temperature: float) -> None:
    """In a session, and where the passes need a trip each."""
    engine = HFEngine(str(folder), loop_mode=loop_mode, dtype="float32", device="cpu", notify=lambda _: None)
    writer = Writer(engine, CONTEXT)
    assert ("slots" in writer.about) == (loop_mode == "plt")
    decoding = Decoding(temperature=temperature, seed=7, max_new_tokens=9)
    (expected,) = engine.generate([GenerationRequest("", Prompt("def f(x):"), decoding)])
    job = engine.prompts.job(GenerationRequest("", Prompt("def f(x):"), decoding))
    heard: list[int] = []
    new = writer.write(Asked(job, False, {}), heard.append)
    assert heard == new
    assert engine.prompts.completion(job, new, ended=False, seconds=0.0).text == expected.text
    gone = Asked(replace(job, limit=500), False, {})
    assert len(writer.write(gone, lambda _: gone.gone.set())) == 2
    assert not writer.running


def test_a_failure_reaches_who_waits_and_the_next_is_served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HFEngine(str(folder), dtype="float32", device="cpu", notify=lambda _: None)
    writer = Writer(engine, CONTEXT)

    def full(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr("plt_model.decode.session._allocated", full)
        with pytest.raises(UserError, match="no room; a smaller --max-model-len"):
            writer.warm_up()
    writer.warm_up()


def test_a_request_that_cannot_begin_is_the_only_one_that_fails(folder: Path) -> None:
    engine = HFEngine(str(folder), dtype="float32", device="cpu", notify=lambda _: None)
    writer = Writer(engine, CONTEXT)
    job = engine.prompts.job(GenerationRequest("", Prompt("a"), Decoding(max_new_tokens=2)))
    with pytest.raises(UnicodeEncodeError):
        writer.write(Asked(replace(job, stops=("\ud800",)), False, {}))
    assert len(writer.write(Asked(job, False, {}))) == 2


@pytest.mark.parametrize("loop_mode", ["plt", "sequential"])
def test_what_hears_a_token_may_fail(folder: Path, loop_mode: str) -> None:
    """Who waits hears of it: the text is not taken for one that ended."""
    engine = HFEngine(str(folder), loop_mode=loop_mode, dtype="float32", device="cpu", notify=lambda _: None)
    writer = Writer(engine, CONTEXT)
    job = engine.prompts.job(GenerationRequest("", Prompt("a"), Decoding(max_new_tokens=4)))

    def told(_: int) -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        writer.write(Asked(job, False, {}), told)
    assert len(writer.write(Asked(job, False, {}))) == 4


def messages_read(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    """What the chat template gets to see."""
    read: list[list[dict[str, Any]]] = []

    def templated(turns: list[dict[str, Any]], *_: object) -> list[int]:
        read.append(turns)
        return [1]

    asked = Reader("tiny", CONTEXT, byte_tokenizer().encode, templated).chat({"model": "tiny", "messages": [*messages]})
    assert asked.body["messages"] == read[0]
    return read[0]


def test_a_template_reads_all_of_a_message() -> None:
    function = {"name": "f", "arguments": '{"a": [1, null]}'}
    call = {"id": "1", "type": "function", "function": function}
    assert messages_read(
        {"role": "user", "name": "bob", "content": "hi"},
        {"role": "assistant", "content": "let me see", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": text} for text in "ab"]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "g", "arguments": ""}}]},
    ) == [
        {"role": "user", "name": "bob", "content": "hi"},
        {
            **{"role": "assistant", "content": "let me see", "reasoning_content": "hm"},
            "tool_calls": [call | {"function": {"name": "f", "arguments": {"a": [1, None]}}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "a\nb"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "g", "arguments": {}}}]},
    ]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"tool_calls": 3}, "messages.0.tool_calls: expected a list"),
        ({"tool_calls": [3]}, r"messages.0.tool_calls.0: expected a call"),
        ({"tool_calls": [{"function": {"arguments": "{"}}]}, r"function.arguments: expected a JSON object"),
        ({"tool_calls": [{"function": {"arguments": "[1]"}}]}, r"function.arguments: expected a JSON object"),
        ({"content": [{"type": "text"}]}, "messages.0.content: expected parts with a type and a text"),
        ({"content": [{"type": "text", "text": "a", "cache_control": {}}]}, "a type and a text alone"),
    ],
)
def test_messages_that_cannot_be_read(message: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        messages_read({"role": "assistant", **message})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "a\ud800"}, "prompt: no text"),
        ({"prompt": "a", "stop": ["x", "\ud800"]}, "stop: no text"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "only with stream"),
        (
            {"prompt": "a", "stream": True, "stream_options": {"often": True}},
            "stream_options.often: this server has no",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 0},
            "max_tokens: Input should be greater than",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
            r"messages.0.content: the model reads text alone, found image_url",
        ),
    ],
)
def test_bad_requests(body: dict[str, object], words: str) -> None:
    reader = Reader("tiny", CONTEXT, byte_tokenizer().encode, lambda *_: [])
    read = reader.completion if "prompt" in body else reader.chat
    with pytest.raises(BadRequest, match=words):
        read({"model": "tiny", **body})


@pytest.mark.parametrize(
    ("kind", "size", "status"),
    [(b"text/plain", 3, 415), (b"application/json; charset=utf-8", MAX_BODY + 1, 413), (b"Application/JSON", 3, 400)],
)
def test_bodies_that_are_not_read(kind: bytes, size: int, status: int) -> None:
    """What any web page may send, and what would fill the memory."""
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"content-type", kind)]}
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * size}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    front = Front(None, reader=None, writer=None, key=None)  # type: ignore[arg-type]
    asyncio.run(front(scope, receive, send))
    assert sent[0]["status"] == status


async def _app_that_fails(began: bool, send: Any) -> None:
    if began:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})  # as Starlette does
    raise RuntimeError('no "room"\nleft')


@pytest.mark.parametrize(("body", "began"), [({}, False), ({"stream": True}, False), ({"stream": True}, True)])
def test_a_fault_of_the_server_is_told_as_openai_does(
    body: dict[str, Any], began: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.dumps({"model": "tiny", "prompt": "a", **body}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    sent: list[MutableMapping[str, Any]] = []
    waiting = [{"type": "http.request", "body": content}]

    async def receive() -> dict[str, Any]:
        if not waiting:
            await asyncio.sleep(60)
        return waiting.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    reader = Reader("tiny", CONTEXT, byte_tokenizer().encode, lambda *_: [])
    front = Front(lambda *given: _app_that_fails(began, given[2]), reader=reader, writer=None, key=None)  # type: ignore[arg-type]
    asyncio.run(front(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send))
    assert sent[0]["status"] == (200 if began else 500)
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(sent) - 2) + [False]
    told = b"".join(message["body"] for message in sent[1:]).decode()
    if began:
        *_, told, done, rest = told.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
    error = json.loads(told.removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ('RuntimeError: no "room" left', "server_error")
    assert "Traceback" in capsys.readouterr().err


# --- calls of tools ---------------------------------------------------------------------------------------

QWEN = utils._RESPONSE_TEMPLATE_FALLBACKS[
    next(kinds for kinds in utils._RESPONSE_TEMPLATE_FALLBACKS if "qwen2" in kinds)
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def answered(text: str, stops: tuple[str, ...] = (), limit: int = 10_000) -> tuple[dict[str, Any], str]:
    """-> message and reason of a text by a model that may call tools."""
    tokenizer = byte_tokenizer()
    new = tokenizer.encode(text, add_special_tokens=False)[:limit]
    asked = Asked(Job("", [1], limit, stops, True, Decoding()), False, {}, tools=[{"function": {"name": "f"}}])
    (choice,) = chat_answer(asked, new, None, Prompts(tokenizer, use_chat=True, eos=[2]), QWEN)["choices"]
    return choice["message"], choice["finish_reason"]


@pytest.mark.parametrize(
    ("text", "stops", "content", "calls"),
    [
        (f"I look.\n{CALL}\n{CALL} done", (), "I look. done", 2),
        (f"<think>\nhm\n</think>\n\nOK {CALL}", (), "<think>\nhm\n</think>\n\nOK", 1),
        (f"{CALL}STOP{CALL}", ("STOP",), None, 1),
        (f"<s>hi{CALL}</s>", (), "hi", 1),
    ],
)
def test_calls_are_read(text: str, stops: tuple[str, ...], content: str | None, calls: int) -> None:
    message, reason = answered(text, stops)
    assert (message["content"], reason) == (content, "tool_calls")
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "f", "arguments": '{"a": 1}'}] * calls
    assert len({call["id"] for call in message["tool_calls"]}) == calls


@pytest.mark.parametrize(
    "text",
    [
        "so: <tool_call>\nnot json\n</tool_call> and more",
        'so <tool_call>{"name": "f", "arg',
        f'{CALL}<tool_call>{{"name": 3, "arguments": {{}}}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>"f"</tool_call>',
        "<tool_call>" + "[" * 5_000 + "</tool_call>",
        "<think>\nhm\n</think>\n\nhi",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert answered(text) == ({"role": "assistant", "content": text}, "stop")


def test_what_the_limit_cut_is_text() -> None:
    """Half a call could be a shorter one."""
    assert answered(CALL, limit=len(CALL)) == ({"role": "assistant", "content": CALL}, "length")


# --- unfinished characters -----------------------------------------------------------------------------------


def test_tokens_spell_out_all_of_the_text() -> None:
    """With the beginning of a character at its end."""
    tokenizer = byte_tokenizer()
    new = tokenizer.encode("aé😀", add_special_tokens=False)[:-2]
    asked = Asked(Job("", [1], len(new), (), False, Decoding()), False, {}, top=0)
    scores = [TokenScore(token, -1.0, [(token, -1.0)]) for token in new]
    (choice,) = completion_answer(asked, new, scores, Prompts(tokenizer, use_chat=False, eos=[2]))["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "aé�"


class Fixed:
    """A writer whose text is given."""

    def __init__(self, new: list[int], tokenizer: Any) -> None:
        self.new, self.tokenizer, self.engine = new, tokenizer, self

    def write(self, _: Asked, told: Any) -> list[int]:
        for token in self.new:
            told(token)
        return self.new


@pytest.mark.parametrize("cut", [0, 2])
def test_a_stream_says_all_of_the_text(cut: int) -> None:
    tokenizer = byte_tokenizer()
    new = tokenizer.encode("aé😀", add_special_tokens=False)
    new = new[: len(new) - cut]

    async def streamed() -> str:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer = Streamer(tokenizer.backend_tokenizer, asyncio.get_running_loop(), queue)
        ASKED.set(Asked(Job("", [1], len(new), (), False, Decoding()), True, {}))
        generate(Fixed(new, tokenizer), torch.tensor([[1]]), streamer)  # type: ignore[arg-type]
        return "".join([piece async for piece in _pieces(CutQueue(queue, ()))])

    assert asyncio.run(streamed()) == tokenizer.decode(new)


def test_a_stream_that_was_given_up_ends_its_text() -> None:
    asked = Asked(Job("", [1], 9, (), False, Decoding()), True, {})

    async def streamed() -> None:
        streamer = Streamer(byte_tokenizer().backend_tokenizer, asyncio.get_running_loop(), asyncio.Queue())
        streamer.cancel()
        transformers_server._tell(streamer, asked, 40)

    asyncio.run(streamed())
    assert asked.gone.is_set()


def test_a_text_that_broke_off_is_no_text() -> None:
    """What came before the error is handed out first."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    for piece in ("ab", utils._StreamError("no room")):
        queue.put_nowait(piece)

    async def streamed() -> None:
        cut = CutQueue(queue, ("bc",))
        assert (await cut.get(), cut.get_nowait()) == ("a", "b")
        with pytest.raises(asyncio.QueueEmpty):
            cut.get_nowait()
        with pytest.raises(RuntimeError, match="no room"):
            await cut.get()

    asyncio.run(streamed())


# --- stop strings in streams ----------------------------------------------------------------------------


@given(
    text=st.text("abc\n", max_size=30),
    stops=st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_a_stream_is_cut_where_the_text_is(text: str, stops: list[str], data: st.DataObject) -> None:
    """The text ends with the piece that completes a stop string, though another one may have begun before."""
    places = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)))))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True) if text[a:b]]
    text = next((said for said in accumulate(pieces) if any(stop in said for stop in stops)), text)
    found = [at for at in map(text.find, stops) if at >= 0]
    assert asyncio.run(_cut(pieces, tuple(stops))) == (text[: min(found)] if found else text)


async def _cut(pieces: list[str], stops: tuple[str, ...]) -> str:
    queue: asyncio.Queue[str | None] = asyncio.Queue()
    for piece in [*pieces, None]:
        queue.put_nowait(piece)
    found = [piece async for piece in _pieces(CutQueue(queue, stops))]
    assert all(found)
    return "".join(found)


async def _pieces(queue: CutQueue) -> AsyncIterator[str]:
    while (piece := await queue.get()) is not None:
        yield piece


def test_what_cannot_be_a_stop_string_is_not_held_back() -> None:
    queue: asyncio.Queue[str] = asyncio.Queue()
    queue.put_nowait("ab")
    cut = CutQueue(queue, ("bc",))
    assert cut.get_nowait() == "a"
    with pytest.raises(asyncio.QueueEmpty):
        cut.get_nowait()
    queue.put_nowait("d")
    assert cut.get_nowait() == "bd"


def test_the_server_is_named_by_what_a_client_here_can_reach(tmp_path: Path) -> None:
    for host, address in {"0.0.0.0": "127.0.0.1", "127.0.0.1": "127.0.0.1"}.items():
        options = ServeOptions(model="plt-tiny:r2", host=host, port=0)
        launch = plan(options, resolve_model("plt-tiny:r2"), "transformers", None, tmp_path)
        assert re.fullmatch(rf"http://{re.escape(address)}:\d+", launch.endpoint)
