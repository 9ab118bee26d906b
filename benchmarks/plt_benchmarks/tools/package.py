"""The official package: its environment, its processes, and a copy of its code for the sandbox.

The environment holds the gold answers too, so nothing of it is shown to a process that runs a model's calls: such a
process gets the code alone, as one archive.
"""

from __future__ import annotations

import io
import json
import os
import py_compile
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from plt_benchmarks.environments import Environment
from plt_benchmarks.protocols import SandboxJob, SandboxLimits, SuiteError

BFCL_VERSION = "2025.7.17"
ENVIRONMENT = Environment(
    name="tools",
    summary=f"BFCL v3 (bfcl-eval {BFCL_VERSION})",
    requirements=(
        f"bfcl-eval=={BFCL_VERSION}",
        "mpmath==1.3.0",
        "tree_sitter==0.21.3",
        "tree-sitter-java==0.21.0",
        "tree-sitter-javascript==0.21.4",
    ),
    options=("--no-deps",),
)
"""What judging and prompting import of the package's many requirements, at the versions that it asks for."""

LIMITS = SandboxLimits(wall_s=240, cpu_s=30, memory=2 << 30, processes=8, output_bytes=64 << 20)
ARCHIVE = "bfcl.zip"
_IN_SANDBOX = f"""
import os, sys
sys.path.insert(0, os.path.join(os.environ["SANDBOX_FILES"], {ARCHIVE!r}))
from inside.sandboxed import main
main()
"""
_HERE = Path(__file__).parent
_CODE = ("bfcl_eval/**/*.py", "mpmath/**/*.py")
_LEFT_OUT = ("local_inference", "scripts", "tests")


def in_environment(module: str) -> list[str]:
    """The command that runs `inside.MODULE` in the environment. Raises SuiteError where there is none."""
    program = f"import sys; sys.path.insert(0, {str(_HERE)!r}); from inside.{module} import main; main()"
    return [str(ENVIRONMENT.python), "-I", "-B", "-c", program]


def describe(data: Path | None, mode: str, categories: tuple[str, ...]) -> dict[str, Any]:
    """Problems with their first questions: see inside.describe. Raises SuiteError."""
    request = {"data": None if data is None else str(data.absolute()), "mode": mode, "categories": categories}
    with tempfile.TemporaryDirectory(prefix="plt-eval-bfcl-") as folder:
        done = subprocess.run(
            in_environment("describe"),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            cwd=folder,
        )
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise SuiteError(f"the official package of suite tools fails: {last}; plt-eval install tools --again")
    told: dict[str, Any] = json.loads(done.stdout)
    if "error" in told:
        raise SuiteError(told["error"])
    return told


def sandbox_job(request: Mapping[str, Any]) -> SandboxJob:
    """A job for inside.sandboxed."""
    return SandboxJob(_IN_SANDBOX, stdin=json.dumps(request).encode(), files={ARCHIVE: archive()}, limits=LIMITS)


@cache
def archive() -> bytes:
    """The package's code without its data, and ours that runs it; compiled for the Python that runs us, kept beside the
    environment. Raises SuiteError where that is not installed."""
    site = _site_packages()
    kept = ENVIRONMENT.folder / "code.zip"
    with suppress(OSError):
        return _with_ours(kept.read_bytes())
    made = _compiled({path.relative_to(site).as_posix(): path for path in _sources(site)})
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    with suppress(OSError):
        partial.write_bytes(made)
        os.replace(partial, kept)
    return _with_ours(made)


def _site_packages() -> Path:
    folder = ENVIRONMENT.python.parent.parent
    found = sorted(folder.glob("lib/python3*/site-packages"))
    if not found:
        raise SuiteError(f"{folder}: expected a virtual environment; plt-eval install tools --again")
    return found[0]


def _sources(site: Path) -> list[Path]:
    found = [path for pattern in _CODE for path in site.glob(pattern)]
    return sorted(path for path in found if not set(path.relative_to(site).parts) & set(_LEFT_OUT))


def _with_ours(official: bytes) -> bytes:
    return _compiled({f"inside/{path.name}": path for path in sorted((_HERE / "inside").glob("*.py"))}, official)


def _compiled(files: Mapping[str, Path], onto: bytes = b"") -> bytes:
    """An archive of sources, each with its compiled form for the Python that fits it; others read the source."""
    buffer = io.BytesIO(onto)
    with zipfile.ZipFile(buffer, "a") as made, tempfile.TemporaryDirectory(prefix="plt-eval-bfcl-") as folder:
        out = str(Path(folder) / "compiled")
        for name, path in files.items():
            made.writestr(zipfile.ZipInfo(name), path.read_bytes())
            py_compile.compile(
                str(path),
                out,
                dfile=name,
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            made.writestr(zipfile.ZipInfo(name + "c"), Path(out).read_bytes())
    return buffer.getvalue()
