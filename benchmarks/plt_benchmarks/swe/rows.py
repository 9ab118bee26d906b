"""The rows of both benchmarks: read, checked, and brought to one form."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plt_benchmarks.datafiles import file_rows
from plt_benchmarks.hub import fetch_hub, hub_cache, hub_url
from plt_benchmarks.protocols import Sample, SuiteData, SuiteError

Harness = Literal["swebench", "multi-swe-bench"]

NEEDS_NETWORK = re.compile(
    r"\b(pip3? install|-m pip install|conda install|apt(-get)? (update|install)|curl |wget |git (fetch|clone|pull)|"
    r"npm (ci|install|i)\b|npx |yarn (install|add)|pnpm |bundle install|gem install|composer (install|update)|"
    r"go (get|mod download|test|build)|cargo |mvn[wd]? |\./gradlew|gradle |ant )"
)
"""Commands of an evaluation script that fetch, or may."""


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub. `rows_sha256`, where it is known, pins the content of all rows whatever
    files they come in (see :func:`rows_digest`); the commit that was read is recorded in any case."""

    repo: str
    pattern: str
    count: int | None = None
    rows_sha256: str | None = None

    @property
    def url(self) -> str:
        return hub_url(self.repo)

    @property
    def present(self) -> bool:
        """Whether the hub's cache has something of it; a run asks the hub for its newest commit all the same."""
        return hub_cache(self.repo).is_dir()


@dataclass(frozen=True)
class Task:
    """One problem in one form. `workdir` is the repository's folder in the container of `image`; `environment` names
    what instances share images' layers with; `row` is the official row, unchanged."""

    id: str
    harness: Harness
    image: str
    workdir: str
    problem: str
    base_commit: str
    gold: str
    test_patch: str
    environment: str
    needs_network: bool
    row: Mapping[str, Any]


def task_of(sample: Sample) -> Task:
    """The task that a sample of these suites holds."""
    task = sample.data["task"]
    assert isinstance(task, Task)
    return task


# --- checking ---------------------------------------------------------------------------------------------

_SWEBENCH_KEYS = (
    "instance_id", "repo", "version", "base_commit", "problem_statement", "patch", "test_patch", "image",
    "eval_script", "log_parser", "eval_type",
)  # fmt: skip


def swebench_task(place: str, row: dict[str, Any]) -> Task:
    """Check a row of swebench 5. Raises SuiteError."""
    for key in _SWEBENCH_KEYS:
        if key not in row:
            old = " (rows of before swebench 5 have no image and no eval_script)" if "instance_id" in row else ""
            raise SuiteError(f"{place}: expected the key {key!r}, found {', '.join(sorted(row)) or 'no key'}{old}")
        if not isinstance(row[key], str):
            raise SuiteError(f"{place}: expected {key!r} to be text, found {type(row[key]).__name__}")
    for key in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        row[key] = _tests(f"{place}: {key!r}", row.get(key))
    if not row["image"] or not re.fullmatch(r"[A-Za-z0-9_.-]+", row["instance_id"]):
        raise SuiteError(f"{place}: expected an image and an instance_id of letters, digits and _.-")
    return Task(
        id=row["instance_id"],
        harness="swebench",
        image=row["image"],
        workdir="/testbed",
        problem=row["problem_statement"],
        base_commit=row["base_commit"],
        gold=row["patch"],
        test_patch=row["test_patch"],
        environment=_environment(row),
        needs_network=needs_network(row["eval_script"]),
        row=row,
    )


def _environment(row: Mapping[str, Any]) -> str:
    """Project and version; the project alone where the version is the instance's own number (Multilingual)."""
    own = row["instance_id"].endswith(f"-{row['version']}")
    return str(row["repo"]) if own else f"{row['repo']} {row['version']}"


def needs_network(script: str) -> bool:
    """Whether an evaluation script has commands that fetch: its patches and comments do not count."""
    text = re.sub(r"<<'(EOF_\w+)'\n.*?\n\1", "", script, flags=re.DOTALL)
    return any(NEEDS_NETWORK.search(line) for line in text.splitlines() if not line.lstrip().startswith("#"))


def multi_swe_task(place: str, row: dict[str, Any]) -> Task:
    """Check a row of Multi-SWE-bench. Raises SuiteError."""
    kinds = {"org": str, "repo": str, "number": int, "title": str, "base": dict, "fix_patch": str, "test_patch": str}
    for key, kind in kinds.items():
        if key not in row:
            raise SuiteError(f"{place}: expected the key {key!r}, found {', '.join(sorted(row)) or 'no key'}")
        if not isinstance(row[key], kind):
            raise SuiteError(f"{place}: expected {key!r} to be {kind.__name__}, found {type(row[key]).__name__}")
    org, repo, number = row["org"], row["repo"], row["number"]
    if not all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in (org, repo)):
        raise SuiteError(f"{place}: expected org and repo of letters, digits and _.-, found {org!r}, {repo!r}")
    issues = row.get("resolved_issues") or []
    told = [f"{issue.get('title') or ''}\n\n{issue.get('body') or ''}" for issue in issues if isinstance(issue, dict)]
    problem = "\n\n".join(told) or f"{row['title']}\n\n{row.get('body') or ''}"
    return Task(
        id=f"{org}__{repo}-{number}",
        harness="multi-swe-bench",
        image=f"mswebench/{org}_m_{repo}:pr-{number}".lower(),
        workdir=f"/home/{repo}",
        problem=problem,
        base_commit=str(row["base"].get("sha", "")),
        gold=row["fix_patch"],
        test_patch=row["test_patch"],
        environment=f"{org}/{repo}",
        needs_network=True,
        row=row,
    )


def _tests(place: str, value: Any) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise SuiteError(f"{place}: expected a list of tests, found text that is no JSON") from None
    if not isinstance(value, list) or not all(isinstance(test, str) for test in value):
        raise SuiteError(f"{place}: expected a list of tests, found {type(value).__name__}")
    return value


# --- reading ------------------------------------------------------------------------------------------------


def load_rows(hub: HubSource, source: Path | None, check: Callable[[str, dict[str, Any]], Task]) -> SuiteData:
    """Rows of parquet or JSON lines from `source` (file or folder), or from the hub. Raises SuiteError."""
    if source is not None:
        files, revision, name = _local_files(source), f"local:{source.name}", str(source)
    else:
        instead = "pass --data PATH, a .parquet or .jsonl of its rows"
        folder, commit = fetch_hub(hub.repo, [hub.pattern], instead=instead)
        files, revision = _local_files(folder), f"{hub.repo}@{commit}"
        name = hub.url
    tasks: dict[str, Task] = {}
    for path in files:
        for place, row in file_rows(path):
            task = check(place, row)
            if task.id in tasks:
                raise SuiteError(f"{place}: instance {task.id} is there for the second time")
            tasks[task.id] = task
    if not tasks:
        raise SuiteError(f"{name}: expected instances, found none")
    digest = rows_digest(task.row for task in tasks.values())
    if source is None and hub.rows_sha256 not in (None, digest):
        raise SuiteError(
            f"{name} at {revision}: expected the {hub.count} rows of SHA-256 {hub.rows_sha256}, found {len(tasks)} of "
            f"{digest}: the data has changed since; pass --data PATH with the rows to use"
        )
    if hub.rows_sha256 == digest:
        revision = f"{hub.repo}#{digest[:12]}"
    return SuiteData(tuple(Sample(task.id, {"task": task}) for task in tasks.values()), revision, digest, name)


def rows_digest(all_rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the rows in their order, each as JSON with sorted keys: the same for parquet and JSON lines."""
    digest = hashlib.sha256()
    for row in all_rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("ascii") + b"\n")
    return digest.hexdigest()


def _local_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise SuiteError(f"data {source}: no such file or folder")
    found = sorted(path for path in source.rglob("*") if path.name.endswith((".parquet", ".jsonl", ".jsonl.gz")))
    wanted = [path for path in found if "test" in path.name] or found
    if not wanted:
        raise SuiteError(f"data {source}: expected .parquet or .jsonl files in it, found none")
    return wanted
