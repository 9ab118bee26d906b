"""Runs the toy suite in a process of its own, to be killed or interrupted:

python toy_run.py RESULTS LOG PROBLEMS N_SAMPLES DRAW_S SCORE_S
"""

from __future__ import annotations

import sys
from pathlib import Path

from toy_parts import NoSandbox, SumEngine, SumSuite

from plt_eval.engines.base import Decoding
from plt_eval.errors import UserError
from plt_eval.runner import RunInterrupted, Settings, run


def main(arguments: list[str]) -> int:
    results, log, problems, n_samples, draw_s, score_s = arguments
    suite = SumSuite(int(problems), score_s=float(score_s))
    engine = SumEngine(draw_s=float(draw_s), log=Path(log))
    settings = Settings(Path(results), Decoding(temperature=0.5), n_samples=int(n_samples), scoring_workers=2)
    try:
        result = run(suite, suite.load(None), engine, NoSandbox, settings)
    except RunInterrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{result.run.manifest.run_id} reused={result.reused}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
