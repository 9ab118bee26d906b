"""A server as a child process: what it says goes on to ours, and it never outlives us.

with Child(command, environment) as child:
    child.wait_until(answers)     # or raises ServerDied with its telling last line
    child.wait()
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

import psutil

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_DYING_S = 3.0
_EXCEPTION = re.compile(r"(?:^|\s)(?P<line>(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\w*: .+)$")
_POINTER = ("Engine core initialization failed", "WorkerProc initialization failed")
"""What vLLM's first process says when another one has said why."""


OURS = "plt-eval: error: "
"""How a line begins that our own program tells its user."""


class ServerDied(Exception):
    """The server ended by itself, with exit code `code`; says with what words, or is empty where our own program ran
    in it and told the user already."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Child:
    """The process of `command` and all that it starts, in a process group of its own: a terminal's Ctrl-C reaches only
    us. Its environment is ours, with what `environment` changes (None: a variable it must not have). Leaving the block
    ends all of it, by SIGTERM and after `grace_s` seconds by SIGKILL."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str | None], *, grace_s: float = 10.0) -> None:
        self.grace_s = grace_s
        self.last: deque[str] = deque(maxlen=400)
        self.process = subprocess.Popen(
            command,
            env={name: value for name, value in {**os.environ, **environment}.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self._listener = threading.Thread(target=self._pass_on, daemon=True)
        self._listener.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def wait_until(self, ready: Callable[[], bool], *, every_s: float = 0.1) -> None:
        """Returns when `ready` does. Raises ServerDied."""
        while not ready():
            self._check(every_s)

    def listens(self, port: int) -> bool:
        """Whether one of its processes listens at that port."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            ours = {process.pid, *(each.pid for each in process.children(recursive=True))}
            found = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
            return any(each.pid in ours and each.laddr and each.laddr.port == port for each in found)
        return False

    def wait(self) -> None:
        """Until it ends, which it should not: raises ServerDied."""
        while True:
            self._check(3600.0)

    def end(self) -> None:
        """End it with all that it started; a second Ctrl-C meanwhile ends it at once."""
        try:
            self._signal(signal.SIGTERM, group=False)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(self.grace_s)
        finally:
            self._signal(signal.SIGKILL, group=True)
            self.process.wait()
            self._wait_for_group(_DYING_S)

    def _check(self, patience_s: float) -> None:
        try:
            code = self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            return
        self._listener.join(2.0)
        line = telling_line(list(self.last))
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise ServerDied("" if line.startswith(OURS) else f"the server ended ({how}): {line}", code)

    def _signal(self, number: int, *, group: bool) -> None:
        with suppress(ProcessLookupError):
            if group:
                os.killpg(self.process.pid, number)  # of a group that others of its processes keep alive, too
            else:
                self.process.send_signal(number)

    def _wait_for_group(self, patience_s: float) -> None:
        """A killed process with gigabytes takes its time to give them back."""
        deadline = time.monotonic() + patience_s
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)
                time.sleep(0.02)

    def _pass_on(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last.append(line.rstrip())
            with suppress(OSError, ValueError):
                sys.stderr.write(line)
                sys.stderr.flush()


def telling_line(lines: Sequence[str]) -> str:
    """The line that says best why a program died: the last exception's, else the last one that is not empty."""
    found = [match["line"] for line in lines if (match := _EXCEPTION.search(line)) and not _points(line)]
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it left no words")
    return (found[-1] if found else last)[:400]


def _points(line: str) -> bool:
    return any(pointer in line for pointer in _POINTER)


def _end_with_parent() -> None:
    """Runs in the child: it must not outlive us, whatever ends us."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
