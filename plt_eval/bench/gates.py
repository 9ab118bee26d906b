"""What must agree before a speed is printed: each gate says which difference was found, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TIGHT = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Allowed of :func:`apart` where rounding cannot explain more."""

SLACK = 0.01
"""Allowed of :func:`apart` in 16 bits, above twice what the model's own forward pass is apart from float32."""


@dataclass(frozen=True)
class Gate:
    """One comparison. `found` above `allowed`, or no number, is red."""

    what: str
    found: float
    allowed: float

    @property
    def green(self) -> bool:
        return self.found <= self.allowed  # False for NaN

    def line(self) -> str:
        """As in "R=2, slot 3: logits are 0.2 apart, allowed 0.0001"."""
        return f"{self.what}: {self.found:.3g} apart, allowed {self.allowed:.3g}"


def red(gates: Sequence[Gate]) -> list[Gate]:
    """Those that forbid a speed."""
    return [gate for gate in gates if not gate.green]


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest, over rows, root mean square of found - expected in that of expected around its mean; rows are the
    last axis. NaN when a number is none. Raises AssertionError for different shapes."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} against {tuple(expected.shape)}"
    a, b = found.double(), expected.double()
    worst = ((a - b).pow(2).mean(-1) / b.var(-1, correction=0)).max()
    return float(worst.sqrt())


def allowed(dtype: torch.dtype, own: float) -> float:
    """What a `dtype` computation may be apart from the float32 model; `own`: what the model's forward pass is."""
    return TIGHT.get(dtype, 2 * own + SLACK)


def different(found: Sequence[int] | Tensor, expected: Sequence[int] | Tensor) -> float:
    """How many tokens differ; all of them when the counts do."""
    a, b = torch.as_tensor(found).flatten().tolist(), torch.as_tensor(expected).flatten().tolist()
    return float(len(b)) if len(a) != len(b) else float(sum(x != y for x, y in zip(a, b, strict=True)))
