"""The `plt-eval` command: its subcommands, and how errors reach the user.

Nothing heavy is imported until a subcommand runs, so `plt-eval --help` answers at once.

Exit codes: 0 done; 1 done, but some samples are missing or a correctness gate was red; 2 the user has to mend
something (one line on stderr); 130 interrupted (`serve`: 143 where SIGTERM ended it).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from plt_eval.cli.bench import app as bench
from plt_eval.cli.data import app as data
from plt_eval.cli.demo import demo
from plt_eval.cli.diagnose import diagnose
from plt_eval.cli.estimate import app as estimate
from plt_eval.cli.export import export
from plt_eval.cli.figures import figures
from plt_eval.cli.harness import OFFICIAL_SETTINGS, official
from plt_eval.cli.install import install
from plt_eval.cli.ls import ls
from plt_eval.cli.report import report
from plt_eval.cli.run import run
from plt_eval.cli.serve import serve
from plt_eval.cli.show import show
from plt_eval.cli.study import study
from plt_eval.cli.suites import suites
from plt_eval.cli.train import sft, train
from plt_eval.errors import UserError

app = typer.Typer(
    name="plt-eval",
    help="How many loops should a Parallel Loop Transformer run?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo)
app.command("run")(run)
app.command("diagnose")(diagnose)
app.command("study")(study)
app.command("train")(train)
app.command("sft")(sft)
app.command("ls")(ls)
app.command("show")(show)
app.command("export")(export)
app.command("serve")(serve)
app.command("report")(report)
app.command("figures")(figures)
app.command("suites")(suites)
app.command("install")(install)
app.command("lm-eval", **OFFICIAL_SETTINGS)(official)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(estimate, name="estimate")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"plt-eval {version('plt-eval')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with the codes above. PLT_EVAL_DEBUG=1 shows tracebacks."""
    try:
        app(args=arguments, prog_name="plt-eval")
    except Exception as error:
        message = _user_message(error)
        if message is None or os.environ.get("PLT_EVAL_DEBUG"):
            raise
        print(f"plt-eval: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def _user_message(error: Exception) -> str | None:
    """What to tell the user; None for a fault of ours, which keeps its traceback."""
    from plt_benchmarks.protocols import SandboxError, SuiteError

    if isinstance(error, UserError | SuiteError | SandboxError):
        return str(error)
    if isinstance(error, ValueError) and type(error).__module__.startswith(("plt_model.", "plt_diagnostics.")):
        return str(error)  # their own errors are one line for the user too; their modules are slow to import
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return where + (error.strerror or str(error))
    return None


if __name__ == "__main__":
    main()
