"""`plt-eval serve --engine vllm`, asked with OpenAI's own client."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from contract import NAME, Served, ServerContract, running


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    more = ["--max-num-seqs", "8"]
    if torch.cuda.is_available():  # other engines stand on the GPU, too
        more += ["--gpu-memory-utilization", "0.1"]
    with running(tmp_path_factory.mktemp("serve"), "--engine", "auto", "--", *more) as it:
        assert "(vllm)" in it.line
        yield it


class TestVLLMServer(ServerContract):
    def busy(self, served: Served) -> int:
        metrics = httpx.get(f"{served.url.removesuffix('/v1')}/metrics", timeout=30).text
        counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.MULTILINE)
        assert len(counts) == 2
        return sum(int(float(count)) for count in counts)

    def test_an_answer_follows_a_json_schema(self, served: Served) -> None:
        colours = ["vermilion", "turquoise"]
        schema = {"type": "object", "properties": {"colour": {"enum": colours}}, "required": ["colour"]}
        answer = served.client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Which colour?"}],
            max_tokens=200,
            temperature=0.0,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {**schema, "additionalProperties": False}},
            },
        )
        assert json.loads(answer.choices[0].message.content or "")["colour"] in colours
