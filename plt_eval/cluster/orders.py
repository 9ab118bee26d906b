"""What travels between the command and the machines that judge for it; plain data, all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import Score, Suite, SuiteError
from plt_eval.swe.containers import ContainerLimits, KeepImages

SCORER_PACKAGES = ("plt-eval", "evalplus", "swebench", "multi-swe-bench")
"""Packages whose version may change a verdict; what lies in environments of its own is in a suite's version."""
DOCKER = "docker"
"""Ray's custom resource: how many SWE judgements a machine takes at a time."""


class Made(Protocol):
    """Makes a suite on another machine. Raises SuiteError."""

    def make(self) -> Suite: ...


@dataclass(frozen=True)
class Recipe:
    """The suite called `name` of those that the registry has for `key` and `options`, with `changes` in its fields."""

    key: str
    options: SuiteOptions
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Suite:
        from plt_benchmarks.registry import get_suite

        for suite in get_suite(self.key, self.options):
            if suite.name == self.name:
                made: Suite = replace(suite, **self.changes) if self.changes else suite  # type: ignore[type-var]
                return made
        raise SuiteError(f"this version has no suite {self.name}")


@dataclass(frozen=True)
class PatchOrder:
    """How patches are judged: see plt_eval.swe. `run` labels the containers, `driver` says whose they are."""

    limits: ContainerLimits
    keep: KeepImages
    token: str
    run: str
    driver: str


@dataclass(frozen=True)
class Order:
    """Everything that judging an answer takes besides the sample and the answer. `sandbox` is None for a suite that
    runs no code. `expected` is what the machine must have as the command's own has it: name -> version."""

    suite: str
    recipe: Made
    expected: Mapping[str, str]
    sandbox: str | None = None
    sandbox_image: str | None = None
    patches: PatchOrder | None = None

    @property
    def key(self) -> str:
        """Equal for orders that one scorer serves."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


@dataclass(frozen=True)
class Judgement:
    """What a machine answers: a score, or why it cannot judge at all (`refused`). `files` are the harness' own, as a
    compressed tar, to be kept in the run's folder."""

    node: str
    score: Score | None = None
    refused: str = ""
    files: bytes = b""


@dataclass(frozen=True)
class Introduction:
    """What a machine says of itself before it judges. `refused` says why it cannot. `images` are those of the asked
    ones that are there, `free_disk` the bytes free for images (None: unknown)."""

    packages: Mapping[str, str]
    hardware: Mapping[str, Any]
    refused: str = ""
    images: frozenset[str] = frozenset()
    free_disk: int | None = None


def expectations(suite: Suite) -> dict[str, str]:
    """What decides verdicts here: the versions of suite and scorers, and of our own code."""
    found = {"suite": suite.version, "code": code_digest()}
    for name in SCORER_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """As in "evalplus 0.3.1, here 0.3.0", for each that differs."""
    told = {"code": "plt-eval's own code", "suite": "the suite's version"}
    return [
        f"{told.get(name, name)}: {found.get(name, 'missing')[:80]} there, {version[:80]} here"
        for name, version in expected.items()
        if found.get(name, "missing") != version
    ]


@cache
def code_digest() -> str:
    """Hash of the source that judges: a version's number says nothing of what was changed since."""
    import plt_benchmarks
    import plt_eval

    benchmarks, ours = Path(plt_benchmarks.__file__).parent, Path(plt_eval.__file__).parent
    digest = hashlib.sha256()
    for base, folders in ((benchmarks, (".",)), (ours, ("cluster", "sandbox", "swe"))):
        files = (path for folder in folders for path in (base / folder).rglob("*"))
        for path in sorted(file for file in files if file.suffix in (".py", ".json", ".jsonl", ".txt")):
            digest.update(f"{path.relative_to(base)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
