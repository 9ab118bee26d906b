"""The demonstration: what is embedded works from the command line, and its problems are sound."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_models import write_family

from plt_benchmarks.demo import DEMO
from plt_benchmarks.trace.suite import TRACE
from plt_eval import models
from plt_eval.cli.demo import FAMILY, TOY, show
from plt_eval.cli.run import SandboxName
from plt_eval.store import list_runs


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "plt_eval.cli.main", *arguments]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def values(run: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in run["metrics"].items()}


def test_demo_solves_its_problems_at_the_loops_it_was_trained_for(tmp_path: Path) -> None:
    done = command("demo", "--loops", "2", "--results", str(tmp_path / "runs"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plt-demo" in done.stdout
    assert f"plt-eval show RUN --results {tmp_path / 'runs'} --failed" in done.stdout
    assert "plt-eval study --quick" in done.stdout
    listed = command("ls", "--json", "--results", str(tmp_path / "runs"), cwd=tmp_path)
    (run,) = json.loads(listed.stdout)
    metrics = json.loads((tmp_path / "runs" / run["run_id"] / "metrics.json").read_text())
    assert values(metrics) == {"demo.base.pass@1": 1.0, "demo.plus.pass@1": 1.0}
    assert metrics["done"] == 30


def test_demo_problems_are_solved_by_their_own_solutions_alone(tmp_path: Path) -> None:
    gold = ["run", "--suite", "demo", "--engine", "replay", "--json", "--results", str(tmp_path), "--limit", "6"]
    (right,) = json.loads(command(*gold, "--completions", "gold", cwd=tmp_path).stdout)
    assert set(values(right).values()) == {1.0}
    wrong = tmp_path / "wrong.jsonl"
    ids = [sample.id for sample in DEMO.load(None).samples[:6]]
    wrong.write_text("".join(json.dumps({"task_id": i, "solution": ""}) + "\n" for i in ids))
    (empty,) = json.loads(command(*gold, "--completions", str(wrong), cwd=tmp_path).stdout)
    assert set(values(empty).values()) == {0.0}


def test_the_embedded_problems_are_the_pinned_ones() -> None:
    data = DEMO.load(None)
    assert data.revision == DEMO.release.name
    assert len(data.samples) == 30


def test_the_family_is_shown_each_member_at_its_own_loop_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "bundled"
    write_family(root, "plt-tiny", (1, 2), weights=True)
    monkeypatch.setattr(models, "BUNDLED", root)
    few = replace(FAMILY, options={**FAMILY.options, "limit": 17, "device": "cpu"})
    show(few, loops="1-2", results=tmp_path / "runs", sandbox=SandboxName.bubblewrap)
    found = [run.manifest.identity for run in list_runs(tmp_path / "runs")]
    assert [(run.suite, run.model, run.loops, run.problems) for run in found] == [
        ("trace", "plt-tiny:r1", 1, 17),
        ("trace", "plt-tiny:r2", 2, 17),
    ]
    out, err = capsys.readouterr()
    assert "trained for one loop count" not in err
    assert "plt-eval run --suite trace --model plt-tiny:r3 --loops 1-4" in out
    assert "plt-eval study --quick" in out


def test_the_families_sample_is_balanced() -> None:
    problems = [(sample.data["family"], sample.data["k"]) for sample in TRACE.load(None).samples]
    shown = problems[: FAMILY.options["limit"]]
    counts = {shown.count(kind) for kind in problems}
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 8


def test_what_is_shown_is_there() -> None:
    assert (Path(TOY.options["model"]) / "config.json").is_file()
