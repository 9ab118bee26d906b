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
    plt_benchmarks.options) that have an effect on it, `agent` those of agents (see plt_eval.swe.command) where an agent
    solves it, and `plumbing` the options of how requests are sent that have none there.
    `own_data` says that the official package carries the data: a folder without any is no reason not to run."""

    name: str
    suite: str
    metric: str
    folders: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    agent: tuple[str, ...] = ()
    plumbing: tuple[str, ...] = ()
    own_data: bool = False


SWE_OPTIONS = (
    "workers",
    "agent_steps",
    "agent_wall_time",
    "agent_command_timeout",
    "agent_actions",
    "agent_context",
    "test_timeout",
    "keep_images",
    "container_memory",
    "container_cpus",
    "pip_index",
    "wheels",
    "split_streams",
)
SENDING = ("concurrency", "retries", "request_timeout")


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
    Column("swe_bench_verified", "swe", "swe.resolved", ("SWE-bench_Verified",), agent=SWE_OPTIONS),
    Column("swe_bench_multilingual", "multi-swe", "multi-swe.resolved", ("SWE-bench_Multilingual",), agent=SWE_OPTIONS),
    Column(
        "terminal_bench_v1",
        "terminal",
        "terminal.resolved",
        ("terminal-bench-core-0.1.1", "terminal-bench-core"),
        agent=("workers", "agent_steps", "agent_wall_time", "test_timeout"),
        plumbing=(*SENDING, "ray"),
    ),
    Column(
        "terminal_bench_v2",
        "terminal-2",
        "terminal-2.resolved",
        ("terminal-bench-2.0", "terminal-bench-2"),
        agent=("workers", "agent_steps"),
        plumbing=(*SENDING, "ray"),
    ),
    Column("mind2web", "mind2web", "mind2web.step_success", ("mind2web",)),
    Column("bfcl_v3", "tools", "tools.overall", ("bfcl",), ("tool_calls",), own_data=True),
)
"""In the paper's order; its average is over all ten."""
