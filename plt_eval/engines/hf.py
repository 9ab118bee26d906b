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

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from plt_eval.engines.base import Completion, GenerationRequest, Loglikelihood, LoglikelihoodRequest
from plt_eval.engines.hf_batches import BatchSize
from plt_eval.engines.hf_generate import GenerateDecoder
from plt_eval.engines.hf_likelihood import Likelihoods
from plt_eval.engines.hf_prompts import Job, Prompts
from plt_eval.engines.hf_session import SessionDecoder
from plt_eval.errors import UserError
from plt_eval.models import no_such_model
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.loading import CheckpointError, load_model, one_line, read_config, weight_files, weights_hash
from plt_model.tokenizer import byte_tokenizer


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
        self.folder, self.notify = Path(model), notify
        if not self.folder.is_dir():
            raise UserError(f"--model {no_such_model(str(model))}")
        self.label = folder_label(self.folder) if label is None else label
        self.device = pick_device(device)
        self.is_plt = _model_type(self.folder) == PLTConfig.model_type
        if not self.is_plt and (loops not in (None, 1) or loop_mode not in (None, "plt")):
            raise UserError(f"--loops {loops}: {self.folder} is no PLT checkpoint; only those can run several loops")
        self.dtype = pick_dtype(dtype, self.folder, self.device, notify)
        try:
            self.weights_sha256 = weights_hash(self.folder)
            self.model: Any = self._load(loops, loop_mode, attention)
        except CheckpointError as broken:
            raise UserError(f"--model {broken}") from broken
        self.tokenizer: Any = self._load_tokenizer(tokenizer)
        use_chat = self._decide_chat(chat_template)
        self.prompts = Prompts(self.tokenizer, use_chat=use_chat, eos=_eos_ids(self.model, self.tokenizer))
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
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            model = load_model(
                self.folder,
                loops=loops,
                loop_mode=loop_mode,
                dtype=self.dtype,
                device=self.device,
                attn_implementation=attention,
            )
        for warning in said:
            self.notify(str(warning.message))
        return model

    def _load_tokenizer(self, chosen: str | None) -> Any:
        if chosen == "bytes":
            return byte_tokenizer(self.model.config.vocab_size)
        where = self.folder if chosen is None else Path(chosen)
        if not any((where / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            raise UserError(f"{where}: no tokenizer in it; pass --tokenizer FOLDER, or --tokenizer bytes")
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
        if len(tokenizer) > self.model.config.vocab_size:
            raise UserError(
                f"{where}: the tokenizer has {len(tokenizer)} tokens, the model {self.model.config.vocab_size}: "
                "they do not belong together"
            )
        return tokenizer

    def _decide_chat(self, wanted: str) -> bool:
        has = getattr(self.tokenizer, "chat_template", None) is not None
        if wanted == "on" and not has:
            raise UserError("--chat-template on: the tokenizer has no chat template")
        return has and wanted != "off"

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

    def identity(self) -> Mapping[str, Any]:
        config = self.model.config.to_dict()
        for noise in ("_name_or_path", "transformers_version", "dtype", "architectures"):
            config.pop(noise, None)
        template = self.tokenizer.chat_template if self.prompts.use_chat else None
        return {
            "engine": self.name,
            "model": self.label,
            "weights_sha256": self.weights_sha256,
            "config_sha256": _sha256(json.dumps(config, sort_keys=True, default=str)),
            "loops": config.get("plt_num_loops", 1),
            "loop_mode": config.get("plt_loop_mode", "plt") if self.is_plt else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokenizer_sha256": _sha256(json.dumps(sorted(self.tokenizer.get_vocab().items()))),
            "chat_template_sha256": None if template is None else _sha256(str(template)),
        }

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


def folder_label(folder: Path) -> str:
    """The folder's name; of RUN/model, where trainings leave their models, RUN, and of RUN/r2/model RUN-r2.

    No slash is in it: of a path, records show the last part only.
    """
    folder = folder.resolve()
    if folder.name != "model":
        return folder.name
    training = folder.parent
    names = [training.parent.name, training.name] if re.fullmatch(r"r\d+", training.name) else [training.name]
    return "-".join(filter(None, names)) or folder.name


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where torch sees one. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    return torch.device(name)


def pick_dtype(name: str, folder: Path, device: torch.device, notify: Callable[[str], None]) -> torch.dtype:
    """The type of that name; "auto" is the checkpoint's own on a GPU, and on a CPU float32 where that fits in memory
    (`notify` hears when it does not)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), None)
    own = saved if isinstance(saved, torch.dtype) else torch.float32
    if device.type != "cpu" or own == torch.float32:
        return own
    size = sum(file.stat().st_size for file in weight_files(folder))
    if 2 * size > 0.6 * psutil.virtual_memory().available:
        notify(f"running in {str(own).removeprefix('torch.')}: float32 would not fit in this machine's memory")
        return own
    return torch.float32


def _model_type(folder: Path) -> str:
    """The checkpoint's model_type, read without trusting the rest of the file."""
    path = folder / "config.json"
    if folder.is_dir() and path.is_file():
        try:
            kind = json.loads(path.read_text()).get("model_type")
        except (ValueError, AttributeError):
            kind = None
        if isinstance(kind, str) and kind != PLTConfig.model_type:
            return kind
    try:
        read_config(folder)
    except CheckpointError as broken:
        raise UserError(f"--model {broken}") from broken
    return PLTConfig.model_type


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found.update([value] if isinstance(value, int) else (value or []))
    return sorted(token for token in found if token < model.config.vocab_size)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
