"""What the tests of Triton kernels share: where to run them, and how to compile them for a GPU that is not there.

With a CUDA device the kernels run on it; without one, `tests/conftest.py` has put Triton into its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HOPPER_SHARED_BYTES = 227 * 1024
"""Shared memory that one thread block may ask for on sm_90 (CUDA C++ programming guide, compute capabilities)."""

_PRELUDE = """
import json, subprocess, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as backend
import plt_model.kernels
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

plt_model.kernels.require_triton = lambda device: None
triton.runtime.driver.set_active(Hopper())
_run, compiled = JITFunction.run, []

def compile_only(self, *args, grid, warmup, **options):
    kernel = _run(self, *args, grid=grid, warmup=True, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([str(Path(backend).parent / "bin" / "cuobjdump"), "-res-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
    words = dict(word.split(":")[:2] for word in usage.split() if word.count(":") == 1 and not word.endswith(":"))
    compiled.append(dict(
        name=kernel.metadata.name, cubin_bytes=len(kernel.asm["cubin"]), warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared, registers=int(words["REG"]), stack_bytes=int(words["STACK"]),
    ))

JITFunction.run = compile_only
"""


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for sm_90. stack_bytes: what a thread spills from its registers to memory."""

    name: str
    cubin_bytes: int
    warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int


def compile_for_hopper(code: str) -> list[Compiled]:
    """Every kernel that `code` launches on tensors of device "meta", compiled for sm_90 exactly as it would be launched
    there. In a process of its own, because this one may be interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _PRELUDE + code + "\nprint(json.dumps(compiled))"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**kernel) for kernel in json.loads(done.stdout.splitlines()[-1])]
