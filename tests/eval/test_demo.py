"""The demonstration: what is embedded works from the command line, and its problems are sound."""

import json
import subprocess
import sys
from pathlib import Path

from plt_benchmarks.demo import DEMO


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "plt_eval.cli.main", *arguments]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def values(run: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in run["metrics"].items()}


def test_demo_solves_its_problems_at_the_loops_it_was_trained_for(tmp_path: Path) -> None:
    done = command("demo", "--loops", "2", "--results", str(tmp_path / "runs"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plt-demo" in done.stdout
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
