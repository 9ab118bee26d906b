"""The replay engine: which files it takes, which it refuses, and how it identifies them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from toy_parts import SumSuite

from plt_benchmarks.protocols import Prompt, Sample, SuiteData
from plt_eval.engines import make_engine
from plt_eval.engines.base import GenerationRequest, LoglikelihoodRequest
from plt_eval.engines.replay import Replayed, ReplayEngine
from plt_eval.errors import UserError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def ask(engine: ReplayEngine, *ids: str) -> list[tuple[str, str, bool]]:
    requests = [GenerationRequest(i, Prompt("")) for i in ids]
    return [(c.request_id, c.text, c.solution) for c in engine.generate(requests)]


def test_completions_and_solutions_in_the_order_of_the_files(tmp_path: Path) -> None:
    one = write(
        tmp_path / "one.jsonl",
        {"task_id": "HumanEval/0", "completion": " return 1"},
        "",
        {"task_id": "HumanEval/0", "solution": "def f(): ...", "completion": "ignored", "extra": [1]},
    )
    two = tmp_path / "two.jsonl.gz"
    two.write_bytes(gzip.compress(json.dumps({"task_id": "HumanEval/0", "completion": "third"}).encode()))
    engine = ReplayEngine.from_files([one, two])
    assert ask(engine, "HumanEval/0#2", "HumanEval/0#0", "HumanEval/0#1") == [
        ("HumanEval/0#2", "third", False),
        ("HumanEval/0#0", " return 1", False),
        ("HumanEval/0#1", "def f(): ...", True),
    ]
    assert engine.identity()["model"] == "one+two"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task_id": "a", "comp', "broken line, not JSON"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "broken line, not JSON"),
        ("[1, 2]", 'expected an object with "task_id"'),
        ('{"completion": "x"}', 'expected an object with "task_id"'),
        ('{"task_id": 3, "completion": "x"}', 'expected an object with "task_id"'),
        ('{"task_id": "a"}', 'a has neither "completion" nor "solution"'),
        ('{"task_id": "a", "solution": null}', '"solution" is NoneType, expected a string'),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "c.jsonl", {"task_id": "a", "completion": "x"}, "", line)
    with pytest.raises(UserError, match=re.escape(f"{path}:3: {message}")):
        ReplayEngine.from_files([path])


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--completions .*nowhere.jsonl: No such file"):
        ReplayEngine.from_files([tmp_path / "nowhere.jsonl"])
    with pytest.raises(UserError, match="Is a directory"):
        ReplayEngine.from_files([tmp_path])
    whole = gzip.compress(b'{"task_id": "a", "completion": "x"}\n' * 1000)
    for name, content in {
        "cut": whole[:-20],
        "plain": b"no gzip",
        "flipped": whole[:30] + b"\0\0" + whole[32:],
    }.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.jsonl.gz: damaged after line"):
            ReplayEngine.from_files([path])


def engine_of(**counts: int) -> ReplayEngine:
    return ReplayEngine({k: [Replayed(f"{k}{i}", False) for i in range(n)] for k, n in counts.items()}, label="f")


def test_missing_tasks_are_counted_and_the_first_is_named() -> None:
    with pytest.raises(UserError, match="2 of 4 problems have fewer than 1 completions, first 'b' with 0"):
        engine_of(a=1, d=1).check({"a", "b", "c", "d"}, ["a", "b", "c", "d"], None)
    with pytest.raises(UserError, match="1 of 2 problems have fewer than 3 completions, first 'b' with 2"):
        engine_of(a=3, b=2).check({"a", "b"}, ["a", "b"], 3)


def test_unknown_tasks_are_counted_and_the_first_is_named() -> None:
    with pytest.raises(UserError, match="2 of 3 task ids are not in the data, first 'x'"):
        engine_of(a=1, x=1, y=1).check({"a"}, ["a"], None)


def test_the_number_of_samples_is_that_of_the_file() -> None:
    assert engine_of(a=3, b=3).check({"a", "b"}, ["a", "b"], None) == 3
    assert engine_of(a=3, b=5).check({"a", "b"}, ["a", "b"], 2) == 2
    assert engine_of(a=3, b=5).check({"a", "b"}, ["a"], None) == 3, "problems beyond the limit do not count"
    with pytest.raises(UserError, match="3 completions for a but 5 for b; pass --n-samples 3"):
        engine_of(a=3, b=5).check({"a", "b"}, ["a", "b"], None)


def test_identity_is_the_content() -> None:
    one = ReplayEngine({"a": [Replayed("x", False)], "b": [Replayed("y", False)]}, label="f")
    turned = ReplayEngine({"b": [Replayed("y", False)], "a": [Replayed("x", False)]}, label="f")
    assert one.identity() == turned.identity()
    others = [
        {"a": [Replayed("x", False)]},
        {"a": [Replayed("x", True)], "b": [Replayed("y", False)]},
        {"a": [Replayed("x", False)], "b": [Replayed("z", False)]},
        {"a": [Replayed("x", False), Replayed("x", False)], "b": [Replayed("y", False)]},
        {"a": [Replayed("y", False)], "b": [Replayed("x", False)]},
    ]
    hashes = {ReplayEngine(answers, label="f").identity()["completions_sha256"] for answers in others}
    assert len(hashes | {one.identity()["completions_sha256"]}) == 6
    assert one.select({"a"}, 1).identity() == ReplayEngine(others[0], label="f").identity()
    assert ReplayEngine(others[3], label="f").select({"a", "b"}, 1).identity() == one.identity()


def test_gold_replays_the_datas_own_solutions() -> None:
    engine = ReplayEngine.gold([(SumSuite(3), SumSuite(3).load(None))])
    assert ask(engine, "Sum/2#0") == [("Sum/2#0", "2 + 14 = 16", True)]
    with pytest.raises(UserError, match="problem q of sums carries no answer"):
        ReplayEngine.gold([(SumSuite(), SuiteData((Sample("q", {"prompt": "x"}),), "v1", "0", "here"))])


def test_no_likelihoods() -> None:
    with pytest.raises(UserError, match="texts only"):
        engine_of(a=1).loglikelihood([LoglikelihoodRequest("a", "b", "c")])
    with pytest.raises(UserError, match="no completion 1 for a"):
        ask(engine_of(a=1), "a#1")


def test_engines_by_name() -> None:
    assert make_engine("replay", answers={}, label="x").name == "replay"
    expected = "hf, vllm, openai, replay"
    with pytest.raises(UserError, match=rf"--engine opnai: expected one of {expected}; did you mean openai\?"):
        make_engine("opnai")
