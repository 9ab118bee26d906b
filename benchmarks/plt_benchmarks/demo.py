"""The demonstration suite: 30 generated one-line Python functions, embedded in the package, judged as HumanEval+ is.

No benchmark: it says whether a model that was trained on such functions (scripts/train_demo_model.py) writes them with
constants that it never saw. It exists so that the whole road from checkpoint to score can be walked with no download.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from plt_benchmarks.code import EvalPlusSuite
from plt_benchmarks.datafiles import Release
from plt_benchmarks.protocols import SuiteData

PROBLEMS = Path(__file__).with_name("data") / "demo_problems.jsonl"


@dataclass
class DemoSuite(EvalPlusSuite):
    """HumanEval+'s prompts and judging on the embedded problems."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = "demo"

    def load(self, source: Path | None) -> SuiteData:
        """The embedded problems, or others in the same format. Raises SuiteError."""
        return super().load(source or PROBLEMS)

    def _definitions(self) -> dict[str, str]:
        judged = "functions whose {} tests all pass, by evalplus' comparison"
        return {"base": judged.format("base"), "plus": judged.format("base and extra")}


DEMO = DemoSuite(
    dataset="humaneval",
    title="demonstration",
    release=Release(
        stem="demo_problems",
        version="v1",
        url="embedded",
        md5="755e10c1c8643584d4443dffe4a4a92a",
        sha256="a3fe52dcff09a8a20497e29f1a1500be5dcb42b680092784173317aedbb08ec2",
    ),
    problems=30,
    cost="seconds",
    summary="30 one-line Python functions for the embedded toy model; no benchmark",
)
