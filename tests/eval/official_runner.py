"""A stand-in for both official runners: it takes their command line, no more, and leaves result files in their format.

What a task comes to is told by `plan.json` beside it: {"task": "resolved" | "unresolved" | ...}; "hang" waits for ever.
Every call is a line of `calls.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

HERE = Path(sys.argv[0]).absolute().parent
NOW = "2026-11-27T01:00:00.000000+00:00"


def main() -> None:
    called = Path(sys.argv[0]).name
    with (HERE / "calls.jsonl").open("a") as log:
        names = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "LITELLM_LOCAL_MODEL_COST_MAP")
        told = {"argv": [called, *sys.argv[1:]], "env": {n: os.environ.get(n) for n in names}, "pid": os.getpid()}
        log.write(json.dumps(told) + "\n")
    plan = json.loads((HERE / "plan.json").read_text())
    if sys.argv[1] in ("datasets", "dataset"):
        download(called, plan)
    elif called == "tb":
        tb(plan)
    else:
        harbor(plan)


def download(called: str, plan: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("group")
    parser.add_argument("verb", choices=["download"])
    if called == "tb":
        parser.add_argument("--dataset", required=True)
    else:
        parser.add_argument("dataset")
        parser.add_argument("--export", action="store_true")
    parser.add_argument("--output-dir", type=Path, required=True)
    given = parser.parse_args()
    if "offline" in plan:
        print("│ ConnectionError: the registry cannot be reached │", file=sys.stderr)
        sys.exit(1)
    folder = given.output_dir if called == "tb" else given.output_dir / "terminal-bench"
    for name in plan:
        write_task(folder, name, "task.yaml" if called == "tb" else "task.toml")


def write_task(folder: Path, name: str, mark: str) -> None:
    """A task that the reader of folders takes."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    text = f"Do {name}."
    (folder / name / mark).write_text(json.dumps({"instruction": text}) if mark == "task.yaml" else "version = '1.0'\n")
    (folder / name / "instruction.md").write_text(text)


def tb(plan: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("verb", choices=["run"])
    for name in ("dataset-path", "output-path"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("run-id", "agent", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--n-concurrent", type=int, required=True)
    parser.add_argument("--no-upload-results", action="store_true", required=True)
    parser.add_argument("--agent-kwarg", action="append", required=True)
    parser.add_argument("--task-id", action="append", required=True)
    parser.add_argument("--global-agent-timeout-sec", type=float)
    parser.add_argument("--global-test-timeout-sec", type=float)
    given = parser.parse_args()
    assert all(part.count("=") == 1 for part in given.agent_kwarg)
    out = given.output_path / given.run_id
    results = []
    for task in given.task_id:
        assert (given.dataset_path / task / "task.yaml").is_file()
        name = f"{task}.1-of-1.{given.run_id}"
        (out / task / name).mkdir(parents=True)
        what = plan[task]
        if what == "hang":
            hang()
        row = tb_row(task, name, what)
        results.append(row)
        if what != "broke":
            (out / task / name / "results.json").write_text(json.dumps(row, indent=4))
        (out / "results.json").write_text(json.dumps({"id": str(uuid.uuid4()), "results": results}, indent=4))


def tb_row(task: str, name: str, what: str) -> dict[str, Any]:
    resolved = {"resolved": True, "unresolved": False, "agent_timeout": False, "unknown_agent_error": False}.get(what)
    plain = what in ("resolved", "unresolved")
    return {
        "id": str(uuid.uuid4()),
        "trial_name": name,
        "task_id": task,
        "instruction": f"Do {task}.",
        "is_resolved": resolved,
        "failure_mode": "unset" if plain else "unknown_agent_error" if what == "broke" else what,
        "parser_results": None if resolved is None else {"test_it": "passed" if resolved else "failed"},
        "recording_path": None,
        "total_input_tokens": 100,
        "total_output_tokens": 10,
        "trial_started_at": NOW,
        "trial_ended_at": NOW,
    }


def harbor(plan: dict[str, str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("verb", choices=["run"])
    for name in ("path", "jobs-dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("job-name", "agent", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--n-concurrent", type=int, required=True)
    for name in ("yes", "quiet"):
        parser.add_argument(f"--{name}", action="store_true", required=True)
    parser.add_argument("--agent-kwarg", action="append", required=True)
    parser.add_argument("--include-task-name", action="append", required=True)
    given = parser.parse_args()
    for task in given.include_task_name:
        assert (given.path / task / "task.toml").is_file()
        name = f"{task[:32]}__AbC12xY"
        (given.jobs_dir / given.job_name / name).mkdir(parents=True)
        what = plan[task]
        if what == "hang":
            hang()
        row = harbor_row(given.path / task, name, what)
        (given.jobs_dir / given.job_name / name / "result.json").write_text(json.dumps(row, indent=4))


def harbor_row(task: Path, name: str, what: str) -> dict[str, Any]:
    """`what` may be the name of an exception."""
    plain = what in ("resolved", "unresolved")
    valid = plain or what == "AgentTimeoutError"
    return {
        "schema_version": 1,
        "id": str(uuid.uuid4()),
        "task_name": task.name,
        "trial_name": name,
        "task_id": {"path": str(task)},
        "agent_result": {"n_input_tokens": 100, "n_output_tokens": 10},
        "verifier_result": {"rewards": {"reward": float(what == "resolved")}} if valid else None,
        "exception_info": None if plain else {"exception_type": what, "exception_message": "it\nbroke"},
        "started_at": NOW,
        "finished_at": NOW,
        "reward_valid": valid,
    }


def hang() -> None:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    (HERE / "hangs").touch()
    while True:
        time.sleep(0.1)


if __name__ == "__main__":
    main()
