"""What `plt-eval run` does for a suite of Terminal-Bench: check the options, find runner, Docker and tasks, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_benchmarks.protocols import SuiteError
from plt_benchmarks.terminal import TerminalSuite
from plt_eval.engines.endpoints import checked_endpoints, served_name
from plt_eval.errors import UserError
from plt_eval.runner import Result, Settings, run
from plt_eval.swe.command import SweOptions, chosen
from plt_eval.terminal.engine import AgentLimits, AgentModel, OfficialEngine

if TYPE_CHECKING:
    from rich.console import Console

    from plt_eval.cli.options import RunOptions
    from plt_eval.engines.checkpoint import ServedModel

TAKEN = {
    "tb": ("instances", "workers", "agent_steps", "agent_wall_time", "test_timeout"),
    "harbor": ("instances", "workers", "agent_steps"),
}
"""Options of agents that have an effect, by runner. (Harbor's command line takes multiples of each task's own limits
only.)"""
_INSTEAD = {
    "n_samples": "a task is done once",
    "scoring_workers": "use --workers",
    "ray": "the official runner does and judges a task with this machine's Docker",
    "concurrency": "use --workers",
    "sandbox_image": "each task has its own image",
}


def check_terminal(suite: TerminalSuite, options: RunOptions) -> None:
    """Raises UserError for options without an effect on a suite of Terminal-Bench, and for missing ones."""
    if options.engine != "openai":
        raise UserError(
            f"suite {suite.name} needs --engine openai, found --engine {options.engine}: its official agent asks an "
            "endpoint; serve the model, and give --endpoint and --api-model"
        )
    for name in ("endpoint", "api_model"):
        if not getattr(options, name):
            raise UserError(f"--engine openai needs {_flag(name)}")
    without = [name for name in (*_INSTEAD, *_NO_EFFECT) if getattr(options, name) is not None]
    if without:
        why = _INSTEAD.get(without[0], f"the official agent decides it ({suite.official.package})")
        raise UserError(f"{_flag(without[0])} has no effect on suite {suite.name}: {why}")
    if options.api == "completions":
        raise UserError(f"--api completions has no effect on suite {suite.name}: the official agent chats")
    swe, taken = options.swe or SweOptions(), TAKEN[suite.official.program]
    for field in fields(swe):
        if getattr(swe, field.name) is not None and field.name not in taken:
            raise UserError(f"{_flag(field.name)} has no effect on suite {suite.name}")
    for address in options.endpoint or ():
        if "=" in address:  # tb cuts at every one
            raise UserError(f"--endpoint {address}: suite {suite.name} takes no address with '=' in it")
    if len(checked_endpoints(options.endpoint or (), _ignore)) > 1:
        raise UserError(f"suite {suite.name} takes one --endpoint: the official runner hands its agent a single one")


def _endpoint(options: RunOptions) -> str:
    return (options.endpoint or ("",))[0]


def _ignore(_: str) -> None:
    """One endpoint given twice is one."""


_NO_EFFECT = ("top_p", "seed", "max_new_tokens", "retries", "request_timeout", "completions")


def run_terminal(
    suite: TerminalSuite,
    options: RunOptions,
    key: str | None,
    checkpoint: ServedModel | None,
    settings: Settings,
    named: Callable[[Settings], Settings],
    console: Console,
    notify: Callable[[str], None],
) -> list[Result]:
    """Let the official runner do and judge the tasks. Raises UserError and SuiteError."""
    official = suite.official
    executable = official.executable()
    suite = replace(suite, runner_version=official.version(executable))
    swe = options.swe or SweOptions()
    data = suite.load(options.data)
    for note in data.notes:
        notify(note)
    data = chosen(data, swe, options.limit, None)
    limits = AgentLimits(min(swe.parallel, len(data.samples)), swe.agent_steps, swe.agent_wall_time, swe.test_timeout)
    served = served_name([_endpoint(options)], options.served_as)
    model = AgentModel(
        str(options.api_model), _endpoint(options), key, settings.decoding.temperature, served, checkpoint
    )
    with closing(OfficialEngine(suite, executable, Path(data.source), model, limits)) as engine:

        def opened(folder: Path, waiting: Collection[str]) -> None:
            if waiting:
                _check_served(model)
                check_docker(suite.name)
                notify(
                    f"{official.package} {suite.runner_version} does {len(waiting)} tasks, {limits.workers} at a time; "
                    f"what it says: {folder}/official/*/output.log"
                )
            engine.folder = folder

        return [run(suite, data, engine, _no_sandbox, replace(named(settings), opened=opened), console=console)]


def _check_served(model: AgentModel) -> None:
    """Raises UserError for a server that says that it runs another loop count than `model.checkpoint`."""
    from plt_eval.engines.openai import OpenAIEngine

    if model.checkpoint is None:
        return
    with closing(
        OpenAIEngine(endpoint=model.endpoint, model=model.name, api_key=model.key, checkpoint=model.checkpoint)
    ) as engine:
        engine.check_served()


def check_docker(name: str) -> None:
    """Raises SuiteError where Docker, its daemon or its Compose plugin is missing."""
    if shutil.which("docker") is None:
        raise SuiteError(f"suite {name} needs Docker: apt-get install docker.io")
    checks = {
        "a Docker daemon that answers": ["info", "--format", "{{.ServerVersion}}"],
        "Docker Compose 2 (`docker compose`; Docker's package docker-compose-plugin)": ["compose", "version"],
    }
    for what, arguments in checks.items():
        try:
            done = subprocess.run(
                ["docker", *arguments], capture_output=True, text=True, check=False, timeout=60, env=dict(os.environ)
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SuiteError(f"suite {name} needs {what}: {error}") from None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "no answer").splitlines()[0]
            raise SuiteError(f"suite {name} needs {what}: {said}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _no_sandbox() -> Any:
    raise AssertionError("the official runner brings its own containers")
