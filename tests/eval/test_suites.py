"""`plt-eval suites`: complete as JSON, and readable at the widths that terminals have."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from plt_benchmarks.registry import all_suites, get_suite, suite_names
from plt_eval.cli.main import main
from plt_eval.cli.suites import facts, suites_table


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["suites", *arguments])
    assert not caught.value.code
    return capsys.readouterr().out


def test_json_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    told = {row["suite"]: row for row in json.loads(command(capsys, "--json"))}
    assert list(told) == [suite.name for suite in all_suites()]
    for row in told.values():
        assert set(row) == {
            "suite", "names", "summary", "version", "problems", "extra", "missing_packages", "needs", "data", "cost",
            "runs_code",
        }  # fmt: skip
        assert set(row["data"]) == {"source", "present", "state"}
        assert all(set(need) == {"what", "present", "mend", "text"} for need in row["needs"])
        for name in row["names"]:
            assert row["suite"] in [suite.name for suite in get_suite(name)]
    assert told["humaneval"]["names"] == ["code", "humaneval", "humaneval+"]
    assert told["humaneval"]["data"]["source"].startswith("https://")
    assert told["mind2web"]["needs"][0]["present"] is False
    assert told["terminal"]["needs"][0]["mend"] == "plt-eval install terminal"


def test_every_name_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys)
    assert all(re.search(rf"\b{re.escape(name)}(?![\w-])", out) for name in [*suite_names(), "paper"])


@pytest.mark.parametrize("width", [100, 160])
def test_the_table_is_readable(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = [facts(suite) for suite in all_suites()]
    console = Console(width=width, highlight=False)
    console.print(suites_table(found))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for row in found:
        assert re.search(rf"^ {re.escape(row['suite'])} ", text, re.MULTILINE), "a name stands whole, in one line"
    assert len(lines) < 9 * len(found)
