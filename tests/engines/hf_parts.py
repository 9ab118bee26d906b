"""Tiny random checkpoints with a byte tokenizer, and requests to ask them."""

from __future__ import annotations

from pathlib import Path

import torch

from plt_benchmarks.protocols import Prompt
from plt_eval.engines.base import Decoding, GenerationRequest
from plt_eval.engines.hf import HFEngine
from plt_model.tokenizer import byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save(folder: Path, model: torch.nn.Module, template: str | None = None) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def requests(texts: list[str], decoding: Decoding | None = None, stop: tuple[str, ...] = ()) -> list[GenerationRequest]:
    decoding = decoding or Decoding(max_new_tokens=12)
    return [GenerationRequest(f"t{i}", Prompt(text, stop=stop), decoding) for i, text in enumerate(texts)]


def texts_of(engine: HFEngine, wanted: list[GenerationRequest]) -> dict[str, str]:
    return {completion.request_id: completion.text for completion in engine.generate(wanted)}


PROMPTS = ["def f(x):", "a", "class Longer:\n    pass", "é ü", "1 + 1 =", "import os"]
