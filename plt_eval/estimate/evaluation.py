"""An evaluation by loop count: memory, GPU-hours, wall time, disk.

    rows = [estimate_run(workload, plan, loops) for loops in (1, 2, 4)]

Answers are shared out over replicas of the model. A replica's texts are decoded `batch` at a time, those of agents no
more than there are agents; reading prompts and decoding take turns on a GPU; agents wait for their commands. Judging
begins with the first answers and goes on while others are written, on processors of its own (on a CPU: the same ones).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil

from plt_eval.engines.hf_batches import FIRST_SIZE
from plt_eval.errors import UserError
from plt_eval.estimate.constants import Range, load_constants
from plt_eval.estimate.memory import (
    GIB,
    Engine,
    KVMemory,
    element_size,
    sequence,
    sequences_that_fit,
    weights_on_disk,
)
from plt_eval.estimate.shapes import Shape
from plt_eval.estimate.speed import Speed
from plt_eval.estimate.workload import Workload
from plt_eval.swe.containers import KeepImages, disk_of_images
from plt_model.decode.prefill import SIDE_BY_SIDE

VLLM_SEQUENCES = ((70 * GIB, 1024), (0, 256))
"""vLLM's own default of sequences at a time, by a GPU's memory (0.32)."""
TOKENS = {"--prompt-tokens": "prompt", "--new-tokens": "new tokens"}
"""Options, and what a workload's sources call them."""
FAR = 4.0
"""A model so many times larger or smaller than the measured one is marked."""
IMAGES_AN_AGENT = 6
"""Images in use or waiting for each agent at a time: as a run reckons (plt_eval.swe.command)."""


@dataclass(frozen=True)
class Plan:
    """On what, and how. None means: the engine's default, or what is needed."""

    shape: Shape
    speed: Speed
    dtype: str
    engine: Engine
    machines: int = 1
    gpus: int = 1
    context: int | None = None
    batch: int | None = None
    tensor_parallel: int | None = None
    prefix_cache: bool | None = None
    workers: int | None = None
    judge_machines: int = 1
    judge_cores: int | None = None
    keep_images: KeepImages = "all"

    @property
    def on_cpu(self) -> bool:
        return self.speed.device.memory_gib is None

    @property
    def memory(self) -> float:
        """Bytes of one GPU; on a CPU without a limit of ours."""
        return float("inf") if self.on_cpu else (self.speed.device.memory_gib or 0) * GIB

    @property
    def cores_each(self) -> int:
        """Of a machine that judges; the one that runs the command is such a machine."""
        return self.judge_cores or self.speed.device.cores

    @property
    def cores(self) -> int:
        """That judge, on all machines that do."""
        return self.judge_machines * self.cores_each

    @property
    def prefixes_kept(self) -> bool:
        """Whether an agent's conversation is read once, and not again at each step."""
        return self.engine == "vllm" if self.prefix_cache is None else self.prefix_cache


@dataclass(frozen=True)
class RunEstimate:
    """Bytes of one GPU, seconds, hours. `sequences` fit; `batch` are decoded at a time; `replicas` of `tensor_parallel`
    GPUs work. `gpu_hours` are of writing alone. `disk` is what images take where the command runs, `disk_of_judges` on
    each other machine that judges. None where the model does not fit. `notes` are what is extrapolated or assumed;
    `steps` the reckoning."""

    suite: str
    loops: int
    context: int
    weights: int
    kv: KVMemory
    tensor_parallel: int
    sequences: int | None
    batch: int | None
    replicas: int
    gpus: int
    gpu_hours: Range | None
    generation: Range | None
    judging: Range
    wall: Range | None
    judging_cpu_hours: Range
    disk: int
    disk_of_judges: int
    notes: tuple[str, ...]
    steps: tuple[str, ...] = field(repr=False)


def estimate_run(work: Workload, plan: Plan, loops: int) -> RunEstimate:
    """One loop count on one suite. Raises UserError for what cannot be asked together."""
    config = plan.shape.at(loops)
    context = _context(work, plan)
    weights = weights_on_disk(plan.shape, plan.dtype)
    parallel = _tensor_parallel(plan, loops, context, weights)
    kv = sequence(plan.engine, config, context, plan.dtype, parallel)
    fits = None if plan.on_cpu else sequences_that_fit(plan.engine, plan.memory, weights // parallel, kv)
    replicas = _replicas(work, plan, parallel)
    batch = _batch(work, plan, replicas, fits)
    times: list[_Times] = []
    steps: list[str] = []
    if batch:
        for scenario in range(3):
            say = steps.append if scenario == 1 else _silent
            times.append(_times(work, plan, loops, parallel, replicas, batch, context, scenario, say))
    judged = _in_order([_judging(work, plan, scenario) for scenario in range(3)])
    cpu_hours = _in_order([work.answers * work.judging.scenario(i) / 3600 for i in range(3)])
    generation = _in_order([t.generation for t in times]) if times else None
    wall = None
    if generation is not None:
        wall = _in_order([_wall(work, plan, times[i], _judging(work, plan, i), i) for i in range(3)])
        steps.append(_told_wall(work, plan, times[1], judged, wall))
    used = replicas * parallel
    disk, disk_of_judges = _disk(work, plan)
    return RunEstimate(
        suite=work.name,
        loops=loops,
        context=context,
        weights=weights // parallel,
        kv=kv,
        tensor_parallel=parallel,
        sequences=fits,
        batch=batch or None,
        replicas=replicas,
        gpus=used,
        gpu_hours=None if generation is None else _in_order([used * t.generation / 3600 for t in times]),
        generation=generation,
        judging=judged,
        wall=wall,
        judging_cpu_hours=cpu_hours,
        disk=disk,
        disk_of_judges=disk_of_judges,
        notes=tuple(_notes(work, plan, loops, parallel, batch, fits)),
        steps=(*_told_memory(plan, context, weights, parallel, kv, fits, batch, replicas), *steps),
    )


def total_wall(rows: list[RunEstimate], plan: Plan) -> Range | None:
    """Of all rows: one after the other on all GPUs; those of the in-process engine each on a GPU of its own."""
    walls = [row.wall for row in rows]
    if any(wall is None for wall in walls):
        return None
    known = [wall for wall in walls if wall is not None]
    if plan.engine == "vllm" or plan.on_cpu:
        return _in_order([sum(wall.scenario(i) for wall in known) for i in range(3)])
    return _in_order([_spread([wall.scenario(i) for wall in known], plan.machines * plan.gpus) for i in range(3)])


def _spread(seconds: list[float], places: int) -> float:
    """The longest first, each where it is free first."""
    free = [0.0] * min(places, len(seconds))
    for value in sorted(seconds, reverse=True):
        free[free.index(min(free))] += value
    return max(free)


# --- what fits ------------------------------------------------------------------------------------------


def _context(work: Workload, plan: Plan) -> int:
    """Tokens that a sequence may come to hold: what slots are made for."""
    limit = plan.shape.at(1).max_position_embeddings
    longest = work.longest(1 if work.agent else 2)
    least = _least(work)
    if plan.context is None:
        given = [flag for flag, name in TOKENS.items() if work.sources[name] == "given"]
        if least > limit and given:
            raise UserError(
                f"{' and '.join(given)}: a prompt and an answer of {work.name} come to {least} tokens: "
                f"the model takes at most {limit}"
            )
        return min(limit, longest)
    if plan.context > limit:
        raise UserError(f"--context {plan.context}: the model takes at most {limit} tokens")
    if plan.context < least:
        raise UserError(
            f"--context {plan.context}: {work.name} needs at least {least} tokens, the prompt and an answer: "
            "see --prompt-tokens and --new-tokens"
        )
    return plan.context


def _least(work: Workload) -> int:
    """Tokens of the longest prompt and answer; of an agent, of its first turn."""
    return round(work.prompt.high + work.new.high)


def _tensor_parallel(plan: Plan, loops: int, context: int, weights: int) -> int:
    if plan.engine == "session":
        if plan.tensor_parallel not in (None, 1):
            raise UserError(f"--tensor-parallel {plan.tensor_parallel} has no effect with --engine session: use vllm")
        return 1
    config = plan.shape.at(loops)
    assert config.num_key_value_heads is not None
    heads = config.num_key_value_heads
    if plan.tensor_parallel is not None:
        if plan.tensor_parallel > plan.gpus or heads % plan.tensor_parallel:
            raise UserError(
                f"--tensor-parallel {plan.tensor_parallel}: expected a divisor of the {heads} key/value heads and at "
                f"most the {plan.gpus} GPUs of a machine"
            )
        return plan.tensor_parallel
    chosen = 1
    for parallel in (n for n in range(1, plan.gpus + 1) if heads % n == 0):
        chosen = parallel
        kv = sequence("vllm", config, context, plan.dtype, parallel)
        if plan.on_cpu or sequences_that_fit("vllm", plan.memory, weights // parallel, kv):
            break
    return chosen


def _replicas(work: Workload, plan: Plan, parallel: int) -> int:
    """Copies of the model that share the answers: the in-process engine is one, and each has an agent at least."""
    most = _agents(work, plan) if work.agent else work.answers
    return 1 if plan.engine == "session" else min(plan.machines * (plan.gpus // parallel), most)


def _batch(work: Workload, plan: Plan, replicas: int, fits: int | None) -> int:
    """Texts that a replica decodes at a time; 0 where not one fits."""
    default = FIRST_SIZE["cpu" if plan.on_cpu else "cuda"]
    if plan.engine == "vllm":
        default = next(count for least, count in VLLM_SEQUENCES if plan.memory >= least or not least)
    batch = plan.batch or default
    if work.agent:
        batch = min(batch, ceil(_agents(work, plan) / replicas))
    if fits is not None:
        batch = min(batch, fits)
    return min(batch, ceil(work.answers / replicas))


def _agents(work: Workload, plan: Plan) -> int:
    """Agents at a time: as `plt-eval run --workers`, one a core of the machine that runs them."""
    return min(plan.workers or plan.cores_each, work.answers)


# --- how long -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Times:
    """Seconds until everything is written, and until the first answers are, those that are written side by side."""

    generation: float
    first: float


def _times(
    work: Workload,
    plan: Plan,
    loops: int,
    parallel: int,
    replicas: int,
    batch: int,
    context: int,
    scenario: int,
    say: Callable[[str], None],
) -> _Times:
    """Of one replica's share: agents take what is left one by one, other answers are shared out before."""
    share: float = ceil(work.answers / replicas)
    at_once: float = batch
    if work.agent:
        share = work.answers / replicas
        at_once = min(_agents(work, plan) / replicas, batch)
    turns = share / at_once
    steps, new = work.steps.scenario(scenario), work.new.scenario(scenario)
    prompt = work.prompt.scenario(scenario)
    bound = plan.shape.at(1).max_position_embeddings if work.agent and plan.context is None else context
    growing = min(bound, work.longest(scenario))
    held = min(prompt + new / 2, growing) if not work.agent else (min(prompt, growing) + growing) / 2
    step = plan.speed.step(plan.shape, loops, at_once, held, plan.dtype, scenario=scenario, share=parallel)
    read = _tokens_read(work, plan, growing, scenario)
    together = _read_together(plan, prompt, batch, scenario) if not work.agent else 1
    one = max(1, round(min(read, held)))
    one_read = (
        read
        / one
        * plan.speed.prefill(plan.shape, loops, one, plan.dtype, scenario=scenario, share=parallel, together=together)
    )
    reading = share * one_read
    decoding = turns * steps * max(0.0, new - 1) * step  # reading a prompt gives the first token
    waiting = turns * steps * work.tool.scenario(scenario)
    say(f"a replica's share: {share:,.4g} answers, {at_once:.4g} at a time, {steps:g} x {new:,.0f} new tokens each")
    say(f"a decoding step at {held:,.0f} tokens of context: {1000 * step:.3g} ms; in all {decoding:,.1f} s")
    say(f"tokens to read an answer: {read:,.0f}, {1000 * one_read:,.3g} ms; in all {reading:,.1f} s")
    if waiting:
        say(f"waiting for commands: {waiting:,.1f} s")
    generation = decoding + reading + waiting
    return _Times(generation, generation / turns)


def _read_together(plan: Plan, prompt: float, batch: int, scenario: int) -> int:
    """Short prompts that are read side by side, when slots become free at the same time; at the high end none do."""
    positions = SIDE_BY_SIDE["cpu" if plan.on_cpu else "cuda"]
    return 1 if scenario == 2 else max(1, min(batch, int(positions // max(1.0, prompt))))


def _tokens_read(work: Workload, plan: Plan, growing: float, scenario: int) -> float:
    """Of one answer: the prompt, and for an agent what is told it, or the whole conversation again at each step."""
    steps, new = work.steps.scenario(scenario), work.new.scenario(scenario)
    told, prompt = work.observation.scenario(scenario), work.prompt.scenario(scenario)
    if plan.prefixes_kept:
        return prompt + max(0.0, steps - 1) * told
    rise = new + told
    until = min(steps, max(0.0, (growing - prompt) / rise)) if rise else steps
    return steps * prompt + until * (until - 1) / 2 * rise + (steps - until) * max(0.0, growing - prompt)


def _judges(work: Workload, plan: Plan) -> int:
    """Judgements at a time: one a core, and where one machine does all, as many as agents."""
    return min(plan.cores, _agents(work, plan)) if work.agent and plan.judge_machines == 1 else plan.cores


def _judging(work: Workload, plan: Plan, scenario: int) -> float:
    """Seconds on all cores that judge; one answer takes one core."""
    one, places = work.judging.scenario(scenario), _judges(work, plan)
    return ceil(work.answers / places) * one if one >= 1 else max(one, work.answers * one / places)


def _start(plan: Plan, scenario: int) -> float:
    """Before anything is read or written: weights are put on a GPU, and the in-process engine compiles."""
    own = plan.speed.measured.start.scenario(scenario)
    if plan.on_cpu:
        return own
    rate = load_constants().loading.rate.scenario(2 - scenario)
    return weights_on_disk(plan.shape, plan.dtype) / rate + (own if plan.engine == "session" else 0.0)


def _wall(work: Workload, plan: Plan, times: _Times, judging: float, scenario: int) -> float:
    start = _start(plan, scenario)
    if plan.on_cpu:
        return start + times.generation + judging
    return start + max(times.generation + work.judging.scenario(scenario), times.first + judging)


def _disk(work: Workload, plan: Plan) -> tuple[int, int]:
    """Bytes of images: where the agents work, which need every one, and on each other machine that judges."""
    if not work.images:
        return 0, 0
    agents = IMAGES_AN_AGENT * _agents(work, plan)
    here = disk_of_images(work.images, work.environments, plan.keep_images, agents)
    if plan.judge_machines == 1:
        return here, 0
    share = ceil(work.images / plan.judge_machines)
    return here, disk_of_images(share, min(work.environments, share), plan.keep_images, plan.cores_each)


def _in_order(values: list[float]) -> Range:
    """The ends may have changed places: a faster model waits longer for its judges."""
    low, middle, high = values
    return Range(low=min(values), middle=middle, high=max(low, middle, high))


# --- in words -------------------------------------------------------------------------------------------


def _notes(work: Workload, plan: Plan, loops: int, parallel: int, batch: int, fits: int | None) -> list[str]:
    device, measured = plan.speed.device, plan.speed.measured
    points = measured.decode
    notes = []
    if not batch:
        return [f"does not fit: {weights_on_disk(plan.shape, plan.dtype) // parallel / GIB:.1f} GiB of weights a GPU, "
                f"and {device.memory_gib:g} GiB"]  # fmt: skip
    if not device.own:
        notes.append(
            f"times on {device.name} are extrapolated from {measured.machine.split(',')[0]} by the data sheets"
        )
    largest = max(p.batch for p in points)
    if batch > largest:
        notes.append(f"batches beyond {largest} texts are extrapolated")
    if loops not in {p.loops for p in points}:
        notes.append(
            f"R={loops} was not timed: between or beyond {', '.join(str(r) for r in sorted({p.loops for p in points}))}"
        )
    sizes = [Shape.named(p.shape).parameters for p in points]
    if not min(sizes) / FAR <= plan.shape.parameters <= max(sizes) * FAR:
        notes.append("a model of this size is extrapolated")
    if plan.dtype not in {p.dtype for p in points}:
        notes.append(f"{plan.dtype} was not timed there")
    if plan.engine == "vllm":
        notes.append("vLLM's speed is taken to be the in-process engine's: it was not measured on a GPU")
    if not plan.on_cpu:
        own = "with compiling, as measured; imports are not in it"
        if plan.engine == "vllm":
            own = "vLLM's own start was not measured and is not in it"
        notes.append(f"wall begins with the loading of weights, at a rate that is assumed; {own}")
    limit = plan.shape.at(1).max_position_embeddings
    if plan.context is None and _least(work) > limit:
        notes.append(
            f"{work.name}: a prompt and an answer may come to {_least(work):,} tokens: memory is for the model's most, "
            f"{limit:,}"
        )
    if parallel > 1:
        notes.append("tensor parallel: what GPUs say to each other is not reckoned")
    if plan.engine == "session" and plan.machines * plan.gpus > 1:
        notes.append("the in-process engine uses one GPU a run: each loop count gets its own")
    agents = _agents(work, plan)
    if work.agent and batch == ceil(agents / _replicas(work, plan, parallel)) and (fits is None or batch < fits):
        notes.append(f"{agents} agents at a time keep the GPUs waiting: --workers")
    if work.images and not work.environments_known:
        notes.append("disk: every image is taken to be of an environment of its own")
    return notes


def _told_memory(
    plan: Plan,
    context: int,
    weights: int,
    parallel: int,
    kv: KVMemory,
    fits: int | None,
    batch: int,
    replicas: int,
) -> list[str]:
    size = element_size(plan.dtype)
    lines = [
        f"weights: {plan.shape.parameters:,} x {size} bytes = {weights / GIB:.2f} GiB over {parallel} GPU(s)",
        f"a sequence of {context:,} tokens: pass 0 {kv.shared / GIB:.4f}, windows {kv.windows / GIB:.4f}, carry "
        f"{kv.carry / GIB:.6f}, unused {kv.unused / GIB:.4f} GiB",
    ]
    if fits is not None:
        lines.append(f"{fits:,} sequences fit a GPU; {batch} are decoded at a time by {replicas} replica(s)")
    return lines


def _told_wall(work: Workload, plan: Plan, times: _Times, judging: Range, wall: Range) -> str:
    joined = "one after the other on the same cores"
    if not plan.on_cpu:
        joined = f"judging begins after {times.first:,.1f} s, and ends one judgement after writing or later"
    return (
        f"start {_start(plan, 1):.1f} s, writing {times.generation:,.1f} s, judging {judging.middle:,.1f} s on "
        f"{_judges(work, plan)} cores ({work.answers:,} x {work.judging.middle:g} s): {joined}: {wall.middle:,.1f} s"
    )


def _silent(_: str) -> None:
    pass


__all__ = ["Plan", "RunEstimate", "estimate_run", "total_wall"]
