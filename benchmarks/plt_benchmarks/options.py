"""What a user may choose about a suite besides its data: each suite takes some of it, and refuses the rest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path

from plt_benchmarks.protocols import SuiteError


@dataclass(frozen=True)
class SuiteOptions:
    """None means: not given. `release`, `since` and `until` choose problems of LiveCodeBench (a release, and the dates
    on which its contests were held, the last one included). `include_path` is a folder of lm-eval tasks,
    `num_fewshot` overrides theirs. `tool_calls` is "prompt" or "native": how BFCL's functions are told to a model."""

    release: str | None = None
    since: date | None = None
    until: date | None = None
    include_path: Path | None = None
    num_fewshot: int | None = None
    tool_calls: str | None = None

    def only(self, suite: str, taken: Collection[str] = ()) -> SuiteOptions:
        """Itself. Raises SuiteError when something is given that is not among `taken`: it has no effect on `suite`."""
        for field in fields(self):
            if getattr(self, field.name) is not None and field.name not in taken:
                raise SuiteError(f"--{field.name.replace('_', '-')} has no effect on suite {suite}")
        return self
