"""The four suites: what each is, where its rows come from, and what is counted.

Data: SWE-bench Verified (500 instances), Lite (300) and Multilingual (300), in the rows of swebench 5; Multi-SWE-bench
(1632). Papers: Jimenez et al. 2024, "SWE-bench: Can Language Models Resolve Real-World GitHub Issues?"; OpenAI 2024,
"Introducing SWE-bench Verified"; Yang et al. 2025, "SWE-smith" (Multilingual); Zan et al. 2025, "Multi-SWE-bench".
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plt_benchmarks.protocols import (
    Answer,
    Message,
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
from plt_benchmarks.statistics import wilson_interval
from plt_benchmarks.swe.judge import OUTCOMES, Host, PatchScorer
from plt_benchmarks.swe.rows import Harness, HubSource, load_rows, multi_swe_task, swebench_task, task_of

JUDGE_VERSION = 1
DEFAULT_TEST_TIMEOUT_S = 1800
"""The official default of swebench; Multi-SWE-bench has none of its own."""


@dataclass
class SweSuite:
    """One data set with its harness; a Suite. Judging needs `host` and `folder`, which whoever runs it sets; `token`
    begins the harness' own run names; `packages` says where scripts install from, if not from the internet."""

    name: str
    title: str
    harness: Harness
    hub: HubSource
    summary: str
    problems: int
    cost: str
    extra: str | None = "swe"
    runs_code: bool = False  # not in the sandbox: the harness runs it in the row's own container
    test_timeout: int = DEFAULT_TEST_TIMEOUT_S
    merge_streams: bool = True
    packages: str = ""
    host: Host | None = field(default=None, repr=False)
    folder: Path | None = None
    token: str = "plt"
    version: str = field(init=False)

    def __post_init__(self) -> None:
        """The version names data set, harness, and what was changed in how it judges."""
        parts = [self.hub.repo, f"{self.harness}-{_installed(self.harness)}", f"judge-{JUDGE_VERSION}"]
        parts.append(f"timeout-{self.test_timeout}")
        if self.harness == "swebench" and self.merge_streams:
            parts.append("merged-streams")
        if self.packages:
            parts.append(self.packages)
        self.version = "+".join(parts)

    @property
    def release(self) -> HubSource:
        """Where the data comes from."""
        return self.hub

    def load(self, source: Path | None) -> SuiteData:
        """Rows from `source` (file or folder), or from the hub when None. Raises SuiteError."""
        return load_rows(self.hub, source, swebench_task if self.harness == "swebench" else multi_swe_task)

    def prompt(self, sample: Sample) -> Prompt:
        """The issue; an agent builds its own conversation around it."""
        problem = task_of(sample).problem
        return Prompt(text=problem, messages=(Message("user", problem),), max_new_tokens=2048)

    def needs(self) -> Sequence[Need]:
        """A Docker daemon; whether it answers is found out by a run."""
        return (Need("Docker", shutil.which("docker") is not None, "apt-get install docker.io"),)

    def gold(self, sample: Sample) -> Answer | None:
        """The patch that was merged."""
        return Answer(task_of(sample).gold, solution=True)

    def scorer(self, sandbox: Sandbox) -> Scorer:  # noqa: ARG002
        """Raises SuiteError when the official harness is not installed."""
        if _installed(self.harness) == "missing":
            raise SuiteError(f"suite {self.name} needs {self.harness}: pip install 'plt-eval[swe]'")
        assert self.host is not None, "a host comes first"
        assert self.folder is not None, "a folder comes first"
        return PatchScorer(self.harness, self.folder, self.host, self.token, self.test_timeout, self.merge_streams)

    def metrics(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Metric]:
        """The share of instances resolved, and below it what became of all."""
        counted = [score for found in scores.values() for score in found if score.error is None]
        metrics = {}
        for outcome, meaning in OUTCOMES.items():
            hits = sum(score.detail.get("outcome") == outcome for score in counted)
            if outcome != "resolved" and not hits:
                continue
            share = hits / len(counted)
            low, high = wilson_interval(share, len(counted))
            name = f"{self.name}.resolved" if outcome == "resolved" else f"{self.name}.outcome/{outcome}"
            words = f"{self.title}: share of instances with outcome {outcome} ({meaning}), 95% Wilson interval"
            metrics[name] = Metric(share, len(counted), low, high, words)
        return metrics


def _installed(harness: Harness) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(harness)
    except PackageNotFoundError:
        return "missing"


SWE = SweSuite(
    name="swe",
    title="SWE-bench Verified",
    harness="swebench",
    hub=HubSource(
        "SWE-bench/SWE-bench_Verified",
        "data/test*",
        500,
        "5ed9776b123ff99770cefeaa2e62c76e7b3d05f8fe9217b17b84b084a9e4c330",
    ),
    problems=500,
    cost="days, by the agent; 455 GiB of images",
    summary="SWE-bench Verified: fix 500 issues of Python projects (agent, Docker)",
)
SWE_LITE = SweSuite(
    name="swe-lite",
    title="SWE-bench Lite",
    harness="swebench",
    hub=HubSource("SWE-bench/SWE-bench_Lite", "data/test*"),
    problems=300,
    cost="a day or more, by the agent; hundreds of GiB of images",
    summary="SWE-bench Lite: fix 300 issues of Python projects (agent, Docker)",
)
MULTI_SWE = SweSuite(
    name="multi-swe",
    title="SWE-bench Multilingual",
    harness="swebench",
    hub=HubSource(
        "SWE-bench/SWE-bench_Multilingual",
        "data/test*",
        300,
        "a042608f761e40deafc9543de13305b090a3170b8c5a6540321ad007550494b6",
    ),
    problems=300,
    cost="a day or more, by the agent; hundreds of GiB of images",
    summary="SWE-bench Multilingual: fix 300 issues in nine languages (agent, Docker)",
)
MULTI_SWE_BENCH = SweSuite(
    name="multi-swe-bench",
    title="Multi-SWE-bench",
    harness="multi-swe-bench",
    hub=HubSource("ByteDance-Seed/Multi-SWE-bench", "**/*.jsonl"),
    problems=1632,
    cost="days, by the agent; over a TiB of images",
    summary="Multi-SWE-bench: fix 1632 issues in seven languages (agent, Docker)",
)
