"""`plt-eval run --suite paper`: the columns that run, and those that cannot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console
from toy_parts import LoopEngine, NoSandbox, SumEngine, SumSuite

from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import SuiteError
from plt_benchmarks.registry import UnknownSuite, get_suite, suite_names
from plt_benchmarks.swe.suites import SweSuite
from plt_benchmarks.terminal import TerminalSuite
from plt_eval.cli.main import main
from plt_eval.cli.options import RunOptions
from plt_eval.cli.paper import _options_for
from plt_eval.engines import ENGINES
from plt_eval.engines.base import Completion, GenerationRequest
from plt_eval.report.columns import COLUMNS, Column
from plt_eval.report.reference import published
from plt_eval.swe.command import SweOptions
from plt_eval.terminal.command import TAKEN


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three columns: one that runs, one whose suite needs what is not here, one without a suite."""

    def get_suite(name: str, options: object = None) -> list[SumSuite]:  # noqa: ARG001
        if name == "broken":
            raise SuiteError("suite broken needs a miracle")
        if name != "sums":
            raise UnknownSuite(f"unknown suite {name!r}")
        return [SumSuite()]

    columns = (
        Column("humaneval_plus", "sums", "right"),
        Column("livecodebench", "broken", "x"),
        Column("mind2web", "none", "x"),
    )
    monkeypatch.setattr("plt_eval.cli.paper.COLUMNS", columns)
    monkeypatch.setattr("plt_benchmarks.registry.get_suite", get_suite)
    monkeypatch.setattr("plt_eval.sandbox.open_sandbox", lambda *_, **__: NoSandbox())
    monkeypatch.setitem(ENGINES, "hf", ("toy_parts", "LoopEngine"))
    monkeypatch.setenv("COLUMNS", "200")
    LoopEngine.made.clear()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["run", "--suite", "paper", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.usefixtures("paper")
def test_the_row_marks_what_could_not_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ("--model", "m", "--loops", "1,2", "--results", str(tmp_path))
    code, out, err = run(capsys, *command, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert [column["cannot_run"] for column in told["columns"]] == [
        None,
        "suite broken needs a miracle",
        "this version has no suite none",
    ]
    assert "livecodebench: cannot run here: suite broken needs a miracle" in err
    assert [row["loops"] for row in told["rows"]] == [1, 2]
    for row in told["rows"]:
        assert set(row["columns"]) == {"humaneval_plus"}
        assert row["mean"] == row["columns"]["humaneval_plus"]["value"]
        assert row["published"]["mean"] == row["published"]["columns"]["humaneval_plus"]
    assert told["rows"][1]["published"]["columns"]["swe_bench_verified"] == 64.4
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "cannot" in out
    assert "this version has no suite none" in out
    assert "part of the benchmark" not in out
    assert "part of the benchmark only: HumanEval+ 3 of 20" in run(capsys, *command, "--limit", "3")[1]


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n-samples", "2", "--temperature", "1"), "--n-samples has no effect on suite paper"),
        (("--run-id", "x"), "--run-id has no effect on suite paper"),
        (("--gold",), "--gold has no effect on suite paper"),
        (("--num-fewshot", "1"), "--num-fewshot has no effect on suite paper"),
        (("--data", "/nowhere"), "--data /nowhere: expected a folder"),
        (("--loops", "x"), "--loops 'x'"),
    ],
)
def test_options_that_no_column_takes(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, "--model", "m", *arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_columns_are_those_that_were_published() -> None:
    printed = set(published("table2")["quantity"])
    assert [column.name for column in COLUMNS if column.name not in printed] == []
    assert printed - {column.name for column in COLUMNS} == {"average"}
    assert [column.suite for column in COLUMNS if column.suite not in suite_names()] == []
    assert len({column.suite for column in COLUMNS}) == len({column.metric for column in COLUMNS}) == len(COLUMNS)


def test_options_of_columns_are_options_there_are() -> None:
    for column in COLUMNS:
        assert set(column.takes) <= {field.name for field in fields(SuiteOptions)}
        assert set(column.agent) <= {field.name for field in fields(SweOptions)}
        assert set(column.plumbing) <= {field.name for field in fields(RunOptions)}
        [suite] = get_suite(column.suite)
        if isinstance(suite, SweSuite):
            assert set(column.agent) == {f.name for f in fields(SweOptions)} - {"instances", "predictions", "gold"}
        if isinstance(suite, TerminalSuite):
            assert set(column.agent) == set(TAKEN[suite.official.program]) - {"instances"}


def test_each_column_gets_the_options_that_it_takes() -> None:
    options = RunOptions(
        "paper",
        "openai",
        endpoint=("http://h/v1",),
        api_model="m",
        concurrency=3,
        scoring_workers=2,
        chosen=SuiteOptions(release="v6", tool_calls="native"),
        swe=SweOptions(workers=4, agent_wall_time=9, keep_images="none"),
    )
    given = {column.name: _options_for(column, options) for column in COLUMNS}
    assert (given["humaneval_plus"].concurrency, given["humaneval_plus"].swe) == (3, None)
    assert given["livecodebench"].chosen == SuiteOptions(release="v6")
    assert given["bfcl_v3"].chosen == SuiteOptions(tool_calls="native")
    assert given["swe_bench_verified"].swe == options.swe
    assert given["swe_bench_verified"].scoring_workers is None
    assert given["terminal_bench_v1"].swe == SweOptions(workers=4, agent_wall_time=9)
    assert given["terminal_bench_v2"].swe == SweOptions(workers=4)
    assert given["terminal_bench_v2"].concurrency is None


@pytest.mark.usefixtures("paper")
def test_missing_samples_are_marked_and_never_zero(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--model", "m", "--results", str(tmp_path / "some"))
    drawn = SumEngine.generate

    def failing(self: LoopEngine, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        self.fail = fail
        return drawn(self, requests)

    fail = {"Sum/1#0"}
    monkeypatch.setattr(LoopEngine, "generate", failing)
    code, out, err = run(capsys, *command, "--json")
    assert code == 1, err
    told = json.loads(out)
    [row] = told["rows"]
    assert (row["columns"]["humaneval_plus"]["n"], row["columns"]["humaneval_plus"]["missing"]) == (19, 1)
    assert told["columns"][0]["missing"] == 1
    code, out, _ = run(capsys, *command)
    assert (code, "1 missing" in out) == (1, True)
    fail = set()
    code, out, _ = run(capsys, *command)
    assert (code, "missing" in out) == (0, False), "the same command tried it again"
    fail = {f"Sum/{i}#0" for i in range(20)}
    code, out, err = run(capsys, "--model", "m", "--results", str(tmp_path / "none"), "--json")
    told = json.loads(out)
    assert told["rows"][0]["columns"] == {}
    assert told["rows"][0]["mean"] is None
    assert "nothing was judged; first: Sum/0#0: the toy engine was told to fail" in told["columns"][0]["does_not_count"]
    assert told["columns"][0]["cannot_run"] is None
    assert "humaneval_plus: does not count: " in err


@pytest.mark.usefixtures("paper")
@pytest.mark.parametrize("width", [100, 160, 200])
def test_the_table_is_readable(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    names = [column for column in COLUMNS if column.name not in ("humaneval_plus", "livecodebench", "mind2web")]
    more = [Column(column.name, "none", "x") for column in names]
    own = (Column("humaneval_plus", "sums", "right"), Column("livecodebench", "broken", "x"), *more)
    monkeypatch.setattr("plt_eval.cli.paper.COLUMNS", own)
    monkeypatch.setattr("plt_eval.tables.output_console", lambda: Console(highlight=False, width=width))
    code, out, err = run(capsys, "--model", "m", "--loops", "1,2", "--results", str(tmp_path))
    assert code == 0, err
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out
    flat = " ".join(out.split())
    assert "LiveCodeBench: suite broken needs a miracle" in flat
    if width < 190:
        [row] = [line for line in lines if "SWE-bench Verified" in line and "43.0" in line]
        assert row.count("cannot run") == 2
        assert "64.4" in row
        assert any("mean of 1" in line and "81.1" in line for line in lines)
    else:
        assert any("HumanEval+" in line and "BFCL v3" in line for line in lines)
        assert sum("published, 7B" in line for line in lines) == 2
