"""`plt-eval bench diagnose`: what the diagnostics cost, against a plain forward pass on the same sample.

Before anything is timed, the streamed measurements are compared with whole S x S maps on a small model. `--shape paper`
is the paper's attention shape: its layers share one set of weights, and its feed-forward is narrow, so that it fits a
laptop; neither changes what the diagnostics hold. Peaks are above the loaded model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plt_diagnostics import MEASUREMENTS, measure
from plt_diagnostics.adapters.plt import PLTAdapter
from plt_eval.bench.gates import Gate
from plt_eval.bench.memory import peak_of
from plt_eval.bench.outcome import Outcome, Row, Setup, against, run_configuration, steps_of
from plt_eval.bench.rounds import Job
from plt_eval.bench.subjects import Family, prompt
from plt_model import PLTConfig, PLTForCausalLM

ALLOWED_NATS = 1e-5
"""Between streamed entropy or KL and those of whole maps, in float32."""

SMALL = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
}
PAPER = {
    "vocab_size": 8192,
    "hidden_size": 5120,
    "intermediate_size": 1024,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""The paper's attention."""

FORWARD, ALL = "forward", "all measurements"


def bench_diagnostics(setup: Setup, contexts: tuple[int, ...], *, each: bool) -> Outcome:
    """Time and memory of the battery (and with `each` of every measurement alone) and of a forward pass."""
    outcome = Outcome("diagnose", {"gate": "streamed against whole maps, in nats"})
    configurations = [(context, loops) for context in contexts for loops in setup.loops]
    setup.watcher.expect(len(configurations) * steps_of(2 + each * len(MEASUREMENTS), setup.rounds))
    for context, loops in configurations:
        _configuration(outcome, setup, {"context": context, "loops": loops}, each=each)
    return outcome


def _configuration(outcome: Outcome, setup: Setup, where: dict[str, int], *, each: bool) -> None:
    family = setup.family
    model = family.model(where["loops"]).eval()
    ids = prompt(where["context"], family.config.vocab_size, seed=setup.seed).to(family.device)
    jobs = [Job(name, work) for name, work in _works(model, ids, each=each).items()]
    timed = run_configuration(outcome, setup, where, jobs, lambda: [gate(family.device)])
    if timed is None:
        return
    for job in jobs:
        facts = {"peak_bytes": peak_of(job.work, family.device)}
        ratio = against(timed, job.name, FORWARD)
        outcome.rows.append(Row(where, job.name, where["loops"], ids.shape[1], timed[job.name], FORWARD, ratio, facts))


def _works(model: PLTForCausalLM, ids: Tensor, *, each: bool) -> dict[str, Callable[[], object]]:
    adapter, mask = PLTAdapter(model), torch.ones_like(ids, dtype=torch.bool)

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)

    def measuring(names: list[str] | None) -> Callable[[], object]:
        return lambda: measure(adapter, ids, mask, [0], names)

    jobs: dict[str, Callable[[], object]] = {FORWARD: forward, ALL: measuring(None)}
    return jobs | ({name: measuring([name]) for name in MEASUREMENTS} if each else {})


def paper_family(layers: int, device: torch.device, seed: int) -> Family:
    """The paper's attention shape in float32, with `layers` times the same layer."""
    config = PLTConfig(**PAPER, num_hidden_layers=1, plt_gate_use_hidden_states=True, plt_hidden_scale=0.3)
    torch.manual_seed(seed)
    model = PLTForCausalLM(config).to(device).eval()
    model.model.layers = nn.ModuleList([model.model.layers[0]] * layers)
    config.num_hidden_layers = layers
    return Family(f"{layers} layers of the paper's attention shape, one set of weights", model)


def gate(device: torch.device) -> Gate:
    """The largest difference between streamed entropy and KL and those of whole maps, in nats, in float32; the former
    on `device`, the latter from its queries and keys on the CPU."""
    adapter = PLTAdapter(_small().to(device))
    ids = prompt(200, SMALL["vocab_size"], seed=5).to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    rows = measure(adapter, ids, mask, [0], ["attention_entropy", "attention_kl"]).rows.to_pandas()
    rows = rows[rows.layer.notna() & (rows.variant == "mixed")]
    gaps = []
    with torch.inference_mode():
        run = adapter.run(ids, mask, further=False, keep=True)
        for layer, loops in enumerate(adapter.attention(run)):
            for (name, r), value in _of_whole_maps(loops).items():
                streamed = rows[(rows.layer == layer) & (rows.loop == r) & (rows.measurement == name)].value
                gaps.append(abs(float(streamed.iloc[0]) - value))
    worst = float("nan") if any(gap != gap for gap in gaps) else max(gaps)
    return Gate("streamed measurements against whole maps, nats", worst, ALLOWED_NATS)


def _small() -> PLTForCausalLM:
    config = PLTConfig(**SMALL, plt_num_loops=3, plt_gate_use_hidden_states=True, plt_hidden_scale=0.3)
    torch.manual_seed(0)
    model: PLTForCausalLM = PLTForCausalLM(config).eval()
    nn.init.normal_(model.get_parameter("model.layers.0.self_attn.plt_gate.weight"))
    return model


def _of_whole_maps(loops: Any) -> dict[tuple[str, int], float]:
    """Entropy of each loop's map, and KL to the loop before, by measurement and loop."""
    maps = [_whole(branches) for branches in loops]
    found = {}
    for r, whole in enumerate(maps, 1):
        found["attention_entropy", r] = float(torch.special.entr(whole).sum(-1).mean())
        if r > 1:
            terms = torch.special.xlogy(whole, whole / maps[r - 2]).nan_to_num(0.0)
            found["attention_kl", r] = float(terms.sum(-1).mean())
    return found


def _whole(branches: Any) -> Tensor:
    """One loop's attention [B, H, S, S], all of it."""
    whole = torch.zeros(())
    for branch in branches:
        q, k = branch.q_BHSK.cpu().double(), branch.k_BGSK.cpu().double()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        if branch.window is not None:
            seen = seen.triu(-branch.window)
        part = (q @ k.transpose(-1, -2) * branch.scale).masked_fill(~seen, float("-inf")).softmax(-1)
        whole = whole + (part if branch.weight_BHS is None else part * branch.weight_BHS.cpu().double()[..., None])
    return whole
