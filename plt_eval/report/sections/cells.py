"""Numbers and words as cells of a table."""

from __future__ import annotations

import math
from typing import Any

from plt_eval.words import count_of


def number(value: float | None, decimals: int | None = None) -> str:
    """With `decimals`, or three digits and more for large whole parts; "-" for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if decimals is not None:
        text = f"{value:,.{decimals}f}"
        return text if any(digit in text for digit in "123456789") else text.removeprefix("-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")


_ROUNDING = 1e-6
"""Of float32: below it there is nothing to tell digits of."""

_MOST_DECIMALS = 6


def with_interval(
    value: float | None, low: float | None, high: float | None, form: str | None = None, *, line: float | None = None
) -> str:
    """The value, and on a line of its own the interval, as in "0.236\\n[0.121, 0.344]". Without a `form` it has as many
    digits as the interval bears: two of its width, and more where an end would else look as if it were the `line`."""
    if value is None or not math.isfinite(value):
        return "-"
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    if form is not None:
        return f"{value:{form}}\n[{low:{form}}, {high:{form}}]" if known else f"{value:{form}}"
    if not known or low == high:
        return number(value)
    assert low is not None
    assert high is not None
    if max(abs(low), abs(high)) < _ROUNDING:
        return f"{value:.0e}"
    decimals = interval_digits(high - low)
    while (
        decimals < _MOST_DECIMALS and line in (round(low, decimals), round(high, decimals)) and line not in (low, high)
    ):
        decimals += 1
    return f"{number(value, decimals)}\n[{number(low, decimals)}, {number(high, decimals)}]"


def interval_digits(width: float) -> int:
    """Decimals that show two digits of a width > 0; at most _MOST_DECIMALS."""
    return min(_MOST_DECIMALS, max(0, 1 - math.floor(math.log10(width))))


def estimate(row: Any, form: str | None = None) -> str:
    """`with_interval` of a row's value, low and high."""
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    return with_interval(value, low, high, form)


def loops_or_open(loops: int | None) -> str:
    """As in "2 loops"."""
    return "not enough evidence" if loops is None else count_of(loops, "loop")


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def size(count: int | None) -> str:
    """Bytes in MiB; "-" where unknown."""
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


PER_LOOP = "loop {}"
