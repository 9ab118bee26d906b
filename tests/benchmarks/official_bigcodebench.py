"""The official check on programs, alone: run by the Python of BigCodeBench's environment, for harmless programs only.

Reads JSON lines {"code", "test"} on standard input and writes the official status of each, a line each. Like the
official command it runs each in a process forked from one that has what `bigcodebench.eval` loads.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    official = importlib.import_module("bigcodebench.eval")
    out = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        row = json.loads(line)
        # The limits of the official command's defaults.
        status, _ = official.untrusted_check(row["code"], row["test"], "task_func", 30 * 1024, 30 * 1024, 10, 1, 20)
        os.write(out, f"{status}\n".encode())


if __name__ == "__main__":
    main()
