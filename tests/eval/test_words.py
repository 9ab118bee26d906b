"""Numbers of things in sentences."""

from __future__ import annotations

import pytest

from plt_eval.words import count_of, plural


@pytest.mark.parametrize(
    ("count", "thing", "text"),
    [
        (0, "text", "0 texts"),
        (1, "text", "1 text"),
        (2000, "core", "2,000 cores"),
        (1, "diagnosis", "1 diagnosis"),
        (2, "diagnosis", "2 diagnoses"),
        (3, "study", "3 studies"),
    ],
)
def test_one_is_no_plural(count: int, thing: str, text: str) -> None:
    assert count_of(count, thing) == text
    assert text.endswith(f" {plural(count, thing)}")
