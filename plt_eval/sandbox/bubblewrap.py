"""Jobs in Linux namespaces of their own, set up by bubblewrap.

A job sees a read-only system with the running Python, an empty network, a private /tmp, and nothing else.
An ordinary user's jobs run in a user namespace. Root's jobs get no user namespace but a user id that nobody
else has, one for each job, because the kernel does not hold root to its process limit and an id of its
own leaves the job powerless even beside the namespaces.

The process that bubblewrap starts is :mod:`plt_eval.sandbox.launcher`. It waits for our word before it starts the
job, and by then the whole chain is bound to the thread that runs it: whenever the harness dies, the job dies.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from plt_benchmarks.protocols import SandboxError, SandboxJob, SandboxOutcome
from plt_eval.sandbox import launcher
from plt_eval.sandbox.job import DRIVER, FILES, JOB_FOLDER, WORK, environment, job_files, limits_text, outcome
from plt_eval.sandbox.mounts import system_mounts
from plt_eval.sandbox.seccomp import deny_list
from plt_eval.sandbox.supervisor import Collector, Wiring, supervise
from plt_eval.sandbox.usage import ProcessMeter

_START_S = 30.0
_END_S = 30.0
_OLDEST = (0, 7)  # the first whose tmpfs takes a size
_BARE_PYTHON = ("-I", "-S", "-B", "-c")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ROOT_CAPABILITIES = (6, 7, 8, 12, 21)  # SETGID, SETUID, SETPCAP, NET_ADMIN, SYS_ADMIN
_FIRST_ID = 0x7000_0000  # above every range of ids that distributions and container tools hand out
_INSIDE_ID = 65534  # what an ordinary user's jobs see as their own id

_OTHERWISE = "or pass --sandbox docker"
_HINTS = (
    (r"apparmor", f"allow it: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 ({_OTHERWISE})"),
    (
        r"loopback|RTM_NEWADDR|uid map",
        f"allow user namespaces: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 ({_OTHERWISE})",
    ),
    (
        r"[Nn]o permissions|namespace",
        "allow user namespaces: sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000 "
        f"({_OTHERWISE})",
    ),
    (
        r"proc",
        f"a container hides parts of /proc: start it with --security-opt systempaths=unconfined ({_OTHERWISE})",
    ),
)


class Bubblewrap:
    """The default sandbox on Linux. Raises SandboxError when this machine cannot provide it."""

    name = "bubblewrap"

    def __init__(self) -> None:
        self._program, version = _find_bubblewrap()
        self._as_root = _is_full_root()
        self._counter = itertools.count()
        self._python = os.path.abspath(sys.executable)
        self._launcher = Path(launcher.__file__).read_text()
        self._mounts = system_mounts()
        self._filter = deny_list(os.uname().machine)
        self._namespaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        self._namespaces += ["--unshare-cgroup-try"]
        if not self._as_root:
            self._namespaces += ["--unshare-user", "--uid", str(_INSIDE_ID), "--gid", str(_INSIDE_ID)]
            self._namespaces += ["--disable-userns"] if version >= (0, 8) else []

    def run(self, job: SandboxJob) -> SandboxOutcome:
        """Run `job` to its end. Thread-safe. Raises SandboxError when the sandbox cannot start."""
        with contextlib.ExitStack() as stack:
            started = self._start(job, stack)
            out, err = Collector(job.limits.output_bytes), Collector(job.limits.output_bytes)
            wiring = Wiring(
                input_fd=started.stdin.fileno(),
                end_input=started.stdin.close,
                outputs={started.stdout.fileno(): out.add, started.stderr.fileno(): err.add},
                exit_fd=started.channel.fileno(),
                usage=lambda: started.meter.read(job.limits.memory),
                kill=started.kill,
            )
            started.channel.send(launcher.GO)
            ending = supervise(wiring, job.stdin, job.limits)
            report = started.report()
            cpu_s = started.reap()
        return outcome(ending, bytes(out.data), bytes(err.data), report, job.limits, 0.0 if report else cpu_s)

    def _start(self, job: SandboxJob, stack: contextlib.ExitStack) -> _Started:
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        data = [theirs.detach()]
        try:
            command = self._command(job, data)
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(self._search_path()),
                pass_fds=data,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise SandboxError(f"bubblewrap cannot be started: {error}") from error
        finally:
            for fd in data:
                os.close(fd)
        stack.callback(_put_away, process)
        return _Started(process, ours, _first_word(process, ours), stack)

    def _command(self, job: SandboxJob, data: list[int]) -> list[str]:
        """The whole command line; appends to `data`, which begins with the launcher's end of the channel, the
        descriptors it names."""
        channel = data[0]
        identity = "keep"
        arguments = [self._program, *self._namespaces, "--die-with-parent", "--new-session", "--as-pid-1"]
        arguments += ["--hostname", "sandbox", "--cap-drop", "ALL"]
        if self._as_root:
            identity = str(_FIRST_ID + (os.getpid() % 0x10000) * 0x100 + next(self._counter) % 0x100)
            arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if self._filter is not None:
            arguments += ["--seccomp", _memory_file(self._filter, data)]
        arguments += [*self._mounts, *_private_mounts(job.limits.tmp_bytes)]
        files = job_files(job) | _accounts(identity if self._as_root else str(_INSIDE_ID))
        arguments += ["--dir", FILES]
        for name, content in files.items():
            place = name if name.startswith("/") else f"{JOB_FOLDER}/{name}"
            arguments += ["--perms", "0444", "--file", _memory_file(content, data), place]
        arguments += ["--remount-ro", "/", "--chdir", WORK, "--", self._python, *_BARE_PYTHON, self._launcher]
        # An ordinary user's launcher counts against the same limit as the job.
        limits = limits_text(job.limits, job.limits.processes + (not self._as_root))
        return [*arguments, f"fd:{channel}", identity, limits, self._python, "-I", DRIVER]

    def _search_path(self) -> str:
        return f"{os.path.dirname(self._python)}:/usr/local/bin:/usr/bin:/bin"


class _Started:
    """A launcher that waits for the word to go, and how to reach, measure and end its sandbox."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        channel: socket.socket,
        launcher_pid: int,
        stack: contextlib.ExitStack,
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.stdin, self.stdout, self.stderr = process.stdin, process.stdout, process.stderr
        self.channel = channel
        self._process = process
        try:
            self._pidfd = os.pidfd_open(launcher_pid)
            stack.callback(os.close, self._pidfd)
            self._tmp = os.open(f"/proc/{launcher_pid}/root/tmp", _FOLDER)
            stack.callback(os.close, self._tmp)
            proc = os.open(f"/proc/{launcher_pid}/root/proc", _FOLDER)
            stack.callback(os.close, proc)
        except OSError as error:
            raise SandboxError(f"bubblewrap: cannot watch a job, {error}") from error
        self.meter = ProcessMeter(proc, lambda: _numbered(proc), self._tmp_bytes)

    def kill(self) -> None:
        """End the first process of the sandbox, and with it all others."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def report(self) -> bytes:
        self.channel.setblocking(False)
        try:
            return self.channel.recv(256)
        except OSError:
            return b""

    def reap(self) -> float:
        """Wait until nothing of the job is left. Returns the processor time of all that it started, in seconds."""
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            pid, status, used = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                return used.ru_utime + used.ru_stime
            time.sleep(0.001)
        raise SandboxError(f"bubblewrap: processes of a job are still there {_END_S:.0f} s after it was killed")

    def _tmp_bytes(self) -> int:
        room = os.statvfs(self._tmp)
        return (room.f_blocks - room.f_bfree) * room.f_frsize


def _first_word(process: subprocess.Popen[bytes], channel: socket.socket) -> int:
    """Wait until the launcher is ready. Returns its process id, as the kernel vouches for it."""
    channel.settimeout(_START_S)
    try:
        word, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_SPACE(12))
    except TimeoutError:
        raise SandboxError(f"bubblewrap did not start a job within {_START_S:.0f} s") from None
    if word != launcher.READY:
        process.kill()
        said = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
        raise SandboxError(_explain(said.splitlines()[-1] if said else "bwrap ended without a word"))
    return int(struct.unpack("3i", ancillary[0][2])[0])


def _put_away(process: subprocess.Popen[bytes]) -> None:
    """Whatever happened: bubblewrap is dead, and so is its sandbox; its pipes are closed."""
    if process.returncode is None:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _private_mounts(tmp_bytes: int) -> list[str]:
    """/proc, a /dev of the harmless devices, and one bounded /tmp for everything that a job writes."""
    arguments = ["--proc", "/proc", "--dir", "/dev"]
    for device in ("null", "zero", "full", "random", "urandom"):
        arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        arguments += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    arguments += ["--symlink", "/proc/self/fd", "/dev/fd", "--symlink", "/tmp/.shm", "/dev/shm"]
    arguments += ["--perms", "1777", "--size", str(max(1, tmp_bytes)), "--tmpfs", "/tmp"]
    return [*arguments, "--perms", "1777", "--dir", "/tmp/.shm", "--perms", "1777", "--dir", WORK]


def _accounts(identity: str) -> dict[str, bytes]:
    """The user and group files that make the job's own id known by a name."""
    return {
        "/etc/passwd": f"root:x:0:0::/:/bin/false\nsandbox:x:{identity}:{identity}::{WORK}:/bin/sh\n".encode(),
        "/etc/group": f"root:x:0:\nsandbox:x:{identity}:\n".encode(),
        "/etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n",
    }


def _memory_file(content: bytes, data: list[int]) -> str:
    """A descriptor, added to `data`, from which bubblewrap reads `content`."""
    fd = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    data.append(fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return str(fd)


def _numbered(proc: int) -> list[str]:
    """Every process of the sandbox but the launcher, which is our own."""
    return [name for name in os.listdir(proc) if name.isdigit() and name != "1"]


def _find_bubblewrap() -> tuple[str, tuple[int, ...]]:
    program = shutil.which("bwrap")
    if sys.platform != "linux":
        raise SandboxError("bubblewrap needs Linux: pass --sandbox docker")
    if program is None:
        raise SandboxError(f"bubblewrap is not installed: apt install bubblewrap ({_OTHERWISE})")
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    numbers = re.search(r"(\d+)\.(\d+)", told)
    version = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    if version < _OLDEST:
        wanted = ".".join(map(str, _OLDEST))
        raise SandboxError(f"{program} is {told.strip() or 'of no known version'}, {wanted} is needed ({_OTHERWISE})")
    return program, version


def _is_full_root() -> bool:
    """Whether this is root with the rights to set a sandbox up, in a namespace that knows all user ids."""
    if os.geteuid() != 0:
        return False
    found = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    held = int(found[1], 16) if found else 0
    maps = (Path(f"/proc/self/{kind}_map").read_text().split() for kind in ("uid", "gid"))
    all_ids = all(words == ["0", "0", str(2**32 - 1)] for words in maps)
    return all_ids and all(held >> bit & 1 for bit in _ROOT_CAPABILITIES)


def _explain(said: str) -> str:
    for pattern, mend in _HINTS:
        if re.search(pattern, said):
            return f"bubblewrap cannot start ({said}): {mend}"
    return f"bubblewrap cannot start: {said} ({_OTHERWISE})"
