"""`plt-eval estimate`: bytes against real caches and the config, and what no estimate may do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from plt_eval.bench.floor import kv_bytes
from plt_eval.cli.main import main
from plt_eval.cluster.orders import DOCKER
from plt_eval.errors import UserError
from plt_eval.estimate.calibrate import LOOPS, TRAINED
from plt_eval.estimate.constants import MuonPoint, Point, Range, calibration_file, load_constants
from plt_eval.estimate.evaluation import Plan, RunEstimate, estimate_run, total_wall
from plt_eval.estimate.memory import GIB, pages, sequences_that_fit, slot, training_memory, weights_on_disk
from plt_eval.estimate.shapes import Shape
from plt_eval.estimate.speed import Speed, fit, prompt_flops, step_flops
from plt_eval.estimate.tokens import tokens_of
from plt_eval.estimate.training import TrainingPlan, estimate_training, recipe_shape
from plt_eval.estimate.workload import Asked, Workload, workloads
from plt_model import PLTCache, PLTConfig, PLTForCausalLM
from plt_model.decode.cache import StaticCache
from plt_model.training.flops import forward_flops, training_flops
from plt_model.training.optimizers import is_matrix_of_a_layer
from plt_model.training.recipe import Optimizer, load_recipe
from plt_model.training.run import TrainingError

FEW = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@cache
def speed(name: str = "h200") -> Speed:
    constants = load_constants()
    device = constants.devices[name]
    return Speed(device, constants.measured[device.measured])


def plan(**changes: Any) -> Plan:
    own: dict[str, Any] = {"shape": Shape.named("7b"), "speed": speed(), "dtype": "bfloat16", "engine": "vllm"}
    return Plan(**{**own, **changes})


def work(**changes: Any) -> Workload:
    asked: dict[str, Any] = {"instances": 500, "prompt_tokens": 1000, "new_tokens": 300, "judge_seconds": 2.0}
    return workloads(Asked(**{**asked, **changes}), load_constants())[0]


# --- bytes ----------------------------------------------------------------------------------------------


def test_the_released_shape_has_the_bytes_that_its_config_says() -> None:
    """By hand: embedding and head of 76,800 x 5,120, and 14 layers of 40 + 8 + 8 + 40 heads of 128, three matrices of
    27,648, two norms, and a gate of 40 heads with biases and a norm of its own, which reads the layer's input."""
    layer = 5120 * 128 * (40 + 8 + 8 + 40) + 3 * 5120 * 27648 + 2 * 5120
    gate = 5120 * 40 + 40 + 5120
    assert Shape.named("7b").parameters == 2 * 76800 * 5120 + 14 * (layer + gate) + 5120
    assert weights_on_disk(Shape.named("7b"), "bfloat16") == pytest.approx(14.19 * GIB, rel=1e-3)


def test_a_token_of_the_released_shape_takes_56_kib() -> None:
    """14 layers x 8 heads x 128 numbers x keys and values x 2 bytes."""
    config = Shape.named("7b").at(2)
    assert (
        slot(config, 1001, "bfloat16").shared - slot(config, 1000, "bfloat16").shared == 14 * 8 * 128 * 2 * 2 == 57344
    )
    assert slot(config, 1000, "bfloat16").windows == 65 * 57344
    assert slot(config, 1000, "bfloat16").carry == 5120 * 2


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_slots_are_those_of_a_real_cache_and_of_the_bench(loops: int) -> None:
    shape = Shape.named("small")
    held = StaticCache(shape.at(loops), slots=1, capacity=77, dtype=torch.float32, device="cpu").nbytes()
    found = slot(shape.at(loops), 77, "float32")
    assert (found.shared, found.windows, found.carry) == (held["shared"], held["windows"], held["carry"])
    assert held == kv_bytes(shape.at(loops), slots=1, context=77, dtype=torch.float32)


def test_the_models_own_cache_holds_as_much_but_for_the_current_token_of_windows() -> None:
    shape, length = Shape.named("small"), 40
    config = shape.at(3)
    model = PLTForCausalLM(config).eval()
    cache_ = PLTCache(config)
    with torch.no_grad():
        model(torch.ones(1, length, dtype=torch.long), past_key_values=cache_, use_cache=True)
    held, found = cache_.nbytes(), slot(config, length, "float32")
    assert held["shared"] == found.shared
    assert held["carry"] == found.carry
    assert held["windows"] * (config.window + 1) == found.windows * config.window


def test_pages_of_the_released_shape_by_hand() -> None:
    """R=2: beside 14 full layers, 14 windows and 3 for the carry, in two groups of 14: what a token takes is R=1's."""
    page = 16 * 2 * 8 * 128 * 2
    found = pages(Shape.named("7b").at(2), 4096, "bfloat16")
    assert ceil(5120 / (2 * 8 * 128)) == 3
    assert (found.shared, found.windows, found.carry) == (14 * 256 * page, 14 * 5 * page, 3 * 5 * page)
    assert found.total == (14 * 256 + 28 * 5) * page
    assert pages(Shape.named("7b").at(1), 4096, "bfloat16").total == 14 * 256 * page
    assert pages(Shape.named("7b").at(4), 4096, "bfloat16").total == 14 * (256 + 4 * 5) * page


@given(loops=st.integers(1, 6), context=st.integers(1, 40_000), parallel=st.sampled_from([1, 2, 4, 8]))
@FEW
def test_pages_hold_everything_that_they_must(loops: int, context: int, parallel: int) -> None:
    config = Shape.named("7b").at(loops)
    one = slot(config, context, "bfloat16")
    found = pages(config, context, "bfloat16", parallel)
    assert found.unused >= 0
    assert parallel * found.shared >= one.shared
    assert found.carry >= one.carry  # the carry is on every GPU, whole
    assert pages(config, context + 1, "bfloat16", parallel).total >= found.total


def test_params_makes_a_model_of_about_that_size() -> None:
    for asked in (1e9, 3e9, 7e9, 1.4e10, 7e10):
        assert Shape.sized(asked).parameters == pytest.approx(asked, rel=0.15)
    config = Shape.sized(7.6e9).at(1)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (5120, 14, 40)


def test_a_checkpoint_has_the_shape_of_its_model() -> None:
    shape = Shape.checkpoint("plt-tiny:r3")
    assert shape.loops == 3
    assert shape.parameters == 272_166  # what its training recorded


# --- the fit --------------------------------------------------------------------------------------------


def test_a_fit_finds_what_made_the_times() -> None:
    rows = [(1.0, 2.0), (2.0, 1.0), (3.0, 7.0)]
    points = tuple(
        Point(shape="7b", dtype="bfloat16", loops=1, batch=1, context=1, seconds=1.5 * a + 0.25 * b) for a, b in rows
    )
    found = fit(rows, points, first_at_least=1.0)
    assert found.coefficients == pytest.approx((1.5, 0.25))
    assert (found.low, found.high) == pytest.approx((1, 1))


def test_no_coefficient_is_negative_and_the_range_holds_every_measurement() -> None:
    rows = [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]
    points = tuple(Point(shape="7b", dtype="bfloat16", loops=1, batch=1, context=1, seconds=s) for s in (3.0, 2.0, 1.0))
    found = fit(rows, points)
    assert min(found.coefficients) >= 0
    for row, point in zip(rows, points, strict=True):
        assert found.low * found(row) <= point.seconds * (1 + 1e-9)
        assert found.high * found(row) >= point.seconds * (1 - 1e-9)


def test_every_measured_time_is_within_its_own_estimate() -> None:
    measured, one = load_constants().measured["h200"], speed()
    for p in measured.decode:
        low, middle, high = (
            one.step(Shape.named(p.shape), p.loops, p.batch, p.context, p.dtype, scenario=i) for i in range(3)
        )
        assert low * 0.999 <= p.seconds <= high * 1.001
        assert middle == pytest.approx(p.seconds, rel=0.05)
    for p in measured.prefill:
        assert one.prefill(Shape.named(p.shape), p.loops, p.context, p.dtype) == pytest.approx(p.seconds, rel=0.05)


def test_flops_of_a_step_are_those_of_a_forward_pass() -> None:
    """With no context but itself, and of a prompt of one token: the head aside."""
    shape = Shape.named("7b")
    config = shape.at(1)
    head = 2 * config.hidden_size * config.vocab_size
    assert prompt_flops(shape, 1, 1) + head == pytest.approx(forward_flops(config, 1))
    gate = step_flops(shape, 1, 1, 0) - (forward_flops(config, 1) - 4 * 5120 * 14)
    assert 0 <= gate < 0.01 * forward_flops(config, 1)  # gates are counted here, and not there


# --- what no estimate may do ----------------------------------------------------------------------------


def _ends(value: Range | None) -> tuple[float, float, float]:
    assert value is not None
    assert value.low <= value.middle <= value.high
    return value.low, value.middle, value.high


def _no_less(first: Range | None, second: Range | None) -> bool:
    return all(b >= a * (1 - 1e-9) for a, b in zip(_ends(first), _ends(second), strict=True))


ENGINES = st.sampled_from(["session", "vllm"])


@given(ENGINES, st.integers(1, 2000), st.integers(0, 500), st.integers(1, 64))
@FEW
def test_more_instances_never_take_less(engine: str, count: int, more: int, gpus: int) -> None:
    here = plan(engine=engine, gpus=gpus, machines=2)
    first, second = (estimate_run(work(instances=n), here, 2) for n in (count, count + more))
    assert _no_less(first.gpu_hours, second.gpu_hours)
    assert _no_less(first.judging, second.judging)
    assert second.disk >= first.disk


@given(ENGINES, st.integers(1, 5), st.integers(1, 200), st.sampled_from(["h100", "h200"]))
@FEW
def test_more_loops_never_take_less(engine: str, loops: int, batch: int, gpu: str) -> None:
    here = plan(engine=engine, batch=batch, speed=speed(gpu))
    first, second = (estimate_run(work(), here, n) for n in (loops, loops + 1))
    assert _no_less(first.gpu_hours, second.gpu_hours)
    assert second.kv.total > first.kv.total


@given(ENGINES, st.integers(1, 20_000), st.integers(0, 5_000), st.integers(1, 64))
@FEW
def test_longer_texts_never_take_less(engine: str, length: int, more: int, batch: int) -> None:
    here = plan(engine=engine, batch=batch)
    first, second = (estimate_run(work(prompt_tokens=n), here, 2) for n in (length, length + more))
    assert second.kv.total >= first.kv.total
    assert _no_less(first.generation, second.generation)


AGENTS = st.sampled_from([{}, {"steps": 9, "observation_tokens": 300, "tool_seconds": 1.0}])


@given(ENGINES, AGENTS, st.integers(1, 20), st.integers(0, 20), st.integers(1, 8), st.integers(1, 3000))
@FEW
def test_more_machines_never_take_longer(
    engine: str, agents: dict[str, Any], machines: int, more: int, gpus: int, count: int
) -> None:
    runs = [
        estimate_run(work(instances=count, **agents), plan(engine=engine, machines=n, gpus=gpus, judge_machines=n), 2)
        for n in (machines, machines + more)
    ]
    assert _no_less(runs[1].wall, runs[0].wall)


@given(ENGINES, AGENTS, st.integers(1, 64), st.integers(0, 500), st.integers(1, 500), st.integers(1, 9))
@FEW
def test_more_gpus_never_make_more_agents_than_workers(
    engine: str, agents: dict[str, Any], gpus: int, more: int, workers: int, machines: int
) -> None:
    runs = [
        estimate_run(work(**agents), plan(engine=engine, gpus=n, machines=machines, workers=workers), 2)
        for n in (gpus, gpus + more)
    ]
    assert _no_less(runs[1].wall, runs[0].wall)
    assert not agents or runs[1].replicas <= workers


@given(
    ENGINES, AGENTS, st.integers(1, 9), st.integers(1, 2000), st.floats(0, 900), st.integers(0, 9), st.integers(0, 500),
    st.floats(0, 900),
)  # fmt: skip
@example("vllm", {}, 8, 2000, 1.2, 1, 0, 0.0)  # judging takes about as long as writing
@FEW
def test_fewer_judges_dearer_judging_and_more_instances_never_take_less(
    engine: str, agents: dict[str, Any], judges: int, count: int, one: float, fewer: int, more: int, dearer: float
) -> None:
    def wall(judges: int, count: int, one: float) -> Range | None:
        here = plan(engine=engine, gpus=8, judge_machines=judges)
        return estimate_run(work(instances=count, judge_seconds=one, **agents), here, 2).wall

    found = wall(judges + fewer, count, one)
    assert _no_less(found, wall(judges, count, one))
    assert _no_less(found, wall(judges + fewer, count + more, one))
    assert _no_less(found, wall(judges + fewer, count, one + dearer))


@given(st.integers(1, 12), st.integers(1, 12))
@FEW
def test_all_loop_counts_take_at_least_the_longest(machines: int, gpus: int) -> None:
    here = plan(engine="session", machines=machines, gpus=gpus)
    rows = [estimate_run(work(), here, loops) for loops in (1, 2, 3, 4)]
    whole = _ends(total_wall(rows, here))
    assert whole[1] >= max(_ends(row.wall)[1] for row in rows)
    assert whole[1] <= sum(_ends(row.wall)[1] for row in rows) * (1 + 1e-9)


def test_an_agents_conversation_that_is_kept_is_read_once() -> None:
    (agents,) = workloads(Asked(suite="swe", steps=40, new_tokens=200, observation_tokens=500), load_constants())
    kept, again = (estimate_run(agents, plan(prefix_cache=on, workers=64), 2) for on in (True, False))
    assert kept.generation is not None
    assert again.generation is not None
    assert again.generation.middle > 1.2 * kept.generation.middle


def test_the_last_answer_is_judged_after_it_is_written() -> None:
    """16 answers side by side, and 16 judges."""
    found = estimate_run(work(instances=16, new_tokens=5000, judge_seconds=600.0), plan(engine="session"), 1)
    assert _ends(found.wall)[1] >= 600 + _ends(found.generation)[1]


def test_workers_are_all_agents_and_all_judgements_of_a_machine() -> None:
    def run(**changes: Any) -> RunEstimate:
        (agents,) = workloads(Asked(suite="swe", judge_seconds=600.0), load_constants())
        return estimate_run(agents, plan(**changes), 2)

    one = run(workers=1)
    for gpus, machines in ((8, 1), (8, 62)):
        more = run(workers=1, gpus=gpus, machines=machines)
        assert (more.replicas, more.batch, more.generation) == (1, 1, one.generation)
    assert one.judging.middle == 500 * 600
    assert run(workers=1, judge_machines=2).judging.middle == ceil(500 / 32) * 600
    assert any("16 agents at a time" in note for note in run(judge_machines=4).notes)


def test_the_machine_of_the_agents_has_every_image() -> None:
    (agents,) = workloads(Asked(suite="swe"), load_constants())
    found = estimate_run(agents, plan(judge_machines=2), 2)
    assert (found.disk, found.disk_of_judges) == (455 * GIB, 330 * GIB)
    few = estimate_run(agents, plan(workers=2, judge_machines=2, judge_cores=4, keep_images="none"), 2)
    assert (few.disk, few.disk_of_judges) == ((5 + 3 * 6 * 2) * GIB, (5 + 3 * 4) * GIB)


def test_a_suite_has_its_own_number_of_problems_where_its_texts_are_anothers() -> None:
    hard, told, all_ = (
        workloads(Asked(suite=name), load_constants())[0]
        for name in ("bigcodebench-hard", "bigcodebench-hard-instruct", "bigcodebench-instruct")
    )
    assert (hard.answers, told.answers, all_.answers) == (148, 148, 1140)
    assert told.prompt == all_.prompt != hard.prompt
    assert "bigcodebench-instruct's texts" in told.sources["prompt"]
    assert "texts" not in all_.sources["prompt"]
    (translated,) = workloads(Asked(suite="multilingual-mbpp:js"), load_constants())
    assert translated.answers == 397


def test_wall_begins_with_loading_and_says_what_of_it_was_measured() -> None:
    loading = load_constants().loading.rate.middle
    for engine, compiling in (("session", speed().measured.start.middle), ("vllm", 0.0)):
        found = estimate_run(work(judge_seconds=0.0), plan(engine=engine), 1)
        start = _ends(found.wall)[1] - _ends(found.generation)[1]
        assert start == pytest.approx(weights_on_disk(Shape.named("7b"), "bfloat16") / loading + compiling)
        assert any("rate that is assumed" in note for note in found.notes)


def test_texts_that_outgrow_the_model_are_told() -> None:
    small = plan(shape=Shape.checkpoint("plt-tiny:r2"), engine="session")
    (texts,) = workloads(Asked(suite="bigcodebench", tokens=tokens_of("plt-tiny:r2")), load_constants())
    assert any("may come to" in note for note in estimate_run(texts, small, 2).notes)


def test_500_instances_at_two_loops_are_hours_of_a_gpu_and_the_images_that_a_run_reckons() -> None:
    (agents,) = workloads(Asked(suite="swe"), load_constants())
    found = estimate_run(agents, plan(workers=64), 2)
    assert found.gpu_hours is not None
    assert 0.2 < found.gpu_hours.middle < 50
    assert found.disk == 455 * GIB  # as `plt-eval suites` says


def test_what_does_not_fit_is_said_and_has_no_times() -> None:
    big = plan(shape=Shape.sized(7e10), gpus=1)
    found = estimate_run(work(), big, 2)
    assert found.gpu_hours is found.wall is found.generation is None
    assert "does not fit" in found.notes[0]
    wide = estimate_run(work(), plan(shape=Shape.sized(7e10), gpus=8), 2)
    assert wide.tensor_parallel == 2
    assert wide.sequences


def test_no_more_sequences_fit_than_there_is_memory_for() -> None:
    one = slot(Shape.named("7b").at(2), 8192, "bfloat16")
    for gib in (10, 20, 40, 80, 139):
        count = sequences_that_fit("session", gib * GIB, weights_on_disk(Shape.named("7b"), "bfloat16"), one)
        assert count * one.total + weights_on_disk(Shape.named("7b"), "bfloat16") <= max(gib * GIB, 14.2 * GIB)


def test_answers_are_taken_to_be_as_long_as_the_gold_ones() -> None:
    """Of a bundled model, whose tokens are bytes and whose prompts are no chats: three characters, and the end."""
    tokens = tokens_of("plt-tiny:r2")
    assert tokens is not None
    assert (tokens.characters_per_token, tokens.chat) == (1.0, False)
    (trace,) = workloads(Asked(suite="trace", tokens=tokens), load_constants())
    assert (trace.prompt.middle, trace.new.middle, trace.new.high) == (43, 4, 24)
    (chats,) = workloads(Asked(suite="humaneval"), load_constants())
    assert chats.new.middle == pytest.approx(618 / 3.23 + 1)


def test_a_problems_own_solution_runs_once() -> None:
    constants = load_constants()
    judging, own = (workloads(Asked(suite="mbpp", samples=n), constants)[0].judging.middle for n in (1, 10))
    assert judging - own == pytest.approx(0.9 * constants.judging["mbpp"].first.middle)
    assert own > constants.judging["mbpp"].cpu_seconds.middle


def test_prompts_that_are_read_side_by_side_share_what_a_pass_takes() -> None:
    own = load_constants().measured["h200"]
    points = []
    for name, loops in (("small", 1), ("small", 2), ("medium", 1), ("medium", 2)):
        shape = Shape.named(name)
        seconds = 2 * prompt_flops(shape, loops, 256) / own.flops + 1e-3 * loops * shape.at(1).num_hidden_layers
        points.append(Point(shape=name, dtype="bfloat16", loops=loops, batch=1, context=256, seconds=seconds))
    one = Speed(load_constants().devices["h200"], own.model_copy(update={"prefill": tuple(points)}))
    row = Shape.named("small"), 2, 40, "bfloat16"
    assert one.prefill(*row) - one.prefill(*row, together=5) == pytest.approx(1e-3 * 2 * 2 * 4 / 5, rel=1e-3)


# --- training -------------------------------------------------------------------------------------------


def training(**changes: Any) -> TrainingPlan:
    own: dict[str, Any] = {
        "recipe": load_recipe("loopcoder-v2-7b"),
        "speed": speed(),
        "machines": 4,
        "gpus": 8,
        "sharded": True,
    }
    return TrainingPlan(**{**own, **changes})


def test_a_training_that_a_run_refuses_has_no_estimate() -> None:
    seven = load_recipe("loopcoder-v2-7b")
    with pytest.raises(UserError, match="micro_batch is 3"):
        estimate_training(training(recipe=seven.model_copy(update={"micro_batch": 3})), 2)
    with pytest.raises(UserError, match="cannot be shared by 24 processes"):
        estimate_training(training(gpus=6), 2)
    with pytest.raises(TrainingError, match="Muon needs whole matrices"):
        estimate_training(training(recipe=load_recipe("plt-tiny"), machines=1, gpus=2), 2)


def test_what_is_not_sharded_holds_copies() -> None:
    recipe, shape = load_recipe("loopcoder-v2-7b"), Shape.named("7b")
    full = recipe.model_copy(update={"precision": "float32"})
    copies = [training_memory(shape, r, 2, n, sharded=False).copies for r in (recipe, full) for n in (1, 2)]
    assert copies == [each * shape.parameters for each in (2, 6, 0, 4)]
    assert estimate_training(training(machines=1, gpus=1, sharded=False), 1).fits is False


def test_autocast_keeps_a_copy_of_every_matrix_for_backward() -> None:
    model = PLTForCausalLM(Shape.named("small").at(1)).train()
    shapes = {weight.shape for weight in model.parameters() if weight.dim() == 2}
    seen: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.dtype is torch.bfloat16 and x.dim() == 2 and {x.shape, x.mT.shape} & shapes:
            seen[x.untyped_storage().data_ptr()] = x
        return x

    ids = torch.ones(1, 7, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids, use_cache=False)
    looked_up = model.get_input_embeddings().weight.numel()
    told = sum(weight.numel() for weight in model.parameters()) - looked_up
    assert sum(x.numel() for x in seen.values()) == pytest.approx(told, rel=0.02)


def test_training_costs_what_its_flops_say_at_a_given_utilisation() -> None:
    found = estimate_training(training(utilisation=0.4), 2)
    assert found.step_seconds.middle == pytest.approx(found.step_flops / (32 * 989e12 * 0.4))
    assert found.gpu_hours.middle == pytest.approx(found.wall.middle * 32 / 3600)
    assert found.steps == 1_000_000_000_000 // 4_194_304


def test_muon_and_the_trainer_are_part_of_a_step_on_a_cpu() -> None:
    """By hand: 14 matrices, which here take a tenth of a second each."""
    points = tuple(MuonPoint(rows=side, columns=side, seconds=0.1) for side in (64, 256))
    measured = load_constants().measured["h200"].model_copy(update={"muon": points})
    cpu = load_constants().devices["h200"].model_copy(update={"memory_gib": None})
    recipe = load_recipe("quick")
    adamw = recipe.model_copy(update={"optimizer": Optimizer(kind="adamw", lr=1e-3)})
    plans = [
        training(recipe=one, speed=Speed(cpu, measured), machines=1, gpus=1, sharded=False) for one in (recipe, adamw)
    ]
    with_muon, without = (estimate_training(plan, 2).step_seconds.middle for plan in plans)
    assert with_muon - without == pytest.approx(1.4, rel=1e-3)
    assert without > load_constants().trainer.value
    old = training(recipe=recipe, machines=1, gpus=1, sharded=False)
    assert any("Muon" in note for note in estimate_training(old, 2).notes)


def test_a_step_on_a_cpu_is_told_by_steps_of_other_models() -> None:
    """A machine with a known rate, time a call, a token's and a parameter's: what it takes is found by steps of three
    models, for a fourth one that learns in two turns, and with Muon is AdamW's for the rest alone."""
    times = (1e-11, 2e-3, 3e-6, 2e-9)

    def took(shape: Shape, loops: int, length: int, batch: int, by_adamw: int, turns: int = 1) -> float:
        config, tokens = shape.at(loops), length * batch
        layers = loops * config.num_hidden_layers
        parts = training_flops(config, length) * tokens, layers * turns, layers * tokens, by_adamw
        return sum(time * part for time, part in zip(times, parts, strict=True))

    points = []
    for name, loops in itertools.product(TRAINED, LOOPS):
        shape = Shape.named(name)
        for batch in TRAINED[name]:
            seconds = took(shape, loops, 128, batch, shape.parameters)
            points.append(Point(shape=name, dtype="float32", loops=loops, batch=batch, context=128, seconds=seconds))
    changes = {"train": tuple(points), "flops": 2e11, "muon": ()}
    measured = load_constants().measured["h200"].model_copy(update=changes)
    cpu = load_constants().devices["h200"].model_copy(update={"memory_gib": None, "flops": 2e11})
    recipe = load_recipe("quick").model_copy(update={"micro_batch": 4})
    shape = recipe_shape(recipe)
    matrices = sum(w.numel() for n, w in shape.model(1).named_parameters() if is_matrix_of_a_layer(n, w))
    plan = training(recipe=recipe, speed=Speed(cpu, measured), machines=1, gpus=1, sharded=False)
    older = measured.model_copy(update={"train": tuple(p for p in points if p.shape != "tiny")})
    for kept, again in ((measured, False), (older, True)):
        told = estimate_training(dataclasses.replace(plan, speed=Speed(cpu, kept)), 2).notes
        assert any(note.endswith("with one number of tokens only: run --calibrate again") for note in told) == again
    assert Speed(cpu, older).training.coefficients[2:] == (0.0, 0.0)
    for loops in (1, 2, 3):
        found = estimate_training(plan, loops).step_seconds
        expected = took(shape, loops, 128, 8, shape.parameters - matrices, turns=2) + load_constants().trainer.value
        assert found.middle == pytest.approx(expected, rel=1e-6)
        assert found.low < found.middle < found.high


def test_the_state_is_shared_out_and_does_not_grow_with_loops() -> None:
    recipe, shape = load_recipe("loopcoder-v2-7b"), Shape.named("7b")
    one, two = (training_memory(shape, recipe, loops, 32, sharded=True) for loops in (1, 2))
    assert one.state == two.state == 16 * shape.parameters // 32
    assert two.activations > one.activations
    assert training_memory(shape, recipe, 2, 32, sharded=False).state == 16 * shape.parameters


def test_activations_are_what_autograd_saves() -> None:
    """Counted by saved-tensor hooks on a model; the estimate's share for a later pass."""
    fields = {**load_recipe("quick").model, "vocab_size": 64, "intermediate_size": 256, "hidden_size": 128}
    recipe = load_recipe("quick").model_copy(update={"model": fields, "batch_tokens": 128})
    shape = Shape.of_config("t", recipe.config(1))
    saved = [_saved(recipe.config(loops)) for loops in (2, 3)]
    told = [training_memory(shape, recipe, loops, 1, sharded=False).activations for loops in (2, 3)]
    assert told[1] - told[0] == pytest.approx(saved[1] - saved[0], rel=0.35)


def _saved(config: PLTConfig) -> int:
    model = PLTForCausalLM(config).train()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    ids = torch.ones(1, 128, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(ids, labels=ids, use_cache=False)
    return sum(size for size, _ in seen.values())


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *(str(argument) for argument in arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_json_has_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli(capsys, "--suite", "humaneval", "--loops", "1,2", "--json")
    document = json.loads(out)
    assert code == 0
    assert [row["loops"] for row in document["rows"]] == [1, 2]
    assert set(document["rows"][0]) == {field.name for field in dataclasses.fields(RunEstimate)}
    assert set(document["rows"][0]["gpu_hours"]) == {"low", "middle", "high"}
    assert document["rows"][0]["kv"]["total"] == document["rows"][0]["kv"]["shared"]
    assert document["suites"][0]["answers"] == 164
    code, out, _ = cli(capsys, "train", "--recipe", "loopcoder-v2-7b", "--gpus", 8, "--machines", 4, "--json")
    document = json.loads(out)
    assert code == 0
    assert [row["loops"] for row in document["rows"]] == [1, 2, 3, 4]
    assert document["rows"][1]["memory"]["total"] > document["rows"][0]["memory"]["total"]


def test_explain_shows_the_reckoning_and_the_table_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli(capsys, "--suite", "swe", "--loops", 2, "--engine", "vllm", "--gpu", "h100", "--explain")
    assert code == 0
    for part in ("455.0 GiB", "assumed, not measured: steps", "data sheets", "a decoding step at", "fitted, decoding"):
        assert part in out


def test_cpu_wants_its_own_measurements_and_uses_them(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--gpu", "cpu", "--model", "plt-tiny", "--suite", "trace", "--loops", "1,4", "--json")
    code, _, err = cli(capsys, *asked)
    assert (code, "--calibrate" in err) == (2, True)
    own = load_constants().measured["h200"].model_copy(update={"machine": "this one", "read_share": 1.0})
    calibration_file().parent.mkdir(parents=True)
    calibration_file().write_text(own.model_dump_json())
    code, out, _ = cli(capsys, *asked)
    document = json.loads(out)
    assert (code, document["measured"]["machine"], document["dtype"]) == (0, "this one", "float32")
    calibration_file().write_text("{}")
    code, _, err = cli(capsys, *asked)
    assert (code, "damaged" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "nope"], "unknown suite"),
        ([], "--instances is missing"),
        (["--instances", 5, "--prompt-tokens", 9], "--new-tokens is missing"),
        (["--suite", "code", "--params", "5"], "--params 5"),
        (["--suite", "code", "--shape", "9b"], "--shape 9b"),
        (["--suite", "code", "--shape", "7b", "--params", "7e9"], "exclude each other"),
        (["--suite", "code", "--loops", "0"], "--loops"),
        (["--suite", "code", "--steps", 3], "--steps has no effect"),
        (["--suite", "humaneval", "--instances", 165], "--instances 165: humaneval has 164"),
        (["--suite", "humaneval", "--new-tokens", 10**6], "--new-tokens: a prompt and an answer"),
        (["--instances", 5, "--prompt-tokens", 10**6, "--new-tokens", 9], "--prompt-tokens and --new-tokens: a prompt"),
        (["--suite", "code", "--keep-images", "all"], "--keep-images has no effect"),
        (["--suite", "swe", "--steps", 1, "--observation-tokens", 9], "--observation-tokens has no effect"),
        (["--suite", "swe", "--steps", 1, "--engine", "vllm", "--prefix-cache", "on"], "with --steps 1"),
        (["--suite", "swe", "--prefix-cache", "on"], "--prefix-cache has no effect with --engine session"),
        (
            ["--suite", "mbpp", "--prompt-tokens", 9, "--new-tokens", 9, "--characters-per-token", 2],
            "--characters-per-token has no effect",
        ),
        (["--suite", "swe", "--prompt-tokens", 9, "--characters-per-token", 2], "--characters-per-token has no effect"),
        (["--suite", "code", "--gpu", "cpu", "--machines", 2], "--machines 2 has no effect with --gpu cpu"),
        (["train", "--recipe", "quick", "--gpu", "cpu", "--gpus", 2], "--gpus 2 has no effect with --gpu cpu"),
        (["--calibrate", "--json"], "--json has no effect with --calibrate alone"),
        (["--calibrate", "--suite", "code"], "--calibrate has no effect on --gpu h200"),
        (["--calibrate", "--gpu", "cpu", "--suite", "nope"], "unknown suite"),
        (["--calibrate", "--gpu", "cpu", "--suite", "code", "--context", 50], "--context 50"),
        (["train", "--recipe", "quick", "--gpu", "b300"], "give --flops, --gpu-memory"),
        (["train", "--recipe", "plt-tiny", "--gpus", 2, "--fsdp"], "--fsdp: Muon needs whole matrices"),
        (["--suite", "code", "--workers", 3], "--workers has no effect"),
        (["--suite", "code", "--context", 50], "--context 50"),
        (["--suite", "code", "--context", 10**7], "--context 10000000"),
        (["--suite", "swe", "--instances", 501], "--instances 501"),
        (["--suite", "swe", "--samples", 2], "--samples has no effect"),
        (["--suite", "code", "--gpu", "b300"], "--memory-bandwidth is missing"),
        (["--suite", "code", "--gpu", "cpu", "--flops", 3], "--flops has no effect"),
        (["--suite", "code", "--tensor-parallel", 2], "--tensor-parallel 2 has no effect"),
        (["--suite", "code", "--engine", "vllm", "--tensor-parallel", 3, "--gpus", 8], "--tensor-parallel 3"),
        (["--suite", "tools"], "--prompt-tokens is missing"),
        (["--suite", "code", "train", "--recipe", "quick"], "--suite has no effect before train"),
        (["train", "--recipe", "nope"], "--recipe nope"),
        (["train", "--recipe", "quick", "--tokens", "12"], "--tokens 12"),
        (["train", "--recipe", "quick", "--utilisation", "1.5"], "--utilisation 1.5"),
        (["train", "--recipe", "quick", "--fsdp"], "--fsdp"),
        (["train", "--recipe", "loopcoder-v2-7b", "--gpus", 7], "cannot be shared by 7"),
    ],
)
def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[object], said: str) -> None:
    code, out, err = cli(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("flag", ["--memory-bandwidth", "--flops", "--gpu-memory"])
def test_numbers_without_end_are_refused(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    code, _, err = cli(capsys, "--suite", "code", flag, "inf")
    assert (code, flag in err, "Traceback" in err) == (2, True, False)


def test_an_agent_of_one_step_is_an_agent_and_muon_is_not_sharded(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cli(capsys, "--suite", "swe", "--steps", 1, "--workers", 5, "--loops", 1, "--json")
    assert (code, json.loads(out)["rows"][0]["batch"]) == (0, 5)
    code, out, _ = cli(capsys, "train", "--recipe", "plt-tiny", "--gpus", 2, "--loops", 1, "--json")
    assert (code, json.loads(out)["sharded"]) == (0, False)


def test_a_gpu_of_the_users_has_no_source_but_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("--memory-bandwidth", 2039, "--flops", 312, "--gpu-memory", 80)
    code, out, _ = cli(capsys, "--suite", "mbpp", "--loops", 1, "--gpu", "a100", *numbers, "--json")
    source = json.loads(out)["device"]["source"]
    assert (code, "given: --memory-bandwidth" in source, "data sheet" in source) == (0, True, False)


@pytest.mark.parametrize("name", ["train.sbatch", "evaluate.sbatch"])
def test_batch_files_parse(name: str) -> None:
    file = Path(__file__).parents[2] / "scripts" / "slurm" / name
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert re.search(r"^#SBATCH --requeue$", file.read_text(), re.MULTILINE)


def test_an_evaluation_goes_on_without_a_server_that_does_not_come_up(tmp_path: Path) -> None:
    """With stand-ins for Slurm: two machines of two GPUs, of which one server never answers; then none does."""
    stand_ins = {
        "scontrol": "echo a1; echo a2",
        "srun": 'echo "$@" | head -n 1 >> "$LOG"; exec /bin/sleep 60',
        "curl": 'case "$*" in *${DEAD}*) exit 7 ;; esac',
        "sleep": "exec /bin/sleep 0.1",
        # It waits for the three steps: on a busy machine their start takes longer than all the rest here.
        "plt-eval": 'until [ "$(grep -c het-group "$LOG")" = 3 ]; do /bin/sleep 0.1; done; echo "plt-eval $*" >>"$LOG"',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log, file = tmp_path / "log", Path(__file__).parents[2] / "scripts" / "slurm" / "evaluate.sbatch"
    own = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "MODEL": "m", "NAME": "n", "LOOPS": "2",
        "START_SECONDS": "1", "SLURM_JOB_NODELIST_HET_GROUP_0": "a", "SLURM_JOB_NODELIST_HET_GROUP_1": "a",
        "SLURM_GPUS_PER_NODE_HET_GROUP_1": "h100:2", "SLURM_CPUS_PER_TASK_HET_GROUP_0": "12",
    }  # fmt: skip
    done = subprocess.run(["bash", file], env={**own, "DEAD": "a1:8001"}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "http://a1:8001/v1: no server in 1 s" in done.stderr) == (0, True)
    lines = log.read_text().splitlines()
    (run,) = (line for line in lines if line.startswith("plt-eval"))
    assert re.findall(r"--endpoint (\S+)", run) == [f"http://{at}/v1" for at in ("a1:8000", "a2:8000", "a2:8001")]
    (servers,) = (line for line in lines if "--het-group=1" in line)
    assert "--nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=8 " in servers
    judges = [line for line in lines if "--het-group=0" in line]
    assert len(judges) == 2
    assert all("--cpus-per-task=12 " in line and '{"docker": 12}' in line for line in judges if "--head" in line)
    log.write_text("")
    none = subprocess.run(["bash", file], env={**own, "DEAD": "http"}, capture_output=True, text=True, timeout=60)
    assert (none.returncode, "plt-eval run" in log.read_text()) == (1, False)


def test_judges_of_the_batch_file_offer_docker_which_its_own_suite_needs() -> None:
    text = (Path(__file__).parents[2] / "scripts" / "slurm" / "evaluate.sbatch").read_text()
    assert "SUITE=${SUITE:-swe}" in text
    starts = [line for line in text.splitlines() if "ray start" in line]
    assert len(starts) == 2
    assert all("$judge" in line for line in starts)
    assert DOCKER in next(line for line in text.splitlines() if line.startswith("judge="))


@pytest.mark.slow
def test_calibration_measures_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = cli(capsys, "--calibrate")
    assert code == 0
    code, out, _ = cli(capsys, "--gpu", "cpu", "--model", "plt-tiny", "--suite", "trace", "--loops", "1,4", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert rows[1]["generation"]["middle"] >= rows[0]["generation"]["middle"] > 0
