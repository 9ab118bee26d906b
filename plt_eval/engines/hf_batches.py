"""How many sequences the in-process engine reads at a time: what was asked for, or as many as fit, found by halving.

batch = BatchSize("auto", device, notify)
with batch.guard(rows):
    ...                       # memory runs out: the size is halved, and the block ends without an error
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch

from plt_eval.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
FIRST_SIZE = {"cuda": 64, "cpu": 8}
"""Sequences at a time to begin with, by device."""


class BatchSize:
    """The number of sequences at a time. `notify` hears when it shrinks."""

    def __init__(self, asked: int | Literal["auto"], device: torch.device, notify: Callable[[str], None]) -> None:
        self.fixed = asked != "auto"
        self.size = FIRST_SIZE[device.type] if asked == "auto" else int(asked)
        self._device, self._notify = device, notify

    @contextmanager
    def guard(self, tried: int) -> Iterator[None]:
        """Around work on `tried` sequences. Where memory runs out the size becomes half of that, and the error ends
        here. Raises UserError where it cannot: the size was asked for, or is one already."""
        full = False
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            full = True
        if full:  # out here nothing holds the error, and with it the tensors of the frames that it went through
            self._halve(tried)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def batched(self, items: list[Item], run: Callable[[list[Item]], list[Result]]) -> Iterator[Result]:
        """run() on one batch after another, each batch's results when they are there."""
        done = 0
        while done < len(items):
            batch = items[done : done + self.size]
            results = None
            with self.guard(len(batch)):
                results = run(batch)
            if results is not None:
                done += len(batch)
                yield from results

    def _halve(self, tried: int) -> None:
        if self.fixed or tried == 1:
            hint = "--batch-size auto" if self.fixed and tried > 1 else "a smaller --dtype or --max-new-tokens"
            raise UserError(f"out of memory at batch size {tried} on {self._device}; try {hint}")
        self.size = tried // 2
        self._notify(f"out of memory at batch size {tried}: going on with {self.size}")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
