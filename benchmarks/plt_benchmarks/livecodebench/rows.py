"""Rows of LiveCodeBench's files (JSON lines or parquet), those of a window of dates, in the official order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from plt_benchmarks.datafiles import parquet_rows, parsed_row
from plt_benchmarks.livecodebench.releases import file_sha256, joint_digest
from plt_benchmarks.protocols import Sample, SuiteData, SuiteError


@dataclass(frozen=True)
class Window:
    """Days on which contests were held, both included; None leaves an end open."""

    since: date | None = None
    until: date | None = None

    def __post_init__(self) -> None:
        if self.since and self.until and self.since > self.until:
            raise SuiteError(
                f"--since {self.since} --until {self.until}: expected the first day not to be after the last"
            )

    def __contains__(self, day: date) -> bool:
        return (self.since is None or self.since <= day) and (self.until is None or day <= self.until)

    @property
    def tag(self) -> str:
        """For versions: empty when it is open at both ends."""
        ends = (f"+since-{self.since}" if self.since else "", f"+until-{self.until}" if self.until else "")
        return "".join(ends)

    @property
    def flags(self) -> str:
        """As the user gave it."""
        ends = (f"--since {self.since}" if self.since else "", f"--until {self.until}" if self.until else "")
        return " ".join(end for end in ends if end)


OPEN = Window()


@dataclass(frozen=True)
class Place:
    """Where a row of JSON lines lies in its file."""

    path: Path
    number: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}"

    def read(self) -> dict[str, Any]:
        """The row. Raises SuiteError when it is not there any more."""
        try:
            with open(self.path, "rb") as stream:
                stream.seek(self.offset)
                row = json.loads(stream.read(self.size))
        except (OSError, ValueError, RecursionError) as error:
            raise SuiteError(f"{self}: cannot be read any more: {error}") from None
        if not isinstance(row, dict):
            raise SuiteError(f"{self}: expected a JSON object, found {type(row).__name__}")
        return row


Row = tuple[str, Place | None, dict[str, Any]]
"""A place for messages, the place to read it again from, and the row."""


def rows_of(path: Path) -> Iterator[Row]:
    """Each row of a file. Raises SuiteError."""
    if path.name.endswith(".gz"):
        raise SuiteError(f"data {path}: expected .jsonl or .parquet, found a compressed file: unpack it first")
    if path.suffix == ".parquet":
        return ((place, None, row) for place, row in parquet_rows(path))
    return _json_rows(path)


def _json_rows(path: Path) -> Iterator[Row]:
    offset = 0
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                place = Place(path, number, offset, len(line))
                offset += len(line)
                if line.strip():
                    yield str(place), place, parsed_row(str(place), line)
    except OSError as error:
        raise SuiteError(f"data {path}: cannot be read, {error}") from error


def contest_day(place: str, row: Mapping[str, Any]) -> date:
    """The day of a row's contest. Raises SuiteError."""
    found = row.get("contest_date")
    try:
        if isinstance(found, datetime):
            return found.date()
        if isinstance(found, int) and not isinstance(found, bool):  # how pandas writes a date into JSON
            return datetime.fromtimestamp(found / 1000, UTC).date()
        return datetime.fromisoformat(str(found)).date()
    except (ValueError, OverflowError, OSError):
        raise SuiteError(f"{place}: expected 'contest_date' to be a date, found {str(found)[:80]!r}") from None


@dataclass(frozen=True)
class Reader:
    """How rows become samples: `keys` have to be there as strings, `sample` makes a problem of a row, and `order`
    sorts them."""

    keys: Sequence[str]
    sample: Callable[[str, Place | None, dict[str, Any]], Sample]
    order: Callable[[Sample], Any]


def read_data(paths: Sequence[Path], reader: Reader, window: Window, revision: str, sha256: str) -> SuiteData:
    """The problems of the files within the window. Raises SuiteError."""
    days: dict[str, date] = {}
    samples: list[Sample] = []
    for path in paths:
        for place, again, row in rows_of(path):
            day = contest_day(place, row)
            _check_keys(place, row, reader.keys)
            sample = reader.sample(place, again, {**row, "contest_date": day.isoformat()})
            if sample.id in days:
                raise SuiteError(f"{place}: problem {sample.id} is there for the second time")
            days[sample.id] = day
            if day in window:
                samples.append(sample)
    source = ", ".join(map(str, paths))
    if not days:
        raise SuiteError(f"{source}: expected problems, found none")
    if not samples:
        first, last = min(days.values()), max(days.values())
        raise SuiteError(
            f"{window.flags}: no problem of these dates among {len(days)}, of contests from {first} to {last}"
        )
    ordered = tuple(sorted(samples, key=reader.order))
    left_out = frozenset(name for name, day in days.items() if day not in window)
    return SuiteData(ordered, revision, sha256, source, left_out=left_out)


def _check_keys(place: str, row: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in keys:
        if not isinstance(row.get(key), str):
            found = type(row[key]).__name__ if key in row else f"the keys {', '.join(sorted(row)) or 'none'}"
            raise SuiteError(f"{place}: expected {key!r} to be a string, found {found}")


def digest_of(paths: Sequence[Path]) -> str:
    """Of one file its SHA-256; of several that of theirs, in order. Raises SuiteError."""
    try:
        return joint_digest([file_sha256(path) for path in paths])
    except OSError as error:
        raise SuiteError(f"data {error.filename}: cannot be read, {error}") from error


def dates_of(samples: Sequence[Sample]) -> str:
    """ "contests from 2023-05-07 to 2024-03-02"."""
    days = sorted(str(sample.data["contest_date"]) for sample in samples)
    return f"contests from {days[0]} to {days[-1]}"


def find_files(source: Path, names: Sequence[str], folders: Sequence[str]) -> list[Path]:
    """Those of `names` that lie together in `source`, in a folder of it whose name is one of `folders`, or in one of
    that; [] where there is none. Patterns with * give the first file that matches, in the order of names."""
    below = [path for path in sorted(source.iterdir()) if path.is_dir() and path.name in folders]
    inner = [path for folder in below for path in sorted(folder.iterdir()) if path.is_dir()]
    for folder in (source, *below, *inner):
        found = [path for name in names for path in sorted(folder.glob(name))[:1] if path.is_file()]
        if found:
            return found
    return []
