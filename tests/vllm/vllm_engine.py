"""One vLLM engine inside this process, driven step by step, and what it said.

    engine = Engine(folder)
    (answer,) = engine.run(Ask([5, 6, 7], new=4))
    answer.tokens, answer.logits            # logits: [positions, V], from position answer.first on

Requests arrive at chosen steps, so that prompts and decodes meet in one batch; `engine.steps` tells what each step
scheduled and how many rows went through one linear layer of the model, call by call.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

ON_GPU = not current_platform.is_cpu()
if not ON_GPU:
    # Each start of an engine on a CPU looks for Triton's kernels in all modules, and stumbles over llvmlite, which
    # n-gram speculation imports. The first start has replaced them all.
    overrides = functools.cache(current_platform.register_triton_kernel_overrides)
    current_platform.register_triton_kernel_overrides = overrides

BLOCK = 32
"""Positions of a block of the KV cache: the least that attention on a CPU takes."""


@dataclass(frozen=True)
class Ask:
    """A request: greedy, `new` tokens, arriving before step `at`; cancelled once it has said `cancel` tokens."""

    prompt: Sequence[int]
    new: int = 8
    at: int = 0
    cancel: int | None = None
    whole: bool = True
    """Whether the prompt's logits are wanted too; such a request does not read the prefix cache."""


@dataclass
class Answer:
    """Logits [positions, V] of the positions from `first` on: the one at p is what follows token p."""

    tokens: list[int]
    logits: Tensor
    first: int
    cached: int
    """Tokens of the prompt that came from the prefix cache."""


@dataclass
class Step:
    """What one step of the engine did, by the requests' numbers."""

    decodes: dict[int, int] = field(default_factory=dict)
    """Tokens scheduled for requests whose prompt had been read (more than one: a speculation to verify)."""
    prefills: dict[int, int] = field(default_factory=dict)
    """Tokens scheduled for the others."""
    preempted: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Rows of each call of the first layer's down_proj: one call is one trip through the layers."""

    @property
    def mixed(self) -> bool:
        return bool(self.decodes and self.prefills)


class Engine:
    """An engine for a checkpoint's folder; `options` are LLM's."""

    def __init__(self, folder: Path, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "seed": 0,
            "block_size": BLOCK,
            "max_model_len": 192,
            "max_num_batched_tokens": 1024,
            "max_num_seqs": 16,
            "num_gpu_blocks_override": 512,
            "logprobs_mode": "raw_logits",
            "max_logprobs": -1,
            "disable_log_stats": False,
        }
        if ON_GPU:  # without them vLLM measures memory, and stumbles over other processes on the same GPU
            defaults |= {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.01}
        gc.freeze()  # vLLM collects garbage five times as it starts: over all that is imported, that takes seconds
        self.llm = LLM(str(folder), **{**defaults, **options})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.vocabulary = self.llm.model_config.get_vocab_size()
        self.graphs = self.llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        """Whether steps of decode rows alone are replayed: no layer is called then."""
        self.steps: list[Step] = []
        self._numbers: dict[str, int] = {}
        self._ids = itertools.count()
        self._watch_scheduler()
        if self.llm.llm_engine.vllm_config.parallel_config.world_size == 1:
            self._watch_trips()

    def _watch_scheduler(self) -> None:
        inner = self.scheduler.schedule

        def schedule(*args: Any, **more: Any) -> Any:
            out, step = inner(*args, **more), Step()
            if not out.num_scheduled_tokens:  # scheduling ahead finds that there is nothing left to do
                return out
            for name, count in out.num_scheduled_tokens.items():
                request = self.scheduler.requests[name]
                read = request.num_computed_tokens - count  # schedule() has counted this step's already
                kind = step.decodes if read >= request.num_prompt_tokens else step.prefills
                kind[self._numbers[name]] = count
            step.preempted = [self._numbers[name] for name in out.preempted_req_ids or ()]
            self.steps.append(step)
            return out

        self.scheduler.schedule = schedule

    def _watch_trips(self) -> None:
        def count(_module: nn.Module, args: Any, _output: Any) -> None:
            if self.steps:
                self.steps[-1].rows.append(len(args[0]))

        def hook(model: nn.Module) -> None:
            (layer,) = (m for name, m in model.named_modules() if name.endswith(".0.mlp.down_proj"))
            layer.register_forward_hook(count)

        self.llm.apply_model(hook)

    def run(self, *asks: Ask, budget: int = 0, chunk: int = 0, squeeze: bool = False) -> list[Answer]:
        """Answer all requests, none of which finds anything in the prefix cache but what these put there.

        budget: the most tokens that a step may read (max_num_batched_tokens). chunk: the most of them from one prompt,
        as soon as there are several requests (long_prefill_token_threshold). squeeze: once all requests decode, take
        away every free block of the KV cache until one is preempted.
        """
        assert self.llm.reset_prefix_cache()
        return self.go_on(*asks, budget=budget, chunk=chunk, squeeze=squeeze)

    def go_on(self, *asks: Ask, budget: int = 0, chunk: int = 0, squeeze: bool = False) -> list[Answer]:
        """As run(), with what is in the prefix cache."""
        self.steps.clear()
        self._numbers.clear()
        with self._limits(budget, chunk):
            outputs = self._outputs(asks, squeeze)
        return [self._answer(ask, output) for ask, output in zip(asks, outputs, strict=True)]

    @contextmanager
    def _limits(self, budget: int, chunk: int) -> Iterator[None]:
        usual = self.scheduler.max_num_scheduled_tokens
        self.scheduler.max_num_scheduled_tokens = budget or usual
        self.scheduler.scheduler_config.long_prefill_token_threshold = chunk
        try:
            yield
        finally:
            self.scheduler.max_num_scheduled_tokens = usual
            self.scheduler.scheduler_config.long_prefill_token_threshold = 0

    def _outputs(self, asks: Sequence[Ask], squeeze: bool) -> list[Any]:
        """vLLM's last word on each request."""
        engine = self.llm.llm_engine
        outputs: dict[str, Any] = {}
        names: dict[int, str] = {}
        taken: list[Any] = []
        waiting = sorted(range(len(asks)), key=lambda i: asks[i].at)
        pool = self.scheduler.kv_cache_manager.block_pool
        for tick in itertools.count():
            while waiting and asks[waiting[0]].at <= tick:
                i = waiting.pop(0)
                names[i] = self._add(i, asks[i])
            if squeeze and not waiting and self.steps and (taken or len(self.steps[-1].decodes) == len(asks)):
                taken += pool.get_new_blocks(pool.get_num_free_blocks())  # also what windows leave behind
            for output in engine.step():
                outputs[output.request_id] = output
            if taken and any(step.preempted for step in self.steps):
                pool.free_blocks(taken)
                taken, squeeze = [], False
            engine.abort_request([names[i] for i in list(names) if _cancelled(asks[i], outputs.get(names[i]))])
            if not waiting and not engine.has_unfinished_requests():
                break
        if taken:
            pool.free_blocks(taken)
        return [outputs[names[i]] for i in range(len(asks))]

    def _add(self, number: int, ask: Ask) -> str:
        params = SamplingParams(
            temperature=0,
            max_tokens=ask.new,
            ignore_eos=True,
            logprobs=-1,
            prompt_logprobs=-1 if ask.whole else None,
            flat_logprobs=True,
            detokenize=False,
        )
        name = f"ask-{next(self._ids)}"
        inner = self.llm.llm_engine.add_request(name, {"prompt_token_ids": list(ask.prompt)}, params)
        self._numbers[inner] = number
        return name

    def _answer(self, ask: Ask, output: Any) -> Answer:
        said = output.outputs[0]
        before = self._rows(output.prompt_logprobs)[1:] if ask.whole else []
        rows = [*before, *self._rows(said.logprobs)]
        return Answer(
            tokens=list(said.token_ids),
            logits=torch.stack(rows),
            first=len(ask.prompt) - 1 - len(before),
            cached=output.num_cached_tokens or 0,
        )

    def _rows(self, flat: Any) -> list[Tensor]:
        """vLLM's logprobs, here raw logits -> [V] a position (NaN where it says nothing)."""
        rows = []
        for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
            row = torch.full((self.vocabulary,), float("nan"))
            row[torch.tensor(flat.token_ids[start:end], dtype=torch.long)] = torch.tensor(flat.logprobs[start:end])
            rows.append(row)
        return rows

    def metric(self, name: str) -> int:
        """A counter of vLLM's, such as num_preemptions."""
        return sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:{name}")

    @property
    def preemptions(self) -> int:
        return sum(len(step.preempted) for step in self.steps)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.core, self.scheduler


def _cancelled(ask: Ask, output: Any) -> bool:
    """Whether a request has said enough to be cancelled now."""
    if ask.cancel is None or output is None or output.finished:
        return False
    return len(output.outputs[0].token_ids) >= ask.cancel


@contextmanager
def opened(folder: Path, options: Mapping[str, Any] | None = None) -> Iterator[Engine]:
    engine = Engine(folder, **(options or {}))
    try:
        yield engine
    finally:
        engine.close()
