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
import subprocess
import sys
from pathlib import Path

from plt_benchmarks.protocols import SandboxError, SandboxJob, SandboxOutcome
from plt_eval.sandbox.job import DRIVER, FILES, JOB_FOLDER, WORK, environment, job_files, limits_text, outcome
from plt_eval.sandbox.launch import BARE_PYTHON, LAUNCHER, CannotStart, Launched
from plt_eval.sandbox.mounts import system_mounts
from plt_eval.sandbox.seccomp import deny_list
from plt_eval.sandbox.usage import ProcessMeter, tasks_of_user

_OLDEST = (0, 7)  # the first whose tmpfs takes a size
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ROOT_CAPABILITIES = (6, 7, 8, 12, 21)  # SETGID, SETUID, SETPCAP, NET_ADMIN, SYS_ADMIN
_INODE = 1024  # what the kernel keeps for an empty file, bytes
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
        self._python = os.path.abspath(sys.executable or "python")
        if not os.access(self._python, os.X_OK):
            raise SandboxError(f"the running Python has no program that a job could use, found {self._python}")
        self._limit_is_per_namespace = _kernel() >= (5, 14)
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
            try:
                launched = Launched(
                    lambda channel, inherited: self._command(job, channel, inherited),
                    environment(f"{os.path.dirname(self._python_of(job))}:/usr/local/bin:/usr/bin:/bin"),
                    stack,
                )
                meter = _meter(launched.pid, stack)
            except CannotStart as error:
                raise SandboxError(_explain(error.said)) from error
            ending, out, err, report = launched.run(
                job.stdin, job.limits, lambda: meter.read(job.limits.memory), launched.kill
            )
            cpu_s = launched.reap()
        return outcome(ending, out, err, report, job.limits, 0.0 if report else cpu_s)

    def _command(self, job: SandboxJob, channel: int, inherited: list[int]) -> list[str]:
        """The whole command line. Appends the descriptors that it names to `inherited`."""
        identity = "keep"
        arguments = [self._program, *self._namespaces, "--die-with-parent", "--new-session", "--as-pid-1"]
        arguments += ["--hostname", "sandbox", "--cap-drop", "ALL"]
        if self._as_root:
            identity = str(_FIRST_ID + (os.getpid() % 0x10000) * 0x100 + next(self._counter) % 0x100)
            arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        if self._filter is not None:
            arguments += ["--seccomp", _memory_file(self._filter, inherited)]
        # The system comes second: a Python that lives below /tmp is put into the private one.
        mounts = self._mounts if job.environment is None else system_mounts(job.environment)
        arguments += [*_private_mounts(job.limits.tmp_bytes), *mounts, "--dir", FILES]
        files = {f"{JOB_FOLDER}/{name}": content for name, content in job_files(job).items()}
        files |= _accounts(identity if self._as_root else str(_INSIDE_ID))
        for path, content in files.items():
            arguments += ["--perms", "0444", "--file", _memory_file(content, inherited), path]
        arguments += ["--remount-ro", "/", "--chdir", WORK, "--", self._python, *BARE_PYTHON, LAUNCHER]
        # An ordinary user's launcher counts against the same limit as the job.
        limits = limits_text(job.limits, job.limits.processes + self._uncounted())
        return [*arguments, f"fd:{channel}", identity, limits, self._python_of(job), "-I", DRIVER]

    def _python_of(self, job: SandboxJob) -> str:
        return self._python if job.environment is None else str(job.environment / "bin" / "python")

    def _uncounted(self) -> int:
        """Processes that are no part of the job but count against its limit."""
        if self._as_root:
            return 0
        return 1 if self._limit_is_per_namespace else 1 + tasks_of_user()


def _meter(launcher_pid: int, stack: contextlib.ExitStack) -> ProcessMeter:
    """Measures through the sandbox's own /proc, which shows its processes and no others."""
    try:
        tmp = os.open(f"/proc/{launcher_pid}/root/tmp", _FOLDER)
        stack.callback(os.close, tmp)
        proc = os.open(f"/proc/{launcher_pid}/root/proc", _FOLDER)
        stack.callback(os.close, proc)
    except OSError as error:
        raise CannotStart(f"cannot look into the sandbox, {error}") from error

    def pids() -> list[str]:  # all but the launcher, which is our own
        return [name for name in os.listdir(proc) if name.isdigit() and name != "1"]

    def tmp_bytes() -> int:
        room = os.statvfs(tmp)
        return (room.f_blocks - room.f_bfree) * room.f_frsize + (room.f_files - room.f_ffree) * _INODE

    return ProcessMeter(proc, pids, tmp_bytes)


def _private_mounts(tmp_bytes: int) -> list[str]:
    """/proc, a /dev of the harmless devices, and one bounded /tmp for everything that a job writes. There is no
    /dev/zero: mapping it yields memory that outlives its mapping, unseen by the meter."""
    arguments = ["--proc", "/proc", "--dir", "/dev"]
    for device in ("null", "full", "random", "urandom"):
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


def _kernel() -> tuple[int, ...]:
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return tuple(map(int, numbers.groups())) if numbers else (0, 0)


def _is_full_root() -> bool:
    """Whether this is root with the rights to set a sandbox up, in a namespace that knows all user ids.

    Raises SandboxError for a root that lacks them: it could still have a user namespace, as ordinary users do, but
    the kernel would not hold its jobs to their number of processes.
    """
    if os.geteuid() != 0:
        return False
    found = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    held = int(found[1], 16) if found else 0
    uids, gids = (Path(f"/proc/self/{kind}_map").read_text().split() for kind in ("uid", "gid"))
    all_ids = uids == gids == ["0", "0", str(2**32 - 1)]
    if all_ids and all(held >> bit & 1 for bit in _ROOT_CAPABILITIES):
        return True
    if uids[:2] == ["0", "0"]:
        raise SandboxError(
            "bubblewrap cannot start: root lacks the rights that it takes (SYS_ADMIN, NET_ADMIN, SETUID, SETGID, "
            f"SETPCAP): run as an ordinary user, start the container with --privileged ({_OTHERWISE})"
        )
    return False


def _explain(said: str) -> str:
    for pattern, mend in _HINTS:
        if re.search(pattern, said):
            return f"bubblewrap cannot start ({said}): {mend}"
    return f"bubblewrap cannot start: {said} ({_OTHERWISE})"
