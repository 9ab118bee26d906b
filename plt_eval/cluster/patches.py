"""Judging patches on a machine of the cluster: the official harness in this process' children, containers of this
machine's Docker, and a folder whose files go back to the run."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plt_benchmarks.protocols import Answer, Sample, Score, SuiteError
from plt_benchmarks.swe.judge import PatchScorer
from plt_benchmarks.swe.rows import task_of
from plt_benchmarks.swe.suites import SweSuite
from plt_eval.cluster.orders import PatchOrder
from plt_eval.sandbox.owners import is_orphan, process_identity
from plt_eval.swe.containers import DockerHost

JUDGED = "judged"
PREFIX = "plt-eval-judged-"
OWNER = "owner"
MOST_BYTES = 64 << 20
"""Larger files of a harness stay behind: they are no reports, and its logs are shorter."""
MOST_IN_ALL = 256 << 20
"""Of the files of one judgement: the largest stay behind."""
_SWEEPS, _PAUSE_S = 3, 1.0


class PatchJudge:
    """The suite's scorer with a Docker daemon and a folder of this machine. Raises SandboxError and SuiteError."""

    def __init__(self, suite: SweSuite, order: PatchOrder) -> None:
        self._host = open_host(order)
        _remove_folders()
        self._home = Path(tempfile.mkdtemp(prefix=PREFIX))
        (self._home / OWNER).write_text(process_identity(os.getpid()))
        made = replace(suite, host=self._host, folder=self._home / JUDGED, token=order.token)
        scorer = made.scorer(_NO_SANDBOX)
        assert isinstance(scorer, PatchScorer)
        self._scorer = scorer

    def judge(self, sample: Sample, answer: Answer) -> tuple[Score, bytes]:
        """The verdict, and the harness' files."""
        self._host.expect(task_of(sample))
        folder = self._home / JUDGED
        try:
            return self._scorer.score(sample, answer), packed(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        self._scorer.close()
        shutil.rmtree(self._home, ignore_errors=True)


_NO_SANDBOX: Any = None
"""The harness brings its own containers."""


def open_host(order: PatchOrder) -> DockerHost:
    """This machine's Docker, with what dead processes left removed. Raises SandboxError, MissingExtra, SuiteError."""
    wheels = order.limits.wheels
    if wheels is not None and not wheels.is_dir():
        raise SuiteError(f"--wheels {wheels}: there is no such folder")
    host = DockerHost(order.limits, order.keep, notify=_say_nothing, driver=order.driver)
    host.open(order.run)
    return host


def stock(order: PatchOrder, images: Sequence[str]) -> dict[str, Any]:
    """Which of `images` are here, and how much disk is free for others."""
    host = open_host(order)
    return {"images": frozenset(filter(host.is_local, images)), "free_disk": host.free_disk()}


def sweep_patches(order: PatchOrder, *, over: bool) -> None:
    """Remove what dead processes left; when the run is over, all of its containers, of which one may just be coming
    up."""
    host = open_host(order)
    for _ in range(_SWEEPS if over else 0):
        host.remove_drivers()
        time.sleep(_PAUSE_S)
    _remove_folders()


def _remove_folders() -> None:
    ours = process_identity(os.getpid())
    for home in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if is_orphan((home / OWNER).read_text(), ours):
                shutil.rmtree(home, ignore_errors=True)


def packed(folder: Path) -> bytes:
    """The files below `folder` as a compressed tar; empty where there are none."""
    files = [(path.stat().st_size, path) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    if not files:
        return b""
    content = io.BytesIO()
    room = MOST_IN_ALL
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as archive:
        for size, path in sorted(files):
            if size <= min(MOST_BYTES, room):
                room -= size
                archive.add(path, str(path.relative_to(folder)), recursive=False)
    return content.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Put the files into `folder`: regular ones alone, and none outside of it. Raises OSError and TarError, also for
    more than `packed` makes."""
    with gzip.open(io.BytesIO(content)) as packed_bytes:
        data = packed_bytes.read(2 * MOST_IN_ALL + 1)  # tar's own headers among them
    if len(data) > 2 * MOST_IN_ALL:
        raise OSError(f"the files of a judgement are more than {2 * MOST_IN_ALL >> 20} MiB")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        regular = [member for member in archive if member.isreg() and not member.issparse()]
        archive.extractall(folder, regular, filter="data")


def _say_nothing(_: str) -> None:
    """Nobody reads what a worker prints."""
