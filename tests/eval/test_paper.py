"""`plt-eval run --suite paper`: the columns that run, and those that cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_parts import LoopEngine, NoSandbox, SumSuite

from plt_benchmarks.protocols import SuiteError
from plt_benchmarks.registry import UnknownSuite, suite_names
from plt_eval.cli.evaluate import _open_sandbox
from plt_eval.cli.main import main
from plt_eval.engines import ENGINES
from plt_eval.report.columns import COLUMNS, Column
from plt_eval.report.reference import published


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
    _open_sandbox.cache_clear()
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
    known = [column.suite for column in COLUMNS if column.suite in suite_names()]
    assert known == ["humaneval", "swe", "multi-swe"]
