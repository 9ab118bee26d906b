"""`plt-eval bench train`: a training step by loops: forward, backward, AdamW.

Weights and optimizer states are float32; `--dtype bfloat16` computes under autocast, as `plt-eval train` does. All loop
counts train the same weights in turn, with a rate at which they hardly move. The gate compares loss and every gradient
with those of eager attention in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from plt_eval.bench.gates import SLACK, Gate
from plt_eval.bench.memory import peak_of
from plt_eval.bench.outcome import Outcome, Row, Setup, against, run_configuration, steps_of
from plt_eval.bench.rounds import Job, Spread
from plt_eval.bench.subjects import at_loops, prompt
from plt_model import PLTForCausalLM
from plt_model.training.flops import peak_flops, training_flops

RATE = 1e-7
"""The learning rate: nothing diverges, whatever the number of rounds."""

TIGHT_GRADIENT = 1e-3
"""Allowed in float32 between one gradient and another, relative to the eager one's norm."""


def bench_train(setup: Setup, batches: tuple[int, ...], contexts: tuple[int, ...], compute: torch.dtype) -> Outcome:
    """Time all configurations; `compute` is float32, or a 16-bit type to autocast to."""
    outcome = Outcome("train", {"compute": str(compute).removeprefix("torch."), "optimizer": "AdamW"})
    models = {f"R={loops}": setup.family.model(loops).train() for loops in setup.loops}
    optimizer = torch.optim.AdamW(next(iter(models.values())).parameters(), lr=RATE)
    configurations = [(batch, context) for batch in batches for context in contexts]
    setup.watcher.expect(len(configurations) * steps_of(len(models), setup.rounds))
    for batch, context in configurations:
        _configuration(outcome, setup, {"batch": batch, "context": context}, models, optimizer, compute)
    return outcome


def _configuration(
    outcome: Outcome,
    setup: Setup,
    where: dict[str, int],
    models: dict[str, PLTForCausalLM],
    optimizer: torch.optim.Optimizer,
    compute: torch.dtype,
) -> None:
    batch, context = where["batch"], where["context"]
    ids = prompt(context, setup.family.config.vocab_size, seed=setup.seed, batch=batch).to(setup.family.device)
    jobs = [Job(name, _step(model, ids, optimizer, compute)) for name, model in models.items()]
    timed = run_configuration(
        outcome, setup, where, jobs, lambda: [g for n, m in models.items() for g in gates(n, m, ids, compute)]
    )
    if timed is None:
        return
    for job, (name, model) in zip(jobs, models.items(), strict=True):
        tokens = batch * context
        flops = training_flops(model.config, context) * tokens / Spread.of(timed[name].seconds()).median
        peak = peak_flops(torch.cuda.get_device_name(setup.family.device)) if ids.is_cuda else None
        facts = {
            "tflops": flops / 1e12,
            "of_the_peak": None if peak is None or compute != torch.bfloat16 else flops / peak,
            "peak_bytes": peak_of(job.work, setup.family.device),
        }
        row = Row(
            where, name, model.config.plt_num_loops, tokens, timed[name], "R=1", against(timed, name, "R=1"), facts
        )
        outcome.rows.append(row)


def _step(
    model: PLTForCausalLM, ids: Tensor, optimizer: torch.optim.Optimizer, compute: torch.dtype
) -> Callable[[], object]:
    def work() -> None:
        loss(model, ids, compute).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def loss(model: PLTForCausalLM, ids: Tensor, compute: torch.dtype) -> Tensor:
    """Nats a token."""
    context: AbstractContextManager[object] = nullcontext()
    if compute != torch.float32:
        context = torch.autocast(ids.device.type, dtype=compute)
    with context:
        value: Tensor = model(ids, labels=ids, use_cache=False).loss
    return value


def gates(name: str, model: PLTForCausalLM, ids: Tensor, compute: torch.dtype) -> list[Gate]:
    """Loss and gradients over a text of a few windows."""
    ids = ids[:1, : 2 * (model.config.window + 1) + 40]
    eager = at_loops(model, model.config.plt_num_loops)
    eager.set_attn_implementation("eager")
    expected = _gradients(eager, ids, torch.float32)
    found = _gradients(model, ids, compute)
    limits = (TIGHT_GRADIENT, TIGHT_GRADIENT)
    if compute != torch.float32:
        own = _differences(_gradients(eager, ids, compute), expected)
        limits = (2 * own[0] + SLACK, 2 * own[1] + SLACK)
    loss_gap, gradient_gap = _differences(found, expected)
    return [
        Gate(f"{name}, loss against eager attention", loss_gap, limits[0]),
        Gate(f"{name}, gradients against eager attention", gradient_gap, limits[1]),
    ]


Gradients = tuple[float, dict[str, Tensor]]


def _gradients(model: PLTForCausalLM, ids: Tensor, compute: torch.dtype) -> Gradients:
    """The loss, and the gradient of each weight that has one. The weights' own are left empty."""
    model.zero_grad(set_to_none=True)
    value = loss(model, ids, compute)
    value.backward()  # type: ignore[no-untyped-call]
    grads = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(value.detach()), grads


def _differences(found: Gradients, expected: Gradients) -> tuple[float, float]:
    """Of the loss, and the largest of a gradient relative to its norm; infinite where one is missing."""
    if found[1].keys() != expected[1].keys():
        return abs(found[0] - expected[0]), float("inf")
    largest = max(float(g.norm()) for g in expected[1].values())
    gaps = [
        float((found[1][name] - g).norm()) / max(float(g.norm()), 1e-3 * largest) for name, g in expected[1].items()
    ]
    worst = float("nan") if any(gap != gap for gap in gaps) else max(gaps)
    return abs(found[0] - expected[0]), worst
