"""What the processes of a job use together, read from a procfs that shows them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time and bytes of memory, of all processes of a job together, and how many there are,
    each thread counted, as the kernel does."""

    cpu_s: float
    memory: int
    processes: int


@dataclass(frozen=True)
class _Process:
    pid: str
    started: str
    own_ticks: int
    waited_ticks: int  # of children that ended and were waited for
    threads: int
    resident: int


@dataclass
class ProcessMeter:
    """Adds up processes seen through `proc`, an open folder of a procfs.

    `pids` lists the job's processes at this moment. `extra_memory` is what they use besides, such as
    files in a tmpfs. A process whose children are reaped unseen (SIGCHLD ignored) would hide their time, so
    the time is the larger of two sums: what the living and their waited-for children report, and what
    was seen to accrue between two looks.
    """

    proc: int
    pids: Callable[[], Iterable[str]]
    extra_memory: Callable[[], int] = lambda: 0
    _seen: dict[tuple[str, str], int] = field(default_factory=dict)
    _accrued: int = 0
    _ticks: int = 0
    _peak: int = 0

    def read(self, memory_limit: int) -> Usage:
        """Measure now. The memory is the proportional set size wherever the cheaper resident size, which
        counts shared pages once per process, would set a new peak or pass the limit."""
        processes = self._look_at_all()
        for process in processes:
            key = (process.pid, process.started)
            self._accrued += max(0, process.own_ticks - self._seen.get(key, 0))
            self._seen[key] = process.own_ticks
        total = sum(process.own_ticks + process.waited_ticks for process in processes)
        self._ticks = max(self._ticks, total, self._accrued)
        memory = self._memory(processes, min(self._peak, memory_limit))
        if memory > memory_limit and len(processes) > 1:
            # Processes that end while they are added up shift their shares to the others: look again.
            memory = min(memory, self._memory(self._look_at_all(), memory_limit))
        self._peak = max(self._peak, memory)
        return Usage(self._ticks * _TICK_S, memory, sum(process.threads for process in processes))

    def _look_at_all(self) -> list[_Process]:
        return [found for pid in self.pids() if (found := self._look(pid)) is not None]

    def _memory(self, processes: list[_Process], bound: int) -> int:
        """Exact only where it may be above `bound`."""
        extra = self.extra_memory()
        memory = sum(process.resident for process in processes)
        if len(processes) > 1 and memory + extra > bound:
            memory = sum(self._proportional(process) for process in processes)
        return memory + extra

    def _read(self, name: str) -> bytes:
        handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.proc)
        try:
            return os.read(handle, 4096)
        finally:
            os.close(handle)

    def _look(self, pid: str) -> _Process | None:
        try:
            # The command's name, in parentheses, may hold anything: read from the last one.
            fields = self._read(f"{pid}/stat").rpartition(b")")[2].split()
        except OSError:
            return None
        if len(fields) < 22:
            return None
        own, waited = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
        return _Process(pid, fields[19].decode(), own, waited, int(fields[17]), int(fields[21]) * _PAGE)

    def _proportional(self, process: _Process) -> int:
        try:
            lines = self._read(f"{process.pid}/smaps_rollup").splitlines()
        except PermissionError:
            return process.resident
        except OSError:  # it has ended
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:")), 0)


def descendants(root: int) -> list[str]:
    """`root` and every process that descends from it, as /proc shows them; a process whose parent has died is
    not found."""
    found, queue = [], [str(root)]
    while queue:
        pid = queue.pop()
        found.append(pid)
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/children") as children:
                    queue += children.read().split()
        except OSError:
            continue
    return found


def tasks_of_user() -> int:
    """How many processes and threads this user runs now, on the whole machine."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return count
