"""What `plt-eval run` does with its options: have them checked, make the engines, run, print.

All checks that need no model come first, so that a mistake costs no time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_eval.cli.options import (
    RunOptions,
    check_lm_eval,
    check_options,
    check_swe,
    parse_batch_size,
    parse_loops,
    refuse_swe_options,
)
from plt_eval.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from plt_benchmarks.eleuther import LmEvalSuite
    from plt_benchmarks.protocols import Sandbox, Suite, SuiteData
    from plt_benchmarks.swe.suites import SweSuite
    from plt_benchmarks.terminal import TerminalSuite
    from plt_benchmarks.tools.suite import ToolsSuite
    from plt_eval.cluster.connection import Connection
    from plt_eval.engines.base import Decoding, Engine
    from plt_eval.engines.checkpoint import ServedModel
    from plt_eval.engines.replay import ReplayEngine
    from plt_eval.models import ResolvedModel
    from plt_eval.runner import RemoteScorer, Result, Settings
    from plt_eval.swe.command import OpenPatchScorer, PatchWork, SweOptions

    Job = tuple[Suite, SuiteData]


def report_runs(options: RunOptions, *, as_json: bool) -> bool:
    """Run everything, print one table (or JSON) to stdout, and say whether samples are missing.
    Raises UserError, SuiteError, SandboxError; on Ctrl-C says how far it got, and exits with 130."""
    import typer
    from rich.console import Console

    from plt_eval.cli.paper import PAPER, evaluate_paper, paper_json, paper_table
    from plt_eval.tables import output_console, result_json, results_table

    console = Console(stderr=True, highlight=False)
    try:
        if options.suite.lower() == PAPER:
            measured = evaluate_paper(options, console, evaluate)
            results = [result for found in measured for result in found.results]
        else:
            results = evaluate(options, console)
    except KeyboardInterrupt as stop:
        typer.echo(f"plt-eval: interrupted: {str(stop) or 'the same command goes on'}", err=True)
        raise typer.Exit(130) from None
    finally:
        _disconnect()
    if options.suite.lower() == PAPER:
        if as_json:
            print(json.dumps(paper_json(measured), indent=2))
        else:
            output_console().print(paper_table(measured))
    elif as_json:
        print(json.dumps([result_json(result) for result in results], indent=2))
    else:
        output_console().print(results_table(results))
    return any(result.metrics.missing for result in results)


def evaluate(options: RunOptions, console: Console) -> list[Result]:
    """One result for every model, loop count and suite; progress and notes go to `console`."""
    from dataclasses import replace

    from plt_benchmarks.eleuther import LmEvalSuite
    from plt_benchmarks.registry import get_suite
    from plt_benchmarks.swe.suites import SweSuite
    from plt_benchmarks.terminal import TerminalSuite
    from plt_benchmarks.tools.suite import ToolsSuite
    from plt_eval.engines.replay import ReplayEngine
    from plt_eval.runner import run

    suites = get_suite(options.suite, options.chosen)
    if isinstance(suites[0], LmEvalSuite):
        return _evaluate_lm_eval(suites[0], options, console)
    if isinstance(suites[0], SweSuite):
        return _evaluate_swe(suites[0], options, console)
    if isinstance(suites[0], TerminalSuite):
        return _evaluate_terminal(suites[0], options, console)
    refuse_swe_options(options)
    check_options(options)
    _check_ray(options)
    models = _models(options, _notes(console))
    jobs = [(suite, suite.load(options.data)) for suite in suites]
    for _, data in jobs:
        for note in data.notes:
            _notes(console)(note)
    results = []
    for model in models:
        with closing(_make_engine(options, model, jobs, _notes(console))) as engine:
            settings = _settings(options, _count_samples(options, engine, jobs))
            for suite, data in jobs:
                own = engine
                if isinstance(engine, ReplayEngine):
                    wanted = {sample.id for sample in data.samples[: options.limit]}
                    own = engine.select(wanted, settings.n_samples)
                elif isinstance(suite, ToolsSuite):
                    own = _tools_engine(engine, suite, data, options)
                loops = None if model is None else model.loops
                named = _named(settings, options, suite.name, loops, several=len(models) * len(jobs) > 1)
                named = replace(named, elsewhere=_elsewhere(options, _notes(console)))
                result = run(suite, data, own, _sandbox(options), named, console=console)
                _say_done(console, result)
                results.append(result)
    return results


def _evaluate_swe(suite: SweSuite, options: RunOptions, console: Console) -> list[Result]:
    """Issues of repositories: an agent or stored patches, judged in Docker by the official harness."""
    from plt_eval.swe.command import SweOptions, run_swe

    notify = _notes(console)
    swe = options.swe or SweOptions()
    check_swe(suite.name, options, swe)
    _check_ray(options)
    if not swe.stored:
        check_options(options)
    models: Sequence[ResolvedModel | None] = [None] if swe.stored else _models(options, notify)

    def named(settings: Settings, engine: Engine) -> Settings:
        loops = engine.identity().get("loops")
        return _named(settings, options, suite.name, loops if isinstance(loops, int) else None, several=len(models) > 1)

    def engines() -> list[Callable[[], Engine]]:
        return [partial(_make_engine, options, model, (), notify) for model in models]

    settings = _settings(options, 1)
    elsewhere = _patches_elsewhere(options, swe, notify)
    results = run_swe(suite, swe, options.data, options.limit, settings, engines, named, console, notify, elsewhere)
    for result in results:
        _say_done(console, result)
    return results


def _evaluate_terminal(suite: TerminalSuite, options: RunOptions, console: Console) -> list[Result]:
    """Tasks in a terminal, done and judged by the official runner, with an endpoint as its agent's model."""
    from plt_eval.terminal.command import check_terminal, run_terminal

    check_terminal(suite, options)
    check_options(options)

    def named(settings: Settings) -> Settings:
        return _named(settings, options, suite.name, None, several=False)

    notify = _notes(console)
    checkpoint = _served(_models(options, notify)[0])
    settings = _settings(options, 1)
    results = run_terminal(suite, options, _api_key(options), checkpoint, settings, named, console, notify)
    for result in results:
        _say_done(console, result)
    return results


def _evaluate_lm_eval(suite: LmEvalSuite, options: RunOptions, console: Console) -> list[Result]:
    """Tasks of lm-evaluation-harness, which builds their prompts and scores them itself."""
    from plt_eval.lm_harness.command import run_lm_eval

    check_lm_eval(options)
    check_options(options, tasks_draw=True)
    notify = _notes(console)
    models = _models(options, notify)
    several = len(models) * len(suite.tasks) > 1

    def named(settings: Settings, name: str, engine: Engine) -> Settings:
        loops = engine.identity().get("loops")
        return _named(settings, options, name, loops if isinstance(loops, int) else None, several=several)

    def engines() -> list[Callable[[], Engine]]:
        return [partial(_make_engine, options, model, (), notify) for model in models]

    results = run_lm_eval(
        suite,
        engines,
        _settings(options, 1),
        named,
        console,
        notify,
        greedy=options.temperature == 0,
        seeded=options.seed is not None,
    )
    for result in results:
        _say_done(console, result)
    return results


# --- engines ------------------------------------------------------------------------------------------


def _models(options: RunOptions, notify: Callable[[str], None]) -> Sequence[ResolvedModel | None]:
    """What an engine that computes itself is to run, one engine each; for an endpoint what it serves, by the user's
    word; [None] for what is not known."""
    if options.engine == "replay" or (options.engine == "openai" and options.model is None):
        return [None]
    models = chosen_models(options.model, options.loops, "evaluating", notify)
    if options.engine == "openai" and len(models) > 1:
        raise UserError(f"--model {options.model} is {len(models)} checkpoints, of which one is served: add --loops")
    return models


def _served(model: ResolvedModel | None) -> ServedModel | None:
    """What an endpoint serves, if the user says so. Raises UserError."""
    if model is None:
        return None
    from plt_eval.engines.checkpoint import ServedModel

    return ServedModel.of(model)


def chosen_models(
    name: str | None, loops: str | None, doing: str, notify: Callable[[str], None]
) -> list[ResolvedModel]:
    """What --model and --loops stand for; without --model the default family, and `notify` hears so. A folder that is
    none is left for whoever opens it to refuse. Raises UserError."""
    from plt_eval.models import DEFAULT_FAMILY, ResolvedModel, names_family, resolve_models

    counts: Sequence[int] | None = None if loops is None else parse_loops(loops)
    if name is None:
        if not names_family(DEFAULT_FAMILY):
            raise UserError("--model is missing: give a checkpoint folder")
        notify(f"no --model: {doing} the bundled family {DEFAULT_FAMILY}")
        name = DEFAULT_FAMILY
    if not names_family(name):
        return [ResolvedModel(Path(name), name, count) for count in counts or (None,)]
    if Path(name).is_dir():
        notify(f"--model {name} is the bundled one; the folder of that name here is --model ./{name}")
    return resolve_models(name, counts)


def _make_engine(
    options: RunOptions, model: ResolvedModel | None, jobs: Sequence[Job], notify: Callable[[str], None]
) -> Engine:
    from plt_eval.engines import make_engine

    if options.engine == "replay":
        return _replay_engine(options, jobs)
    if options.engine == "openai":
        given = {
            "api": options.api,
            "served_as": options.served_as,
            "checkpoint": _served(model),
            "concurrency": options.concurrency,
            "retries": options.retries,
            "timeout_s": options.request_timeout,
        }
        required = {"endpoint": options.endpoint, "model": options.api_model, "api_key": _api_key(options)}
        return make_engine("openai", **required, **_without_none(given), notify=notify)
    assert model is not None
    given = {
        "label": None if model.family is None else model.label,
        "loops": model.loops,
        "loop_mode": options.loop_mode,
        "dtype": options.dtype,
        "device": options.device,
        "chat_template": options.chat_template,
        "tokenizer": options.tokenizer,
        "decoder": options.decoder,
        "attention": options.attention,
        "compile": options.compile,
        "tensor_parallel": options.tensor_parallel,
        "max_model_len": options.max_model_len,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    return make_engine(
        options.engine,
        model=str(model.folder),
        batch_size=parse_batch_size(options.batch_size),
        notify=notify,
        **_without_none(given),
    )


def _tools_engine(engine: Engine, suite: ToolsSuite, data: SuiteData, options: RunOptions) -> Engine:
    """The engine, answering with calls of tools and with conversations where the suite wants them."""
    from plt_eval.tools_agent.engine import CONVERSATIONS, ToolsEngine

    conversations = (options.concurrency or CONVERSATIONS) * len(options.endpoint or ("",))
    return ToolsEngine(engine, suite, data.samples, _sandbox(options), conversations=conversations)


def _api_key(options: RunOptions) -> str | None:
    if options.api_key_env is None:
        return os.environ.get("OPENAI_API_KEY")
    if not os.environ.get(options.api_key_env):
        raise UserError(f"--api-key-env {options.api_key_env}: no such environment variable, or it is empty")
    return os.environ[options.api_key_env]


def _replay_engine(options: RunOptions, jobs: Sequence[Job]) -> ReplayEngine:
    from plt_eval.engines.replay import ReplayEngine

    assert options.completions is not None
    if "gold" in options.completions:
        if len(options.completions) > 1:
            raise UserError("--completions gold stands alone: give either gold or files")
        return ReplayEngine.gold(jobs)
    return ReplayEngine.from_files([Path(name) for name in options.completions])


def _count_samples(options: RunOptions, engine: Engine, jobs: Sequence[Job]) -> int:
    """Completions a problem. Replayed ones are checked against the data here, before anything is stored."""
    from plt_eval.engines.replay import ReplayEngine

    if not isinstance(engine, ReplayEngine):
        return options.n_samples or 1
    known = {sample.id for _, data in jobs for sample in data.samples}.union(*(data.left_out for _, data in jobs))
    wanted = [sample.id for _, data in jobs for sample in data.samples[: options.limit]]
    return engine.check(known, wanted, options.n_samples)


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# --- running ------------------------------------------------------------------------------------------


def _settings(options: RunOptions, n_samples: int) -> Settings:
    from plt_eval.runner import Settings

    image = f" ({options.sandbox_image})" if options.sandbox_image else ""
    return Settings(
        results=options.results,
        decoding=_decoding(options),
        n_samples=n_samples,
        limit=options.limit,
        scoring_workers=options.scoring_workers,
        command=("plt-eval", *sys.argv[1:]),
        sandbox=options.sandbox + image,
    )


def _decoding(options: RunOptions) -> Decoding:
    from plt_eval.engines.base import Decoding

    return Decoding(
        temperature=options.temperature or 0.0,
        top_p=1.0 if options.top_p is None else options.top_p,
        seed=options.seed or 0,
        max_new_tokens=options.max_new_tokens,
    )


def _named(settings: Settings, options: RunOptions, suite: str, loops: int | None, *, several: bool) -> Settings:
    """With --run-id: the name itself for a single run, else the beginning of each run's name."""
    from dataclasses import replace

    from plt_eval.records import slug
    from plt_eval.store import check_run_id

    if options.run_id is None:
        return settings
    parts = [check_run_id(options.run_id)]
    if several:
        parts += [suite] if loops is None else [suite, f"r{loops}"]
    return replace(settings, run_id=slug("-".join(parts)))


def _sandbox(options: RunOptions) -> Callable[[], Sandbox]:
    return lambda: _open_sandbox(options.sandbox, options.sandbox_image)


@cache
def _open_sandbox(name: str, image: str | None) -> Sandbox:
    from plt_eval.sandbox import open_sandbox

    return open_sandbox(name, image=image)


# --- judging elsewhere ----------------------------------------------------------------------------------


def _check_ray(options: RunOptions) -> None:
    """Raises UserError for a --ray that cannot be reached."""
    if options.ray is not None:
        from plt_eval.cluster.connection import check_address

        check_address(options.ray)


def _elsewhere(options: RunOptions, notify: Callable[[str], None]) -> Callable[[Suite], RemoteScorer] | None:
    """What judges answers in place of this process, if --ray says so."""
    if options.ray is None:
        return None
    address = options.ray

    def opened(suite: Suite) -> RemoteScorer:
        from plt_eval.cluster.opening import open_scorer, recipe_of

        connection = _connected(address, options.scoring_workers or _cores())
        recipe = recipe_of(suite, options.suite, options.chosen)
        return open_scorer(connection, suite, recipe, options.sandbox, options.sandbox_image, notify)

    return opened


def _patches_elsewhere(options: RunOptions, swe: SweOptions, notify: Callable[[str], None]) -> OpenPatchScorer | None:
    """The same for patches."""
    if options.ray is None:
        return None
    address = options.ray

    def opened(suite: SweSuite, work: PatchWork) -> RemoteScorer:
        from plt_eval.cluster.opening import open_patch_scorer, recipe_of

        connection = _connected(address, options.scoring_workers or swe.parallel)
        return open_patch_scorer(connection, suite, recipe_of(suite, options.suite, None), work, notify)

    return opened


_connections: dict[str, Connection] = {}
"""One for all runs of a command: Ray has no more in a process."""


def _connected(address: str, at_once: int) -> Connection:
    from plt_eval.cluster.connection import connect

    if address not in _connections:
        _connections[address] = connect(address, at_once=at_once)
    return _connections[address]


def _disconnect() -> None:
    while _connections:
        _connections.popitem()[1].close()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _notes(console: Console) -> Callable[[str], None]:
    def note(message: str) -> None:
        console.print(f"note: {message}", markup=False, soft_wrap=True)

    return note


def _say_done(console: Console, result: Result) -> None:
    manifest = result.run.manifest
    how = "complete already" if result.reused else f"{manifest.done} of {manifest.total} samples judged"
    console.print(f"{manifest.run_id}: {how}, in {result.run.path}", markup=False, soft_wrap=True)
