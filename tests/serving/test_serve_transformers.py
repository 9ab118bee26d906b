"""`plt-eval serve --engine transformers`, asked with OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from contract import NAME, Served, ServerContract, running

from plt_benchmarks.protocols import Message, Prompt

TOOLS = [{"type": "function", "function": {"name": "T", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(tmp_path_factory.mktemp("serve"), "--engine", "transformers", "--device", "cpu") as it:
        yield it


class TestTransformersServer(ServerContract):
    def busy(self, served: Served) -> int:
        health = httpx.get(f"{served.url.removesuffix('/v1')}/health", timeout=30).json()
        return int(health["running"])

    @pytest.mark.parametrize(
        ("field", "value"), [("n", 2), ("presence_penalty", 0.5), ("suffix", "end"), ("best_of", 3), ("top_k", 5)]
    )
    def test_what_would_have_no_effect_is_refused(self, served: Served, field: str, value: object) -> None:
        with pytest.raises(openai.BadRequestError, match=field):
            served.complete("a", extra_body={field: value})

    @pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_dict"])
    def test_a_request_brings_no_template(self, served: Served, name: str) -> None:
        options = {"chat_template_kwargs": {name: "{{ 7 * 7 }}"}}
        with pytest.raises(openai.BadRequestError, match=f"{name} is not for a request to set"):
            served.client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": "a"}], max_tokens=1, extra_body=options
            )

    def test_a_stop_string_at_the_last_token_is_the_reason(self, served: Served) -> None:
        whole = served.complete("def f(x):", 6).choices[0].text
        for stream in (False, True):
            answer = served.complete("def f(x):", 6, stop=whole[-2:], stream=stream)
            last = list(answer)[-1] if stream else answer
            assert last.choices[0].finish_reason == "stop"

    def test_calls_of_tools(self, served: Served) -> None:
        """With their texts the rest of the answer; a stream brings the same."""
        whole = served.text(Prompt("unused", messages=(Message("user", "hello"),)), 30)
        text = whole[: whole.index(whole[20:23])]
        expected = [(name, {"between": between}) for name, between in re.findall(r"(\w)(\W*)(?:\w|$)", text)]
        assert len(expected) > 1
        asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "tools": TOOLS}
        asked |= {"max_tokens": 30, "temperature": 0, "stop": whole[20:23]}
        choice = served.client.chat.completions.create(**asked).choices[0]
        (piece,) = served.client.chat.completions.create(**asked, stream=True)
        assert choice.finish_reason == piece.choices[0].finish_reason == "tool_calls"
        for message in (choice.message, piece.choices[0].delta):
            assert message.content == re.sub(r"\w\W*(?:\w|$)", "", text)
            told = [call.function for call in message.tool_calls or ()]
            assert [(call.name, json.loads(call.arguments)) for call in told] == expected

    def test_an_answer_with_tools_that_is_cut_is_text(self, served: Served) -> None:
        whole = served.text(Prompt("unused", messages=(Message("user", "hello"),)), 30)
        asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "tools": TOOLS}
        choice = served.client.chat.completions.create(**asked, max_tokens=30, temperature=0).choices[0]
        assert (choice.message.content, choice.finish_reason) == (whole, "length")
        assert not choice.message.tool_calls

    def test_nothing_else_of_transformers_server_can_be_reached(self, served: Served) -> None:
        """It could load other models, and throw this one out."""
        root = served.url.removesuffix("/v1")
        headers = {"Authorization": "Bearer sk-secret-of-the-tests"}
        for path in ("load_model", "reset", "v1/responses"):
            assert httpx.post(f"{root}/{path}", json={"model": NAME}, headers=headers).status_code == 404
        assert served.complete("a").choices
