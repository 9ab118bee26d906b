"""lm-eval's own command, which learns our model's name before it runs, and is left alone otherwise.

lm-eval 0.4.13 has no way in for models of other packages: it looks names up in a list that only imported code can add
to, and imports nothing that a user or an installed package names. So something of ours has to run first:

    plt-eval lm-eval run --model plt ...             this module
    PYTHONPATH=... lm-eval run --model plt ...       the folder `startup` beside it
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from plt_benchmarks.eleuther import PACKAGE_VERSION
from plt_eval.errors import MissingExtra, UserError

MODEL = "plt"
TARGET = "plt_eval.lm_harness.models:PltLM"
STARTUP = Path(__file__).with_name("startup")
"""The folder for PYTHONPATH."""


def need_lm_eval(why: str) -> None:
    """Raises MissingExtra when lm-eval is not installed, and UserError for another version than ours is made for."""
    from importlib import metadata

    try:
        found = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise MissingExtra("lm-eval", "lm-eval", why) from None
    if found != PACKAGE_VERSION:
        raise UserError(f"{why} needs lm-eval {PACKAGE_VERSION}, found {found}: pip install 'plt-eval[lm-eval]'")


def register() -> None:
    """Tell lm-eval of the model `plt`; harmless when it knows."""
    import lm_eval.models  # noqa: F401  (its own names first: it does not list them any more once another is there)
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=TARGET)


def run_official(arguments: Sequence[str]) -> None:
    """What `lm-eval ARGUMENTS` does."""
    need_lm_eval("plt-eval lm-eval")
    register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
