"""When the harness itself dies, so does the job; and an interrupted harness leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from sandbox_tools import (
    BECOME_USER,
    TEST_IMAGE,
    bubblewrap_sandbox,
    carriers,
    docker_sandbox,
    gone,
    user_environment,
    user_python,
)

from plt_eval.sandbox import open_sandbox

# The job is run from a worker thread, as the runner does, while the main thread waits.
HARNESS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from plt_benchmarks.protocols import SandboxJob, SandboxLimits
from plt_eval.sandbox import open_sandbox
name, marker, image = sys.argv[1:]
sandbox = open_sandbox(name, image=image or None)
program = f'''
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
    signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
os.execvp("python3" if {name == "docker"} else sys.executable, ["python3", "-c", "while True: pass", "{marker}"])
'''
with ThreadPoolExecutor(2) as pool:
    job = SandboxJob(program, limits=SandboxLimits(wall_s=40, cpu_s=200))
    print(list(pool.map(sandbox.run, [job, job])))
"""


def wait_for_carriers(marker: str, count: int, but: int) -> list[int]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [pid for pid in carriers(marker) if pid != but]
        if len(found) >= count:
            return found
        time.sleep(0.05)
    pytest.fail(f"the jobs did not come up: {carriers(marker)}")


def start(command: list[str], name: str, marker: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    image = TEST_IMAGE if name == "docker" else ""
    return subprocess.Popen(
        [*command, "-c", HARNESS, name, marker, image], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )


@pytest.mark.parametrize("who", ["self", "user"])
def test_a_killed_harness_takes_its_jobs_along(marker: str, who: str) -> None:
    bubblewrap_sandbox()
    command = [sys.executable] if who == "self" else [*BECOME_USER, user_python()]
    with start(command, "bubblewrap", marker, None if who == "self" else user_environment()) as harness:
        # Two jobs of two processes each.
        wait_for_carriers(marker, 4, harness.pid)
        harness.kill()
    assert gone(marker, 5)


def test_without_a_sandbox_they_go_on(marker: str) -> None:
    """The control of the test above."""
    with start([sys.executable], "unsafe-subprocess", marker) as harness:
        wait_for_carriers(marker, 4, harness.pid)
        harness.kill()
    assert not gone(marker, 1)


@pytest.mark.docker
def test_containers_of_a_killed_harness_are_removed(marker: str) -> None:
    docker_sandbox()
    with start([sys.executable], "docker", marker) as harness:
        wait_for_carriers(marker, 4, harness.pid)
        harness.kill()
    import docker

    client = docker.from_env()
    label = {"label": "plt-eval.sandbox"}
    orphans = [c for c in client.containers.list(filters=label) if f"/{harness.pid}/" in c.labels["plt-eval.sandbox"]]
    assert len(orphans) == 2, "they must be there at first, or this test shows nothing"
    open_sandbox("docker", image=TEST_IMAGE)
    left = {container.id for container in client.containers.list(all=True, filters=label)}
    assert not left & {container.id for container in orphans}
    assert gone(marker, 5)


@pytest.mark.docker
def test_containers_of_a_living_harness_are_left_alone(marker: str) -> None:
    docker_sandbox()
    with start([sys.executable], "docker", marker) as harness:
        running = wait_for_carriers(marker, 4, harness.pid)
        open_sandbox("docker", image=TEST_IMAGE)
        assert set(running) <= set(carriers(marker))
        harness.kill()
    open_sandbox("docker", image=TEST_IMAGE)
    assert gone(marker, 5)


INTERRUPTED = """
import signal, sys
from plt_benchmarks.protocols import SandboxJob, SandboxLimits
from plt_eval.sandbox import open_sandbox
sandbox = open_sandbox(sys.argv[1], image=sys.argv[3] or None)
program = "import os\\nos.execvp('python3', ['python3', '-c', 'while True: pass', " + repr(sys.argv[2]) + "])"
try:
    sandbox.run(SandboxJob(program, limits=SandboxLimits(wall_s=60)))
except KeyboardInterrupt:
    sys.exit(33)
"""


@pytest.mark.parametrize("name", ["bubblewrap", "unsafe-subprocess", pytest.param("docker", marks=pytest.mark.docker)])
def test_an_interrupted_run_leaves_nothing(marker: str, name: str) -> None:
    if name == "docker":
        docker_sandbox()
    command = [sys.executable, "-c", INTERRUPTED, name, marker, TEST_IMAGE if name == "docker" else ""]
    with subprocess.Popen(command) as harness:
        wait_for_carriers(marker, 1, harness.pid)
        # A job's own processes are what must be there: not only the line that names it.
        time.sleep(0.5)
        harness.send_signal(signal.SIGINT)
        assert harness.wait(30) == 33
    assert gone(marker, 3)


def test_thread_that_ran_a_job_may_end() -> None:
    """The job is bound to its thread; a later job of another thread must not be."""
    bubblewrap_sandbox()
    script = """
import threading
from plt_benchmarks.protocols import SandboxJob
from plt_eval.sandbox import open_sandbox
sandbox = open_sandbox("bubblewrap")
outcomes = []
def many():
    for _ in range(5):
        outcomes.append(sandbox.run(SandboxJob("import time\\ntime.sleep(0.1)")).exit_code)
short = threading.Thread(target=lambda: outcomes.append(sandbox.run(SandboxJob("")).exit_code))
long = threading.Thread(target=many)
short.start(); long.start(); short.join(); long.join()
print(outcomes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == str([0] * 6), done.stderr
