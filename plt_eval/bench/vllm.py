"""`plt-eval bench vllm`: PLT in vLLM, decode throughput by loops, beside R trips a token.

    R=1               vLLM's steps on the weights as a plain Llama: what the others are compared with
    R                 plt_model's plugin: R passes as rows of one trip
    R, trips          the same, one trip a pass (additional_config plt.trips = "each")

Each is a vLLM engine of its own in this process, on one folder, with vLLM's defaults but for room. A round decodes
`tokens` tokens of `batch` requests whose prompts have been read already. `--prefix` times the first token of a prompt
that is in the prefix cache, against the same prompt cold.

The gates take requests of different lengths through the engines that are timed: the logits of what they decode against
the float32 model's forward pass over the same text, and in float32 the greedy tokens too. With --prefix the answer
after a hit must be, token for token, the cold one.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from plt_eval.bench.decode import GATE_STEPS, gate_prompts
from plt_eval.bench.gates import Gate, allowed, apart, different
from plt_eval.bench.outcome import Outcome, Row, Setup, against, in_words, run_configuration, steps_of
from plt_eval.bench.rounds import Job, Timed
from plt_eval.bench.subjects import Family, prompt
from plt_eval.engines.vllm_start import (
    check_installed,
    cpu_kv_bytes,
    end,
    give_memory_back,
    installed_version,
    start,
    threads_kept,
)
from plt_model import PLTForCausalLM
from plt_model.vllm.layout import PageLayers

TOLD = 4
"""Of how many texts of a batch the gates compare logits: vLLM hands them out number by number."""

SPARE = 256
"""Positions of the KV cache a text, beside its own: blocks begun, and those that vLLM keeps for itself."""

KINDS = {"one": "R={loops}", "each": "R={loops}, trips"}
"""How a token's passes run -> the subject's name."""


@dataclass(frozen=True)
class VLLMSettings:
    """One configuration for each batch and context; `tokens` new ones of each request a round. `eager`: without vLLM's
    compilation and graphs."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int
    eager: bool

    @property
    def configurations(self) -> list[tuple[int, int]]:
        """(batch, context)."""
        return list(itertools.product(self.batches, self.contexts))

    def engine(self) -> dict[str, Any]:
        """Options of vLLM that give the largest configuration room, its prompts in one step."""
        longest = max(self.contexts) + max(self.tokens, GATE_STEPS) + 8
        return {
            "max_model_len": longest,
            "max_num_seqs": max(self.batches),
            "max_num_batched_tokens": max(max(self.batches) * max(self.contexts), longest),
            "enforce_eager": self.eager,
        }

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {"vllm": installed_version(), "tokens_a_round": self.tokens, "eager": self.eager}


def bench_vllm(setup: Setup, settings: VLLMSettings) -> Outcome:
    """Time decoding, all configurations."""
    outcome = Outcome("vllm", settings.facts())
    with ExitStack() as stack:
        folder = stack.enter_context(saved(setup.family))
        engines = [
            stack.enter_context(VLLMSubject.opened(setup.family, folder, loops, trips, settings.engine()))
            for loops, trips in itertools.product(setup.loops, KINDS)
            if loops > 1 or trips == "one"
        ]
        setup.watcher.expect(len(settings.configurations) * steps_of(len(engines), setup.rounds))
        for batch, context in settings.configurations:
            _decode(outcome, setup, settings, engines, {"batch": batch, "context": context})
    return outcome


def _decode(
    outcome: Outcome, setup: Setup, settings: VLLMSettings, engines: list[VLLMSubject], where: dict[str, int]
) -> None:
    batch, context = where["batch"], where["context"]
    ids = prompt(context, setup.family.config.vocab_size, seed=setup.seed, batch=batch).tolist()
    jobs = [Job(engine.name, engine.finish, partial(engine.begin, ids, settings.tokens)) for engine in engines]
    prompts = [row[0].tolist() for row in gate_prompts(setup.family.config, batch, context, setup.family.device)]
    timed = run_configuration(
        outcome, setup, where, jobs, lambda: [gate for engine in engines for gate in engine.gates(setup, prompts)]
    )
    if timed is None:
        return
    for engine in engines:
        own = timed[engine.name]
        row = Row(
            where, engine.name, engine.loops, batch * settings.tokens, own, "R=1", against(timed, engine.name, "R=1")
        )
        row.facts = {"steps_a_round": settings.tokens, "trips": engine.trips}
        outcome.rows.append(row)
    for loops in setup.loops:
        if loops > 1:
            names = [kind.format(loops=loops) for kind in KINDS.values()]
            parts = [f"{name} {_spread(timed, 'R=1', name)}" for name in names]
            outcome.notes.append(f"{in_words(where)}: of R=1's tokens a second: {', '.join(parts)}")


def bench_prefix(setup: Setup, settings: VLLMSettings) -> Outcome:
    """Time the first token of a prompt, cold and from the prefix cache."""
    outcome = Outcome("vllm", {**settings.facts(), "prefix": True})
    with ExitStack() as stack:
        folder = stack.enter_context(saved(setup.family))
        engines = [
            stack.enter_context(VLLMSubject.opened(setup.family, folder, loops, "one", settings.engine()))
            for loops in setup.loops
        ]
        setup.watcher.expect(len(settings.configurations) * steps_of(2 * len(engines), setup.rounds))
        for batch, context in settings.configurations:
            _first_token(outcome, setup, engines, {"batch": batch, "context": context})
    return outcome


def _first_token(outcome: Outcome, setup: Setup, engines: list[VLLMSubject], where: dict[str, int]) -> None:
    batch, context = where["batch"], where["context"]
    ids = prompt(context, setup.family.config.vocab_size, seed=setup.seed, batch=batch).tolist()
    jobs = []
    for engine in engines:
        first = partial(engine.write, ids, 1)
        jobs += [Job(f"{engine.name}, cold", first, engine.forget), Job(f"{engine.name}, hit", first, first)]
    timed = run_configuration(
        outcome, setup, where, jobs, lambda: [gate for engine in engines for gate in engine.prefix_gates(ids)]
    )
    if timed is None:
        return
    for engine in engines:
        for how in ("cold", "hit"):
            name, base = f"{engine.name}, {how}", f"{engine.name}, cold"
            row = Row(where, name, engine.loops, 0, timed[name], base, against(timed, name, base))
            outcome.rows.append(row)


class VLLMSubject:
    """A vLLM engine of one loop count, stepped from here."""

    def __init__(self, name: str, loops: int, trips: str, llm: Any) -> None:
        self.name, self.loops, self.trips, self.llm = name, loops, trips, llm
        self._ids = map(str, itertools.count())
        self._order: list[str] = []
        self._outputs: dict[str, Any] = {}

    @classmethod
    @contextmanager
    def opened(
        cls, family: Family, folder: Path, loops: int, trips: str, options: dict[str, Any]
    ) -> Iterator[VLLMSubject]:
        """Started, and ended. Raises UserError."""
        with threads_kept():
            llm = start(
                is_plt=True,
                model=str(folder),
                dtype=str(family.dtype).removeprefix("torch."),
                hf_overrides={"plt_num_loops": loops},
                additional_config={"plt": {"trips": trips}},
                max_logprobs=-1,
                logprobs_mode="raw_logits",
                **_memory(family, loops, options),
                **options,
            )
            subject = cls(KINDS[trips].format(loops=loops), loops, trips, llm)
            del llm
            try:
                yield subject
            finally:
                llm, subject.llm = subject.llm, None
                end(llm)
                del llm
                give_memory_back()

    # --- a round --------------------------------------------------------------------------------------

    def begin(self, prompts: Sequence[list[int]], tokens: int) -> None:
        """Read the prompts: until each request has its first token, all of them in the same step."""
        self._add(prompts, tokens + 1)
        while not self._outputs:
            self._step()
        assert len(self._outputs) == len(prompts), f"{len(self._outputs)} of {len(prompts)} prompts read in one step"

    def finish(self) -> list[list[int]]:
        """Step until all have ended -> their tokens."""
        while self.llm.llm_engine.has_unfinished_requests():
            self._step()
        return [list(self._outputs[name].outputs[0].token_ids) for name in self._order]

    def write(self, prompts: Sequence[list[int]], tokens: int, told: Collection[int] = ()) -> list[list[int]]:
        """All of it: the prompts and `tokens` tokens after each."""
        self._add(prompts, tokens, told)
        return self.finish()

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.llm_engine.reset_prefix_cache()

    def _add(self, prompts: Sequence[list[int]], tokens: int, told: Collection[int] = ()) -> None:
        """`told`: which of them say their logits, too."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        self._outputs.clear()
        self._order = []
        for number, ids in enumerate(prompts):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=-1 if number in told else None,
                flat_logprobs=True,
            )
            self._order.append(next(self._ids))
            self.llm.llm_engine.add_request(self._order[-1], tokens_input(ids), params)

    def _step(self) -> None:
        for output in self.llm.llm_engine.step():
            self._outputs[output.request_id] = output

    # --- gates ----------------------------------------------------------------------------------------

    def gates(self, setup: Setup, prompts: Sequence[list[int]]) -> list[Gate]:
        """Logits of decoded tokens, of some of the texts that are decoded together, and in float32 all their tokens."""
        self.forget()
        count = len(prompts)
        told = sorted({i * (count - 1) // (TOLD - 1) for i in range(TOLD)})
        written = self.write(prompts, GATE_STEPS, told)
        found = torch.stack([_logits(self._outputs[self._order[i]].outputs[0].logprobs) for i in told])
        family, wide = setup.family, setup.family.wide()

        def whole(of: Family, which: Sequence[int]) -> Tensor:
            return _whole(of.model(self.loops), [prompts[i] for i in which], [written[i] for i in which])

        expected = whole(wide, told)
        own = 0.0 if wide is family else apart(whole(family, told), expected)
        gates = [Gate(f"{self.name}, logits", apart(found, expected), allowed(family.dtype, own))]
        if wide is family:
            best = whole(wide, range(count)).argmax(-1)
            gates.append(Gate(f"{self.name}, greedy tokens", different(torch.tensor(written), best), 0.0))
        return gates

    def prefix_gates(self, prompts: Sequence[list[int]]) -> list[Gate]:
        """The answers after a hit, which must be one, are the cold ones."""
        self.forget()
        cold = self.write(prompts, GATE_STEPS)
        read = [self._outputs[name].num_cached_tokens or 0 for name in self._order]
        hit = self.write(prompts, GATE_STEPS)
        cached = [self._outputs[name].num_cached_tokens or 0 for name in self._order]
        missed = sum(not now > before for before, now in zip(read, cached, strict=True))
        return [
            Gate(f"{self.name}, prompts not found in the cache", float(missed), 0.0),
            Gate(f"{self.name}, tokens after a hit", different(torch.tensor(hit), torch.tensor(cold)), 0.0),
        ]


def _memory(family: Family, loops: int, options: dict[str, Any]) -> dict[str, Any]:
    """Engines stand side by side: each takes what its texts need, and on a GPU not a share of it, as vLLM would."""
    if family.device.type == "cpu":
        return {"kv_cache_memory_bytes": cpu_kv_bytes(most=1 << 29)}
    config: Any = family.model(loops).config
    layers = PageLayers.of(config, config.num_key_value_heads, config.head_dim)
    size = 1 << (max(32, config.head_dim) - 1).bit_length()  # heads may be padded
    each = 2 * config.num_key_value_heads * size * family.dtype.itemsize
    positions = options["max_num_seqs"] * (options["max_model_len"] + SPARE)
    wanted = layers.full * (1 + layers.recent) * each * positions
    return {"kv_cache_memory_bytes": wanted, "gpu_memory_utilization": 0.01}  # the latter is only asked for beside it


def _logits(flat: Any) -> Tensor:
    """[S, V] of vLLM's logprobs of every token, in the order of the vocabulary. (The token that was taken comes first,
    and again in its place.)"""
    tokens, values = torch.tensor(flat.token_ids), torch.tensor(flat.logprobs)
    rows = torch.full((len(flat.start_indices), int(tokens.max()) + 1), float("nan"))
    for row, first, last in zip(rows, flat.start_indices, flat.end_indices, strict=True):
        row[tokens[first:last]] = values[first:last]
    return rows


@torch.no_grad()
def _whole(model: PLTForCausalLM, prompts: Sequence[list[int]], written: list[list[int]]) -> Tensor:
    """Logits [N, S, V] that predict the S written tokens of each of the N texts, by one forward pass over each."""
    device, rows = model.lm_head.weight.device, []
    for ids, new in zip(prompts, written, strict=True):
        text = torch.tensor([[*ids, *new[:-1]]], device=device)
        rows.append(model(text, use_cache=False, logits_to_keep=len(new)).logits[0].float().cpu())
    return torch.stack(rows)


@contextmanager
def saved(family: Family) -> Iterator[Path]:
    """The family's weights in a folder that vLLM can open. Raises UserError where there is no vLLM."""
    check_installed(lambda _: None)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="plt-bench-") as folder:
        family.model(1).save_pretrained(folder)
        yield Path(folder)


def _spread(timed: dict[str, Timed], name: str, base: str) -> str:
    spread = against(timed, name, base)
    return f"{spread.median:.3g} [{spread.low:.3g}, {spread.high:.3g}]"
