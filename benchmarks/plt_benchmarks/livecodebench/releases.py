"""The official files of LiveCodeBench, and fetching them.

Code generation comes in six files, each with the problems that one version added: release_v6 is all of them. They are
large (4.5 GB in all, nearly all of it hidden tests), so they are fetched in parts, kept, and never held in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_benchmarks.datafiles import CONNECT_S, READ_S, cache_folder
from plt_benchmarks.protocols import SuiteError

DATASET = "livecodebench/code_generation_lite"
REVISION = "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
DEFAULT_RELEASE = "release_v6"
FOLDERS = ("livecodebench", "code_generation_lite")
"""What a folder with the data may be called."""


@dataclass(frozen=True)
class LiteFile:
    """One file of code_generation_lite at REVISION."""

    name: str
    problems: int
    size: int
    sha256: str

    @property
    def url(self) -> str:
        return f"{hub()}/datasets/{DATASET}/resolve/{REVISION}/{self.name}"

    @property
    def kept(self) -> Path:
        """Where it lies once it was fetched and found to be what it should."""
        return cache_folder() / "data" / "livecodebench" / REVISION[:12] / self.name

    @property
    def present(self) -> bool:
        """Whether it is kept."""
        return self.kept.is_file() and self.kept.stat().st_size == self.size


FILES = (
    LiteFile("test.jsonl", 400, 1252609773, "2bd02b38beb48e8c46b5b9987095d999ff38cd8efc255ea5d58974317c48f63f"),
    LiteFile("test2.jsonl", 111, 713377060, "095df7c5daf15f882c51a9deb84085cff1e073495a5dbcf95015a564d485f3a3"),
    LiteFile("test3.jsonl", 101, 623360766, "28ed26cc83363ce3f1fe2d5fad9f8393077beb1907b167a31bd3b32f80801b79"),
    LiteFile("test4.jsonl", 101, 1204644685, "d711138ddaebfcf5f8ec6a4283ee677298c0f5c5d374a235af92aaf0584510da"),
    LiteFile("test5.jsonl", 167, 557699297, "7f77571c2a6df0c2a72a3277650309f67e01e0008e18117e624633df53f81214"),
    LiteFile("test6.jsonl", 175, 134303240, "bb4c364f71921c4495a6ad15abe1a927350b720009f4933e2e71f8af0f6fd1f5"),
)


@dataclass(frozen=True)
class LiteRelease:
    """A version of code generation, by its official tag."""

    tag: str
    files: tuple[LiteFile, ...]

    @property
    def problems(self) -> int:
        return sum(file.problems for file in self.files)

    @property
    def url(self) -> str:
        return f"{hub()}/datasets/{DATASET}/tree/{REVISION} ({sum(file.size for file in self.files) / 1e9:.1f} GB)"

    @property
    def present(self) -> bool:
        """Whether it can be read without a network."""
        return all(file.present for file in self.files)

    @property
    def sha256(self) -> str:
        """Of its one file, or of the digests of its files."""
        return joint_digest([file.sha256 for file in self.files])

    def fetch(self) -> list[Path]:
        """The files, from where they are kept or fetched to there. Raises SuiteError."""
        missing = [file for file in self.files if not file.present]
        _check_room(sum(file.size for file in missing))
        for file in missing:
            _fetch(file.url, file.kept, DATASET, file.size, file.sha256)
        return [file.kept for file in self.files]


def release(tag: str) -> LiteRelease:
    """By an official tag: release_v5 is the first five files, v5 the fifth alone, v3_v5 the third to the fifth. Raises
    SuiteError."""
    whole = re.fullmatch(r"release_v([1-6])", tag)
    part = re.fullmatch(r"v([1-6])(?:_v([1-6]))?", tag)
    if whole:
        return LiteRelease(tag, FILES[: int(whole[1])])
    if part and int(part[1]) <= int(part[2] or part[1]):
        return LiteRelease(tag, FILES[int(part[1]) - 1 : int(part[2] or part[1])])
    raise SuiteError(f"--release {tag}: expected release_v1 to release_v6, or single versions as v6 or v4_v6")


@dataclass(frozen=True)
class HubFile:
    """The one test file of a small data set, found by the file list at `revision`."""

    dataset: str
    revision: str
    problems: int

    @property
    def url(self) -> str:
        return f"{hub()}/datasets/{self.dataset}/tree/{self.revision}"

    @property
    def folder(self) -> Path:
        return cache_folder() / "data" / "livecodebench" / f"{self.dataset.rpartition('/')[2]}-{self.revision[:12]}"

    @property
    def kept(self) -> Path | None:
        """The file, if it was fetched."""
        return next((path for path in sorted(self.folder.glob("*")) if path.suffix in (".jsonl", ".parquet")), None)

    @property
    def present(self) -> bool:
        """Whether it can be read without a network."""
        return self.kept is not None

    def fetch(self) -> Path:
        """The file, from where it is kept or fetched to there. Raises SuiteError."""
        kept = self.kept
        if kept is not None:
            return kept
        listing = f"{hub()}/api/datasets/{self.dataset}/tree/{self.revision}?recursive=true"
        content = _get(listing, self.dataset)
        try:
            names = [entry["path"] for entry in json.loads(content) if entry["type"] == "file"]
        except (ValueError, TypeError, KeyError):
            raise SuiteError(f"{listing}: expected a list of files, found none; {_instead(self.dataset)}") from None
        data = [name for name in names if name.endswith((".jsonl", ".parquet")) and "test" in name]
        if len(data) != 1:
            raise SuiteError(f"{listing}: expected one test file, found {len(data)}; {_instead(self.dataset)}")
        path: Path = self.folder / data[0].rpartition("/")[2]
        _fetch(f"{hub()}/datasets/{self.dataset}/resolve/{self.revision}/{data[0]}", path, self.dataset)
        return path


EXECUTION = HubFile("livecodebench/execution-v2", "main", 479)
"""No revision of it could be established; runs are told apart by the hash of what was read."""
TEST_OUTPUT = HubFile("livecodebench/test_generation", "6f3ac40bbecf81eba15899139d279b077f2816fd", 442)


# --- fetching -----------------------------------------------------------------------------------------


def hub() -> str:
    """The hub's address, or that of a mirror of it."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _instead(dataset: str) -> str:
    return f"pass --data PATH, a file or folder with the data of {dataset}"


def _check_room(size: int) -> None:
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < size:
            needed, left = f"{size / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
            raise SuiteError(f"{folder}: the data needs {needed}, and {left} are free; XDG_CACHE_HOME moves the cache")


def _get(url: str, dataset: str) -> bytes:
    import httpx

    try:
        response = httpx.get(url, follow_redirects=True, timeout=httpx.Timeout(READ_S, connect=CONNECT_S))
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SuiteError(f"cannot fetch {url}: {_why(error)}; {_instead(dataset)}") from None
    return response.content


def _fetch(url: str, path: Path, dataset: str, size: int | None = None, sha256: str | None = None) -> None:
    """Fetch `url` to `path`, going on where an earlier try ended. Raises SuiteError."""
    partial = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # another command may be fetching it
            if path.is_file() and size in (None, path.stat().st_size):
                return
            if size is None:  # nobody knows whether an earlier try came to the end
                stream.truncate(0)
            _stream(url, stream, size, dataset)
            found = file_sha256(partial)
            if sha256 is not None and found != sha256:
                stream.truncate(0)
                raise SuiteError(f"{url}: expected content of SHA-256 {sha256}, found {found}; {_instead(dataset)}")
            os.replace(partial, path)
    except OSError as error:
        raise SuiteError(f"{path}: cannot be kept: {error}") from None


def _stream(url: str, stream: Any, size: int | None, dataset: str) -> None:
    import httpx

    begun = stream.seek(0, os.SEEK_END)
    if size is not None and begun >= size:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begun}-"} if begun else {})
    timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
            response.raise_for_status()
            if begun and response.status_code != httpx.codes.PARTIAL_CONTENT:
                stream.truncate(0)
                begun = 0
            progress = _Progress(url.rpartition("/")[2], size, begun)
            for chunk in response.iter_raw():
                stream.write(chunk)
                progress.add(len(chunk))
        stream.flush()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        stream.flush()
        raise SuiteError(f"cannot fetch {url}: {_why(error)}; {_instead(dataset)}") from None


class _Progress:
    """A line on standard error for each tenth of a large file."""

    def __init__(self, name: str, size: int | None, done: int) -> None:
        self._name, self._size, self._done = name, size, done
        self._tenth = -1
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        if self._size is None or (tenth := 10 * self._done // self._size) == self._tenth:
            return
        self._tenth = tenth
        print(f"fetching {self._name}: {10 * tenth}% of {self._size / 1e6:,.0f} MB", file=sys.stderr, flush=True)


def _why(error: Any) -> str:
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else str(error).strip() or type(error).__name__


def joint_digest(digests: Sequence[str]) -> str:
    """What identifies several files in order, by their SHA-256; of one its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Of a file that may be too large for memory. Raises OSError."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
