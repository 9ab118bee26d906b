"""`plt-eval bench prefill`: reading a prompt, as the decode engine does, by loops and length.

R passes cost R times the matrix products; what this shows beside the ratio is memory: the peak above the loaded model
(cache included), which grows linearly with the prompt. The gate compares the chunked prompt, and two tokens after it,
with the float32 model's forward pass over the whole text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from plt_eval.bench.floor import kv_bytes
from plt_eval.bench.gates import Gate, allowed, apart
from plt_eval.bench.memory import peak_of
from plt_eval.bench.outcome import Outcome, Row, Setup, against, run_configuration, steps_of
from plt_eval.bench.rounds import Job
from plt_eval.bench.subjects import prompt
from plt_model import PLTForCausalLM
from plt_model.decode.prefill import CHUNK, read_prompt

GATE_TOKENS = 1024
"""Of a prompt that gates read on a CPU, at most; on a GPU all of it."""


@dataclass(frozen=True)
class PrefillSettings:
    """One configuration for each batch and context; `chunk` None is the decode engine's."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    chunk: int | None


def bench_prefill(setup: Setup, settings: PrefillSettings) -> Outcome:
    """Time all configurations."""
    chunk = settings.chunk or CHUNK
    outcome = Outcome("prefill", {"chunk": chunk})
    configurations = [(batch, context) for batch in settings.batches for context in settings.contexts]
    setup.watcher.expect(len(configurations) * steps_of(len(setup.loops), setup.rounds))
    for batch, context in configurations:
        _configuration(outcome, setup, {"batch": batch, "context": context}, chunk)
    return outcome


def _configuration(outcome: Outcome, setup: Setup, where: dict[str, int], chunk: int) -> None:
    family, batch, context = setup.family, where["batch"], where["context"]
    ids = prompt(context, family.config.vocab_size, seed=setup.seed, batch=batch).to(family.device)
    jobs = [Job(f"R={loops}", _reading(family.model(loops), ids, chunk)) for loops in setup.loops]
    timed = run_configuration(
        outcome, setup, where, jobs, lambda: [gate(setup, loops, ids, chunk) for loops in setup.loops]
    )
    if timed is None:
        return
    for job, loops in zip(jobs, setup.loops, strict=True):
        config = family.model(loops).config
        facts = {
            "peak_bytes": peak_of(job.work, family.device),
            "kv_bytes": kv_bytes(config, slots=batch, context=context, dtype=family.dtype),
        }
        ratio = against(timed, job.name, "R=1")
        outcome.rows.append(Row(where, job.name, loops, batch * context, timed[job.name], "R=1", ratio, facts))


def _reading(model: PLTForCausalLM, ids: Tensor, chunk: int) -> Callable[[], object]:
    return lambda: read_prompt(model, ids, chunk=chunk)


@torch.no_grad()
def gate(setup: Setup, loops: int, ids: Tensor, chunk: int) -> Gate:
    """The chunked prompt and two tokens after it, against the whole text."""
    length = ids.shape[1] if ids.is_cuda else min(ids.shape[1], GATE_TOKENS)
    size = chunk if chunk < length else -(-length // 3)
    model, reference = setup.family.model(loops), setup.family.wide().model(loops)
    fed = prompt(2, model.config.vocab_size, seed=4).to(ids.device)
    text = torch.cat([ids[:1, :length], fed], dim=1)
    cache, logits = read_prompt(model, text[:, :length], chunk=size)
    found = [logits]
    for i in range(2):
        found.append(model(fed[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    expected = reference(text, use_cache=False, logits_to_keep=3).logits[0].float()
    own = apart(model(text, use_cache=False, logits_to_keep=3).logits[0].float(), expected)
    what = f"R={loops}, logits after {length} tokens in chunks of {size} and two more"
    return Gate(what, apart(torch.cat(found).float(), expected), allowed(setup.family.dtype, own))
