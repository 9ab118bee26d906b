"""What every backend gives a job: its folders and files, its environment, and its resource limits."""

from __future__ import annotations

import math
import signal

from plt_benchmarks.protocols import SandboxJob, SandboxLimits, SandboxOutcome
from plt_eval.sandbox.supervisor import Ending

JOB_FOLDER = "/sandbox"
DRIVER = f"{JOB_FOLDER}/driver.py"
FILES = f"{JOB_FOLDER}/files"
WORK = "/tmp/work"
OPEN_FILES = 256
_SINGLE_THREADED = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def job_files(job: SandboxJob) -> dict[str, bytes]:
    """The driver and the extra files by their path below the job's folder. Raises ValueError for a file name that
    is no base name."""
    for name in job.files:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"a sandbox file needs a base name, found {name!r}")
    named = {f"files/{name}": data for name, data in job.files.items()}
    return {"driver.py": job.program.encode(), **named}


def environment(path: str, home: str = WORK, files: str = FILES) -> dict[str, str]:
    """The whole environment of a job. Python's own variables reach only programs that the job starts without
    `-I`."""
    return {
        "PATH": path,
        "HOME": home,
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "SANDBOX_FILES": files,
        **dict.fromkeys(_SINGLE_THREADED, "1"),
    }


def limits_text(limits: SandboxLimits, processes: int | None) -> str:
    """The limits of each process, as the launcher reads them. There is none on the stack: a scorer may raise its own,
    and a hard limit would stop it. That on time is one second late, for the supervisor to be first, which adds up all
    processes."""
    values = {
        "CPU": math.ceil(limits.cpu_s) + 1,
        "FSIZE": limits.file_bytes,
        "NOFILE": OPEN_FILES,
        "CORE": 0,
        "AS": limits.address_space,
        "NPROC": processes,
    }
    return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)


def outcome(
    ending: Ending, stdout: bytes, stderr: bytes, report: bytes, limits: SandboxLimits, cpu_s: float = 0.0
) -> SandboxOutcome:
    """Put together what the supervisor saw and what the launcher reported (nothing, when the job was killed).

    Two limits are also found by the report, so that a verdict does not hang on when the supervisor last looked:
    a process that outgrew the memory of the whole job, and one that the kernel stopped at its own time limit.
    """
    status, exit_code, peak = ending.limit or "exited", None, ending.peak_memory
    cpu_s = max(cpu_s, ending.cpu_s or 0.0)
    if status == "exited":
        exit_code, reported_s, resident = _read_report(report)
        cpu_s, peak = max(cpu_s, reported_s), max(peak or 0, resident)
        if resident > limits.memory:
            status, exit_code = "memory_limit", None
        elif exit_code in (-signal.SIGXCPU, -signal.SIGKILL) and cpu_s > limits.cpu_s:
            status, exit_code = "cpu_limit", None
    return SandboxOutcome(status, exit_code, stdout, stderr, ending.wall_s, cpu_s, peak)


def was_killed(report: bytes) -> bool:
    """Whether the job, or its launcher, ended by SIGKILL."""
    return _read_report(report)[0] == -signal.SIGKILL


def _read_report(report: bytes) -> tuple[int, float, int]:
    """The launcher's exit code, processor time in seconds, and largest process in bytes. What is no report, or none
    at all, is of a job that ended or broke its own launcher: as if it had been killed."""
    try:
        exit_code, cpu_ms, resident = (int(word) for word in report.split())
    except ValueError:
        return -signal.SIGKILL, 0.0, 0
    return exit_code, max(0, cpu_ms) / 1000, max(0, resident)
