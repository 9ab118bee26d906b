"""A toy suite for machines of a cluster, which import it: judging may take long, and may kill its judge."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy_parts import SumSuite

from plt_benchmarks.protocols import Sample

HERE = Path(__file__).parent
SMALL: dict[str, Any] = {
    "num_cpus": 1,
    "object_store_memory": 80 << 20,
    "env_vars": {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "eval")])},
}
"""A machine of the tests; it can import this file."""


@dataclass(frozen=True)
class ToyRecipe:
    """Judging takes `score_s`, and is the judge's end for the sample `deadly`."""

    problems: int
    score_s: float = 0.0
    deadly: str = ""

    def make(self) -> SumSuite:
        return SumSuite(self.problems, score_s=self.score_s, before=self._end)

    def _end(self, sample: Sample) -> None:
        if sample.id == self.deadly:
            os._exit(1)
