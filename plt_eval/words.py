"""Numbers of things in sentences.

count_of(2000, "core")      "2,000 cores"
plural(1, "diagnosis")      "diagnosis"
"""

from __future__ import annotations

_PLURALS = {"diagnosis": "diagnoses", "study": "studies"}
"""Where an s at the end is not enough."""


def plural(count: int, thing: str) -> str:
    """`thing` as it stands behind `count`: as in "1 text", "0 texts"."""
    return thing if count == 1 else _PLURALS.get(thing, f"{thing}s")


def count_of(count: int, thing: str) -> str:
    """As in "1 core", "2,000 cores"."""
    return f"{count:,} {plural(count, thing)}"
