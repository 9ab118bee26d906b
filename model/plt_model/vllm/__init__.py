"""PLT on unmodified vLLM."""

from __future__ import annotations


def register() -> None:
    """What vLLM calls in every process of its own (entry point group vllm.general_plugins)."""
