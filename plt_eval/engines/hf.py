"""The in-process engine: a checkpoint folder, decoded as fast as its architecture allows.

    engine = HFEngine("models/tiny-r2/model", loops=2)
    for completion in engine.generate(requests):
        ...

PLT checkpoints run at any loop count; any other causal language model that transformers knows runs as it is, for
comparison. Reproducible: greedy, or sampled with one random stream per request.

This module loads a model and says which one it is. Texts are written by hf_session or hf_generate, likelihoods
measured by hf_likelihood; hf_prompts stands between text and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from plt_eval.engines.base import Completion, GenerationRequest, Loglikelihood, LoglikelihoodRequest
from plt_eval.engines.checkpoint import Checkpoint, pick_device, pick_dtype, warnings_told
from plt_eval.engines.hf_batches import BatchSize
from plt_eval.engines.hf_generate import GenerateDecoder
from plt_eval.engines.hf_likelihood import Likelihoods
from plt_eval.engines.hf_prompts import Job
from plt_eval.engines.hf_session import SessionDecoder
from plt_eval.errors import UserError, one_line
from plt_model import PLTForCausalLM
from plt_model.loading import CheckpointError, load_model


class HFEngine:
    """A model in this process.

    `model` is a checkpoint folder; `label` is its name in records (default: the folder's own, and for a folder "model"
    of a training the training's). `tokenizer` is a folder, "bytes" for the built-in byte tokenizer, or None for the
    checkpoint's own. `dtype` "auto" is the checkpoint's on a GPU, and on a CPU float32 where that fits in memory.
    `chat_template` "auto" uses the tokenizer's template if it has one and the prompt has messages. `batch_size` is the
    number of sequences at a time; "auto" begins with what should fit, and halves when memory runs out.

    `decoder` "auto" is "session" (plt_model.decode: one trip through the layers a token, slots that refill) for every
    PLT whose loops can run so, and "generate" (transformers') for the rest. `compile` is the session's. `attention` is
    the implementation to load the model with; "auto" is the fastest one that the device and type allow.

    What the engine decides by itself it says through `notify`. Raises UserError for a checkpoint that cannot be used,
    and for options that it cannot serve.
    """

    name = "hf"

    def __init__(
        self,
        model: str,
        *,
        loops: int | None = None,
        loop_mode: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int | Literal["auto"] = "auto",
        chat_template: Literal["auto", "on", "off"] = "auto",
        tokenizer: str | None = None,
        label: str | None = None,
        decoder: Literal["auto", "session", "generate"] = "auto",
        attention: str = "auto",
        compile: Literal["auto", "on", "off"] = "auto",
        notify: Callable[[str], None] = print,
    ) -> None:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # what matters of its warnings is said through `notify`
        self.notify = notify
        self.checkpoint = Checkpoint(model, label=label, loops=loops, loop_mode=loop_mode)
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.folder, self.device, notify)
        try:
            self.weights_sha256 = self.checkpoint.weights_sha256
            self.model: Any = self._load(loops, loop_mode, attention)
        except CheckpointError as broken:
            raise UserError(f"--model {broken}") from broken
        self.prompts = self.checkpoint.prompts(
            self.model.config, self.model.generation_config, tokenizer=tokenizer, chat_template=chat_template
        )
        self.tokenizer: Any = self.prompts.tokenizer
        self.model.generation_config = GenerationConfig()
        self.batch = BatchSize(batch_size, self.device, notify)
        self.decoder: Any = self._decide_decoder(decoder, compile)
        self._told = False

    # --- loading --------------------------------------------------------------------------------------

    def _load(self, loops: int | None, loop_mode: str | None, attention: str) -> Any:
        named = None if attention == "auto" else attention
        try:
            if self.is_plt:
                return self._load_plt(loops, loop_mode, attention)
            return (
                AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype, attn_implementation=named)
                .to(self.device)
                .eval()
            )
        except CheckpointError:
            raise
        except (ImportError, ValueError) as refused:
            if named is None:
                raise
            raise UserError(f"--attention {named}: {one_line(refused)}") from refused

    def _load_plt(self, loops: int | None, loop_mode: str | None, attention: str) -> PLTForCausalLM:
        with warnings_told(self.notify):
            return load_model(
                self.folder,
                loops=loops,
                loop_mode=loop_mode,
                dtype=self.dtype,
                device=self.device,
                attn_implementation=attention,
            )

    def _decide_decoder(self, wanted: str, compile: Literal["auto", "on", "off"]) -> SessionDecoder | GenerateDecoder:
        config = self.model.config
        one_trip = self.is_plt and config.one_trip_decode
        if wanted == "session" and not self.is_plt:
            raise UserError(f"--decoder session: {self.folder} is no PLT checkpoint; use --decoder generate")
        if wanted == "session" and not one_trip:
            why = "--loop-mode sequential" if config.plt_loop_mode == "sequential" else "a model without the shift"
            raise UserError(
                f"--decoder session: {why} takes a trip through the layers for each loop; use --decoder generate"
            )
        if one_trip and wanted != "generate":
            return SessionDecoder(self.model, self.prompts, self.batch, compile=compile, notify=self.notify)
        if compile == "on":
            raise UserError("--compile on has no effect with decoder generate: it belongs to session")
        return GenerateDecoder(self.model, self.prompts, self.batch)

    @property
    def folder(self) -> Path:
        """The checkpoint's."""
        return self.checkpoint.folder

    @property
    def is_plt(self) -> bool:
        """Whether it can run several loops."""
        return self.checkpoint.is_plt

    def identity(self) -> Mapping[str, Any]:
        return self.checkpoint.identity(self.name, self.model.config, self.dtype, self.prompts)

    def facts(self) -> Mapping[str, str]:
        """How it computes: the decoder and the attention."""
        return {"decoder": self.decoder.name, "attention": str(self.model.config._attn_implementation)}

    @property
    def context(self) -> int | None:
        """Tokens that fit: prompt and answer together."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template has tools."""
        return self.prompts.takes_tools

    def count_tokens(self, request: GenerationRequest) -> int:
        """Tokens of a request's prompt."""
        return len(self.prompts.encode(request.prompt, request.tools))

    # --- work -----------------------------------------------------------------------------------------

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """Longest prompts first, so that memory runs out at once or never; each is yielded when the decoder has it."""
        yield from self.generate_jobs(map(self.prompts.job, requests))

    def _warn_about_context(self, jobs: list[Job]) -> None:
        limit = self.context
        over = sum(limit is not None and len(job.ids) + job.limit > limit for job in jobs)
        if over:
            self.notify(f"{over} of {len(jobs)} prompts may grow past the model's context of {limit} tokens")

    def _tell_facts(self) -> None:
        if not self._told:
            self._told = True
            self.notify(f"decoder: {self.decoder}; attention: {self.facts()['attention']}")

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:
        """Trailing spaces of the context count as the continuation's, as the tokens that span the border do. A context
        that several requests share is read once, by a PLT."""
        yield from Likelihoods(self.model, self.prompts, self.batch, shares=self.is_plt).score(requests)

    def generate_jobs(self, jobs: Iterable[Job]) -> Iterator[Completion]:
        """What `generate` does, of prompts in tokens."""
        ordered = sorted(jobs, key=lambda job: (-len(job.ids), job.id))
        self._warn_about_context(ordered)
        self._tell_facts()
        for decoding in dict.fromkeys(job.decoding for job in ordered):  # transformers' generate() cannot mix them
            yield from self.decoder.decode([job for job in ordered if job.decoding == decoding])

    def loglikelihood_tokens(self, requests: Iterable[tuple[str, list[int], list[int]]]) -> Iterator[Loglikelihood]:
        """What `loglikelihood` does, of requests in tokens: (id, context, continuation)."""
        yield from Likelihoods(self.model, self.prompts, self.batch, shares=self.is_plt).score_tokens(requests)

    def close(self) -> None:
        """Give the model's memory back."""
        self.model = self.decoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
