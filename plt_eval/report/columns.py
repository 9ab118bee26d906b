"""The columns of the paper's Table 2 (arXiv 2606.18023), and which of our suites and metrics each is.

The paper does not say how it drew or scored its benchmarks (releases, prompts, temperatures): a column here is the same
benchmark by its official package, with greedy decoding unless you say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """`name` is that of results/reference/table2.csv; `suite` what --suite takes for it, and `metric` the run's metric
    that stands in it. `folders` is what a sub-folder with its data may be called. `takes` names the suite options (see
    plt_benchmarks.options) that have an effect on it; `agent` says that an agent solves it."""

    name: str
    suite: str
    metric: str
    folders: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    agent: bool = False


COLUMNS = (
    Column("humaneval_plus", "humaneval", "humaneval.plus.pass@1", ("humanevalplus",)),
    Column("multipl_e", "multilingual", "multilingual.pass@1", ("multipl-e",)),
    Column("bigcodebench_full", "bigcodebench", "bigcodebench.pass@1", ("bigcodebench",)),
    Column(
        "livecodebench",
        "lcb-generation",
        "lcb-generation.pass@1",
        ("livecodebench",),
        ("release", "since", "until"),
    ),
    Column("swe_bench_verified", "swe", "swe.resolved", ("SWE-bench_Verified",), agent=True),
    Column("swe_bench_multilingual", "multi-swe", "multi-swe.resolved", ("SWE-bench_Multilingual",), agent=True),
    Column("terminal_bench_v1", "terminal", "terminal.resolved"),
    Column("terminal_bench_v2", "terminal", "terminal.resolved"),
    Column("mind2web", "mind2web", "mind2web.step_success"),
    Column("bfcl_v3", "tools", "tools.overall", ("bfcl",), ("tool_calls",)),
)
"""In the paper's order; its average is over all ten."""
