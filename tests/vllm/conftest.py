"""These tests run in vLLM's own environment (scripts/make_vllm_env.sh): PYTHON -m pytest tests/vllm

Elsewhere the whole folder is skipped; PLT_EVAL_REQUIRE_VLLM=1 makes that a failure.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm_cases import Measured

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TRITON_F32_DEFAULT": "ieee",  # on a GPU Triton would multiply float32 as TF32
    # The shapes are tiny, and threads that wait for work by spinning slow everything else on a small machine.
    "OMP_NUM_THREADS": "1",
    "KMP_BLOCKTIME": "0",
}

ERRORS = "largest error of a logit"
"""What of a test's report holds them: reports reach the summary from whichever process tests run in."""


def _vllm_is_there() -> bool:
    found = importlib.util.find_spec("vllm")
    return found is not None and found.origin is not None  # a mere folder of that name is found, too


if _vllm_is_there():
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


class Absent(pytest.Module):
    """A test module that needs vLLM, where there is none."""

    def collect(self) -> list[pytest.Item]:
        reason = "needs vLLM: bash scripts/make_vllm_env.sh FOLDER, then FOLDER/bin/python -m pytest tests/vllm"
        if os.environ.get("PLT_EVAL_REQUIRE_VLLM") == "1":
            raise self.CollectError(f"{reason} (PLT_EVAL_REQUIRE_VLLM=1)")
        pytest.skip(reason, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if _vllm_is_there() else Absent.from_parent(parent, path=module_path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How far the logits were off, by scenario and loop count."""
    rows: dict[str, dict[int, float]] = {}
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for scenario, by_loops in dict(report.user_properties).get(ERRORS, {}).items():
            row = rows.setdefault(scenario, {})
            for loops, error in by_loops.items():
                row[loops] = max(error, row.get(loops, 0.0))
    if rows:
        terminalreporter.section(ERRORS)
    for scenario, by_loops in sorted(rows.items()):
        cells = "  ".join(f"R={loops} {error:.1e}" for loops, error in sorted(by_loops.items()))
        terminalreporter.write_line(f"{scenario:<40}{cells}")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    from vllm_cases import Measured

    errors: dict[str, dict[int, float]] = {}
    request.node.user_properties.append((ERRORS, errors))
    return Measured(errors)
