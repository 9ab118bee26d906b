"""Read a model while it runs, and run its parts again: no model code is written twice.

with Capture(attentions, ("q_proj", "k_proj")) as capture, Calls(layers) as calls:
    model(...)
q_BSX = capture.take(0, "q_proj")[0]        # what layer 0's projection put out when it was first called
y_BSD = calls.again(0, 0, x_BSD)            # layer 0 over another input, all else as in its first call
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


class Calls:
    """While open, keeps how each module is called: all arguments but the first, its input, which is kept only on
    `inputs`. Masks and rotary angles are shared between calls, so this holds little."""

    def __init__(self, modules: Sequence[nn.Module], *, inputs: bool = False) -> None:
        self._modules = list(modules)
        self._inputs = inputs
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in modules]
        self.inputs: list[list[Tensor]] = [[] for _ in modules]

    def __enter__(self) -> Self:
        for i, module in enumerate(self._modules):
            self._handles.append(module.register_forward_pre_hook(self._keeper(i), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def again(self, module: int, call: int, x: Tensor) -> Tensor:
        """The module's output for the input x, called as it was in that call (from 0)."""
        rest, named = self._calls[module][call]
        output = self._modules[module](x, *rest, **named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _keeper(self, i: int) -> Any:
        def keep(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            named = dict(named)
            x, rest = (given[0], given[1:]) if given else (named.pop("hidden_states"), ())
            self._calls[i].append((rest, named))
            if self._inputs:
                self.inputs[i].append(x)

        return keep


def heads(projected_BSX: Tensor, size: int) -> Tensor:
    """[B, S, H * K] -> [B, H, S, K]."""
    return projected_BSX.view(*projected_BSX.shape[:-1], -1, size).transpose(1, 2)
