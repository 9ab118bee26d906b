"""Mind2Web: known by name, and not runnable; this says why in one line instead of leaving the name unknown.

Data: osunlp/Mind2Web (CC BY 4.0), 252, 177 and 912 tasks in the test splits for new tasks, websites and domains. Paper:
Deng et al. 2023, "Mind2Web: Towards a Generalist Agent for the Web". What an honest suite would need is in
docs/suites/mind2web.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plt_benchmarks.protocols import (
    Answer,
    Metric,
    Need,
    Prompt,
    Sample,
    Sandbox,
    Score,
    Scorer,
    SuiteData,
    SuiteError,
)

WHY = (
    "suite mind2web cannot run: its official evaluation is no installable package (scripts, a prompt file, a pickle of "
    "candidate ranks), and asks about each step in several rounds; docs/suites/mind2web.md says what is missing"
)


@dataclass
class Mind2WebSuite:
    """A Suite that refuses to load, whatever data it is given."""

    name: str = "mind2web"
    version: str = "none"
    summary: str = "Mind2Web: the next action on a web page, in 252 tasks of the cross-task split (cannot run yet)"
    extra: str | None = None
    runs_code: bool = False
    problems: int = 252
    cost: str = "-"

    def needs(self) -> Sequence[Need]:
        """What no installation brings."""
        return (Need("an official evaluation to install", False, "docs/suites/mind2web.md"),)

    def load(self, source: Path | None) -> SuiteData:  # noqa: ARG002
        """Raises SuiteError that says why."""
        raise SuiteError(WHY)

    def prompt(self, sample: Sample) -> Prompt:  # noqa: ARG002
        """Raises SuiteError: there is no sample to ask about."""
        raise SuiteError(WHY)

    def gold(self, sample: Sample) -> Answer | None:  # noqa: ARG002
        """There is none."""
        return None

    def scorer(self, sandbox: Sandbox) -> Scorer:  # noqa: ARG002
        """Raises SuiteError."""
        raise SuiteError(WHY)

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:  # noqa: ARG002
        """There are none."""
        return {}


MIND2WEB = Mind2WebSuite()
