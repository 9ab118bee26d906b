"""What `plt-eval run` does for a SWE suite: choose instances, put agent, engine, Docker and harness together, run, and
leave the predictions beside the verdicts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plt_benchmarks.protocols import Sample, Suite, SuiteData
from plt_benchmarks.swe.rows import Task, task_of
from plt_benchmarks.swe.suites import SweSuite
from plt_eval.engines.base import Engine
from plt_eval.errors import UserError
from plt_eval.runner import RemoteScorer, Result, Settings, run
from plt_eval.swe.agent import AgentEngine, AgentSettings
from plt_eval.swe.containers import GIB, ContainerLimits, DockerHost, KeepImages
from plt_eval.swe.predictions import FILE_NAME, PredictionsEngine, write_predictions

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SweOptions:
    """The options of `plt-eval run` that only SWE suites have. None means: not given."""

    instances: str | None = None
    workers: int | None = None
    agent_steps: int | None = None
    agent_wall_time: int | None = None
    agent_command_timeout: int | None = None
    agent_actions: str | None = None
    agent_context: int | None = None
    test_timeout: int | None = None
    predictions: Path | None = None
    gold: bool | None = None
    keep_images: str | None = None
    container_memory: float | None = None
    container_cpus: float | None = None
    pip_index: str | None = None
    wheels: Path | None = None
    split_streams: bool | None = None

    @property
    def stored(self) -> bool:
        """Whether patches are read instead of written by an agent."""
        return self.predictions is not None or bool(self.gold)

    @property
    def parallel(self) -> int:
        """Agents, and judgements, at a time."""
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def keep(self) -> KeepImages:
        """Which of the images that are pulled stay."""
        return self.keep_images or "all"  # type: ignore[return-value]

    def agent(self) -> AgentSettings:
        """How the agent goes about it."""
        own = AgentSettings()
        given: dict[str, Any] = {
            "steps": self.agent_steps,
            "wall_time": self.agent_wall_time,
            "command_timeout": self.agent_command_timeout,
            "actions": self.agent_actions,
            "context": self.agent_context,
        }
        return replace(own, **{name: value for name, value in given.items() if value is not None})

    def limits(self) -> ContainerLimits:
        """What a container may use. Raises UserError."""
        if self.wheels is not None and not self.wheels.is_dir():
            raise UserError(f"--wheels {self.wheels}: expected a folder of packages, found none")
        if self.wheels is not None and self.pip_index is not None:
            raise UserError("--wheels and --pip-index exclude each other: give one")
        memory = ContainerLimits.memory if self.container_memory is None else int(self.container_memory * GIB)
        return ContainerLimits(memory, self.container_cpus, pip_index=self.pip_index, wheels=self.wheels)


@dataclass(frozen=True)
class PatchWork:
    """What is to be judged elsewhere: `tasks` may need images, `folder` is the run's own, and `began` is told of each
    sample whose judging begins."""

    tasks: Sequence[Task]
    limits: ContainerLimits
    keep: KeepImages
    folder: Path
    began: Callable[[Sample], None] | None = None


OpenPatchScorer = Callable[[SweSuite, PatchWork], RemoteScorer]


def configured(suite: SweSuite, options: SweOptions) -> SweSuite:
    """The suite as the options want it judged."""
    if options.split_streams and suite.harness != "swebench":
        raise UserError(
            f"--split-streams has no effect on suite {suite.name}: it belongs to those that swebench judges"
        )
    source = ""
    if options.wheels is not None:
        source = "wheels"
    elif options.pip_index is not None:
        source = f"index-{hashlib.sha256(options.pip_index.encode()).hexdigest()[:8]}"
    return replace(
        suite,
        test_timeout=options.test_timeout or suite.test_timeout,
        merge_streams=not options.split_streams,
        packages=source,
    )


def chosen(data: SuiteData, options: SweOptions, limit: int | None, have: Collection[str] | None) -> SuiteData:
    """The instances that --instances and --limit leave, of those that `have` a patch (None: all). Raises UserError."""
    samples = data.samples
    if options.instances is not None:
        wanted = [name.strip() for name in options.instances.split(",") if name.strip()]
        known = {sample.id: sample for sample in samples}
        unknown = [name for name in wanted if name not in known]
        if unknown or not wanted:
            import difflib

            near = difflib.get_close_matches(unknown[0], known, n=1) if unknown else []
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--instances: no instance {unknown[0] if unknown else ''!r} in {data.source}{hint}")
        samples = tuple(known[name] for name in dict.fromkeys(wanted))
    if have is not None:
        samples = tuple(sample for sample in samples if sample.id in have)
        if not samples:
            raise UserError("none of the chosen instances has a prediction")
    return replace(data, samples=samples[:limit])


def run_swe(
    suite: SweSuite,
    options: SweOptions,
    data_path: Path | None,
    limit: int | None,
    settings: Settings,
    make_engines: Callable[[], list[Callable[[], Engine]]],
    named: Callable[[Settings, Engine], Settings],
    console: Console,
    notify: Callable[[str], None],
    elsewhere: OpenPatchScorer | None = None,
) -> list[Result]:
    """Judge stored patches, or let each engine of `make_engines` solve and judge what it did; `elsewhere` has other
    machines judge. Agents work with this machine's Docker."""
    limits = options.limits()
    suite = configured(suite, options)
    data = suite.load(data_path)
    tasks = {sample.id: task_of(sample) for sample in data.samples}
    if options.stored:
        engine = _stored_engine(options, tasks)
        part = chosen(data, options, limit, engine.instances)
        asked = chosen(data, options, limit, None)
        if len(part.samples) < len(asked.samples):
            notify(
                f"{len(asked.samples) - len(part.samples)} of {len(asked.samples)} instances have no prediction: the "
                f"score is over the other {len(part.samples)}"
            )
        host = _host(options, limits, notify) if elsewhere is None else None
        own = named(settings, engine)
        return [_run_one(suite, part, engine, host, limits, options, own, console, notify, elsewhere)]
    results = []
    for make in make_engines():
        part = chosen(data, options, limit, None)
        inner = make()
        host = _host(options, limits, notify)
        with closing(
            AgentEngine(
                inner, tasks, host, settings=options.agent(), workers=min(options.parallel, len(part.samples)),
                notify=notify,
            )
        ) as agent:  # fmt: skip
            own = named(settings, inner)
            results.append(_run_one(suite, part, agent, host, limits, options, own, console, notify, elsewhere))
    return results


def _stored_engine(options: SweOptions, tasks: dict[str, Task]) -> PredictionsEngine:
    if options.predictions is not None:
        return PredictionsEngine.from_file(options.predictions, tasks)
    return PredictionsEngine.gold(tasks.values())


def _host(options: SweOptions, limits: ContainerLimits, notify: Callable[[str], None]) -> DockerHost:
    keep = options.keep
    # Agents and judgements under way, and patches that wait for one: see the runner's backlog.
    return DockerHost(limits, keep, pulls=2, notify=notify, at_once=6 * options.parallel)


def _run_one(
    suite: SweSuite,
    data: SuiteData,
    engine: Engine,
    host: DockerHost | None,
    limits: ContainerLimits,
    options: SweOptions,
    settings: Settings,
    console: Console,
    notify: Callable[[str], None],
    elsewhere: OpenPatchScorer | None,
) -> Result:
    tasks = {sample.id: task_of(sample) for sample in data.samples}
    suite = replace(suite, host=host)
    work: PatchWork | None = None

    def opened(folder: Path, waiting: Collection[str]) -> None:
        nonlocal work
        open_tasks = [tasks[instance] for instance in waiting]
        if host is not None:
            host.open(folder.name)
            host.plan(open_tasks)
        _say_conditions(suite, open_tasks, limits, notify)
        suite.folder = folder / "judged"
        suite.token = "plt-" + hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        work = PatchWork(open_tasks, limits, options.keep, folder, _released_by(host))
        if isinstance(engine, AgentEngine):
            engine.folder = folder

    def judges(_: Suite) -> RemoteScorer:
        assert elsewhere is not None
        assert work is not None, "the run is opened first"
        return elsewhere(suite, work)

    settings = replace(settings, opened=opened)
    if elsewhere is None:
        settings = replace(settings, scoring_workers=options.parallel)
    else:
        settings = replace(settings, elsewhere=judges)
    try:
        result = run(suite, data, engine, _no_sandbox, settings, console=console)
    finally:
        if host is not None:
            host.remove_containers({})
    _leave_predictions(result, tasks, notify)
    return result


def _released_by(host: DockerHost | None) -> Callable[[Sample], None] | None:
    """An image that an agent has used is not needed here any more, once its patch is judged elsewhere."""
    return None if host is None else lambda sample: host.release(task_of(sample))


def _say_conditions(suite: SweSuite, tasks: list[Task], limits: ContainerLimits, notify: Callable[[str], None]) -> None:
    if suite.harness == "swebench" and suite.merge_streams:
        notify("deviation from the official command: test scripts begin with `exec 2>&1` (--split-streams: without)")
    fetching = sum(task.needs_network for task in tasks)
    if not fetching:
        return
    if limits.wheels is not None:
        notify(
            f"tests of {fetching} of {len(tasks)} instances install packages: from {limits.wheels}, without a network"
        )
    else:
        where = "" if limits.pip_index is None else f" (pip from {limits.pip_index})"
        notify(
            f"tests of {fetching} of {len(tasks)} instances install or fetch packages: their containers have a "
            f"network{where}; agents and all others have none"
        )


def _leave_predictions(result: Result, tasks: dict[str, Task], notify: Callable[[str], None]) -> None:
    folder = result.run.path
    if result.reused and (folder / FILE_NAME).exists():
        return
    patches = {record.sample_id: record.text for record in result.run.completions() if record.error is None}
    models = {str(record.detail.get("model", "")) for record in result.run.completions()} - {""}
    model = "+".join(sorted(models)) or result.run.manifest.identity.model
    ordered = {instance: patches[instance] for instance in tasks if instance in patches}
    with suppress(OSError):
        path = write_predictions(folder, model, ordered, tasks)
        notify(f"predictions for the official command: {path}")


def _no_sandbox() -> Any:
    raise AssertionError("the official harness brings its own containers")
