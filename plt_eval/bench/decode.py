"""`plt-eval bench decode`: a new token at every loop count, beside what it would cost without one trip for all loops.

    R=1                   one pass of the same weights through the same step: what the others are compared with
    R                     the step of `plt_model.decode`: R passes as rows of one trip
    R, trips              the same model and cache, one trip a pass
    R, looped             the standard looped transformer on the same weights: a trip and a full KV cache a pass
    Llama generate()      transformers' own at R=1, on the same tensors

A round is the same number of new tokens for each, greedy, each token fed back, after `context` tokens that are there
already. The gates come first: logits of the timed step itself, with its compilation, its cache and its reach, against
the float32 model's forward pass over the same tokens, in slots of different lengths; and greedy texts, token for token,
against generate() in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from plt_eval.bench.floor import Bandwidth, kv_bytes, must_read
from plt_eval.bench.gates import Gate, allowed, apart, different
from plt_eval.bench.outcome import Outcome, Row, Setup, against, in_words, run_configuration, steps_of
from plt_eval.bench.rounds import Job, Timed
from plt_eval.bench.subjects import Family, prompt
from plt_model import PLTForCausalLM
from plt_model.decode.baselines import LoopedCache, LoopedTransformer, SequentialTrips
from plt_model.decode.cache import StaticCache
from plt_model.decode.compiled import FastStep, fast_step
from plt_model.decode.prefill import read_prompt
from plt_model.decode.step import DecodeStep

BASELINES = ("trips", "looped", "llama")

GATE_PROMPT = 640
"""Tokens of the longest text that gates read (less where the context is shorter); the other slots' are shorter."""

GATE_STEPS = 6
"""Steps whose logits are compared, and tokens of greedy texts."""


@dataclass(frozen=True)
class DecodeSettings:
    """One configuration for each batch and context; `tokens` new ones a round."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int
    compile: str
    baselines: tuple[str, ...]


def bench_decode(setup: Setup, settings: DecodeSettings, bandwidth: Bandwidth) -> Outcome:
    """Time all configurations."""
    outcome = Outcome("decode", {"tokens_a_round": settings.tokens, "compile": settings.compile})
    subjects = list(make_subjects(setup, settings))
    configurations = [(batch, context) for batch in settings.batches for context in settings.contexts]
    setup.watcher.expect(len(configurations) * steps_of(len(subjects), setup.rounds))
    for batch, context in configurations:
        _configuration(outcome, setup, settings, subjects, {"batch": batch, "context": context}, bandwidth)
    return outcome


def _configuration(
    outcome: Outcome,
    setup: Setup,
    settings: DecodeSettings,
    subjects: list[Decoder | LlamaBaseline],
    where: dict[str, int],
    bandwidth: Bandwidth,
) -> None:
    batch, context = where["batch"], where["context"]
    jobs = []
    for subject in subjects:
        subject.make_room(batch, context, settings.tokens)
        jobs.append(Job(subject.name, subject.decode, subject.prepare))
    timed = run_configuration(
        outcome, setup, where, jobs, lambda: [gate for subject in subjects for gate in subject.gates(setup)]
    )
    for subject in subjects:
        subject.leave_room()
    if timed is None:
        return
    base = subjects[0].name
    outcome.notes += [
        f"{in_words(where)}: R={loops} takes {_ratio(timed, f'R={loops}', other)} of the time of {other}"
        for loops in setup.loops
        for other in (f"R={loops}, trips", f"R={loops}, looped")
        if other in timed
    ]
    for subject in subjects:
        times = timed[subject.name]
        reads = must_read(subject.model, slots=batch, context=context + (settings.tokens + 1) // 2, trips=subject.trips)
        row = Row(
            where, subject.name, subject.loops, batch * settings.tokens, times, base, against(timed, subject.name, base)
        )
        least = reads / bandwidth.bytes_per_second
        row.facts = {
            "steps_a_round": settings.tokens,
            "runs": subject.about,
            "kv_bytes": kv_bytes(subject.model.config, slots=batch, context=context, dtype=setup.family.dtype),
            "bytes_read_a_step": reads,
            "trips_a_step": subject.trips,
            "floor_seconds_a_step": least,
            "of_the_floor": least / (row.seconds().median / settings.tokens),
        }
        outcome.rows.append(row)


def _ratio(timed: dict[str, Timed], name: str, other: str) -> str:
    spread = against(timed, name, other)
    return f"{spread.median:.3g} [{spread.low:.3g}, {spread.high:.3g}]"


def make_subjects(setup: Setup, settings: DecodeSettings) -> Iterator[Decoder | LlamaBaseline]:
    """R=1 first. Their packed weights are the same bytes."""
    steps = {loops: DecodeStep(setup.family.model(loops)) for loops in setup.loops}
    for loops, step in steps.items():
        yield Decoder(f"R={loops}", step, step.model, loops, trips=1, compile=settings.compile)
    for loops, step in steps.items():
        if loops > 1 and "trips" in settings.baselines:
            yield Decoder(
                f"R={loops}, trips", SequentialTrips(step), step.model, loops, trips=loops, compile=settings.compile
            )
    for loops, step in steps.items():
        if loops > 1 and "looped" in settings.baselines:
            model = setup.family.model(loops, mode="sequential")
            yield Decoder(
                f"R={loops}, looped", LoopedTransformer(step), model, loops, trips=loops, compile=settings.compile
            )
    if "llama" in settings.baselines:
        yield LlamaBaseline(setup.family)


class Decoder:
    """A step with a cache, ready to write a round's tokens. `model` is what the step must agree with."""

    def __init__(
        self, name: str, step: nn.Module, model: PLTForCausalLM, loops: int, *, trips: int, compile: str
    ) -> None:
        self.name, self.step, self.model, self.loops, self.trips = name, step, model, loops, trips
        self.call: FastStep = fast_step(step, compile=compile)
        self._cache: StaticCache | LoopedCache | None = None

    @property
    def about(self) -> str:
        """How the step runs: compiled, as a graph, ..."""
        return self.call.about

    @property
    def cache(self) -> StaticCache | LoopedCache:
        assert self._cache is not None, "make_room() comes first"
        return self._cache

    def make_room(self, batch: int, context: int, tokens: int) -> None:
        """A cache of its own, full of numbers up to the context."""
        self.batch, self.context, self.tokens = batch, context, tokens
        self._cache = new_cache(self.step, self.model, batch, context + max(tokens, GATE_STEPS) + 1)
        for held in _tensors(self._cache):
            held.normal_()
        self.first = prompt(batch, self.model.config.vocab_size, seed=1)[0].to(self._cache.lengths.device)

    def leave_room(self) -> None:
        """Free the cache."""
        self._cache = None
        self.call.release()

    def prepare(self) -> None:
        """Back to the context's end."""
        self.cache.lengths.fill_(self.context)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The round: each slot's tokens one after another, the last ones [N] handed back."""
        tokens = self.first
        for i in range(self.tokens):
            reach = self.call.reach(self.context + i + 1, self.cache.capacity)
            tokens = self.call(self.cache, tokens, reach).argmax(-1)
        return tokens

    def gates(self, setup: Setup) -> list[Gate]:
        """Logits in every slot, and the greedy text."""
        wide = setup.family.wide()
        mode = self.model.config.plt_loop_mode
        reference = wide.model(self.loops, mode=mode)
        prompts = gate_prompts(self.model.config, self.batch, self.context, setup.family.device)
        cache = new_cache(self.step, self.model, self.batch, self.cache.capacity)
        fed = prompt(self.batch, self.model.config.vocab_size, seed=2, batch=GATE_STEPS).to(cache.lengths.device)
        found = _stepped(self.call, self.model, cache, prompts, fed, self.context)
        expected = _whole(reference, prompts, fed)
        own = apart(_whole(self.model, prompts, fed).to(expected.dtype), expected)
        return [
            Gate(f"{self.name}, logits of the step", apart(found, expected), allowed(setup.family.dtype, own)),
            self._greedy(wide, reference, prompts[-1]),
        ]

    def _greedy(self, wide: Family, reference: PLTForCausalLM, ids: Tensor) -> Gate:
        """The text after the shortest prompt. In 16 bits the same step is taken in float32: there a text can part
        from generate()'s at a near tie without anything being wrong."""
        step, held = self.call, self.step
        if wide.dtype != self.model.lm_head.weight.dtype:
            held = _again(self.step, wide.model(self.loops))
            step = fast_step(held, compile="off")
        cache = new_cache(held, reference, 1, self.cache.capacity)
        read, logits = read_prompt(reference, ids)
        cache.adopt(0, read)
        text = [int(logits.argmax(-1))]
        for _ in range(GATE_STEPS - 1):
            reach = step.reach(ids.shape[1] + len(text), cache.capacity)
            last = torch.tensor(text[-1:], device=ids.device)
            text.append(int(step(cache, last, reach).argmax(-1)))
        return Gate(f"{self.name}, greedy tokens in float32", different(text, generated(reference, ids)), 0.0)


class LlamaBaseline:
    """transformers' Llama and its generate(), with the DynamicCache that it makes for itself."""

    name, loops, trips, about = "Llama generate()", 1, 1, "eager"

    def __init__(self, family: Family) -> None:
        self.model, self._llama = family.model(1), family.llama()
        self._filled: list[tuple[Tensor, Tensor]] = []

    def make_room(self, batch: int, context: int, tokens: int) -> None:
        config, weight = self.model.config, self._llama.lm_head.weight
        assert config.num_key_value_heads is not None
        assert config.head_dim is not None
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        filled = torch.empty(shape, dtype=weight.dtype, device=weight.device).normal_()
        self._filled = [(filled.clone(), filled.clone()) for _ in range(config.num_hidden_layers)]
        self.ids = prompt(context + 1, config.vocab_size, seed=1, batch=batch).to(weight.device)
        self.tokens = tokens

    def leave_room(self) -> None:
        self._filled = []

    def prepare(self) -> None:
        """A cache that has read the context."""
        self._cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._filled):
            self._cache.update(keys, values, layer)

    def decode(self) -> Tensor:
        """The round, as generate() goes about it."""
        written = generated(self._llama, self.ids, count=self.tokens, past_key_values=self._cache)
        return written[:, -1]

    def gates(self, setup: Setup) -> list[Gate]:
        """It is the same model."""
        wide = setup.family.wide()
        ids = prompt(min(GATE_PROMPT, self.ids.shape[1]), self.model.config.vocab_size, seed=3).to(self.ids.device)
        with torch.no_grad():
            expected = wide.model(1)(ids, use_cache=False).logits[0].float()
            own = apart(self.model(ids, use_cache=False).logits[0].float(), expected)
            found = self._llama(ids, use_cache=False).logits[0].float()
        text = generated(wide.llama(), ids)
        return [
            Gate(f"{self.name}, logits", apart(found, expected), allowed(setup.family.dtype, own)),
            Gate(f"{self.name}, greedy tokens in float32", different(text, generated(wide.model(1), ids)), 0.0),
        ]


@torch.no_grad()
def generated(model: PLTForCausalLM | LlamaForCausalLM, ids: Tensor, *, count: int = GATE_STEPS, **more: Any) -> Tensor:
    """generate()'s new tokens [B, count], greedy."""
    out: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **more
    )
    assert out.shape[1] == ids.shape[1] + count, f"{out.shape[1] - ids.shape[1]} tokens in place of {count}"
    return out[:, ids.shape[1] :]


def gate_prompts(config: Any, batch: int, context: int, device: torch.device) -> list[Tensor]:
    """A text for each slot [1, S]: the first as long as the context or GATE_PROMPT, the others on both sides of the
    window's size."""
    lengths = [min(context, GATE_PROMPT)]
    lengths += [max(1, min(context, 2 * (config.window + 1) - 7 * slot)) for slot in range(1, batch)]
    return [prompt(length, config.vocab_size, seed=10 + slot).to(device) for slot, length in enumerate(lengths)]


def new_cache(step: nn.Module, model: PLTForCausalLM, slots: int, capacity: int) -> StaticCache | LoopedCache:
    """An empty cache of the kind that the step takes."""
    if isinstance(step, LoopedTransformer):
        return step.cache(slots=slots, capacity=capacity)
    weight = model.lm_head.weight
    return StaticCache(model.config, slots=slots, capacity=capacity, dtype=weight.dtype, device=weight.device)


def _again(step: nn.Module, model: PLTForCausalLM) -> nn.Module:
    """The same kind of step of another model."""
    own = DecodeStep(model)
    return own if isinstance(step, DecodeStep) else type(step)(own)


def _stepped(
    step: FastStep,
    model: PLTForCausalLM,
    cache: StaticCache | LoopedCache,
    prompts: list[Tensor],
    fed: Tensor,
    context: int,
) -> Tensor:
    """Logits [N, GATE_STEPS, V] in float32 after each of the fed tokens [GATE_STEPS, N], with the reach of a context
    of `context` tokens."""
    for slot, ids in enumerate(prompts):
        cache.adopt(slot, read_prompt(model, ids)[0])
    reaches = [step.reach(context + i + 1, cache.capacity) for i in range(len(fed))]
    # A graph overwrites its logits at the next step.
    logits = [step(cache, tokens, reach).float().clone() for tokens, reach in zip(fed, reaches, strict=True)]
    return torch.stack(logits, dim=1)


@torch.no_grad()
def _whole(model: PLTForCausalLM, prompts: list[Tensor], fed: Tensor) -> Tensor:
    """The same by forward passes over the whole texts."""
    rows = []
    for slot, ids in enumerate(prompts):
        text = torch.cat([ids, fed[None, :, slot]], dim=1)
        rows.append(model(text, use_cache=False, logits_to_keep=len(fed)).logits[0].float())
    return torch.stack(rows)


def _tensors(cache: StaticCache | LoopedCache) -> Iterator[Tensor]:
    for held in cache.passes if isinstance(cache, LoopedCache) else [cache]:
        yield from (*held.keys, *held.values, *held.ring_keys, *held.ring_values, held.carry)
