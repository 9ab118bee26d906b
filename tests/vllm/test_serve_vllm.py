"""`plt-eval serve --engine vllm`, asked with OpenAI's own client."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from contract import Served, ServerContract, running


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running(tmp_path_factory.mktemp("serve"), "--engine", "auto", "--", "--max-num-seqs", "8") as it:
        assert "(vllm)" in it.line
        yield it


class TestVLLMServer(ServerContract):
    def busy(self, served: Served) -> int:
        metrics = httpx.get(f"{served.url.removesuffix('/v1')}/metrics", timeout=30).text
        counts = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.MULTILINE)
        assert len(counts) == 2
        return sum(int(float(count)) for count in counts)
