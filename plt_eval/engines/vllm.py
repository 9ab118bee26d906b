"""vLLM in this process: continuous batching over a paged KV cache, for PLTs by plt_model's plugin.

    engine = VLLMEngine("models/tiny-r2/model", loops=2)
    for completion in engine.generate(requests):
        ...

Prompts, templates, tokenizers and stop strings are those of the engine hf: vLLM is given tokens and gives tokens, so
that in float32 both write the same greedy texts. It is started when it is first needed: a complete run is only read.

This module says which model runs; vllm_start starts and ends vLLM, vllm_steps feeds it, vllm_likelihood measures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from plt_eval.engines import vllm_likelihood
from plt_eval.engines.base import Completion, GenerationRequest, Loglikelihood, LoglikelihoodRequest
from plt_eval.engines.checkpoint import Checkpoint, pick_dtype, warnings_told
from plt_eval.engines.hf_prompts import Job, StopCheck
from plt_eval.engines.openai import derived_seed
from plt_eval.engines.vllm_start import check_installed, computes_on, cpu_kv_bytes, installed_version, start
from plt_eval.engines.vllm_steps import CLOSED, STOPS_EVERY, Asked, Steps, Written
from plt_eval.errors import UserError, one_line
from plt_model.loading import CheckpointError, check_fit, read_config
from plt_model.modeling_plt import set_loops

COLDEST = 0.01
"""vLLM takes this in place of any lower temperature but 0."""


class VLLMEngine:
    """A model run by vLLM, in this process; with `tensor_parallel` in that many, one a GPU (or share of the CPUs).

    `model`, `label`, `loops`, `loop_mode`, `tokenizer`, `chat_template` and `dtype` are those of HFEngine. `batch_size`
    is the number of sequences at a time, "auto" vLLM's own. `max_model_len` is the context in tokens, by default the
    model's, or what of it the KV cache holds. `gpu_memory_utilization` is the share of the device's memory to take
    (default: vLLM's on a GPU, and on a CPU see cpu_kv_bytes). `compile` "off" runs vLLM eagerly: it starts sooner.
    `additional_config` is for plt_model's plugin.

    What the engine decides by itself it says through `notify`. Raises UserError for a checkpoint that cannot be used,
    for options that do not fit it, and where vLLM does not start.
    """

    name = "vllm"
    concurrent = True

    def __init__(
        self,
        model: str,
        *,
        loops: int | None = None,
        loop_mode: str | None = None,
        dtype: str = "auto",
        batch_size: int | Literal["auto"] = "auto",
        chat_template: Literal["auto", "on", "off"] = "auto",
        tokenizer: str | None = None,
        label: str | None = None,
        compile: Literal["auto", "on", "off"] = "auto",
        tensor_parallel: int = 1,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        additional_config: Mapping[str, Any] | None = None,
        notify: Callable[[str], None] = print,
    ) -> None:
        if compile == "on":
            raise UserError(
                "--compile on has no effect with --engine vllm, which decides by itself; off makes it eager"
            )
        check_installed(notify)
        transformers_logging.set_verbosity_error()
        self.notify = notify
        self.device = computes_on()
        self.checkpoint = Checkpoint(model, label=label, loops=loops, loop_mode=loop_mode)
        self.dtype = pick_dtype(dtype, self.checkpoint.folder, self.device, notify)
        self.config: Any = self._read_config(loops, loop_mode)
        self.prompts = self.checkpoint.prompts(
            self.config, self._generation_config(), tokenizer=tokenizer, chat_template=chat_template
        )
        self.tokenizer: Any = self.prompts.tokenizer
        self._max_model_len = self._checked_context(max_model_len)
        self.tensor_parallel = tensor_parallel
        self._options = self._vllm_options(batch_size, compile, gpu_memory_utilization, additional_config)
        self._starting = threading.Lock()
        self._steps: Steps | None = None
        self._closed = False

    # --- which model ----------------------------------------------------------------------------------

    def _read_config(self, loops: int | None, loop_mode: str | None) -> Any:
        if not self.checkpoint.is_plt:
            return self._read_other_config()
        try:
            config = read_config(self.checkpoint.folder)
            check_fit(self.checkpoint.folder, config)
        except CheckpointError as broken:
            raise UserError(f"--model {broken}") from broken
        with warnings_told(self.notify):
            set_loops(config, loops, loop_mode)
        return config

    def _read_other_config(self) -> Any:
        folder = self.checkpoint.folder
        try:
            return AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as unknown:
            raise UserError(f"--model {folder}: {one_line(unknown)}") from unknown

    def _generation_config(self) -> GenerationConfig | None:
        folder = self.checkpoint.folder
        return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else None

    def _checked_context(self, asked: int | None) -> int | None:
        own = getattr(self.config, "max_position_embeddings", None)
        if asked is not None and isinstance(own, int) and asked > own:
            raise UserError(f"--max-model-len {asked}: {self.checkpoint.folder} has a context of {own} tokens")
        return asked

    def _vllm_options(
        self,
        batch_size: int | Literal["auto"],
        compile: str,
        gpu_memory_utilization: float | None,
        additional_config: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        options: dict[str, Any] = {
            "model": str(self.checkpoint.folder),
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensor_parallel_size": self.tensor_parallel,
            "max_model_len": -1 if self._max_model_len is None else self._max_model_len,
            "enable_prefix_caching": True,
            "enforce_eager": compile == "off",
        }
        if self.checkpoint.is_plt:
            options["hf_overrides"] = {
                "plt_num_loops": self.config.plt_num_loops,
                "plt_loop_mode": self.config.plt_loop_mode,
            }
        if batch_size != "auto":
            options["max_num_seqs"] = batch_size
        if gpu_memory_utilization is not None:
            options["gpu_memory_utilization"] = gpu_memory_utilization
        elif self.device.type == "cpu":
            options["kv_cache_memory_bytes"] = cpu_kv_bytes(self.tensor_parallel)
        if additional_config:
            options["additional_config"] = dict(additional_config)
        return options

    def identity(self) -> Mapping[str, Any]:
        """As the engine hf's; a context that was asked for cuts texts off."""
        own = self.checkpoint.identity(self.name, self.config, self.dtype, self.prompts)
        return own if self._max_model_len is None else {**own, "max_model_len": self._max_model_len}

    def facts(self) -> Mapping[str, str]:
        """How it computes: vLLM's version, on what, in how many processes."""
        return {
            "vllm": installed_version() or "of unknown version",
            "device": self.device.type,
            "tensor_parallel": str(self.tensor_parallel),
        }

    @property
    def steps(self) -> Steps:
        """vLLM itself, started when it is first asked for. Raises RuntimeError when the engine is closed."""
        with self._starting:
            if self._closed:
                raise RuntimeError(CLOSED)
            if self._steps is None:
                facts = self.facts()
                self.notify(f"starting vLLM {facts['vllm']} on {facts['device']}")
                self._steps = Steps(lambda: start(is_plt=self.checkpoint.is_plt, **self._options))
                fits = self._steps.max_model_len
                if fits < self._own_context():
                    self.notify(f"the KV cache holds a context of {fits} tokens, the model's is longer")
            return self._steps

    def _own_context(self) -> int:
        return self._max_model_len or int(getattr(self.config, "max_position_embeddings", 0))

    @property
    def context(self) -> int:
        """Tokens that fit: prompt and answer together."""
        return self.steps.max_model_len

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template has tools."""
        return self.prompts.takes_tools

    def count_tokens(self, request: GenerationRequest) -> int:
        """Tokens of a request's prompt."""
        return len(self.prompts.encode(request.prompt, request.tools))

    # --- work -----------------------------------------------------------------------------------------

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """Longest prompts first, all of them in vLLM's hands; each is yielded when it ends."""
        yield from self.generate_jobs(map(self.prompts.job, requests))

    def generate_jobs(self, jobs: Iterable[Job]) -> Iterator[Completion]:
        """What `generate` does, of prompts in tokens."""
        ordered = {job.id: job for job in sorted(jobs, key=lambda job: (-len(job.ids), job.id))}
        for temperature in {job.decoding.temperature for job in ordered.values()}:
            if 0 < temperature < COLDEST:
                raise UserError(f"--temperature {temperature}: vLLM samples from {COLDEST} on; expected that, or 0")
        fitting = [job for job in ordered.values() if len(job.ids) < self.context]
        self._warn_about_context(list(ordered.values()))
        for job in ordered.values():
            if len(job.ids) >= self.context:
                yield self._too_long(job)
        for written in self.steps.run([self._asked(job) for job in fitting]):
            yield self._completion(ordered[written.asked.key], written)

    def _asked(self, job: Job) -> Asked:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        warm = job.decoding.temperature > 0
        params = SamplingParams(
            temperature=job.decoding.temperature,
            top_p=job.decoding.top_p if warm else 1.0,
            seed=derived_seed(job.decoding.seed, job.id) if warm else None,
            max_tokens=min(job.limit, self.context - len(job.ids)),
            stop_token_ids=list(self.prompts.eos),
            ignore_eos=True,  # those of the checkpoint's files are among the stop_token_ids
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if job.stops else RequestOutputKind.FINAL_ONLY,
            stream_interval=STOPS_EVERY if job.stops else None,
        )
        return Asked(job.id, job.ids, params, StopCheck(job.stops, self.tokenizer) if job.stops else None)

    def _completion(self, job: Job, written: Written) -> Completion:
        return self.prompts.completion(job, written.tokens, ended=written.ended, seconds=written.seconds)

    def _too_long(self, job: Job) -> Completion:
        why = f"the prompt has {len(job.ids)} tokens, and vLLM's context holds {self.context} (--max-model-len)"
        return Completion(job.id, "", "error", chat=job.chat, prompt_tokens=len(job.ids), error=why)

    def _warn_about_context(self, jobs: list[Job]) -> None:
        over = sum(len(job.ids) + job.limit > self.context for job in jobs)
        if over:
            self.notify(f"{over} of {len(jobs)} texts are cut off where the context of {self.context} tokens ends")

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:
        """Trailing spaces of the context count as the continuation's, as the tokens that span the border do."""
        yield from self.loglikelihood_tokens((one.id, *self.prompts.border(one)) for one in requests)

    def loglikelihood_tokens(self, requests: Iterable[tuple[str, list[int], list[int]]]) -> Iterator[Loglikelihood]:
        """What `loglikelihood` does, of requests in tokens: (id, context, continuation)."""
        yield from vllm_likelihood.score(self.steps, requests)

    def close(self) -> None:
        """End vLLM, and give its memory back."""
        with self._starting:
            self._closed = True
            if self._steps is not None:
                self._steps.close()
                self._steps = None
