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

    def test_nothing_else_of_transformers_server_can_be_reached(self, served: Served) -> None:
        """It could load other models, and throw this one out."""
        root = served.url.removesuffix("/v1")
        headers = {"Authorization": "Bearer sk-secret-of-the-tests"}
        for path in ("load_model", "reset", "v1/responses"):
            assert httpx.post(f"{root}/{path}", json={"model": NAME}, headers=headers).status_code == 404
        assert served.complete("a").choices
