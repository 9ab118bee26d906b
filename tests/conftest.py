"""Without a GPU, Triton's kernels run in its interpreter. That is decided when triton is first imported, which
transformers does, so it is said here, before any test module loads."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

LOCKS = Path(tempfile.gettempdir())

# How long an example takes says more of who else uses the machine. CI draws the same examples each time.
hypothesis.settings.register_profile(
    "any machine",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any machine")

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest has put this folder on the path, where tests/vllm would pass for a package called vllm.
sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]

# Whoever is started in the background by a shell ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """The shapes are tiny, other work may share the machine, and sums in one order are the same bits each time."""
    import torch  # not above: tests/vllm says first how it is to be loaded

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_sandbox_of_an_earlier_test() -> Iterator[None]:
    """Commands keep the sandbox that they have opened, which may be a stand-in."""
    yield
    commands: Any = sys.modules.get("plt_eval.cli.evaluate")
    if commands is not None:
        commands._open_sandbox.cache_clear()


# For modules that look at all of them on this machine: one such module at a time, whichever process of pytest runs it.


@pytest.fixture(scope="module")
def only_containers() -> Iterator[None]:
    with FileLock(LOCKS / "plt-eval-tests-containers.lock"):
        yield


@pytest.fixture(scope="module")
def only_judges() -> Iterator[None]:
    with FileLock(LOCKS / "plt-eval-tests-judges.lock"):
        yield
