"""Choosing a sandbox by name, and the one line that a user gets when it cannot work here."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox_tools import BECOME_USER, carriers, docker_sandbox, user_environment, user_python

from plt_benchmarks.protocols import SandboxJob, SandboxLimits
from plt_eval.errors import MissingExtra, UserError
from plt_eval.sandbox import SANDBOXES, open_sandbox
from plt_eval.sandbox.seccomp import deny_list


def fake_bubblewrap(folder: Path, version: str, words: str = "") -> str:
    """A PATH on which bwrap is a script that tells `version`, and otherwise says `words` and fails."""
    script = folder / "bwrap"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit; fi\necho "{words}" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def one_line(name: str, image: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_sandbox(name, image=image)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("bubblewarp", "bubblewrap"), ("bwrap", "bubblewrap"), ("dokcer", "docker"), ("unsafe", "unsafe-subprocess")],
)
def test_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    assert f"--sandbox {typed}" in one_line(typed)
    assert f"did you mean {meant}?" in one_line(typed)


@pytest.mark.parametrize("name", ["", "none", "subprocess", "UNSAFE-SUBPROCESS", "unsafe_subprocess", "unsafe"])
def test_nothing_but_its_full_name_opens_the_unsafe_one(name: str) -> None:
    one_line(name)
    assert open_sandbox("unsafe-subprocess").name == "unsafe-subprocess"
    assert SANDBOXES[0] == "bubblewrap"


def test_image_is_for_docker_only() -> None:
    assert "--sandbox-image python:3" in one_line("bubblewrap", "python:3")


def test_bubblewrap_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = "bubblewrap is not installed: apt install bubblewrap (or pass --sandbox docker)"
    assert one_line("bubblewrap") == f"--sandbox bubblewrap: {expected}"


def test_bubblewrap_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", fake_bubblewrap(tmp_path, "bubblewrap 0.6.1"))
    assert "is bubblewrap 0.6.1, 0.7 is needed" in one_line("bubblewrap")


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        ("bwrap: setting up uid map: Permission denied", "kernel.apparmor_restrict_unprivileged_userns=0"),
        ("bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted", "apparmor_restrict_unprivileged_userns=0"),
        ("bwrap: No permissions to create new namespace", "kernel.unprivileged_userns_clone=1"),
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "systempaths=unconfined"),
        ("bwrap: something that nobody foresaw", "something that nobody foresaw"),
        ("", "without a word"),
    ],
)
def test_bubblewrap_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, mend: str) -> None:
    monkeypatch.setenv("PATH", fake_bubblewrap(tmp_path, "bubblewrap 0.11.0", words))
    told = one_line("bubblewrap")
    assert mend in told
    assert words in told
    assert "--sandbox docker" in told


def test_user_namespaces_are_forbidden() -> None:
    """For real: inside a namespace whose limit is 0, the kernel refuses bubblewrap another one."""
    script = "from plt_eval.sandbox import open_sandbox\nopen_sandbox('bubblewrap')"
    inside = f'echo 0 > /proc/sys/user/max_user_namespaces; exec "{user_python()}" -c "$SCRIPT"'
    done = subprocess.run(
        [*BECOME_USER, "unshare", "-Ur", "sh", "-c", inside],
        env={**user_environment(), "SCRIPT": script},
        cwd="/",
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("plt_eval.errors.UserError: --sandbox bubblewrap: bubblewrap cannot start"), done.stderr
    assert "user.max_user_namespaces=10000" in last


def test_root_without_the_rights() -> None:
    """The kernel never holds root to a number of processes: without the right to give it up, no sandbox."""
    if os.geteuid() != 0:
        pytest.skip("only root can be root without rights")
    script = "from plt_eval.sandbox import open_sandbox\nopen_sandbox('bubblewrap')"
    command = ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "--sandbox bubblewrap: bubblewrap cannot start: root lacks the rights" in last
    assert "run as an ordinary user" in last


def test_python_below_tmp(tmp_path: Path) -> None:
    """An environment in /tmp is seen in the job's own /tmp, where nothing else of the machine's is."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (tmp_path / "secret").touch()
    script = f"""
from plt_benchmarks.protocols import SandboxJob
from plt_eval.sandbox import open_sandbox
program = "import os, sys; print(sys.prefix, os.listdir({str(tmp_path)!r}), os.access(sys.prefix, os.W_OK))"
print(open_sandbox("bubblewrap").run(SandboxJob(program)).stdout.decode())
"""
    env = {**os.environ, "PYTHONPATH": user_environment()["PYTHONPATH"]}
    command = [tmp_path / "env" / "bin" / "python", "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    writable = os.geteuid() != 0  # an empty folder of its own, on which the parts are mounted
    assert done.stdout.strip() == f"{tmp_path}/env ['env'] {writable}", done.stderr


def test_python_that_a_job_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert "/nonexistent/python" in one_line("bubblewrap")


def test_docker_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(MissingExtra, match=r"plt-eval\[docker\]"):
        open_sandbox("docker")


def test_docker_daemon_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("docker")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    assert "does the Docker daemon run" in one_line("docker")


@pytest.mark.docker
def test_docker_image_is_missing() -> None:
    docker_sandbox()
    told = one_line("docker", "plt-eval-no-such-image:1")
    assert "--sandbox-image plt-eval-no-such-image:1" in told
    assert "docker pull" in told


@pytest.mark.docker
def test_docker_image_without_python(tmp_path: Path) -> None:
    import docker

    docker_sandbox()
    client = docker.from_env()
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    client.api.import_image_from_file(str(tmp_path / "empty.tar"), repository="plt-eval-empty-test", tag="1")
    try:
        assert "python3" in one_line("docker", "plt-eval-empty-test:1")
    finally:
        client.images.remove("plt-eval-empty-test:1")


def test_opening_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom plt_eval.sandbox import open_sandbox\nopen_sandbox('bubblewrap')\n"
        "print([name for name in ('torch', 'transformers', 'docker', 'evalplus', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_unsafe_holds_limits_and_its_group(marker: str) -> None:
    sandbox = open_sandbox("unsafe-subprocess")
    loop = sandbox.run(SandboxJob("while True: pass", limits=SandboxLimits(wall_s=1)))
    assert loop.status == "wall_limit"
    program = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "{marker}"])
time.sleep(0.3)
print(child.poll())
"""
    outcome = sandbox.run(SandboxJob(program))
    assert outcome.stdout == b"None\n"
    assert carriers(marker) == []
    eater = "block = bytearray(b'x') * (300 << 20)\nimport time\ntime.sleep(5)"
    assert sandbox.run(SandboxJob(eater, limits=SandboxLimits(memory=100 << 20))).status == "memory_limit"
    forks = "import os, time\nfor _ in range(60):\n    if os.fork() == 0: time.sleep(20)\ntime.sleep(5)"
    outcome = sandbox.run(SandboxJob(forks, limits=SandboxLimits(processes=20, wall_s=20)))
    assert outcome.wall_s < 5
    assert outcome.exit_code != 0


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_is_well_formed(machine: str) -> None:
    """Every jump of the filter lands inside it, and what it ends with is a verdict."""
    program = deny_list(machine)
    assert program is not None
    lines = list(struct.iter_unpack("=HBBI", program))
    for position, (code, if_true, if_false, _) in enumerate(lines):
        if code & 0x07 == 0x05:
            assert position + 1 + max(if_true, if_false) < len(lines)
    assert lines[-1][0] == 0x06


def test_no_filter_where_the_numbers_are_unknown() -> None:
    assert deny_list("riscv64") is None
