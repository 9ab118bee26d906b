"""Where a run happened: package versions, the project's commit, the machine. Never fails; says less instead."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from plt_eval.records import GitState, Hardware

PACKAGES = (
    "plt-eval",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "evalplus",
    "lm-eval",
    "docker",
    "flash-attn",
    "httpx",
)


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that can move a result; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(root: Path | None = None) -> GitState | None:
    """Commit of the project's checkout, `dirty` when tracked files differ from it; None when it is not one."""
    root = Path(__file__).resolve().parent.parent if root is None else root
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return GitState(commit=commit.strip(), dirty=bool(changes.strip()))


def hardware() -> Hardware:
    """The processor, the cores this process may use, memory, and NVIDIA GPUs."""
    return Hardware(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        ram=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpu_names(),
    )


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu_names() -> tuple[str, ...]:
    """From torch when the engine has loaded it (it knows which ones may be used), else from the driver."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    names = []
    for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        try:
            lines = card.read_text().splitlines()
        except OSError:
            continue
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return tuple(names)
