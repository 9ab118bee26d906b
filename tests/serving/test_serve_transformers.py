"""`plt-eval serve --engine transformers`, asked with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from contract import NAME, Served, ServerContract, running


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

    def test_nothing_else_of_transformers_server_can_be_reached(self, served: Served) -> None:
        """It could load other models, and throw this one out."""
        root = served.url.removesuffix("/v1")
        headers = {"Authorization": "Bearer sk-secret-of-the-tests"}
        for path in ("load_model", "reset", "v1/responses"):
            assert httpx.post(f"{root}/{path}", json={"model": NAME}, headers=headers).status_code == 404
        assert served.complete("a").choices
