"""A training by loop count: GPU-hours, wall time, memory of a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

from plt_eval.errors import UserError
from plt_eval.estimate.constants import Range, load_constants
from plt_eval.estimate.memory import GIB, TrainingMemory, training_memory
from plt_eval.estimate.shapes import Shape
from plt_eval.estimate.speed import Speed, matrices, training_row
from plt_model.training.flops import training_flops
from plt_model.training.recipe import Recipe
from plt_model.training.run import TrainingError, check_sharding, split_batch

FREE = 0.92
"""Of a GPU's memory: the rest is CUDA's, its libraries' and torch's fragments'. Assumed, not measured."""


RECIPES_TOOK = (0.85, 1.4)
"""On a CPU: of what is predicted, the least and the most that a training by a recipe takes (docs/scaling.md)."""


@dataclass(frozen=True)
class TrainingPlan:
    """`utilisation` of the peak, measured by the user; None: what was measured here."""

    recipe: Recipe
    speed: Speed
    machines: int
    gpus: int
    sharded: bool
    utilisation: float | None = None

    @property
    def world(self) -> int:
        return self.machines * self.gpus

    @property
    def on_cpu(self) -> bool:
        return self.speed.device.memory_gib is None


@dataclass(frozen=True)
class TrainingEstimate:
    """`traffic`: bytes that each process receives a step at least, where the model is sharded."""

    loops: int
    parameters: int
    steps: int
    step_flops: float
    memory: TrainingMemory
    fits: bool | None
    step_seconds: Range
    gpu_hours: Range
    wall: Range
    traffic: int
    notes: tuple[str, ...]
    told: tuple[str, ...] = field(repr=False)


def estimate_training(plan: TrainingPlan, loops: int) -> TrainingEstimate:
    """One loop count. Raises UserError for processes that cannot share the batch, and RecipeError."""
    recipe, world = plan.recipe, plan.world
    if plan.sharded:
        check_sharding(recipe.optimizer)
    try:
        _, turns = split_batch(recipe.batch, recipe.micro_batch, world)
    except TrainingError as error:
        raise UserError(f"--machines {plan.machines} --gpus {plan.gpus}: {error}") from None
    shape = recipe_shape(recipe)
    flops = training_flops(shape.at(loops), recipe.sequence_length) * recipe.batch_tokens
    memory = training_memory(shape, recipe, loops, world, sharded=plan.sharded)
    seconds = _step_seconds(plan, shape, loops, flops, turns)
    wall = _times(seconds, recipe.steps)
    traffic = _traffic(plan, shape, loops, turns)
    fits = None if plan.on_cpu else memory.total <= FREE * (plan.speed.device.memory_gib or 0) * GIB
    return TrainingEstimate(
        loops=loops,
        parameters=shape.parameters,
        steps=recipe.steps,
        step_flops=flops,
        memory=memory,
        fits=fits,
        step_seconds=seconds,
        gpu_hours=_times(wall, world / 3600),
        wall=wall,
        traffic=traffic,
        notes=tuple(_notes(plan, shape)),
        told=tuple(_told(plan, shape, loops, flops, seconds, memory, turns, traffic)),
    )


def recipe_shape(recipe: Recipe) -> Shape:
    """The recipe's model. Raises RecipeError."""
    return Shape.of_config(recipe.name, recipe.config(1))


def _step_seconds(plan: TrainingPlan, shape: Shape, loops: int, flops: float, turns: int) -> Range:
    speed, peak = plan.speed, plan.speed.device.flops * plan.world
    if plan.utilisation is not None:
        return Range.exactly(flops / (peak * plan.utilisation))
    if plan.on_cpu:
        recipe, with_muon = plan.recipe, plan.recipe.optimizer.kind == "muon"
        by_adamw = shape.parameters - (sum(size.numel() for size in matrices(shape)) if with_muon else 0)
        row = training_row(shape, loops, recipe.sequence_length, recipe.batch, by_adamw, peak=peak, turns=turns)
        middle, besides = speed.training(row), load_constants().trainer.value + _muon(plan, shape)
        low, high = (middle * end + besides for end in (speed.training.low, speed.training.high))
        all_of_it, (least, most) = middle + besides, RECIPES_TOOK
        return Range(low=min(low, least * all_of_it), middle=all_of_it, high=max(high, most * all_of_it))
    again = 4 / 3 if plan.recipe.gradient_checkpointing else 1.0
    reached = speed.utilisation()
    low, middle, high = (again * flops / (peak * share) for share in (reached.high, reached.middle, reached.low))
    return Range(low=low, middle=middle, high=high)


def _muon(plan: TrainingPlan, shape: Shape) -> float:
    """Seconds a step, where the recipe has it and it was measured."""
    return (plan.speed.muon(shape) or 0.0) if plan.recipe.optimizer.kind == "muon" else 0.0


def _traffic(plan: TrainingPlan, shape: Shape, loops: int, turns: int) -> int:
    """FSDP gathers a layer's weights for each of its passes, forward and backward, and the rest once a turn; gradients
    are scattered once a step at least. Each process receives what the others hold."""
    if not plan.sharded:
        return 0
    size = 2 if plan.recipe.precision == "bf16" else 4
    others = (plan.world - 1) / plan.world
    layers, rest = shape.layer_parameters, shape.parameters - shape.layer_parameters
    return int(others * size * (turns * (2 * loops * layers + rest) + layers + rest))


def _times(value: Range, factor: float) -> Range:
    return Range(low=value.low * factor, middle=value.middle * factor, high=value.high * factor)


def _notes(plan: TrainingPlan, shape: Shape) -> list[str]:
    notes, points = [], plan.speed.measured.train
    if plan.utilisation is None and not plan.on_cpu:
        largest = max(Shape.named(p.shape).parameters for p in points)
        if shape.parameters > 4 * largest:
            notes.append(
                f"training was measured with {largest / 1e6:.0f}M parameters only: from its utilisation to that of "
                "reading prompts with 7B; measure some steps and give --utilisation"
            )
    if plan.recipe.optimizer.kind == "muon" and plan.utilisation is None and not plan.speed.measured.muon:
        again = ": run --calibrate again" if plan.on_cpu else ""
        notes.append(f"Muon's own work is not in the times: it was not measured there{again}")
    if plan.on_cpu and not plan.speed.tokens_told:
        notes.append("training was measured with one number of tokens only: run --calibrate again")
    if not plan.speed.device.own:
        notes.append(f"times on {plan.speed.device.name} are extrapolated by the data sheets")
    if plan.world > 1:
        notes.append("what processes say to each other is not in the times: several were not measured")
    return notes


def _told(
    plan: TrainingPlan,
    shape: Shape,
    loops: int,
    flops: float,
    seconds: Range,
    memory: TrainingMemory,
    turns: int,
    traffic: int,
) -> list[str]:
    recipe = plan.recipe
    lines = [
        f"{shape.parameters:,} parameters, {recipe.tokens:,} tokens, {recipe.steps:,} steps of {recipe.batch_tokens:,}",
        f"a step: {flops:.3g} FLOPs at R={loops}, forward and backward"
        + (", a third more for activations computed again" if recipe.gradient_checkpointing else "")
        + f"; {seconds.low:.3g} to {seconds.high:.3g} s on {plan.world} x {plan.speed.device.name}",
        f"a process: weights, gradients, moments {memory.state / GIB:.3f}, copies {memory.copies / GIB:.3f}, "
        f"activations {memory.activations / GIB:.3f}, logits {memory.logits / GIB:.3f} GiB",
    ]
    if traffic:
        lines.append(
            f"FSDP: each process receives {traffic / GIB:.1f} GiB a step ({turns} turns, a pass gathers its layers): "
            f"at 50 GB/s {traffic / 50e9:.2f} s beside {seconds.middle:.2f} s of computing"
        )
    return lines


__all__ = ["TrainingEstimate", "TrainingPlan", "estimate_training", "recipe_shape"]
