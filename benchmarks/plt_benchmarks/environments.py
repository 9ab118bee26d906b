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
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from plt_benchmarks.datafiles import cache_folder
from plt_benchmarks.protocols import Need, SuiteError

_DONE = "plt-eval.json"
"""Written last: an environment without it was never finished."""


@dataclass(frozen=True)
class Environment:
    """What `plt-eval install NAME` installs: `requirements` as pip takes them, and `summary`, what for, in a line.
    `options` are further arguments for pip. `bare` is installed afterwards without what it says that it requires.
    `python_version` is the version that the requirements are for, as in "3.11"; None means whichever runs us.
    `oldest_python` takes any Python of this machine from that version on: it is for programs that are started as
    processes, as jobs in the sandbox see the running Python and those in /usr only. `extras` are arguments for its
    Python that add to it what it can do without, each with what is missing when that fails."""

    name: str
    summary: str
    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    python_version: str | None = None
    oldest_python: tuple[int, int] | None = None
    extras: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def folder(self) -> Path:
        """Where it lies: of its own for each set of requirements and each Python."""
        python = self.oldest_python or (sys.version_info[:2], sys.base_prefix)
        told = json.dumps([self.requirements, self.options, python, *([self.bare] if self.bare else [])])
        root = os.environ.get("PLT_EVAL_ENVIRONMENTS")
        base = Path(root) if root else cache_folder() / "environments"
        return base.absolute() / f"{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def present(self) -> bool:
        """Whether it was installed to its end, and the Python that it was made with is still there."""
        return (self.folder / _DONE).is_file() and (self.folder / "bin" / "python").exists()

    @property
    def python(self) -> Path:
        """Its Python. Raises SuiteError where it is not installed."""
        if not self.present:
            raise SuiteError(f"{self.summary} needs an environment of its own: plt-eval install {self.name}")
        return self.folder / "bin" / "python"

    def need(self) -> Need:
        """The environment, for listings."""
        return Need(f"environment {self.name}", self.present, f"plt-eval install {self.name}")

    def install(self, notify: Callable[[str], None], *, again: bool = True) -> None:
        """Make it, anew if an earlier try was cut short; without `again` not if it is there. Waits for another process
        that makes it. `notify` hears each step. Raises SuiteError."""
        import filelock

        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder.with_name(f"{self.folder.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                notify("another process installs it: waiting")
                lock.acquire()
            try:
                if again or not self.present:
                    self._make(notify)
            finally:
                lock.release()
        except OSError as error:
            raise SuiteError(f"environment {self.name} in {self.folder}: {error}") from error

    def _make(self, notify: Callable[[str], None]) -> None:
        folder, python = self.folder, self._base_python()
        (folder / _DONE).unlink(missing_ok=True)  # first of all: a removal that is cut short must not leave it
        if folder.exists():
            shutil.rmtree(folder)
        notify(f"a virtual environment in {folder}")
        _call([python, "-m", "venv", str(folder)])
        notify(f"pip install {textwrap.shorten(' '.join(self.requirements), 300)}")
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        _call([*pip, "install", "--no-input", *self.options, *self.requirements], _PipProgress(notify))
        if self.bare:
            notify(f"pip install --no-deps {' '.join(self.bare)}")
            _call([*pip, "install", "--no-input", *self.options, "--no-deps", *self.bare])
        for missing, arguments in self.extras:
            try:
                _call([str(folder / "bin" / "python"), *arguments])
            except SuiteError as error:
                notify(f"without {missing} ({error})")
        told = {"name": self.name, "packages": _call([*pip, "freeze"]).splitlines()}
        partial = folder / f"{_DONE}.partial"
        partial.write_text(json.dumps(told, indent=1))
        os.replace(partial, folder / _DONE)

    def _base_python(self) -> str:
        """The Python that makes it: the running one where that will do, else one that this machine has besides. Raises
        SuiteError where there is none of the version."""
        running = "{}.{}".format(*sys.version_info)
        if self.oldest_python is not None:
            if sys.version_info[:2] >= self.oldest_python:
                return sys.executable
            major, minor = self.oldest_python
            wanted, kinds = f"{major}.{minor} or newer", [f"{major}.{later}" for later in range(minor, minor + 8)]
        elif self.python_version in (None, running):
            return sys.executable
        else:
            wanted, kinds = str(self.python_version), [str(self.python_version)]
        found = next(filter(_runs, _pythons(kinds)), None)  # a shim may be there for no Python at all
        if found is None:
            raise SuiteError(
                f"environment {self.name} is for Python {wanted}, found {running}: install it, so that PATH has "
                f"python{kinds[0]}"
            )
        return found


def _pythons(versions: list[str]) -> Iterator[str]:
    """What may be Pythons of `versions`, the first of them first: on PATH, and among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for version in versions:
        on_path = shutil.which(f"python{version}")
        yield from [on_path] if on_path else []
        yield from (str(found) for found in sorted(pyenv.glob(f"*/bin/python{version}")))


def _runs(python: str) -> bool:
    with suppress(OSError, subprocess.TimeoutExpired):
        command = [python, "-c", "import venv, ensurepip"]
        return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0
    return False


def _call(command: list[str], heard: Callable[[str], None] | None = None) -> str:
    """The standard output of `command`, which `heard` gets line by line. Raises SuiteError with the line that says what
    went wrong."""
    own = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
    own["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"  # its notice would be the last line
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True, errors="replace",
            env=own,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if heard is not None:
                    heard(line)
        errors.seek(0)
        complaints = errors.read()
    if process.returncode:
        lines = (complaints.strip() or "".join(said).strip() or "no output").splitlines()
        telling = [line for line in lines if line.startswith("ERROR:")] or lines
        raise SuiteError(f"{' '.join(command[:6])}...: exit code {process.returncode}: {telling[-1]}")
    return "".join(said)


class _PipProgress:
    """Tells from pip's lines how far it is."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify
        self._found = 0

    def __call__(self, line: str) -> None:
        if line.startswith(("Collecting ", "Processing ")):
            self._found += 1
            if self._found % PACKAGES_A_LINE == 0:
                self._notify(f"{self._found} packages found")
        elif line.startswith("Installing collected packages"):
            self._notify(f"packages to install: {line.count(',') + 1}")


PACKAGES_A_LINE = 25
_NOT_OURS = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
"""Variables that would send packages elsewhere, or bring some of another place."""
