"""What the programs that suites run in the sandbox said, and how they ended."""

from __future__ import annotations

import json
from typing import TypeVar

from plt_benchmarks.protocols import SandboxOutcome

T = TypeVar("T")


def told_by(outcome: SandboxOutcome, kind: type[T]) -> T | None:
    """The JSON that a program printed; None if it did not end well, or printed something else than a `kind`."""
    if outcome.status != "exited" or outcome.exit_code != 0:
        return None
    try:
        said = json.loads(outcome.stdout)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, kind) else None


def how_it_ended(outcome: SandboxOutcome) -> str:
    """In words, with the last line of its standard error."""
    if outcome.status != "exited":
        return outcome.status.replace("_", " ")
    last = outcome.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return f"exit code {outcome.exit_code}" + (f": {last[0][:200]}" if last else "")
