"""Environments of their own for official packages that cannot live beside ours.

`plt-eval install tools` makes one: a virtual environment with pinned requirements in the cache folder. Its programs are
started as processes, or run in the sandbox by its Python (SandboxJob.environment); nothing of it is ever imported here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plt_benchmarks.datafiles import cache_folder
from plt_benchmarks.protocols import Need, SuiteError

_DONE = "plt-eval.json"
"""Written last: an environment without it was never finished."""


@dataclass(frozen=True)
class Environment:
    """What `plt-eval install NAME` installs: `requirements` as pip takes them, and `summary`, what for, in a line.
    `options` are further arguments for pip."""

    name: str
    summary: str
    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where it lies: of its own for each set of requirements and each Python."""
        python = (sys.version_info[:2], sys.base_prefix)
        told = json.dumps([self.requirements, self.options, python])
        root = os.environ.get("PLT_EVAL_ENVIRONMENTS")
        base = Path(root) if root else cache_folder() / "environments"
        return base.absolute() / f"{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def present(self) -> bool:
        """Whether it was installed to its end."""
        return (self.folder / _DONE).is_file()

    @property
    def python(self) -> Path:
        """Its Python. Raises SuiteError where it is not installed."""
        if not self.present:
            raise SuiteError(f"{self.summary} needs an environment of its own: plt-eval install {self.name}")
        return self.folder / "bin" / "python"

    def need(self) -> Need:
        """The environment, for listings."""
        return Need(f"environment {self.name}", self.present, f"plt-eval install {self.name}")

    def install(self, notify: Callable[[str], None]) -> None:
        """Make it, anew if an earlier try was cut short. `notify` hears each step. Raises SuiteError."""
        folder = self.folder
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            notify(f"a virtual environment in {folder}")
            _call([sys.executable, "-m", "venv", str(folder)])
            notify(f"pip install {' '.join(self.requirements)}")
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-input"]
            _call([*pip, *self.options, *self.requirements])
            frozen = _call([str(folder / "bin" / "python"), "-m", "pip", "freeze"])
            (folder / _DONE).write_text(json.dumps({"name": self.name, "packages": frozen.split()}, indent=1))
        except OSError as error:
            raise SuiteError(f"environment {self.name} in {folder}: {error}") from error


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise SuiteError(f"{' '.join(command[:6])}...: exit code {done.returncode}: {last}")
    return done.stdout
