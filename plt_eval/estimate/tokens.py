"""What a checkpoint's tokenizer makes of text: how many characters a token has, and whether prompts are chats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plt_eval.models import resolve_models


@dataclass(frozen=True)
class Tokens:
    """`chat`: it has a chat template."""

    characters_per_token: float
    chat: bool
    source: str


def tokens_of(model: str) -> Tokens | None:
    """Of a checkpoint folder or a bundled model; None where no tokenizer can be loaded. Raises UserError."""
    from transformers import AutoTokenizer

    folder = resolve_models(model, None)[0].folder
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text = Path(__file__).read_text(encoding="utf-8")
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    except (OSError, ValueError, KeyError, AttributeError, ImportError):
        return None
    return Tokens(len(text) / max(1, count), tokenizer.chat_template is not None, f"{model}'s own tokenizer, on Python")


__all__ = ["Tokens", "tokens_of"]
