"""Peak memory of a piece of work, above what was taken before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress

import torch

from plt_eval.diagnosis.memory import PeakMemory


def peak_of(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes; None where it cannot be measured. A run of its own, and not the first: giving memory back and setting
    marks costs time, and first runs take what stays."""
    _give_back(device)
    memory = PeakMemory(device)
    work()
    memory.look()
    return memory.peak()


def _give_back(device: torch.device) -> None:
    """What earlier work has freed goes to the system, or this one would seem to need less."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
