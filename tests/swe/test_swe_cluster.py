"""Patches judged by the machines of a Ray cluster: as here, and nothing is left behind when a judge or machine dies."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mini import HANGING, WRONG, Cli, Instance, write_rows
from scripted import ScriptedServer

sys.path.append(str(Path(__file__).parents[1] / "cluster"))

from ray_nodes import started

from plt_eval.store import Run, list_runs
from plt_eval.swe.containers import LABEL

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("only_containers", "only_judges")]
pytest.importorskip("ray", reason="needs ray: pip install 'plt-eval[ray]'")


def containers() -> list[str]:
    command = ["docker", "ps", "-aq", "--filter", f"label={LABEL}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def only_run(results: Path) -> Run:
    (run,) = list_runs(results)
    return run


def verdicts(run: Run) -> dict[str, Any]:
    own = ("judged_on", "judge_seconds")
    return {
        sample.sample_id: (
            sample.values,
            sample.error,
            {name: value for name, value in sample.detail.items() if name not in own},
        )
        for sample in run.samples()
    }


def write_predictions(path: Path, patches: dict[str, str]) -> None:
    rows = [{"instance_id": i, "model_name_or_path": "org/model", "model_patch": p} for i, p in patches.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def wait_until(true: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return found


def test_verdicts_and_files_are_those_of_a_local_run(cli: Cli, tmp_path: Path, calc: Instance, cargo: Instance) -> None:
    """The harness' files come back, too."""
    write_rows(tmp_path / "rows.jsonl", calc, cargo)
    write_predictions(tmp_path / "p.jsonl", {calc.id: calc.patch(WRONG), cargo.id: cargo.gold})
    command = ["run", "--suite", "swe", "--data", "rows.jsonl", "--predictions", "p.jsonl"]
    cli(*command, "--results", "here")
    done = cli(*command, "--results", "there", "--ray", "local")
    here, there = only_run(tmp_path / "here"), only_run(tmp_path / "there")
    assert verdicts(there) == verdicts(here)
    metrics = [run.metrics() for run in (here, there)]
    assert metrics[0] is not None
    assert metrics[0] == metrics[1]
    assert "judges, " in done.stderr
    for sample in there.samples():
        log = there.path / sample.detail["log"]
        assert json.loads((log / "verdict.json").read_text())["outcome"] == sample.detail["outcome"]
        kept = (folder / sample.detail["log"] for folder in (here.path, there.path))
        # (The run's own token is in one of the names.)
        ours, theirs = ({re.sub("plt-[0-9a-f]{8}", "", path.name) for path in log.rglob("*")} for log in kept)
        assert ours == theirs
    assert containers() == []


@pytest.mark.slow
def test_multi_swe_bench_and_an_agents_patch_are_judged_there(
    cli: Cli, tmp_path: Path, calc: Instance, multi: Instance, model: ScriptedServer
) -> None:
    write_rows(tmp_path / "multi.jsonl", multi)
    cli("run", "--suite", "multi-swe-bench", "--data", "multi.jsonl", "--gold", "--ray", "local", "--results", "m")
    write_rows(tmp_path / "rows.jsonl", calc)
    cli("run", "--suite", "swe", "--data", "rows.jsonl", *model.options(), "--ray", "local", "--results", "a")
    for results in ("m", "a"):
        (sample,) = only_run(tmp_path / results).samples()
        assert sample.detail["outcome"] == "resolved"
        assert sample.detail["judged_on"]
    assert containers() == []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines, each with a place for Docker, and a head that does not judge."""
    store = {"object_store_memory": 80 << 20}
    judge = {"num_cpus": 1, "resources": {"docker": 1}, **store}
    with started({"num_cpus": 0, **store}, judge, judge) as made:
        yield made


def judges() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if " ".join(process.cmdline()).startswith("ray::judge"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def machine_of(cluster: Any, judge: psutil.Process) -> Any:
    """The machine whose raylet has started `judge`."""
    raylet = judge.parent()
    assert raylet is not None
    return next(
        node for node in cluster.list_all_nodes() if raylet.pid in [p.process.pid for p in node.all_processes["raylet"]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["judge", "command", "machine"])  # the last one stays dead
def test_what_dies_leaves_no_container_and_loses_no_verdict(
    cluster: Any, tmp_path: Path, calc: Instance, cargo: Instance, victim: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", calc, cargo)
    hanging = calc.patch(HANGING)
    write_predictions(tmp_path / "p.jsonl", {calc.id: hanging, cargo.id: cargo.gold})
    command = [sys.executable, "-m", "plt_eval", "run", "--suite", "swe", "--data", "rows.jsonl"]
    command += ["--predictions", "p.jsonl", "--test-timeout", "20", "--ray", cluster.address]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as told:
        journal = wait_until(lambda: next(iter(tmp_path.glob("results/runs/*/samples.jsonl")), None))
        wait_until(lambda: len(judges()) == 1 and len(containers()) == 1 and journal.read_text())
        if victim == "judge":
            judges()[0].kill()
        elif victim == "machine":
            cluster.remove_node(machine_of(cluster, judges()[0]), allow_graceful=False)
        else:
            told.send_signal(signal.SIGINT)
        _, err = told.communicate(timeout=200)
    assert told.returncode == (130 if victim == "command" else 0), err
    run = only_run(tmp_path / "results" / "runs")
    outcomes = {sample.sample_id: sample.detail.get("outcome") for sample in run.samples()}
    expected = {cargo.id: "resolved"} | ({} if victim == "command" else {calc.id: "tests_timed_out"})
    assert outcomes == expected
    assert containers() == []
