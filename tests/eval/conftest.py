"""Fixtures of the store's and the runner's tests."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_server import Server, ServerProcess


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount(8); the file-size-limit test covers the same path")
    if done.returncode != 0:
        pytest.skip("needs the right to mount a tmpfs (root); the file-size-limit test covers the same path")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def serving() -> Iterator[Server]:
    it = Server()
    thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield it
    it.over.set()
    it.shutdown()
    it.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as it:
        yield it


@pytest.fixture
def second() -> Iterator[Server]:
    """Another one."""
    with serving() as it:
        yield it


@pytest.fixture
def processes() -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers, each in a process of its own."""
    both = ServerProcess(), ServerProcess()
    yield both
    for each in both:
        each.kill()
