"""The measurements by name: what each is, which states it reads, and how it is computed.

    for name, measurement in MEASUREMENTS.items():
        print(name, measurement.equation, measurement.unit)
    chosen = select(["step_size", "gate"])

A measurement is a class without state, registered with @register. `measure(chunk)` is its formula: it reads one chunk
of a :class:`plt_diagnostics.trace.LoopTrace` and yields, for each loop and variant, one value a token (or a head and
token, or a sample). What becomes of the values - means over samples, layers, positions; non-finite ones apart - is the
same for all and written once, in :mod:`plt_diagnostics.tally`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor

from .adapters.protocol import State

Reads = Literal["states", "attention", "outputs"]
"""The kind of chunk a measurement consumes."""


class MeasurementError(ValueError):
    """A measurement that does not exist, or that cannot be made of this model; one line."""


@dataclass(frozen=True)
class Values:
    """What a measurement yields. values: [B] one a sample, [B, n] one a token, or [B, H, n] one a head and token of
    the chunk. where [B] or [B, n]: False where it is not defined."""

    loop: int
    variant: str
    values: Tensor
    where: Tensor | None = None


class Measurement(Protocol):
    """A registered measurement.

    title, unit, definition: for people; equation: in plain text, with the paper's number where it has one.
    variants: which state, branch or mode, the default first; `follows_model` puts the state that the model hands on
    first instead. layered, positioned: whether rows by layer and by position are kept.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    equation: ClassVar[str]
    unit: ClassVar[str]
    definition: ClassVar[str]
    reads: ClassVar[Reads]
    variants: ClassVar[tuple[str, ...]]
    follows_model: ClassVar[bool]
    layered: ClassVar[bool]
    positioned: ClassVar[bool]

    def measure(self, chunk: Any) -> Iterator[Values]:
        """The values of one chunk: a StateChunk, an AttentionBlock or an OutputChunk, as `reads` says."""
        ...


VERSION = 1
"""Of the measurements: raised whenever one of them gives other numbers, so that no stored ones stand for them."""

MEASUREMENTS: dict[str, type[Measurement]] = {}
"""All of them, in the order of tables."""

_Kind = TypeVar("_Kind", bound=type[Any])


def register(kind: _Kind) -> _Kind:
    """Class decorator: make a measurement known by its name."""
    assert kind.name not in MEASUREMENTS, f"two measurements are called {kind.name}"
    MEASUREMENTS[kind.name] = kind
    return kind


def select(names: Sequence[str] | None) -> tuple[Measurement, ...]:
    """The measurements of these names, in the order of tables; all for None. Raises MeasurementError."""
    for name in names or ():
        if name not in MEASUREMENTS:
            near = difflib.get_close_matches(name, MEASUREMENTS, n=2, cutoff=0.5)
            guess = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise MeasurementError(f"{name!r} is no measurement{guess}; there are {', '.join(MEASUREMENTS)}")
    return tuple(kind() for name, kind in MEASUREMENTS.items() if names is None or name in names)


def default_variant(name: str, hands_on: State) -> str:
    """The variant that tables show of a measurement, for a model that hands on this state."""
    kind = MEASUREMENTS[name]
    return hands_on if kind.follows_model else kind.variants[0]
