"""Read queries and keys out of a transformers attention module while it runs: no model code is written twice.

with Capture(layers) as capture:
    model(...)
q_BHSK, k_BGSK = capture.take(layer=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


class Capture:
    """While open, keeps what the named submodules of each attention put out, call by call."""

    def __init__(self, attentions: Sequence[nn.Module], parts: Sequence[str]) -> None:
        self._modules = [(i, part, getattr(module, part)) for i, module in enumerate(attentions) for part in parts]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._calls: dict[tuple[int, str], list[Tensor]] = {}

    def __enter__(self) -> Self:
        for layer, part, module in self._modules:
            self._handles.append(module.register_forward_hook(self._keeper((layer, part))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, layer: int, part: str) -> list[Tensor]:
        """What `part` of the layer put out, oldest call first; forgotten here."""
        return self._calls.pop((layer, part), [])

    def _keeper(self, key: tuple[int, str]) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._calls.setdefault(key, []).append(output)

        return keep


def heads(projected_BSX: Tensor, size: int) -> Tensor:
    """[B, S, H * K] -> [B, H, S, K]."""
    return projected_BSX.view(*projected_BSX.shape[:-1], -1, size).transpose(1, 2)
