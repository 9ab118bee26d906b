"""Jobs as plain processes of this machine: limits, but NO isolation.

A job can read and write whatever the user can, reach the network, and leave processes behind that left its process
group. It is for machines where nothing better runs and for code that the user trusts; nothing chooses it but its full
name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from plt_benchmarks.protocols import SandboxError, SandboxJob, SandboxOutcome
from plt_eval.sandbox.job import environment, job_files, limits_text, outcome
from plt_eval.sandbox.launch import BARE_PYTHON, LAUNCHER, Launched
from plt_eval.sandbox.usage import ProcessMeter, descendants, tasks_of_user

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class UnsafeSubprocess:
    """Runs jobs in a process group and a temporary folder of their own, and removes both. `tmp_bytes` is not held:
    the folder lies on an ordinary disk."""

    name = "unsafe-subprocess"

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise SandboxError("unsafe-subprocess needs Linux: pass --sandbox docker")

    def run(self, job: SandboxJob) -> SandboxOutcome:
        """Run `job` to its end. Thread-safe. Raises SandboxError when no process can be started."""
        with contextlib.ExitStack() as stack:
            try:
                folder = Path(tempfile.mkdtemp(prefix="plt-eval-job-"))
                stack.callback(_remove, folder)
                _write(folder, job_files(job))
                # The kernel counts all processes of a user against this limit.
                limits = limits_text(job.limits, job.limits.processes + tasks_of_user())
                python = os.path.abspath(sys.executable)
                runs_job = python if job.environment is None else str(job.environment / "bin" / "python")
                driver = [runs_job, "-I", str(folder / "driver.py")]
                launched = Launched(
                    lambda fd, _: [python, *BARE_PYTHON, LAUNCHER, f"fd:{fd}", "keep", limits, *driver],
                    environment(_search_path(runs_job), str(folder / "work"), str(folder / "files")),
                    stack,
                )
                stack.callback(_kill_group, launched)
                proc = os.open("/proc", _FOLDER)
                stack.callback(os.close, proc)
            except SandboxError as error:
                raise SandboxError(f"cannot start a process: {error}") from error
            except OSError as error:
                raise SandboxError(f"cannot set a job's folder up: {error}") from error
            meter = ProcessMeter(proc, lambda: descendants(launched.pid)[1:])
            ending, out, err, report = launched.run(
                job.stdin, job.limits, lambda: meter.read(job.limits.memory), lambda: _kill_group(launched)
            )
            launched.reap()
        return outcome(ending, out, err, report, job.limits)


def _search_path(python: str) -> str:
    return f"{os.path.dirname(python)}:/usr/local/bin:/usr/bin:/bin"


def _kill_group(launched: Launched) -> None:
    """Kill the job's process group, and those that left it but still descend from it."""
    strays = [int(pid) for pid in descendants(launched.pid)[1:]]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launched.process.pid, signal.SIGKILL)
    for pid in strays:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _write(folder: Path, files: dict[str, bytes]) -> None:
    (folder / "files").mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o444)
    (folder / "files").chmod(0o555)


def _remove(folder: Path) -> None:
    """Remove all of it, also where the job took the right to do so away."""
    for parent, names, _ in os.walk(folder):
        for name in ("", *names):
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
