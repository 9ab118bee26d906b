"""The sandboxes that the tests try, and how to find what a job left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from plt_benchmarks.protocols import Sandbox, SandboxError, SandboxJob, SandboxLimits, SandboxOutcome
from plt_eval.sandbox import open_sandbox

CHECKOUT = Path(__file__).resolve().parents[2]
USER_ID = 23456
# setpriv itself still reads as root; the program that env starts does not.
BECOME_USER = ("setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups", "env")
MB = 1 << 20
TEST_IMAGE = "plt-eval-sandbox-test:latest"


class AsUser:
    """Bubblewrap as an ordinary user has it, when the tests run as root."""

    name = "bubblewrap"

    def __init__(self, python: str) -> None:
        self._command = [*BECOME_USER, python]

    def run(self, job: SandboxJob) -> SandboxOutcome:
        done = subprocess.run(
            [*self._command, str(Path(__file__).with_name("run_as_user.py")), "bubblewrap"],
            input=pickle.dumps(job),
            stdout=subprocess.PIPE,
            env=user_environment(),
            cwd="/",
            check=True,
        )
        answer = pickle.loads(done.stdout)
        if isinstance(answer, str):
            raise SandboxError(answer)
        assert isinstance(answer, SandboxOutcome)
        return answer


def user_environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/benchmarks", "HOME": "/nonexistent"}


def user_python() -> str:
    """A Python that an ordinary user may run with this checkout; skips the test where there is none."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; the tests of bubblewrap run as an ordinary user already")
    for python in dict.fromkeys((sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin"))):
        check = "import sys, plt_eval.sandbox; assert sys.version_info >= (3, 11)"
        tried = [*BECOME_USER, str(python), "-c", check]
        if python and not subprocess.run(tried, env=user_environment(), cwd="/", capture_output=True).returncode:
            return python
    pytest.skip("no Python 3.11 and checkout that an ordinary user could read")


def docker_sandbox() -> Sandbox:
    """The docker sandbox with the test image, which is made when it is not there. Without a daemon the test skips,
    or fails where PLT_EVAL_REQUIRE_DOCKER=1 says that there must be one."""
    missing = None
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        missing = "no Docker daemon answers"
    else:
        script = CHECKOUT / "scripts" / "make_test_image.sh"
        python = {**os.environ, "PYTHON": sys.executable}
        made = subprocess.run([script], capture_output=True, text=True, env=python)
        if made.returncode:
            missing = f"no test image: {made.stderr.strip()}"
    if missing and os.environ.get("PLT_EVAL_REQUIRE_DOCKER") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    return open_sandbox("docker", image=TEST_IMAGE)


def bubblewrap_sandbox() -> Sandbox:
    if sys.platform != "linux":
        pytest.skip("bubblewrap needs Linux")
    return open_sandbox("bubblewrap")


def carriers(word: str) -> list[int]:
    """The processes of this machine with `word` on their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if word.encode() in command and state not in "ZX" and int(pid) != os.getpid():
            found.append(int(pid))
    return found


def gone(marker: str, within_s: float = 2.0) -> bool:
    """Whether no process carries `marker` any more, or none does so soon."""
    deadline = time.monotonic() + within_s
    while carriers(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not carriers(marker)


QUICK = SandboxLimits(wall_s=20, cpu_s=20, memory=400 * MB)


def attack(sandbox: Sandbox, program: str, *arguments: Any, limits: SandboxLimits = QUICK) -> SandboxOutcome:
    """Run `program`, which reads its arguments as one line of JSON."""
    text = f"import json, os, sys\nARGS = json.loads(sys.stdin.readline())\n{program}"
    return sandbox.run(SandboxJob(text, json.dumps(arguments).encode() + b"\n", limits=limits))


def said(outcome: SandboxOutcome) -> str:
    assert outcome.status == "exited", outcome
    assert outcome.exit_code == 0, outcome
    return outcome.stdout.decode().strip()
