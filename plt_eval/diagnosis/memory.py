"""How much memory measuring takes above what the loaded model does.

memory = PeakMemory(torch.device("cpu"))
...                                       # now and then: memory.look()
memory.peak()
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

_SLACK = 1 << 24
"""Resident memory is counted in batches of pages: so far may the mark be from what is resident, in bytes."""


class PeakMemory:
    """How much more memory is taken than when this was made, at most, in bytes.

    On a GPU that is what torch's allocator has given out. On a CPU it is the high-water mark of the process' resident
    set, which Linux lets a process set back; where it does not, only a mark above the earlier one says anything.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._most: int | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
        self._before = psutil.Process().memory_info().rss
        self._mark = _high_water()

    def look(self) -> None:
        """Read the mark."""
        if self._device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self._device)
        else:
            found = _high_water()
            if found <= self._mark and self._mark > self._before + _SLACK:
                return  # the mark is of before, and could not be set back
        self._most = max(self._most or 0, found - self._before, 0)

    def peak(self) -> int | None:
        """None where it could not be measured, or nothing was."""
        return self._most


def _high_water() -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
