"""Engines by name; each is imported only when it is asked for."""

from __future__ import annotations

import difflib
from typing import Any

from plt_eval.engines.base import Engine
from plt_eval.errors import UserError

ENGINES = {
    "hf": ("plt_eval.engines.hf", "HFEngine"),
    "vllm": ("plt_eval.engines.vllm", "VLLMEngine"),
    "openai": ("plt_eval.engines.openai", "OpenAIEngine"),
    "replay": ("plt_eval.engines.replay", "ReplayEngine"),
}
"""Name on the command line -> (module, class)."""


def make_engine(kind: str, **options: Any) -> Engine:
    """The engine called `kind`, made with the options of its class. Raises UserError for an unknown name."""
    import importlib

    if kind not in ENGINES:
        near = difflib.get_close_matches(kind, ENGINES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--engine {kind}: expected one of {', '.join(ENGINES)}{hint}")
    module, name = ENGINES[kind]
    engine: Engine = getattr(importlib.import_module(module), name)(**options)
    return engine
