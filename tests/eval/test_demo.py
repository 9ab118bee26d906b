"""The demonstration: what is embedded works from the command line, and its problems are sound."""

import json
import subprocess
import sys
from pathlib import Path

from plt_benchmarks.demo import DEMO
from plt_benchmarks.trace.suite import TRACE
from plt_eval.cli.demo import CODE, FAMILY
from plt_eval.store import list_runs


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "plt_eval.cli.main", *arguments]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def values(run: dict) -> dict[str, float]:
    return {name: metric["value"] for name, metric in run["metrics"].items()}


def test_the_demonstration_walks_the_whole_road(tmp_path: Path) -> None:
    done = command("demo", "--loops", "1,2", "--results", str(tmp_path / "runs"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained for one loop count" not in done.stderr
    assert f"plt-eval show RUN --results {tmp_path / 'runs'} --failed" in done.stdout
    assert "plt-eval study --quick" in done.stdout
    runs = list_runs(tmp_path / "runs")
    assert [(run.manifest.identity.model, run.manifest.identity.loops) for run in runs] == [
        ("plt-tiny:r1", 1),
        ("plt-tiny:r2", 2),
        ("plt-demo", 2),
    ]
    first, _, code = [run.metrics() for run in runs]
    assert first is not None
    assert first.metrics["trace.exact/string/k1"].value > 0.2
    assert code is not None
    assert {name: metric.value for name, metric in code.metrics.items()} == {
        "demo.base.pass@1": 1.0,
        "demo.plus.pass@1": 1.0,
    }


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


def test_the_families_sample_is_balanced() -> None:
    problems = [(sample.data["family"], sample.data["k"]) for sample in TRACE.load(None).samples]
    shown = problems[: FAMILY.options["limit"]]
    counts = {shown.count(kind) for kind in problems}
    assert counts == {10}


def test_what_is_shown_is_there() -> None:
    assert (Path(CODE.options["model"]) / "config.json").is_file()
