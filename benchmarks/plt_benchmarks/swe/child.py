"""What both official harnesses run in: a process of its own, in the order's own folder, that dies with its parent.

    python -m plt_benchmarks.swe.child <<< '{"harness": "swebench", "folder": ...}'

The harnesses write to paths relative to the working directory, set process-wide limits, open Docker clients at import
and may end the process; none of that reaches the one that asks. The verdict is a file, `verdict.json`: what is printed
goes to `harness.log` and counts for nothing. Every container that the harness makes gets the options of the order
(labels, limits, network). swebench, which judges many patches in a process anyway, takes one order after another, each
answered by a line; Multi-SWE-bench keeps loggers and more in its modules, and gets a new process for each.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

VERDICT = "verdict.json"
_GIT_REFUSED = re.compile(
    r"^error: (patch failed|cannot apply binary patch|corrupt patch|No valid patches|.*: (patch does not apply|"
    r"No such file or directory|already exists in working directory|does not exist in index))",
    re.MULTILINE,
)
_FULL = "No space left on device"
SKIPPED_PATCH = ">>>>> Patch Apply Failed"


DONE = b"done\n"
HARNESS_LOG = "harness.log"
_options: dict[str, Any] = {}
"""What every container gets besides what its creator asks for."""


def main() -> None:
    """Take orders (a JSON line each), judge, write the verdict into the order's folder, and answer with DONE. Ends at
    once when the standard input does: then whoever asks is gone."""
    answers = os.dup(1)
    orders: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_take_orders, args=(orders,), daemon=True).start()
    _equip_containers()
    while True:
        order = json.loads(orders.get())
        os.chdir(order["folder"])
        _print_to(HARNESS_LOG)
        _options.clear()
        _options.update(order["container"])
        one_of_many = order["harness"] == "swebench"
        Path(VERDICT).write_text(json.dumps((_swebench if one_of_many else _multi_swe_bench)(order)), encoding="utf-8")
        sys.stdout.flush()
        os.write(answers, DONE)
        if not one_of_many:
            return


def _take_orders(orders: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    os._exit(3)


def _print_to(path: str) -> None:
    """Let both streams go to the file `path` from here on."""
    sys.stdout.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _equip_containers() -> None:
    """Give every container that is created from here on `_options`."""
    from docker.models.containers import ContainerCollection

    created = ContainerCollection.create

    def create(self: Any, image: Any, command: Any = None, **asked: Any) -> Any:
        together = {**_options, **asked}
        for name in ("environment", "volumes", "labels"):
            own = asked.get(name) or {}
            if isinstance(own, list):
                own = dict(item.split("=", 1) for item in own)
            together[name] = {**_options.get(name, {}), **{str(key): value for key, value in own.items()}}
        return created(self, image, command, **together)

    ContainerCollection.create = create


# --- swebench -----------------------------------------------------------------------------------------------


def _swebench(order: Mapping[str, Any]) -> dict[str, Any]:
    from swebench.harness import run_evaluation

    row, run_id, model = order["row"], order["run_id"], order["model"]
    instance = row["instance_id"]
    Path("row.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    prediction = {"instance_id": instance, "model_name_or_path": model, "model_patch": order["patch"]}
    Path("prediction.jsonl").write_text(json.dumps(prediction) + "\n", encoding="utf-8")
    report_file = run_evaluation.main(
        dataset_name="row.jsonl",
        split="test",
        instance_ids=[instance],
        predictions_path="prediction.jsonl",
        max_workers=1,
        open_file_limit=4096,
        run_id=run_id,
        timeout=order["test_timeout"],
        rewrite_reports=False,
        modal=False,
        report_dir=".",
    )
    report = json.loads(Path(report_file).read_text(encoding="utf-8"))
    logs = Path("logs/run_evaluation") / run_id / model.replace("/", "__") / instance
    told = {name: _text(logs / name) for name in ("run_instance.log", "report.json")}
    return swebench_verdict(report, instance, told["run_instance.log"], told["report.json"])


def swebench_verdict(report: Mapping[str, Any], instance: str, log: str, own_report: str) -> dict[str, Any]:
    """What the official files say: an `outcome`, or an `error` of the infrastructure. `log` is run_instance.log,
    `own_report` the instance's report.json ("" where there is none)."""
    reason = report["failure_reasons"].get(instance)
    detail: dict[str, Any] = {} if reason is None else {"suspected": reason}
    if own_report:
        tests = json.loads(own_report)[instance].get("tests_status") or {}
        detail["tests"] = {
            kind: {"passed": len(found.get("success", ())), "failed": found.get("failure", ())[:20]}
            for kind, found in tests.items()
            if kind in ("FAIL_TO_PASS", "PASS_TO_PASS")
        }
    if instance in report["resolved_ids"]:
        return {"outcome": "resolved", **detail}
    if instance in report["unresolved_ids"]:
        return {"outcome": "unresolved", **detail}
    if _FULL in _last_line(log):
        return {"error": f"disk full: {_last_line(log)}", **detail}
    if SKIPPED_PATCH in log:
        return {"outcome": "patch_failed", **detail}
    killed_in_vain = "kill -TERM" in log and "executable file not found" in log  # the image has no `kill`
    if "Test timed out after" in log or killed_in_vain:
        return {"outcome": "tests_timed_out", **detail}
    return {"error": f"the harness judged nothing: {_last_line(log)}", **detail}


# --- multi-swe-bench ----------------------------------------------------------------------------------------


def _multi_swe_bench(order: Mapping[str, Any]) -> dict[str, Any]:
    from multi_swe_bench.harness.gen_report import CliArgs as Report
    from multi_swe_bench.harness.run_evaluation import CliArgs as Evaluation

    row = order["row"]
    names = ("org", "repo", "number")
    Path("row.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    prediction = {**{name: row[name] for name in names}, "fix_patch": order["patch"]}
    Path("prediction.jsonl").write_text(json.dumps(prediction) + "\n", encoding="utf-8")
    for folder in ("work", "report", "logs"):
        Path(folder).mkdir(exist_ok=True)
    shared: dict[str, Any] = {
        "workdir": Path("work"), "output_dir": Path("report"), "specifics": None, "skips": None, "max_workers": 1,
        "dataset_files": ["row.jsonl"], "log_dir": Path("logs"), "log_level": "INFO", "log_to_console": False,
    }  # fmt: skip
    evaluation = Evaluation(
        mode="instance_only", patch_files=["prediction.jsonl"], force_build=False, repo_dir=None, need_clone=True,
        global_env=None, clear_env=True, stop_on_error=False, max_workers_build_image=1, max_workers_run_instance=1,
        fix_patch_run_cmd="", human_mode=True, **shared,
    )  # fmt: skip
    timed_out = _Deadline(order["test_timeout"], order["container"]["labels"])
    with timed_out:
        evaluation.run_mode_instance_only()
    Report(mode="evaluation", raw_dataset_files=None, regen=True, **shared).run()
    report = json.loads(Path("report/final_report.json").read_text(encoding="utf-8"))
    work = Path("work") / row["org"] / row["repo"] / "evals" / f"pr-{row['number']}"
    log = _text(Path("logs/run_evaluation.log"))
    return multi_swe_verdict(report, _text(work / "fix-patch-run.log"), log, timed_out=timed_out.passed)


def multi_swe_verdict(report: Mapping[str, Any], output: str, log: str, *, timed_out: bool) -> dict[str, Any]:
    """What the official files say: an `outcome`, or an `error` of the infrastructure. `output` is the tests' log, `log`
    the harness'."""
    if timed_out:
        return {"outcome": "tests_timed_out"}
    if "Error running instance" in log:
        return {"error": f"the harness broke off: {_last_line(log)}"}
    if report["resolved_ids"]:
        return {"outcome": "resolved"}
    if not output:
        return {"error": f"the harness judged nothing: {_last_line(log)}"}
    if _GIT_REFUSED.search("\n".join(output.splitlines()[-20:])):  # its scripts end there: they say `set -e`
        return {"outcome": "patch_failed"}
    if report["unresolved_ids"] or report["error_ids"]:
        return {"outcome": "unresolved"}
    return {"error": f"the harness judged nothing: {_last_line(log)}"}


class _Deadline:
    """Multi-SWE-bench waits for a container for ever: after `seconds` those with `labels` are killed."""

    def __init__(self, seconds: float, labels: Mapping[str, str]) -> None:
        self.passed = False
        self._labels = [f"{name}={value}" for name, value in labels.items()]
        self._timer = threading.Timer(seconds, self._kill)

    def __enter__(self) -> None:
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _kill(self) -> None:
        import docker

        self.passed = True
        for container in docker.from_env().containers.list(filters={"label": self._labels}):
            container.kill()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _last_line(log: str) -> str:
    """The last line that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line and not line.startswith(("File ", "raise "))]
    return (telling or lines or ["it left no log"])[-1][:300]


if __name__ == "__main__":
    main()
