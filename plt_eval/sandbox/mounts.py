"""Which parts of this machine a job sees: the system and the running Python, read-only, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime")
_SETTINGS = ("java-*-openjdk", "R/ldpaths", "R/Renviron", "mono", "racket", "ldc2.conf", "dmd.conf")
"""What compilers and interpreters that distributions package keep in /etc and do not start, or not find their
libraries, without."""
_PYTHON_PARTS = ("bin", "lib", "lib64", "pyvenv.cfg")


def python_folders() -> list[Path]:
    """Where the running Python lives, its virtual environment and the installation behind it, without repeats."""
    found = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    found.append(str(Path(sys.executable).resolve().parent.parent))
    return [Path(name) for name in dict.fromkeys(os.path.abspath(name) for name in found)]


def system_mounts(environment: Path | None = None) -> list[str]:
    """The arguments for bubblewrap that make up the read-only system, with the virtual environment `environment`."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in _SYSTEM:
        arguments += place(Path("/") / name)
    arguments += ["--dir", "/etc"]
    for name in _ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for path in sorted(path for pattern in _SETTINGS for path in Path("/etc").glob(pattern)):
        arguments += ["--dir", str(path.parent), "--ro-bind-try", str(path), str(path)]
    private = _private_folders()
    for folder in private:
        arguments += ["--tmpfs", str(folder)]
    for prefix in python_folders():
        seen = prefix == Path("/") or prefix.is_relative_to("/usr")
        if not seen or any(map(prefix.is_relative_to, private)):
            for part in _PYTHON_PARTS:
                arguments += place(prefix / part)
    if environment is not None:
        arguments += _environment_mounts(environment, private)
    for folder in private:
        arguments += ["--remount-ro", str(folder)]
    return arguments


def _environment_mounts(folder: Path, private: list[Path]) -> list[str]:
    """A virtual environment at its own place, even where that is a link, and the Python that it was made with."""
    arguments = ["--dir", str(folder.parent), "--ro-bind", str(folder), str(folder)]
    python = folder / "bin" / "python"
    links = [python]
    while links[-1].is_symlink() and len(links) < 40:
        links.append(links[-1].parent / os.readlink(links[-1]))
    behind = [Path(os.path.normpath(link)).parent.parent for link in [*links[1:], python.resolve()]]
    known = [folder, *python_folders()]
    for prefix in dict.fromkeys(behind):
        seen = prefix == Path("/") or prefix.is_relative_to("/usr")
        if prefix not in known and (not seen or any(map(prefix.is_relative_to, private))):
            for part in _PYTHON_PARTS:
                arguments += place(prefix / part)
    return arguments


def place(path: Path) -> list[str]:
    """Arguments for bubblewrap: `path` at its own place, a link as the link it is, anything else bound read-only. Its
    parent folders are made first, because those that bubblewrap makes on its way are closed to all but root."""
    if path.is_symlink():
        return ["--dir", str(path.parent), "--symlink", os.readlink(path), str(path)]
    return ["--dir", str(path.parent), "--ro-bind", str(path), str(path)] if path.exists() else []


def _private_folders() -> list[Path]:
    """Homes and checkouts that lie inside /usr (as containers like to have them) and would be seen with it."""
    return sorted({folder for folder in _candidates() if folder.is_relative_to("/usr/") and folder.is_dir()})


def _candidates() -> Iterator[Path]:
    if (home := os.environ.get("HOME")) and home != "/usr":
        yield Path(home).resolve()
    here = Path(__file__).resolve().parents[2]
    for folder in (here, Path.cwd()):
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            yield folder
