"""`plt-eval bench throughput`: many texts of unequal lengths through a few slots.

DecodeSession refills a slot as soon as its text is done; the baseline is transformers' Llama with generate() on the
same tensors at R=1, `batch` texts at a time in the order of arrival, prompts padded on the left, each batch as long as
its longest text asks for. Only tokens that were asked for count. The gate takes the first texts through the
very sessions and generate() calls that are timed, and reads each chosen token's logit in the float32 model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM

from plt_eval.bench.gates import Gate
from plt_eval.bench.outcome import Outcome, Row, Setup, against, in_words, run_configuration, steps_of
from plt_eval.bench.rounds import Job
from plt_eval.bench.subjects import prompt
from plt_model import PLTForCausalLM
from plt_model.decode.session import DecodeSession, Request

LLAMA = "Llama generate()"

SHORTFALL = {torch.float32: 1e-3, torch.float64: 1e-9}
SHORTFALL_16_BITS = 0.3
"""How far below the float32 model's best logit a chosen token's may lie there, in standard deviations of the logits:
near ties fall differently, nothing else may. A random token lies about four below."""

GATE_TOKENS = 16
"""Of each text that gates read, at most."""


@dataclass(frozen=True)
class ThroughputSettings:
    """`context` and `tokens` are of the longest prompt and text; the shortest have an eighth."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int
    requests: int
    compile: str


def bench_throughput(setup: Setup, settings: ThroughputSettings) -> Outcome:
    """Time all configurations."""
    outcome = Outcome(
        "throughput",
        {"requests": settings.requests, "most_new_tokens": settings.tokens, "compile": settings.compile},
    )
    llama = setup.family.llama()
    configurations = [(batch, context) for batch in settings.batches for context in settings.contexts]
    setup.watcher.expect(len(configurations) * steps_of(len(setup.loops) + 1, setup.rounds))
    for batch, context in configurations:
        where = {"batch": batch, "context": context}
        requests = make_requests(settings, context, setup.family.config.vocab_size, setup.seed)
        sessions = {
            f"R={loops}": DecodeSession(setup.family.model(loops), slots=batch, compile=settings.compile)
            for loops in setup.loops
        }
        _configuration(outcome, setup, where, requests, sessions, llama)
    return outcome


def _configuration(
    outcome: Outcome,
    setup: Setup,
    where: dict[str, int],
    requests: list[Request],
    sessions: dict[str, DecodeSession],
    llama: LlamaForCausalLM,
) -> None:
    batch = where["batch"]
    writers: dict[str, Callable[[list[Request]], dict[str, list[int]]]] = {
        **{name: _in_session(session) for name, session in sessions.items()},
        LLAMA: lambda asked: in_static_batches(llama, asked, batch),
    }
    jobs = [Job(name, _all(writer, requests)) for name, writer in writers.items()]
    loops = dict(zip(writers, [*setup.loops, 1], strict=True))
    timed = run_configuration(
        outcome,
        setup,
        where,
        jobs,
        lambda: [
            gate(name, writer, setup.family.wide().model(loops[name]), requests, batch, setup.family.dtype)
            for name, writer in writers.items()
        ],
    )
    if timed is None:
        return
    tokens = sum(request.max_new_tokens for request in requests)
    for name in writers:
        outcome.rows.append(Row(where, name, loops[name], tokens, timed[name], LLAMA, against(timed, name, LLAMA)))
    spread = against(timed, LLAMA, "R=1")
    outcome.notes.append(
        f"{in_words(where)}: R=1 writes {spread.median:.3g} [{spread.low:.3g}, {spread.high:.3g}] times the tokens a "
        f"second of {LLAMA}"
    )


def make_requests(settings: ThroughputSettings, context: int, vocabulary: int, seed: int) -> list[Request]:
    """Prompts and texts of lengths between an eighth of the longest and the longest."""
    draw = random.Random(seed)
    found = []
    for i in range(settings.requests):
        length = draw.randint(max(1, context // 8), context)
        count = draw.randint(max(1, settings.tokens // 8), settings.tokens)
        found.append(Request(str(i), prompt(length, vocabulary, seed=i)[0].tolist(), count))
    return found


def _in_session(session: DecodeSession) -> Callable[[list[Request]], dict[str, list[int]]]:
    return lambda asked: {result.key: result.tokens for result in session.run(asked)}


@torch.no_grad()
def in_static_batches(llama: LlamaForCausalLM, requests: list[Request], batch: int) -> dict[str, list[int]]:
    """Each request's tokens, by generate() on `batch` of them at a time."""
    found, device = {}, llama.lm_head.weight.device
    for first in range(0, len(requests), batch):
        asked = requests[first : first + batch]
        longest = max(len(request.prompt) for request in asked)
        pads = [longest - len(request.prompt) for request in asked]
        ids = torch.tensor([[0] * pad + request.prompt for pad, request in zip(pads, asked, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        out: Any = llama.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(request.max_new_tokens for request in asked),
            do_sample=False,
        )
        for request, row in zip(asked, out[:, longest:].tolist(), strict=True):
            found[request.key] = row[: request.max_new_tokens]
    return found


def _all(writer: Callable[[list[Request]], dict[str, list[int]]], requests: list[Request]) -> Callable[[], object]:
    return lambda: writer(requests)


@torch.no_grad()
def gate(
    name: str,
    writer: Callable[[list[Request]], dict[str, list[int]]],
    reference: PLTForCausalLM,
    requests: list[Request],
    batch: int,
    dtype: torch.dtype,
) -> Gate:
    """More texts than slots, so that some are refilled."""
    asked = [
        Request(r.key, r.prompt, max(1, min(r.max_new_tokens, GATE_TOKENS - i % 4)))
        for i, r in enumerate(requests[: batch + 2])
    ]
    found, worst = writer(asked), 0.0
    for request in asked:
        written = found.get(request.key, [])
        if len(written) != request.max_new_tokens:
            return Gate(f"{name}, tokens of text {request.key}", float("inf"), 0.0)
        text = torch.tensor([request.prompt + written], device=reference.lm_head.weight.device)
        logits = reference(text[:, :-1], use_cache=False, logits_to_keep=len(written)).logits[0].double()
        chosen = logits.gather(1, text[0, -len(written) :, None])[:, 0]
        worst = max(worst, float(((logits.amax(-1) - chosen) / logits.std(-1)).max()))
    return Gate(f"{name}, chosen tokens below the best, in deviations", worst, SHORTFALL.get(dtype, SHORTFALL_16_BITS))
