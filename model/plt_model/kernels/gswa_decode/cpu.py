"""The decode step's attention on a CPU: built once by the machine's own C++ compiler, then loaded from the disk.

    gswa_decode = load()        # some 10 seconds the first time, nothing afterwards
    y = gswa_decode(q, keys, values, ring_keys, ring_values, gate, lengths)

It takes what :func:`plt_model.kernels.gswa_decode.gswa_decode` takes. The library lies in $PLT_KERNEL_CACHE, or in
plt_model below the user's cache directory, under a name that says which source, torch, compiler and processor it is of.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import KernelUnavailable

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-ignored-attributes")
LONGEST = 300
"""Seconds that a compiler may take."""


@functools.cache
def load() -> Callable[..., Tensor]:
    """The kernel, a torch operator that may be compiled into a graph. Raises KernelUnavailable without a compiler (g++,
    clang++ or $CXX) and where building fails, naming why."""
    _load_library(_built())
    torch.library.register_fake("plt_model_cpu::gswa_decode", _shape)
    kernel: Callable[..., Tensor] = torch.ops.plt_model_cpu.gswa_decode.default
    return kernel


def _shape(q: Tensor, *_: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


def _load_library(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise KernelUnavailable(f"the CPU decode kernel cannot be loaded from {path}: {error}") from error


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    raise KernelUnavailable("the CPU decode kernel needs a C++ compiler: found neither g++ nor clang++, nor $CXX")


def _built() -> Path:
    """The library's file, made where it is missing."""
    if sys.platform == "win32":
        raise KernelUnavailable("the CPU decode kernel is not built on Windows")
    compiler = _compiler()
    target = _folder() / f"gswa_decode-{_name(compiler)}.so"
    if not target.exists():
        _build(compiler, target)
    return target


def _folder() -> Path:
    named = os.environ.get("PLT_KERNEL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plt_model"


def _name(compiler: str) -> str:
    """A hash of all that decides what the library does, and which processors it runs on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), " ".join(FLAGS), torch.__version__, version, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What tells this processor's instructions: one home directory may serve different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _build(compiler: str, target: Path) -> None:
    """Compile into a file aside, then put it in its place at once: two that build at the same time disturb neither."""
    from torch.utils.cpp_extension import include_paths, library_paths

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as aside:
            made = Path(aside) / target.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
            command += [f"-isystem{path}" for path in include_paths("cpu")]
            command += [word for path in library_paths("cpu") for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
            done = subprocess.run(
                [*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True, timeout=LONGEST, check=False
            )
            if done.returncode:
                said = (
                    [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
                )
                raise KernelUnavailable(f"the CPU decode kernel cannot be built with {compiler}: {said[0]}")
            os.replace(made, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailable(f"the CPU decode kernel cannot be built in {target.parent}: {error}") from error


__all__ = ["load"]
