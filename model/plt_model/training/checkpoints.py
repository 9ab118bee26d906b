"""Checkpoints that are whole or are not there.

A checkpoint is written into a hidden folder, sealed with the SHA-256 of every file in it, and only then renamed to
`checkpoint-<step>`. A kill leaves the hidden folder behind, never half a checkpoint. Whatever befalls a file later
(a bad disk, a cut copy) shows against the seal, and `last_good` falls back to the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

SEAL = "seal.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def staging(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is sealed."""
    return folder / f".checkpoint-{step}.partial"


def publish(folder: Path, step: int) -> Path:
    """Seal what lies in `staging` and give it its name, replacing a checkpoint of that step. Returns its folder."""
    source, target = staging(folder, step), folder / f"checkpoint-{step}"
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    sums = {name: _sha256(source / name) for name in names}
    (source / SEAL).write_text(json.dumps({"step": step, "sha256": sums}, indent=1) + "\n")
    for path in [*source.rglob("*"), source]:
        sync(path)
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    sync(folder)
    return target


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in one line; None when every file is as it was sealed."""
    seal = checkpoint / SEAL
    try:
        sums = json.loads(seal.read_text())["sha256"]
    except FileNotFoundError:
        return f"{seal} is missing"
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"{seal} cannot be read ({' '.join(str(error).split())})"
    if not isinstance(sums, dict) or not sums or not all(isinstance(value, str) for value in sums.values()):
        return f"{seal} cannot be read (expected the SHA-256 of every file)"
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        found = _sha256(path)
        if found != expected:
            return f"{path} has SHA-256 {found[:12]}..., expected {expected[:12]}..."
    return None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `folder`, whole or not, by step."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found)


def last_good(folder: Path, warn: Callable[[str], None]) -> tuple[int, Path] | None:
    """The newest whole checkpoint, as (step, folder), or None. Every newer one that is not whole is told to `warn`."""
    for step, path in reversed(checkpoints(folder)):
        problem = fault(path)
        if problem is None:
            return step, path
        warn(f"{path.name} is damaged and is left aside: {problem}")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what kills left half-written."""
    for _, path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have a file or folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
