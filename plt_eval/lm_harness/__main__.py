"""`python -m plt_eval.lm_harness ARGUMENTS`: lm-eval's own command, with the model `plt`."""

from __future__ import annotations

import sys

from plt_eval.cli.main import main

main(["lm-eval", *sys.argv[1:]])
