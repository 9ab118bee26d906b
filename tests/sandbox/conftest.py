"""Every sandbox in turn, and the plain subprocess that shows what an attack does without one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from sandbox_tools import AsUser, bubblewrap_sandbox, carriers, docker_sandbox, user_python

from plt_benchmarks.protocols import Sandbox
from plt_eval.sandbox import open_sandbox


@pytest.fixture(scope="session", params=["bubblewrap", "as-user", pytest.param("docker", marks=pytest.mark.docker)])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """Every sandbox in turn."""
    if request.param == "docker":
        return docker_sandbox()
    return AsUser(user_python()) if request.param == "as-user" else bubblewrap_sandbox()


@pytest.fixture(scope="session")
def bubblewrap() -> Sandbox:
    return bubblewrap_sandbox()


@pytest.fixture(scope="session")
def no_sandbox() -> Sandbox:
    """The control: the same program, limits and all, with no walls around it."""
    return open_sandbox("unsafe-subprocess")


@pytest.fixture
def marker() -> Iterator[str]:
    """A word by which processes of a job are found from outside. Whoever still carries it in the end is killed."""
    word = f"plt-eval-marker-{os.urandom(8).hex()}"
    yield word
    for pid in carriers(word):
        os.kill(pid, 9)
