"""`plt-eval estimate`: what an evaluation, or a training, would take, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plt_eval.cli.run import Dtype, KeepImages

if TYPE_CHECKING:
    from plt_eval.estimate.speed import Speed

app = typer.Typer(
    help="GPU-hours, memory, disk and wall time of an evaluation or a training, from measured constants.",
    rich_markup_mode=None,
)


class EstimatedEngine(StrEnum):
    """What decodes."""

    session = "session"
    vllm = "vllm"


class Switch(StrEnum):
    on = "on"
    off = "off"


Gpu = Annotated[str, typer.Option(help="h200, h100, cpu; any other name with the numbers of its data sheet.")]
Flops = Annotated[float | None, typer.Option(min=1e-6, max=1e9, help="Its dense bf16 TFLOP/s, by its data sheet.")]
GpuMemory = Annotated[float | None, typer.Option(min=1e-3, max=1e9, help="Its memory in GiB.")]
Machines = Annotated[int, typer.Option(min=1, max=100_000, help="Machines with GPUs.")]
Gpus = Annotated[int, typer.Option(min=1, max=1024, help="GPUs a machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]
Explain = Annotated[bool, typer.Option("--explain", help="Print each step of the reckoning.")]


@app.callback(invoke_without_command=True)
def evaluation(
    context_: typer.Context,
    suite: Annotated[str | None, typer.Option(help="What to evaluate on, as for `plt-eval run`.")] = None,
    instances: Annotated[int | None, typer.Option(min=1, max=10**9, help="Problems (default: the suite's).")] = None,
    samples: Annotated[int, typer.Option(min=1, max=10**6, help="Answers a problem.")] = 1,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder, or a bundled model's name.")] = None,
    shape: Annotated[str | None, typer.Option(help="A shape of `plt-eval bench` (default 7b), or 40m.")] = None,
    params: Annotated[float | None, typer.Option(help="Parameters, as 7e9: the 7B made smaller or larger.")] = None,
    loops: Annotated[
        str | None, typer.Option(help="Loop counts, as 2 or 1,2,4 or 1-4 (default 1-4, or the checkpoint's).")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence, at most (default: what the texts come to).")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, max=10**8, help="Tokens of a prompt.")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=1, max=10**8, help="Tokens of an answer; of an agent, of a turn.")
    ] = None,
    characters_per_token: Annotated[
        float | None, typer.Option(min=0.1, max=1000, help="Of the tokenizer (default: --model's own; bytes: 1).")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=10**6, help="Turns of an agent an instance.")] = None,
    observation_tokens: Annotated[
        int | None, typer.Option(min=0, max=10**8, help="Tokens that an agent's command answers.")
    ] = None,
    tool_seconds: Annotated[float | None, typer.Option(min=0, max=1e6, help="Seconds of an agent's command.")] = None,
    judge_seconds: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Processor seconds of judging an answer.")
    ] = None,
    machines: Machines = 1,
    gpus: Gpus = 1,
    gpu: Gpu = "h200",
    memory_bandwidth: Annotated[
        float | None, typer.Option(min=1e-3, max=1e9, help="GB/s that the GPU's memory reads, by its data sheet.")
    ] = None,
    flops: Flops = None,
    gpu_memory: GpuMemory = None,
    engine: Annotated[EstimatedEngine, typer.Option(help="session: in this process; vllm.")] = EstimatedEngine.session,
    dtype: Annotated[
        Dtype, typer.Option(help="Numbers to compute in (auto: bfloat16; float32 on a CPU).")
    ] = Dtype.auto,
    batch: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Texts at a time (default: the engine's own).")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, max=1024, help="[vllm] GPUs a replica (default: as few as fit).")
    ] = None,
    prefix_cache: Annotated[
        Switch | None, typer.Option(help="Whether a conversation is read once (default: on with vllm).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Agents at a time (default: one a core of a machine).")
    ] = None,
    judge_machines: Annotated[
        int, typer.Option(min=1, max=10**5, help="Machines that judge (more than one: --ray).")
    ] = 1,
    judge_cores: Annotated[
        int | None, typer.Option(min=1, max=10**5, help="Cores of each (default: those of the measured machine).")
    ] = None,
    keep_images: Annotated[
        KeepImages | None, typer.Option(help="[swe] Of the images that are pulled (default: all).")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure this machine's CPU first (a minute), and keep it: for --gpu cpu."),
    ] = False,
    json_: Json = False,
    explain: Explain = False,
) -> None:
    """What an evaluation would take, by loop count.

    Every number is the middle of a range [low, high]: the spread of the measurements behind it, and what nobody knows
    before (how much a model writes). What was not measured is said in notes. Trainings: `plt-eval estimate train`.
    """
    if context_.invoked_subcommand is not None:
        _refuse_given(context_, "before train: give train's own options behind it")
        return
    from dataclasses import replace

    from plt_eval.errors import UserError
    from plt_eval.estimate.constants import load_constants
    from plt_eval.estimate.evaluation import Plan, estimate_run
    from plt_eval.estimate.report import print_runs, runs_json
    from plt_eval.estimate.tokens import tokens_of
    from plt_eval.estimate.workload import Asked, workloads

    if calibrate and suite is None and instances is None:
        _refuse_given(context_, "with --calibrate alone: give a --suite, or --instances, too", but=("calibrate",))
        _calibrate()
        return
    if calibrate and gpu.lower() != "cpu":
        raise UserError(f"--calibrate has no effect on --gpu {gpu}: it measures this machine's CPU: --gpu cpu")
    _refuse_several(gpu, machines, gpus)
    given = {"--memory-bandwidth": memory_bandwidth, "--flops": flops, "--gpu-memory": gpu_memory}
    device = _speed(gpu, given, calibrated=not calibrate)
    chosen = _shape(model, shape, params)
    asked = Asked(
        suite, instances, samples, prompt_tokens, new_tokens, steps, observation_tokens, tool_seconds, judge_seconds,
        characters_per_token, tokens_of(model) if model is not None and suite is not None else None,
    )  # fmt: skip
    if suite is None and prompt_tokens is None and context is not None and new_tokens is not None:
        if context <= new_tokens:
            raise UserError(f"--context {context}: expected more than the --new-tokens {new_tokens}")
        asked = replace(asked, prompt_tokens=context - new_tokens)
    work = workloads(asked, load_constants())
    if engine is EstimatedEngine.session and tensor_parallel not in (None, 1):
        raise UserError(f"--tensor-parallel {tensor_parallel} has no effect with --engine session: it belongs to vllm")
    plan = Plan(
        shape=chosen,
        speed=device,
        dtype=_dtype(dtype, gpu),
        engine=engine.value,
        machines=machines,
        gpus=gpus,
        context=context,
        batch=batch,
        tensor_parallel=tensor_parallel,
        prefix_cache=None if prefix_cache is None else prefix_cache is Switch.on,
        workers=workers,
        judge_machines=judge_machines,
        judge_cores=judge_cores,
        keep_images="all" if keep_images is None else keep_images.value,
    )
    _refuse_agents(work, workers=workers, prefix_cache=prefix_cache)
    if prefix_cache is not None and engine is EstimatedEngine.session:
        raise UserError("--prefix-cache has no effect with --engine session, which reads conversations again: use vllm")
    if prefix_cache is not None and steps == 1:
        raise UserError("--prefix-cache has no effect with --steps 1: no conversation goes on")
    if keep_images is not None and not any(one.images for one in work):
        raise UserError("--keep-images has no effect without images: it belongs to swe and its like")
    counts = _loops(loops, chosen.loops)
    rows = [estimate_run(one, plan, count) for one in work for count in counts]
    if calibrate:  # what cannot be is said before the minute
        _calibrate()
        plan = replace(plan, speed=_speed(gpu, given))
        rows = [estimate_run(one, plan, count) for one in work for count in counts]
    if json_:
        _echo_json(runs_json(plan, work, rows))
        return
    from plt_eval.tables import output_console

    print_runs(output_console(), plan, work, rows, explain=explain)


@app.command("train")
def train(
    recipe: Annotated[str, typer.Option(help="Recipe file, or the name of a bundled recipe.")],
    loops: Annotated[str, typer.Option(help="Loop counts, as 2 or 1,2,4 or 1-4.")] = "1-4",
    tokens: Annotated[float | None, typer.Option(help="Tokens in all, as 1e11, instead of the recipe's.")] = None,
    machines: Machines = 1,
    gpus: Gpus = 1,
    gpu: Gpu = "h200",
    flops: Flops = None,
    gpu_memory: GpuMemory = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of the peak that some steps of yours reached, in (0, 1].")
    ] = None,
    fsdp: Annotated[
        bool | None, typer.Option("--fsdp/--no-fsdp", help="Sharded over all GPUs (default: several, without Muon).")
    ] = None,
    json_: Json = False,
    explain: Explain = False,
) -> None:
    """What a training would take, by loop count."""
    from plt_eval.errors import UserError
    from plt_eval.estimate.report import print_trainings, trainings_json
    from plt_eval.estimate.training import TrainingPlan, estimate_training
    from plt_model.training.recipe import load_recipe

    loaded = load_recipe(recipe)
    if tokens is not None:
        if not loaded.batch_tokens <= tokens <= 1e18:
            raise UserError(f"--tokens {tokens:g}: expected {loaded.batch_tokens:,} (a step of {loaded.name}) to 1e18")
        loaded = loaded.model_copy(update={"tokens": int(tokens)})
    if utilisation is not None and not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation:g}: expected a share above 0 and at most 1")
    _refuse_several(gpu, machines, gpus)
    world = machines * gpus
    sharded = world > 1 and loaded.optimizer.kind != "muon" if fsdp is None else fsdp
    if sharded and world == 1:
        raise UserError("--fsdp shards over processes: give --gpus or --machines (found 1 process)")
    plan = TrainingPlan(
        recipe=loaded,
        speed=_speed(gpu, {"--flops": flops, "--gpu-memory": gpu_memory}),
        machines=machines,
        gpus=gpus,
        sharded=sharded,
        utilisation=utilisation,
    )
    rows = [estimate_training(plan, count) for count in _loops(loops, None)]
    if json_:
        _echo_json(trainings_json(plan, rows))
        return
    from plt_eval.tables import output_console

    print_trainings(output_console(), plan, rows, explain=explain)


def _speed(gpu: str, given: dict[str, float | None], *, calibrated: bool = True) -> Speed:
    """What --gpu and the numbers in `given`, by their options, stand for. Not `calibrated`: of a CPU that is yet to be
    measured, in no time that means anything. Raises UserError."""
    from plt_eval.errors import UserError
    from plt_eval.estimate.constants import DeviceRecord, load_constants, load_own
    from plt_eval.estimate.speed import Speed

    constants, name = load_constants(), gpu.lower()
    if name == "cpu":
        wrong = next((flag for flag, value in given.items() if value is not None), None)
        if wrong is not None:
            raise UserError(f"{wrong} has no effect with --gpu cpu: it is measured by --calibrate")
        own = load_own() if calibrated else next(iter(constants.measured.values()))
        if own is None:
            raise UserError("--gpu cpu: this machine was not measured: run plt-eval estimate --calibrate once")
        record = DeviceRecord(
            name="CPU", memory_gib=None, bandwidth=own.bandwidth, flops=own.flops, cores=own.cores, measured="cpu",
            own=True, source=own.source,
        )  # fmt: skip
        return Speed(record, own)
    known = constants.devices.get(name)
    if known is None:
        missing = next((flag for flag, value in given.items() if value is None), None)
        if missing is not None:
            raise UserError(
                f"--gpu {gpu}: only {', '.join(constants.devices)} and cpu are known; of another one give "
                f"{', '.join(given)} ({missing} is missing)"
            )
        known = next(iter(constants.devices.values())).model_copy(
            update={"name": gpu, "own": False, "source": "cores: the machine that was measured"}
        )
    fields = {"--memory-bandwidth": ("bandwidth", 1e9), "--flops": ("flops", 1e12), "--gpu-memory": ("memory_gib", 1.0)}
    update: dict[str, Any] = {}
    for flag, value in given.items():
        if value is not None:
            field, unit = fields[flag]
            update[field] = value * unit
            update["source"] = f"{update.get('source', known.source)}; given: {flag}"
    if {"bandwidth", "flops"} & update.keys():
        update["own"] = False
    return Speed(known.model_copy(update=update), constants.measured[known.measured])


def _shape(model: str | None, shape: str | None, params: float | None) -> Any:
    from plt_eval.errors import UserError
    from plt_eval.estimate.shapes import Shape

    given = [f for f, value in (("--model", model), ("--shape", shape), ("--params", params)) if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other: give one")
    if model is not None:
        return Shape.checkpoint(model)
    return Shape.sized(params) if params is not None else Shape.named(shape or "7b")


def _loops(text: str | None, own: int | None) -> list[int]:
    from plt_eval.cli.options import parse_loops

    if text is None:
        return [1, 2, 3, 4] if own is None else [own]
    return parse_loops(text)


def _dtype(dtype: Dtype, gpu: str) -> str:
    if dtype is Dtype.auto:
        return "float32" if gpu.lower() == "cpu" else "bfloat16"
    return dtype.value


def _calibrate() -> None:
    from rich.console import Console

    from plt_eval.estimate.calibrate import calibrate
    from plt_eval.estimate.constants import calibration_file

    try:
        measured = calibrate(Console(stderr=True, highlight=False))
    except KeyboardInterrupt:
        typer.echo("plt-eval: interrupted: nothing is kept", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{measured.machine}, {measured.when}: kept in {calibration_file()}", err=True)


def _refuse_agents(work: Any, **given: Any) -> None:
    from plt_eval.cli.options import flag
    from plt_eval.errors import UserError

    for name, value in given.items():
        if value is not None and not any(one.agent for one in work):
            raise UserError(f"{flag(name)} has no effect without an agent: give --steps too, or --suite swe")


def _refuse_given(context: typer.Context, where: str, but: Sequence[str] = ()) -> None:
    """Options that would be ignored."""
    from plt_eval.cli.options import flag
    from plt_eval.errors import UserError

    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in but:
            raise UserError(f"{flag(name.rstrip('_'))} has no effect {where}")


def _refuse_several(gpu: str, machines: int, gpus: int) -> None:
    from plt_eval.errors import UserError

    for name, value in (("--machines", machines), ("--gpus", gpus)):
        if gpu.lower() == "cpu" and value != 1:
            raise UserError(f"{name} {value} has no effect with --gpu cpu: this machine alone was measured")


def _echo_json(document: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(document, indent=2))
