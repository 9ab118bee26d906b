"""Which head size the pages have: one that attention backends take which let layers share a cache."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from plt_model.vllm import pages


def on_a_gpu(size: int, _config: Any, windowed: bool) -> Any:
    """What vLLM chooses there in float32, which FlashAttention does not take."""
    assert isinstance(windowed, bool)
    return TritonAttentionBackend if TritonAttentionBackend.supports_head_size(size) else FlexAttentionBackend


@pytest.mark.parametrize(("size", "padded"), [(8, 32), (16, 32), (32, 32), (48, 48), (128, 128)])
def test_small_heads_are_padded_rather_than_left_to_flex_attention(
    size: int, padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "real_backend", on_a_gpu)
    assert pages.padded_head_size(size, None) == padded  # type: ignore[arg-type]


def test_flex_attention_alone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "real_backend", lambda *_: FlexAttentionBackend)
    with pytest.raises(ValueError, match="FLEX_ATTENTION has no caches that layers share"):
        pages.padded_head_size(64, None)  # type: ignore[arg-type]
