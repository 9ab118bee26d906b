"""What every server of `plt-eval serve` must do, asked with OpenAI's own client: a class of tests to inherit."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines.base import Decoding, GenerationRequest, LoglikelihoodRequest
from plt_eval.engines.hf import HFEngine
from plt_eval.engines.openai import OpenAIEngine
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.tokenizer import byte_tokenizer

NAME, KEY, KEY_VARIABLE = "tiny", "sk-secret-of-the-tests", "PLT_EVAL_TEST_KEY"
LOOPS = 3
CONTEXT = 8192
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RESPONSE = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "^", "close": "2", "content": "text"},
        "tool_calls": {
            "open_pattern": r"(?P<name>\w)",
            "close_pattern": r"\w",
            "repeats": True,
            "content": "text",
            "transform": {"function": {"name": "{name}", "arguments": {"between": "{content}"}}},
        },
        "content": {"content": "text"},
    },
}
"""Every two letters are a call: of the first, with what is between them. Its anchor is another template's."""
PROMPTS = ["def f(x):", "a", "class Longer:\n    pass", "é ü", "1 + 1 =", "import os", "x" * 300, "  two", "\n", "~"]
STARTS_WITHIN_S = 300.0
ENDS_WITHIN_S = 60.0


def save(folder: Path) -> Path:
    """A random PLT of 2 loops that writes printable text without an end."""
    torch.manual_seed(0)
    config = PLTConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=CONTEXT,
        plt_num_loops=2,
        plt_window_size=[6, 0],
        plt_hidden_scale=0.3,
    )
    model = PLTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        printable = [3 + byte for byte in range(32, 127)]
        unwanted = [token for token in range(259) if token not in printable]
        model.lm_head.weight[unwanted] = 0.0
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = RESPONSE
    tokenizer.save_pretrained(folder)
    return folder


# --- a server -------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A server that runs, and the same model in this process."""

    url: str
    line: str
    engine: HFEngine
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    written: dict[tuple[Prompt, int], str] = field(default_factory=dict)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=KEY, max_retries=0, timeout=120.0)

    def text(self, prompt: Prompt, tokens: int = 12) -> str:
        """What the in-process engine writes."""
        if (prompt, tokens) not in self.written:
            (done,) = self.engine.generate([GenerationRequest("one", prompt, Decoding(max_new_tokens=tokens))])
            self.written[prompt, tokens] = done.text
        return self.written[prompt, tokens]

    def complete(self, text: str, tokens: int = 12, **options: Any) -> Any:
        asked = {"model": NAME, "prompt": text, "max_tokens": tokens, "temperature": 0.0} | options
        return self.client.completions.create(**asked)


def command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "plt_eval", "serve", "--model", str(model), *options]


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Served]:
    """`plt-eval serve` until the block ends; then SIGTERM must leave nothing of it."""
    model = save(folder / "model")
    asked = ("--loops", str(LOOPS), "--port", "0", "--dtype", "float32", "--served-model-name", NAME)
    environment = os.environ | {KEY_VARIABLE: KEY, "HF_HUB_OFFLINE": "1"}
    started = command(model, *asked, "--api-key-env", KEY_VARIABLE, *options)
    process = subprocess.Popen(
        started, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )
    log: list[str] = []
    threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True).start()
    assert process.stdout is not None
    alarm = threading.Timer(STARTS_WITHIN_S, process.kill)
    alarm.start()
    line = process.stdout.readline()
    alarm.cancel()
    if not line:
        process.kill()
        pytest.fail("no server: " + "".join(log[-20:]))
    url = re.search(r"http://\S+/v1", line)
    assert url is not None, line
    engine = HFEngine(str(model), loops=LOOPS, dtype="float32", device="cpu", notify=lambda _: None)
    try:
        yield Served(url[0], line, engine, process, log)
    finally:
        engine.close()
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(ENDS_WITHIN_S)
        finally:
            process.kill()
    assert process.returncode == 143
    assert children
    assert not [child for child in children if _lives(child)], "a process of the server lives on"
    with socket.socket() as it:
        it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        it.bind(("127.0.0.1", int(url[0].split(":")[2].partition("/")[0])))


def _lives(process: psutil.Process) -> bool:
    """Whether it is more than an entry that nobody has collected yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- the tests ------------------------------------------------------------------------------------------


class ServerContract:
    """Inherit it, with a fixture `served`."""

    def test_the_one_line_says_what_to_type(self, served: Served) -> None:
        typed = f"plt-eval run --engine openai --endpoint {served.url} --api-model {NAME} --api-key-env {KEY_VARIABLE}"
        assert typed in served.line
        assert f" --loops {LOOPS} --suite SUITE" in served.line
        assert KEY not in served.line

    def test_it_lists_its_model(self, served: Served) -> None:
        answer = served.client.models.with_raw_response.list()
        assert answer.headers["X-PLT-Loops"] == str(LOOPS)
        (model,) = answer.parse().data
        assert model.id == NAME

    def test_completions_are_those_of_the_engine_in_process(self, served: Served) -> None:
        for text in PROMPTS:
            answer = served.complete(text)
            (choice,) = answer.choices
            assert (choice.text, choice.finish_reason) == (served.text(Prompt(text)), "length"), text
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(text.encode()) + 1
            assert answer.usage.completion_tokens == 12

    def test_the_loop_count_is_the_one_asked_for(self, served: Served) -> None:
        """The control of the test before: the checkpoint's own count would write something else."""
        own = HFEngine(str(served.engine.folder), dtype="float32", device="cpu", notify=lambda _: None)
        requests = [GenerationRequest(text, Prompt(text), Decoding(max_new_tokens=12)) for text in PROMPTS]
        assert any(done.text != served.text(Prompt(done.request_id)) for done in own.generate(requests))
        own.close()

    def test_a_completion_ends_before_a_stop_string(self, served: Served) -> None:
        whole = served.text(Prompt("def f(x):"), 30)
        stop = whole[10:14]
        choice = served.complete("def f(x):", 30, stop=[stop, "\x01"]).choices[0]
        assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
        pieces = served.complete("def f(x):", 30, stop=stop, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == choice.text

    def test_a_stream_brings_the_same_text_in_pieces(self, served: Served) -> None:
        pieces = [piece for piece in served.complete("import os", 40, stream=True) if piece.choices]
        texts = [piece.choices[0].text for piece in pieces]
        assert "".join(texts) == served.text(Prompt("import os"), 40)
        assert sum(1 for text in texts if text) > 5
        assert pieces[-1].choices[0].finish_reason == "length"

    def test_a_stream_ends_with_its_usual_line(self, served: Served) -> None:
        body = {"model": NAME, "prompt": "a", "max_tokens": 3, "temperature": 0, "stream": True}
        answer = httpx.post(f"{served.url}/completions", json=body, headers=_headers(), timeout=120)
        assert answer.text.rstrip().endswith("data: [DONE]")

    def test_chat_answers_are_those_of_the_engine_in_process(self, served: Served) -> None:
        turns = [("system", "Be brief."), ("user", "What is 1 + 1?")]
        expected = served.text(Prompt("unused", messages=tuple(Message(*turn) for turn in turns)), 20)
        asked: dict[str, Any] = {"model": NAME, "max_tokens": 20, "temperature": 0}
        asked["messages"] = [{"role": role, "content": content} for role, content in turns]
        answer = served.client.chat.completions.create(**asked)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "length"
        stream = [piece for piece in served.client.chat.completions.create(**asked, stream=True) if piece.choices]
        assert "".join(piece.choices[0].delta.content or "" for piece in stream) == expected
        assert stream[-1].choices[0].finish_reason == "length"

    def test_a_chat_answer_ends_before_a_stop_string(self, served: Served) -> None:
        asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "hello"}]}
        whole = served.text(Prompt("unused", messages=(Message("user", "hello"),)), 30)
        asked |= {"max_tokens": 30, "temperature": 0, "stop": whole[10:13]}
        choice = served.client.chat.completions.create(**asked).choices[0]
        assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(asked["stop"])], "stop")
        pieces = served.client.chat.completions.create(**asked, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content

    def test_parts_of_a_text_are_lines(self, served: Served) -> None:
        parts = [{"type": "text", "text": text} for text in ("one", "two")]
        expected = served.text(Prompt("unused", messages=(Message("user", "one\ntwo"),)))
        asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": parts}]}
        answer = served.client.chat.completions.create(**asked, max_tokens=12, temperature=0)
        assert answer.choices[0].message.content == expected

    def test_drawn_texts_depend_on_the_seed_alone(self, served: Served) -> None:
        def drawn(seed: int) -> str:
            return str(served.complete("a", 24, temperature=1.0, top_p=0.95, seed=seed).choices[0].text)

        assert drawn(1) == drawn(1)
        assert len({drawn(seed) for seed in range(1, 5)}) > 1

    def test_log_probabilities_of_a_completion(self, served: Served) -> None:
        choice = served.complete("def f(x):", 6, logprobs=2).choices[0]
        told = choice.logprobs
        assert "".join(told.tokens) == choice.text
        assert all(len(top) >= 2 for top in told.top_logprobs)
        request = LoglikelihoodRequest("one", "def f(x):", choice.text)
        (expected,) = served.engine.loglikelihood([request])
        assert sum(told.token_logprobs) == pytest.approx(expected.logprob, abs=1e-3)

    def test_log_probabilities_of_a_chat_answer(self, served: Served) -> None:
        answer = served.client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=5,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
        told = answer.choices[0].logprobs
        assert told is not None
        assert told.content is not None
        assert "".join(entry.token for entry in told.content) == answer.choices[0].message.content
        for entry in told.content:
            assert len(entry.top_logprobs) == 3
            assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs), abs=1e-6)
            assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6

    def test_log_probabilities_in_streams(self, served: Served) -> None:
        expected = served.text(Prompt("import os"), 5)
        pieces = [piece.choices[0] for piece in served.complete("import os", 5, logprobs=1, stream=True)]
        assert "".join(piece.text for piece in pieces) == expected
        assert sum(len(piece.logprobs.token_logprobs) for piece in pieces if piece.logprobs) == 5
        chat = served.client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=5,
            temperature=0,
            logprobs=True,
            stream=True,
        )
        told = [piece.choices[0] for piece in chat]
        tokens = [entry.token for one in told if one.logprobs for entry in one.logprobs.content or ()]
        assert "".join(one.delta.content or "" for one in told) == "".join(tokens)
        assert len(tokens) == 5

    def test_an_echo_puts_the_prompt_before_the_text(self, served: Served) -> None:
        choice = served.complete("import os", 5, echo=True).choices[0]
        assert choice.text == "import os" + served.text(Prompt("import os"), 5)
        assert choice.logprobs is None

    def test_log_likelihoods_for_our_own_engine(self, served: Served) -> None:
        requests = [
            LoglikelihoodRequest(f"{context}|{text}", context, text)
            for context in ("def f(x):", "1 + 1 =")
            for text in (" return x", " 2")
        ]
        requests.append(LoglikelihoodRequest("greedy", "import os", served.text(Prompt("import os"), 3)))
        engine = OpenAIEngine(endpoint=served.url, model=NAME, api="completions", api_key=KEY)
        told = {one.request_id: one for one in engine.loglikelihood(requests)}
        engine.close()
        for expected in served.engine.loglikelihood(requests):
            found = told[expected.request_id]
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-3)
            assert (found.tokens, found.greedy) == (expected.tokens, expected.greedy)
        assert told["greedy"].greedy

    def test_many_at_once_get_what_each_gets_alone(self, served: Served) -> None:
        asked = [(text, 4 + 9 * (i % 3)) for i, text in enumerate(PROMPTS * 2)]
        expected = [served.text(Prompt(text), tokens) for text, tokens in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            found = list(pool.map(lambda pair: served.complete(*pair).choices[0].text, asked))
        assert found == expected

    def test_our_own_engine_writes_the_same_through_it(self, served: Served) -> None:
        from plt_benchmarks.registry import get_suite

        (suite,) = get_suite("trace")
        requests = [
            GenerationRequest(f"{i}", replace(suite.prompt(sample), messages=()), Decoding(max_new_tokens=16))
            for i, sample in enumerate(suite.load(None).samples[:5])
        ]
        engine = OpenAIEngine(endpoint=served.url, model=NAME, api="completions", api_key=KEY)
        found = {done.request_id: done.text for done in engine.generate(requests)}
        engine.close()
        assert found == {done.request_id: done.text for done in served.engine.generate(requests)}

    # --- clients that go ----------------------------------------------------------------------------

    def test_streams_that_are_closed_free_their_places(self, served: Served) -> None:
        streams = [served.complete(f"stream {i}", CONTEXT - 100, stream=True) for i in range(16)]
        for stream in streams[:8]:
            next(iter(stream))
        for stream in streams:
            stream.close()
        self._answers_soon(served)

    def test_requests_that_are_given_up_free_their_places(self, served: Served) -> None:
        def give_up(i: int) -> None:
            with pytest.raises(openai.APITimeoutError):
                served.client.with_options(timeout=2.0).completions.create(
                    model=NAME, prompt=f"{i}", max_tokens=CONTEXT - 100, temperature=0
                )

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(give_up, range(16)))
        self._answers_soon(served)

    def _answers_soon(self, served: Served) -> None:
        """Were the long texts still being written, they would take all places, or all of the time."""
        began = time.monotonic()
        assert served.complete("a").choices[0].text == served.text(Prompt("a"))
        while self.busy(served):
            assert time.monotonic() - began < 20, "given up, but still being written"
            time.sleep(0.1)

    def busy(self, served: Served) -> int:
        """Requests that the server is working on."""
        raise NotImplementedError

    # --- mistakes -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("path", "body", "status", "words"),
        [
            ("completions", b'{"model": "tiny", "prompt": ', 400, "JSON"),
            ("completions", b"", 400, ""),
            ("completions", b"[]", 400, ""),
            ("completions", {"model": "other", "prompt": "a"}, 404, "other"),
            ("completions", {"prompt": "a", "max_tokens": -3}, 400, "max_tokens"),
            ("completions", {"prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
            ("completions", {"prompt": "a" * CONTEXT, "max_tokens": 1}, 400, "context length"),
            ("completions", {"prompt": "a", "max_tokens": CONTEXT + 1}, 400, "max_tokens|context length"),
            ("completions", {"prompt": {"text": "a"}}, 400, "prompt"),
            ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
            ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
            ("completions", {"prompt": "a", "top_p": 7}, 400, "top_p"),
            ("completions", {"prompt": "a", "stop": 3}, 400, "stop"),
            ("chat/completions", {}, 400, "messages"),
            ("chat/completions", {"messages": "hello"}, 400, "messages"),
            ("chat/completions", {"messages": [{"content": "who?"}]}, 400, "role"),
            ("chat/completions", {"messages": [{"role": "user", "content": "a" * CONTEXT}]}, 400, "context length"),
            ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}, 400, "max_tokens"),
            ("nowhere", {"prompt": "a"}, 404, ""),
        ],
    )
    def test_a_mistake_is_told_and_does_no_harm(
        self, served: Served, path: str, body: Any, status: int, words: str
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps({"model": NAME, "temperature": 0} | body).encode()
        headers = _headers() | {"Content-Type": "application/json"}
        answer = httpx.post(f"{served.url}/{path}", content=content, headers=headers, timeout=120)
        assert status <= answer.status_code < 500
        assert re.search(words, answer.text), answer.text
        assert served.complete("a").choices[0].text == served.text(Prompt("a"))

    def test_without_the_key_nothing_is_told(self, served: Served) -> None:
        other = openai.OpenAI(base_url=served.url, api_key="sk-guessed", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            other.completions.create(model=NAME, prompt="a")


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}
