"""What `plt-eval run --predictions` costs over the official command on the same predictions, and where the time goes.

    python scripts/swe_overhead.py [INSTANCES] [ROUNDS] [--stop-at-once]

Makes miniature instances (those of the tests: seconds of tests would hide the overhead, so theirs take none), checks
that both commands give the same verdicts, and then times whole processes in turn: the official one, ours, the official
one, ours... Needs a Docker daemon, and scripts/make_swe_base.sh.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
sys.path.insert(0, str(CHECKOUT / "tests" / "swe"))


def main() -> None:
    """Print the table."""
    from mini import BASE, WRONG, swebench_instance

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    workers = len(os.sched_getaffinity(0))
    subprocess.run(["sh", str(CHECKOUT / "scripts" / "make_swe_base.sh"), BASE], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # No published image has a stop signal: there the official command waits 15 s for `docker stop`.
        signal = "SIGKILL" if "--stop-at-once" in sys.argv else None
        one = swebench_instance(folder / "one", 3, base=BASE, stop_signal=signal)
        rows = [{**one.row, "instance_id": f"mini__calc-{i}"} for i in range(count)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        patches = [one.gold if i % 2 else one.patch(WRONG) for i in range(count)]
        lines = [
            {"instance_id": row["instance_id"], "model_name_or_path": "m", "model_patch": patch}
            for row, patch in zip(rows, patches, strict=True)
        ]
        (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        took: dict[str, list[float]] = {"official": [], "ours": []}
        seconds: dict[str, list[float]] = {}
        for number in range(rounds):
            own = folder / f"round{number}"
            own.mkdir()
            official = [
                sys.executable, "-m", "swebench.harness.run_evaluation", "-d", str(folder / "rows.jsonl"), "-p",
                str(folder / "p.jsonl"), "-id", f"round{number}", "--max_workers", str(workers),
            ]  # fmt: skip
            ours = [
                sys.executable, "-m", "plt_eval", "run", "--suite", "swe", "--data", str(folder / "rows.jsonl"),
                "--predictions", str(folder / "p.jsonl"), "--workers", str(workers),
            ]  # fmt: skip
            for kind, command in (("official", official), ("ours", ours)):
                started = time.monotonic()
                subprocess.run(command, cwd=own, check=True, capture_output=True)
                took[kind].append(time.monotonic() - started)
            (report,) = own.glob("m.round*.json")
            resolved = set(json.loads(report.read_text())["resolved_ids"])
            (samples,) = own.glob("results/runs/*/samples.jsonl")
            judged = [json.loads(line) for line in samples.open()]
            assert {record["sample_id"] for record in judged if record["values"]["resolved"]} == resolved
            for record in judged:
                for stage, value in record["detail"]["judge_seconds"].items():
                    seconds.setdefault(stage, []).append(value)
        for kind, values in took.items():
            told = ", ".join(f"{value:.1f}" for value in values)
            print(f"{kind}: {statistics.median(values):.1f} s of {count} instances, {workers} at a time ({told})")
        ratios = [ours / official for official, ours in zip(took["official"], took["ours"], strict=True)]
        print(f"ratio ours/official: {statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")
        for stage, values in seconds.items():
            print(f"{stage}: median {statistics.median(values):.2f} s an instance")


if __name__ == "__main__":
    main()
