"""Files that survive a kill: append-only JSON lines, and files replaced whole.

A line is handed to the kernel in one piece as soon as it is there, so a killed process loses none that was
appended; fsync follows in batches, so a power cut loses at most the last batch. A line that was being written when
the end came is cut off at the next opening. A full disk never leaves half a line.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from plt_eval.errors import UserError

_FULL = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota reached",
    errno.EFBIG: "file size limit reached",
}


class DiskFull(UserError):
    """There was no room for what had to be written."""


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" into a DiskFull that names `path`."""
    try:
        yield
    except OSError as error:
        what = _FULL.get(error.errno or 0)
        if what is None:
            raise
        raise DiskFull(
            f"{what} while writing {path}; nothing lost, free space and run the same command again"
        ) from error


class Journal:
    """An append-only file of JSON lines with one writer; `append` is thread-safe.

    Opening cuts off a torn last line. `sync_lines` and `sync_seconds` say how much may be waiting for an fsync.
    Raises DiskFull, with everything appended before still in place.
    """

    def __init__(self, path: Path, *, sync_lines: int = 32, sync_seconds: float = 2.0) -> None:
        self.path = path
        self._sync_lines = sync_lines
        self._sync_seconds = sync_seconds
        self._lock = threading.Lock()
        self._unsynced = 0
        self._synced_at = time.monotonic()
        with naming_full_disk(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._size = _end_of_whole_lines(self._fd)
            os.ftruncate(self._fd, self._size)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line. Raises ValueError for what JSON cannot hold, or when closed; then nothing is written."""
        line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        with self._lock, naming_full_disk(self.path):
            if self._fd < 0:
                raise ValueError(f"{self.path} is closed")
            self._write(line.encode("ascii"))
            self._unsynced += 1
            waited = time.monotonic() - self._synced_at
            if self._unsynced >= self._sync_lines or waited >= self._sync_seconds:
                self._sync()

    def close(self) -> None:
        """Sync and close; harmless when closed already."""
        with self._lock:
            if self._fd < 0:
                return
            try:
                with naming_full_disk(self.path):
                    self._sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except BaseException:  # a full disk, or Ctrl-C between two pieces: leave no half line
            with suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def _sync(self) -> None:
        if self._unsynced:
            os.fsync(self._fd)
        self._unsynced = 0
        self._synced_at = time.monotonic()


def read_journal(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole line as (line number from 1, object); a torn last line is left out, a missing file is empty.
    Raises UserError naming file and line for a line that is not a JSON object."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            yield number, _parse(path, number, line)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step that a kill or a power cut cannot halve. Raises DiskFull."""
    with replacing(path) as stream:
        stream.write(text.encode("utf-8"))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write what shall stand at `path`: put there in one step when the block ends well. Raises DiskFull."""
    temporary = path.with_name(f".{path.name}.tmp")
    with naming_full_disk(path):
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` as durable as the files."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:  # covers broken JSON and broken UTF-8
        raise UserError(
            f"{path}:{number}: damaged line: {error}; restore the file or delete the run directory"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
    return value


def _end_of_whole_lines(fd: int, block: int = 1 << 16) -> int:
    """The offset just after the last newline."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
