"""The official check with nothing of ours around it, as a script: reads problems and programs as JSON from its standard
input, writes what the official functions say about each.

It is a process of its own because some of the programs write to every descriptor that they find.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def bare_official(dataset: str, jobs: list[tuple[dict[str, Any], str]], **limits: float) -> list[tuple[str, str]]:
    """(base status, plus status) of each (row, program), one after the other; "broken" where the check itself broke."""
    content = json.dumps({"dataset": dataset, "jobs": jobs, "limits": limits})
    done = subprocess.run([sys.executable, __file__], input=content, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [(base, plus) for base, plus in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    from evalplus.data.mbpp import mbpp_deserialize_inputs
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.evaluate import check_correctness
    from evalplus.gen.util import trusted_exec

    request = json.load(sys.stdin)
    statuses, truth = [], {}
    for row, program in request["jobs"]:
        for key in ("base_input", "plus_input"):
            if row["task_id"].startswith("Mbpp/"):
                row[key] = mbpp_deserialize_inputs(row["task_id"], row[key])
        if row["task_id"] not in truth:
            expected: dict[str, Any] = {}
            for name in ("base", "plus"):
                expected[name], expected[f"{name}_time"] = trusted_exec(
                    row["prompt"] + row["canonical_solution"],
                    row[f"{name}_input"],
                    row["entry_point"],
                    record_time=True,
                    output_not_none=row["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS,
                )
            truth[row["task_id"]] = expected
        try:
            found = check_correctness(
                request["dataset"], 0, row, program, truth[row["task_id"]], fast_check=True, **request["limits"]
            )
            statuses.append((found["base"][0], found["plus"][0]))
        except KeyError:  # the program wrote into the memory that holds the status
            statuses.append(("broken", "broken"))
    print()
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
