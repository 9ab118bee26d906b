"""What the launcher tells the server process of `--engine transformers`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

KEY_VARIABLE = "PLT_EVAL_SERVER_KEY"
"""Environment variable with the key that clients must send."""


@dataclass(frozen=True)
class Settings:
    """What to load and how to call it. `name` is the model's for clients; `chat_template` is a file's text;
    `max_model_len` limits prompt and answer together, besides the model's own context."""

    model: str
    name: str
    loops: int | None
    dtype: str
    device: str
    tokenizer: str | None = None
    chat_template: str | None = None
    max_model_len: int | None = None

    def json(self) -> str:
        """As the one argument of the server's command line."""
        return json.dumps(asdict(self))
