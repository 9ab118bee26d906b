"""A Docker daemon, the miniature instances with their images, and a server that plays a model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mini import BASE, Cli, Instance, multi_swe_instance, swebench_instance
from scripted import ScriptedServer

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def docker() -> str:
    """A daemon, and the image that the miniature ones are built on. Without a daemon the test skips, or fails where
    PLT_EVAL_REQUIRE_DOCKER=1 says that there must be one."""
    missing = None
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        missing = "no Docker daemon answers"
    else:
        made = subprocess.run(
            ["sh", str(CHECKOUT / "scripts" / "make_swe_base.sh"), BASE], capture_output=True, text=True
        )
        if made.returncode:
            missing = f"no base image: {(made.stdout + made.stderr).strip()}"
    if missing and os.environ.get("PLT_EVAL_REQUIRE_DOCKER") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    return BASE


@pytest.fixture(scope="session")
def calc(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    return swebench_instance(tmp_path_factory.mktemp("calc"), 1, base=docker, stop_signal="SIGKILL")


@pytest.fixture(scope="session")
def cargo(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    return swebench_instance(
        tmp_path_factory.mktemp("cargo"), 2, base=docker, parser="parse_log_cargo", stop_signal="SIGKILL"
    )


@pytest.fixture(scope="session")
def multi(docker: str, tmp_path_factory: pytest.TempPathFactory) -> Instance:
    return multi_swe_instance(tmp_path_factory.mktemp("multi"), base=docker)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`plt-eval ARGUMENTS` in an empty folder."""

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "plt_eval", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    return run


@pytest.fixture
def model() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
