"""Problems from files: pinned releases fetched once, files and folders given by path, and their rows, checked."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_benchmarks.protocols import Sample, SuiteData, SuiteError

CONNECT_S, READ_S = 5.0, 60.0
PARTIAL = ("-Mini", "-NoExtreme")


@dataclass(frozen=True)
class Release:
    """A published file at a fixed version. `stem` begins the names of its files, `md5` (as published) and `sha256` are
    of the uncompressed bytes."""

    stem: str
    version: str
    url: str
    md5: str
    sha256: str

    @property
    def name(self) -> str:
        return f"{self.stem}-{self.version}"

    @property
    def kept(self) -> Path:
        """Where it lies once it was fetched."""
        return cache_folder() / "data" / f"{self.name}.jsonl{'.gz' if self.packed else ''}"

    @property
    def packed(self) -> bool:
        """Whether it is published compressed."""
        return self.url.endswith(".gz")

    @property
    def present(self) -> bool:
        """Whether it can be read without a network."""
        return not self.url.startswith("https://") or self.kept.is_file()


@dataclass(frozen=True)
class DataFile:
    """The uncompressed content of a data file, where it came from, and what it is (see SuiteData.revision)."""

    content: bytes
    source: str
    revision: str
    sha256: str


def cache_folder() -> Path:
    """The folder for what can be computed or fetched again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "plt-eval"


def open_data(release: Release, source: Path | None) -> DataFile:
    """The file at `source` (or the best one in that folder), or the release when None. Raises SuiteError."""
    if source is None:
        return DataFile(_released(release), release.url, release.name, release.sha256)
    path = find_file(release.stem, source)
    content = read_bytes(path)
    digest = hashlib.sha256(content).hexdigest()
    revision = release.name if digest == release.sha256 else f"local:{path.name}"
    return DataFile(content, str(path), revision, digest)


def find_file(stem: str, source: Path) -> Path:
    """`source` itself, or in it or its direct sub-folders the file whose name begins with `stem`, a full one before
    a partial one. Raises SuiteError."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise SuiteError(f"data {source}: no such file or folder")
    folders = [source, *sorted(path for path in source.iterdir() if path.is_dir())]
    found = [path for folder in folders for path in _data_files(folder, stem)]
    if not found:
        raise SuiteError(f"data {source}: expected {stem}*.jsonl[.gz] in it or its sub-folders, found no such file")
    return min(found, key=lambda path: (any(part in path.name for part in PARTIAL), found.index(path)))


def _data_files(folder: Path, stem: str) -> list[Path]:
    found = [path for path in folder.glob(f"{stem}*") if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def read_bytes(path: Path) -> bytes:
    """The content of a file, uncompressed if its name ends in .gz. Raises SuiteError."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.name.endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise SuiteError(f"data {path}: cannot be read, {error}") from error


def rows(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row that is not blank, with its place ("file, line n") for messages. Raises SuiteError."""
    for number, line in enumerate(file.content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{file.source}, line {number}"
        yield place, parsed_row(place, line)


def parsed_row(place: str, line: bytes) -> dict[str, Any]:
    """The row in a line of JSON. Raises SuiteError, which names `place`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SuiteError(f"{place}: expected a JSON object, found broken JSON ({error})") from None
    if not isinstance(row, dict):
        raise SuiteError(f"{place}: expected a JSON object, found {type(row).__name__}")
    return row


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a parquet file, with its place ("file, row n"). Raises SuiteError."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise SuiteError(f"data {path}: cannot be read, {error}") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", row


def file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a file of JSON lines, compressed or not, or of parquet. Raises SuiteError."""
    return parquet_rows(path) if path.suffix == ".parquet" else rows(DataFile(read_bytes(path), str(path), "", ""))


def _released(release: Release) -> bytes:
    """The content of the release, from the cache or fetched into it."""
    if release.kept.is_file():
        try:
            content = read_bytes(release.kept)
        except SuiteError:
            content = b""
        if hashlib.sha256(content).hexdigest() == release.sha256:
            return content
    fetched = _fetch(release)
    try:
        content = gzip.decompress(fetched) if release.packed else fetched
    except (OSError, EOFError, zlib.error) as error:
        raise SuiteError(f"{release.url}: what was fetched is no gzip file ({error}); {_instead(release)}") from None
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != release.md5 or hashlib.sha256(content).hexdigest() != release.sha256:
        raise SuiteError(f"{release.url}: expected content of MD5 {release.md5}, found {digest}; {_instead(release)}")
    _keep(release.kept, fetched)
    return content


def _fetch(release: Release) -> bytes:
    import httpx

    try:
        timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
        response = httpx.get(release.url, follow_redirects=True, timeout=timeout)
        response.raise_for_status()
    except httpx.HTTPStatusError as error:
        raise SuiteError(
            f"cannot fetch {release.url}: HTTP {error.response.status_code}; {_instead(release)}"
        ) from None
    except httpx.HTTPError as error:
        why = str(error).strip() or type(error).__name__
        raise SuiteError(f"cannot fetch {release.url}: {why}; {_instead(release)}") from None
    return response.content


def _instead(release: Release) -> str:
    return f"pass --data PATH, a file or folder with {release.stem}.jsonl{'.gz' if release.packed else ''}"


def _keep(path: Path, fetched: bytes) -> None:
    """Best effort: without a place to keep it, the next run fetches it again."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(fetched)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def suite_data(file: DataFile, check_row: Callable[[str, dict[str, Any]], None], *, key: str = "task_id") -> SuiteData:
    """A suite's problems from rows that pass `check_row(place, row)`, in order, by their `key`. Raises SuiteError for
    one that is there twice and a file without problems, and whatever `check_row` raises."""
    samples: dict[str, Sample] = {}
    for place, row in rows(file):
        check_row(place, row)
        if row[key] in samples:
            raise SuiteError(f"{place}: {key} {row[key]} is there for the second time")
        samples[row[key]] = Sample(row[key], row)
    if not samples:
        raise SuiteError(f"{file.source}: expected problems, found none")
    return SuiteData(tuple(samples.values()), file.revision, file.sha256, file.source)
