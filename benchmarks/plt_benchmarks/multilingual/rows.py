"""The problems: rows of the official data set, or of files in its format, checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plt_benchmarks.datafiles import file_rows
from plt_benchmarks.hub import fetch_hub, hub_cache, hub_url
from plt_benchmarks.multilingual.languages import Language, language
from plt_benchmarks.protocols import Sample, SuiteData, SuiteError

Benchmark = Literal["humaneval", "mbpp"]
_ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
NOT_OFFICIAL = ("py",)
"""Languages that older copies have and the official data has not: Python is where the problems come from."""
_ALIASES = {"go_test.go": "go", "python": "py", "bash": "sh", "rust": "rs", "ruby": "rb"}
"""Other names of languages in rows of older copies."""


@dataclass(frozen=True)
class Hub:
    """The official data set at a fixed commit of its repository, which names its content."""

    repo: str
    revision: str
    benchmark: Benchmark

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.revision[:7]}"

    @property
    def url(self) -> str:
        return hub_url(self.repo)

    def pattern(self, key: str) -> str:
        return f"{self.benchmark}-{key}/*.parquet"

    @property
    def present(self) -> bool:
        """Whether the hub's cache holds something of that commit."""
        return any(self.kept.glob(f"{self.benchmark}-*/*.parquet"))

    @property
    def kept(self) -> Path:
        """Where the hub's cache keeps that commit."""
        return hub_cache(self.repo) / "snapshots" / self.revision


@dataclass(frozen=True)
class Problem:
    """One problem in one language; `row` has name, prompt, tests and stop_tokens."""

    language: Language
    row: dict[str, Any]


def problem_of(sample: Sample) -> Problem:
    """The problem that a sample of these suites holds."""
    return Problem(language(sample.data["language"]), dict(sample.data))


def load_rows(hub: Hub, source: Path | None, languages: Sequence[Language], notes: Sequence[str]) -> SuiteData:
    """The problems of `languages`, each problem's languages one after the other, from `source` (file or folder) or
    the hub. A language without any is left out, and a note says so. Raises SuiteError."""
    keys = [each.key for each in languages]
    if source is None:
        files, revision, name = _hub_files(hub, keys), hub.name, hub.url
    else:
        files, revision, name = _local_files(hub.benchmark, source), f"local:{source.name}", str(source)
    found: dict[str, dict[str, Any]] = {}
    for path in files:
        for place, row in file_rows(path):
            checked = _checked(place, row, hub.benchmark, keys)
            if checked is None:
                continue
            if checked["id"] in found:
                raise SuiteError(f"{place}: {checked['id']} is there for the second time")
            found[checked["id"]] = checked
    if not found:
        official = source is None and set(keys) <= set(NOT_OFFICIAL)
        instead = "; HumanEval's own Python is --suite humaneval" if official else ""
        raise SuiteError(f"{name}: expected {hub.benchmark} problems in {', '.join(keys)}, found none{instead}")
    absent = [each for each in languages if not any(row["language"] == each.key for row in found.values())]
    told = [*notes]
    if absent:
        titles = ", ".join(f"{each.title} ({each.key})" for each in absent)
        told.append(f"left out, because {name} has no {hub.benchmark} problems in it: {titles}")
    samples = [Sample(row["id"], row) for row in sorted(found.values(), key=lambda row: _order(row, keys))]
    return SuiteData(tuple(samples), revision, _digest(samples), name, tuple(told))


def _order(row: dict[str, Any], keys: list[str]) -> tuple[int, str, int]:
    number = re.search(r"_(\d+)_", row["name"])
    return (int(number[1]) if number else 0, row["name"], keys.index(row["language"]))


def _digest(samples: Iterable[Sample]) -> str:
    """SHA-256 of what is asked and judged, in order: the same for parquet and JSON lines."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(dict(sample.data), sort_keys=True).encode("ascii") + b"\n")
    return digest.hexdigest()


# --- checking -------------------------------------------------------------------------------------------


def _checked(place: str, row: dict[str, Any], benchmark: Benchmark, keys: list[str]) -> dict[str, Any] | None:
    """What we need of a row; None for another language or benchmark. Raises SuiteError for a row that is not in the
    official format."""
    for key in ("name", "language", "prompt", "tests"):
        if not isinstance(row.get(key), str):
            found = type(row[key]).__name__ if key in row else f"the keys {', '.join(sorted(row)) or 'none'}"
            raise SuiteError(f"{place}: expected {key!r} to be a string, found {found}")
    name, key = row["name"], _ALIASES.get(row["language"], row["language"])
    if key not in keys or not name.lower().startswith(f"{benchmark}_"):
        return None
    stops = row.get("stop_tokens")
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise SuiteError(f"{place}: expected 'stop_tokens' to be a list of strings, found {str(stops)[:80]!r}")
    if not re.search(language(key).test, row["tests"], re.MULTILINE):
        raise SuiteError(f"{place}: expected 'tests' to have {language(key).title} tests of MultiPL-E, found none")
    checked = {"id": f"{key}/{name}", "name": name, "language": key, "prompt": row["prompt"], "tests": row["tests"]}
    solution = row.get("canonical_solution")
    gold = {"canonical_solution": solution} if isinstance(solution, str) else {}
    return {**checked, "stop_tokens": [*stops], **gold}


# --- reading --------------------------------------------------------------------------------------------


def _local_files(benchmark: Benchmark, source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise SuiteError(f"data {source}: no such file or folder")
    found = sorted(path for path in source.rglob(f"{benchmark}-*") if path.is_file() or path.is_dir())
    files = [file for path in found for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    wanted = [file for file in dict.fromkeys(files) if file.name.endswith(_ENDINGS) and not _other_format(file)]
    if not wanted:
        raise SuiteError(
            f"data {source}: expected files {benchmark}-LANGUAGE.jsonl[.gz] or folders {benchmark}-LANGUAGE with "
            "parquet files in it, found none"
        )
    return wanted


def _other_format(file: Path) -> bool:
    """HumanEval-X's Python, which lies beside the translations in some copies: other ids, other keys."""
    return file.name.startswith("humaneval-python.")


def _hub_files(hub: Hub, keys: list[str]) -> list[Path]:
    """The official files of the languages that there are: from the hub's cache where it has them all, else fetched."""
    patterns = [hub.pattern(key) for key in keys if key not in NOT_OFFICIAL]
    folder = hub.kept
    if not all(any(folder.glob(pattern)) for pattern in patterns):
        which = f"{hub.benchmark}-LANGUAGE"
        instead = f"pass --data PATH, a folder with {which}.jsonl files or {which} folders"
        folder, _ = fetch_hub(hub.repo, patterns, revision=hub.revision, instead=instead)
    return [file for pattern in patterns for file in sorted(folder.glob(pattern))]
