"""One loop that feeds a job, reads it within bounds, watches what it uses, and has it killed at a limit.

Every backend runs its jobs through :func:`supervise`, in the thread that started the job: a job started with a
parent-death signal is bound to the life of that thread, which is why no second thread takes part.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from plt_benchmarks.protocols import SandboxLimits, SandboxStatus
from plt_eval.sandbox.usage import Usage

POLL_S = 0.04
"""How often a job's usage is measured; four times as often once it is past half of its memory."""
_DRAIN_S = 5.0
_CHUNK = 1 << 18
_LAST_READS = 8

Sink = Callable[[bytes], bool]
"""Takes what was read; false when that passes the limit of output."""


@dataclass
class Collector:
    """At most `limit` bytes of one stream."""

    limit: int
    data: bytearray = field(default_factory=bytearray)

    def add(self, chunk: bytes) -> bool:
        room = self.limit - len(self.data)
        self.data += chunk[:room]
        return len(chunk) <= room


@dataclass(frozen=True)
class Wiring:
    """How a supervisor reaches a job: where its standard input goes (and how to end it), who takes what is
    read from which descriptor, and a descriptor that becomes readable when the job has ended (None: it has ended
    once every output has). `kill`, called once, must end everything that could still write."""

    input_fd: int
    end_input: Callable[[], None]
    outputs: Mapping[int, Sink]
    exit_fd: int | None
    usage: Callable[[], Usage | None]
    kill: Callable[[], None]


@dataclass(frozen=True)
class Ending:
    """How the supervision ended, `limit` naming the limit that did it. It names none, as if the job had been killed
    by somebody, for too many processes: most kernels refuse those to begin with."""

    limit: SandboxStatus | None
    wall_s: float
    cpu_s: float | None
    peak_memory: int | None


class _Supervision:
    def __init__(self, wiring: Wiring, stdin: bytes, limits: SandboxLimits) -> None:
        self.wiring, self.limits = wiring, limits
        self.pending = memoryview(stdin)
        self.limit: SandboxStatus | None = None
        self.open = dict(wiring.outputs)
        self.selector = selectors.DefaultSelector()
        self.start = time.monotonic()
        self.cpu_s: float | None = None
        self.peak: int | None = None
        self.poll_s = POLL_S
        self.too_many = False  # where the kernel does not hold the job to its number of processes

    def run(self) -> Ending:
        with self.selector:
            for fd in self.open:
                os.set_blocking(fd, False)
                self.selector.register(fd, selectors.EVENT_READ, self._read)
            os.set_blocking(self.wiring.input_fd, False)
            self.selector.register(self.wiring.input_fd, selectors.EVENT_WRITE, self._write)
            self._write(self.wiring.input_fd)
            if self.wiring.exit_fd is not None:
                self.selector.register(self.wiring.exit_fd, selectors.EVENT_READ, None)
            self._watch()
            wall_s = time.monotonic() - self.start
            self.wiring.kill()
            self._end_input()
            self._drain()
        return Ending(self.limit, wall_s, self.cpu_s, self.peak)

    def _watch(self) -> None:
        """Until the job ends or a limit is passed."""
        deadline, next_look = self.start + self.limits.wall_s, self.start
        while self.limit is None and not self.too_many:
            now = time.monotonic()
            if now >= deadline:
                if self._ended_meanwhile():
                    return
                self.limit = self.limit or "wall_limit"
            elif now >= next_look:
                self._measure()
                next_look = now + self.poll_s
            else:
                if self._handle(min(deadline, next_look) - now) or self._has_closed():
                    return

    def _ended_meanwhile(self) -> bool:
        """Whether the job has ended unheard: on a busy machine this thread may come to its deadline late. (When it
        ended nobody knows: it gets the benefit of the doubt.) What was written last comes before an output's end."""
        return any(self._handle(0) or self._has_closed() for _ in range(_LAST_READS))

    def _has_closed(self) -> bool:
        """Whether a job has ended that says so by ending its outputs."""
        return self.wiring.exit_fd is None and not self.open

    def _handle(self, timeout: float) -> bool:
        """Serve what is ready; true when the job has ended."""
        ended = False
        for key, _ in self.selector.select(timeout):
            if key.data is None:
                ended = True
            else:
                key.data(key.fd)
        return ended

    def _drain(self) -> None:
        """What was written before the end is still in the pipes; something that survived cannot hold us long."""
        if self.wiring.exit_fd is not None:
            self.selector.unregister(self.wiring.exit_fd)
        deadline = time.monotonic() + _DRAIN_S
        while self.open and self.limit != "output_limit" and (left := deadline - time.monotonic()) > 0:
            self._handle(left)

    def _measure(self) -> None:
        usage = self.wiring.usage()
        if usage is None:
            return
        self.cpu_s = max(self.cpu_s or 0.0, usage.cpu_s)
        self.peak = max(self.peak or 0, usage.memory)
        self.poll_s = POLL_S if usage.memory < self.limits.memory // 2 else POLL_S / 4
        if usage.memory > self.limits.memory:
            self.limit = "memory_limit"
        elif usage.cpu_s > self.limits.cpu_s:
            self.limit = "cpu_limit"
        self.too_many = usage.processes > self.limits.processes

    def _read(self, fd: int) -> None:
        try:
            chunk = os.read(fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self.selector.unregister(fd)
            del self.open[fd]
        elif not self.open[fd](chunk) and self.limit is None:
            self.limit = "output_limit"

    def _write(self, fd: int) -> None:
        try:
            while self.pending:
                self.pending = self.pending[os.write(fd, self.pending[:_CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:  # the job does not want the rest
            pass
        self._end_input()

    def _end_input(self) -> None:
        if self.wiring.input_fd in self.selector.get_map():
            self.selector.unregister(self.wiring.input_fd)
            self.wiring.end_input()


def supervise(wiring: Wiring, stdin: bytes, limits: SandboxLimits) -> Ending:
    """Run the loop until the job has ended or passed a limit and was killed. The clock starts now."""
    return _Supervision(wiring, stdin, limits).run()
