"""Starting a launcher on this machine, and the socket over which it is told to go and reports back."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from plt_benchmarks.protocols import SandboxError, SandboxLimits
from plt_eval.sandbox import launcher
from plt_eval.sandbox.supervisor import Collector, Ending, Wiring, supervise
from plt_eval.sandbox.usage import Usage

LAUNCHER = Path(launcher.__file__).read_text()
BARE_PYTHON = ("-I", "-S", "-B", "-c")
_START_S = 30.0
_END_S = 30.0


class CannotStart(SandboxError):
    """The launcher never came up; `said` is the last line that was printed instead."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.said = said


class Launched:
    """A launcher that is ready and waits for the word to go. Everything that it holds is put away with `stack`,
    and whatever is still running is killed then.

    `command` is given the number of the launcher's end of the channel, and a list to which it adds further
    descriptors for the new process; all of them are closed here. Raises CannotStart.
    """

    def __init__(
        self,
        command: Callable[[int, list[int]], list[str]],
        env: Mapping[str, str],
        stack: contextlib.ExitStack,
    ) -> None:
        self.channel, theirs = socket.socketpair()
        stack.enter_context(self.channel)
        self.channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        inherited = [theirs.detach()]
        try:
            self.process = subprocess.Popen(
                command(inherited[0], inherited),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
                pass_fds=inherited,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise CannotStart(str(error)) from error
        finally:
            for fd in inherited:
                os.close(fd)
        stack.callback(self._put_away)
        self.pid = self._first_word()
        self._pidfd = os.pidfd_open(self.pid)
        stack.callback(os.close, self._pidfd)

    def run(
        self, stdin: bytes, limits: SandboxLimits, usage: Callable[[], Usage], kill: Callable[[], None]
    ) -> tuple[Ending, bytes, bytes, bytes]:
        """Say go and watch the job to its end. Returns how it ended, its output and errors, and the report."""
        out, err = Collector(limits.output_bytes), Collector(limits.output_bytes)
        pipes = self.process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        assert pipes.stderr is not None
        wiring = Wiring(
            input_fd=pipes.stdin.fileno(),
            end_input=pipes.stdin.close,
            outputs={pipes.stdout.fileno(): out.add, pipes.stderr.fileno(): err.add},
            exit_fd=self.channel.fileno(),
            usage=usage,
            kill=kill,
        )
        self.channel.send(launcher.GO)
        ending = supervise(wiring, stdin, limits)
        return ending, bytes(out.data), bytes(err.data), self._report()

    def kill(self) -> None:
        """Kill the launcher itself; in a sandbox where it is process 1 that ends everything."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def reap(self) -> float:
        """Wait for the end of what was started. Returns the processor time of it all, in seconds. Raises SandboxError
        when it outlives its killing."""
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                return used.ru_utime + used.ru_stime
            time.sleep(0.0005)
        raise SandboxError(f"processes of a job are still there {_END_S:.0f} s after they were killed")

    def _first_word(self) -> int:
        """Wait until the launcher is ready. Returns its process id, as the kernel vouches for it."""
        self.channel.settimeout(_START_S)
        try:
            word, ancillary, _, _ = self.channel.recvmsg(1, socket.CMSG_SPACE(12))
        except TimeoutError:
            raise CannotStart(f"no job was started within {_START_S:.0f} s") from None
        if word != launcher.READY:
            self.process.kill()
            said = self.process.stderr.read().decode(errors="replace") if self.process.stderr else ""
            raise CannotStart((said.strip().splitlines() or ["it ended without a word"])[-1])
        return int(struct.unpack("3i", ancillary[0][2])[0])

    def _report(self) -> bytes:
        self.channel.setblocking(False)
        try:
            return self.channel.recv(256)
        except OSError:
            return b""

    def _put_away(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
