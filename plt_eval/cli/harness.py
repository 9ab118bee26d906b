"""`plt-eval lm-eval`: the official command of lm-evaluation-harness, with our models in it."""

from __future__ import annotations

from typing import Any

import typer

OFFICIAL_SETTINGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    "add_help_option": False,
}
"""Everything after the name is the official command's, --help too."""


def official(context: typer.Context) -> None:
    """lm-evaluation-harness' own command, with the model `plt`.

    All arguments go to it as they are: plt-eval lm-eval run --model plt --model_args pretrained=CHECKPOINT,loops=2
    --tasks TASK. `plt-eval lm-eval --hook` prints the folder that makes `lm-eval` itself know the model where it is on
    PYTHONPATH. (To keep its runs with all others: plt-eval run --suite lm-eval:TASK.)
    """
    from plt_eval.lm_harness.official import STARTUP, run_official

    if context.args == ["--hook"]:
        typer.echo(STARTUP)
        return
    run_official(context.args)
