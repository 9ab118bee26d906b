"""The in-process engine: a checkpoint folder, transformers' generate(), batches that shrink when memory runs out.

PLT checkpoints run at any loop count; any other causal language model that transformers knows runs as it is, for
comparison. Reproducible: greedy, or sampled with one random stream per request (see :class:`_SeededSampling`).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging as transformers_logging

from plt_benchmarks.protocols import Prompt
from plt_eval.engines.base import Completion, FinishReason, GenerationRequest, Loglikelihood, LoglikelihoodRequest
from plt_eval.errors import UserError
from plt_eval.models import no_such_model
from plt_model import PLTConfig
from plt_model.loading import CheckpointError, load_model, read_config, weight_files, weights_hash
from plt_model.tokenizer import byte_tokenizer

Item = TypeVar("Item")
_FIRST_BATCH = {"cuda": 64, "cpu": 8}
_CUT = "-----the-answer-continues-here-----"


class HFEngine:
    """A model in this process.

    `model` is a checkpoint folder; `label` is its name in records (default: the folder's own, and for a folder "model"
    of a training the training's). `tokenizer` is a folder, "bytes" for the built-in byte tokenizer, or None for the
    checkpoint's own. `dtype` "auto" is the checkpoint's on a GPU, and on a CPU float32 where that fits in memory.
    `chat_template` "auto" uses the tokenizer's template if it has one and the prompt has messages. What the engine
    decides by itself it says through `notify`.
    Raises UserError for a checkpoint that cannot be used.
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
            self.model: Any = self._load(loops, loop_mode)
        except CheckpointError as broken:
            raise UserError(f"--model {broken}") from broken
        self.tokenizer: Any = self._load_tokenizer(tokenizer)
        self.use_chat = self._decide_chat(chat_template)
        self.eos = _eos_ids(self.model, self.tokenizer)
        self.model.generation_config = GenerationConfig()
        self.fixed_batch = batch_size != "auto"
        self.batch_size = _FIRST_BATCH[self.device.type] if batch_size == "auto" else int(batch_size)

    # --- loading --------------------------------------------------------------------------------------

    def _load(self, loops: int | None, loop_mode: str | None) -> Any:
        if self.is_plt:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                model = load_model(self.folder, loops=loops, loop_mode=loop_mode, dtype=self.dtype, device=self.device)
            for warning in said:
                self.notify(str(warning.message))
            return model
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype).to(self.device).eval()

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

    def identity(self) -> Mapping[str, Any]:
        config = self.model.config.to_dict()
        for noise in ("_name_or_path", "transformers_version", "dtype", "architectures"):
            config.pop(noise, None)
        template = self.tokenizer.chat_template if self.use_chat else None
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

    # --- prompts --------------------------------------------------------------------------------------

    def _is_chat(self, prompt: Prompt) -> bool:
        return self.use_chat and bool(prompt.messages)

    def _encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; the beginning-of-text token at most once."""
        if not self._is_chat(prompt):
            return self._without_double_bos(self.tokenizer(prompt.text)["input_ids"])
        turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
        if not prompt.prefill:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            turns.append({"role": "assistant", "content": prompt.prefill + _CUT})
            whole = self.tokenizer.apply_chat_template(turns, tokenize=False)
            text, found, _ = whole.partition(_CUT)
            if not found:
                raise UserError("the tokenizer's chat template drops the assistant's turn; pass --chat-template off")
        return self._without_double_bos(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _without_double_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _text(self, prompt_ids: list[int], new_ids: list[int]) -> str:
        """The new tokens' text as it continues the prompt (some tokenizers drop a leading space otherwise)."""
        tail = prompt_ids[-8:]
        before, both = (self.tokenizer.decode(x, skip_special_tokens=True) for x in (tail, tail + new_ids))
        if both.startswith(before):
            return str(both[len(before) :])
        return str(self.tokenizer.decode(new_ids, skip_special_tokens=True))

    # --- generation -----------------------------------------------------------------------------------

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[Completion]:
        """Longest prompts first, so that memory runs out at once or never; each batch is yielded when it is done."""
        jobs = [_Job(request, self._encode(request.prompt)) for request in requests]
        jobs.sort(key=lambda job: (-len(job.ids), job.request.id))
        self._warn_about_context(jobs)
        yield from self._batched(jobs, self._generate_batch)

    def _warn_about_context(self, jobs: Sequence[_Job]) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        over = sum(limit is not None and len(job.ids) + job.limit > limit for job in jobs)
        if over:
            self.notify(f"{over} of {len(jobs)} prompts may grow past the model's context of {limit} tokens")

    def _batched(self, items: list[Item], run: Callable[[list[Item]], list[Any]]) -> Iterator[Any]:
        """Run in batches; halve the batch when memory runs out, and say so."""
        done = 0
        while done < len(items):
            batch = items[done : done + self.batch_size]
            results = None
            try:
                results = run(batch)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self._shrink(len(batch))
            if results is None:
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            done += len(batch)
            yield from results

    def _shrink(self, tried: int) -> None:
        if self.fixed_batch or tried == 1:
            hint = "--batch-size auto" if self.fixed_batch and tried > 1 else "a smaller --dtype or --max-new-tokens"
            raise UserError(f"out of memory at batch size {tried} on {self.device}; try {hint}")
        self.batch_size = tried // 2
        self.notify(f"out of memory at batch size {tried}: going on with {self.batch_size}")

    @torch.inference_mode()
    def _generate_batch(self, jobs: list[_Job]) -> list[Completion]:
        started = time.monotonic()
        ids, mask = self._pad([job.ids for job in jobs], left=True)
        rows = [_Row(job.limit, self._stops(job.request.prompt)) for job in jobs]
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max(job.limit for job in jobs),
                do_sample=False,
                eos_token_id=self.eos or None,
                pad_token_id=self._pad_id(),
            ),
            logits_processor=self._sampling(jobs),
            stopping_criteria=StoppingCriteriaList([_RowsDone(rows, ids.shape[1], self.tokenizer)]),
        )
        seconds = time.monotonic() - started
        tokens = out[:, ids.shape[1] :].tolist()
        return [self._completion(job, row, new, seconds) for job, row, new in zip(jobs, rows, tokens, strict=True)]

    def _completion(self, job: _Job, row: _Row, new: list[int], seconds: float) -> Completion:
        new = new[: row.limit]
        end = next((i for i, token in enumerate(new) if token in self.eos), None)
        reason: FinishReason = "length" if end is None else "stop"
        new = new if end is None else new[:end]
        text = self._text(job.ids, new)
        cut = min((at for at in (text.find(stop) for stop in row.stops) if at >= 0), default=None)
        if cut is not None:
            text, reason = text[:cut], "stop"
        return Completion(
            request_id=job.request.id,
            text=text,
            finish_reason=reason,
            chat=self._is_chat(job.request.prompt),
            prompt_tokens=len(job.ids),
            completion_tokens=len(new),
            seconds=seconds,
        )

    def _stops(self, prompt: Prompt) -> tuple[str, ...]:
        return prompt.chat_stop if self._is_chat(prompt) else prompt.stop

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (self.eos or [0])[0])

    def _pad(self, sequences: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self._pad_id(), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            ids[i, place], mask[i, place] = torch.tensor(sequence, dtype=torch.long), 1
        return ids.to(self.device), mask.to(self.device)

    def _sampling(self, jobs: list[_Job]) -> LogitsProcessorList:
        decoding = jobs[0].request.decoding
        if any(job.request.decoding != decoding for job in jobs):
            raise UserError("one batch cannot mix decoding settings")
        chain = LogitsProcessorList()
        if decoding.temperature > 0:
            chain.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_p < 1:
                chain.append(TopPLogitsWarper(decoding.top_p))
            chain.append(_SeededSampling([f"{decoding.seed}:{job.request.id}" for job in jobs]))
        return chain

    # --- log-likelihood -------------------------------------------------------------------------------

    def loglikelihood(self, requests: Iterable[LoglikelihoodRequest]) -> Iterator[Loglikelihood]:
        """Trailing spaces of the context count as the continuation's, as the tokens that span the border do."""
        pairs = [_Pair(request.id, *self._split(request)) for request in requests]
        pairs.sort(key=lambda pair: (-len(pair.context) - len(pair.continuation), pair.id))
        yield from self._batched(pairs, self._loglikelihood_batch)

    def _split(self, request: LoglikelihoodRequest) -> tuple[list[int], list[int]]:
        spaces = len(request.context) - len(request.context.rstrip())
        context = request.context[: len(request.context) - spaces]
        whole = self._without_double_bos(self.tokenizer(request.context + request.continuation)["input_ids"])
        start = len(self._without_double_bos(self.tokenizer(context)["input_ids"])) if context else 0
        if start == 0:
            first = self.tokenizer.bos_token_id
            first = first if first is not None else (self.eos or [0])[0]
            whole = whole if whole[:1] == [first] else [first, *whole]
            start = 1
        return whole[:start], whole[start:]

    @torch.inference_mode()
    def _loglikelihood_batch(self, pairs: list[_Pair]) -> list[Loglikelihood]:
        ids, mask = self._pad([pair.context + pair.continuation for pair in pairs], left=False)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        out = []
        for row, pair in zip(logits, pairs, strict=True):
            start, count = len(pair.context) - 1, len(pair.continuation)
            logprobs = row[start : start + count].float().log_softmax(-1)
            target = torch.tensor(pair.continuation, device=logprobs.device, dtype=torch.long)
            total = float(logprobs.gather(-1, target[:, None]).double().sum())
            out.append(Loglikelihood(pair.id, total, count, bool((logprobs.argmax(-1) == target).all())))
        return out

    def close(self) -> None:
        """Give the model's memory back."""
        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Job:
    request: GenerationRequest
    ids: list[int]

    @property
    def limit(self) -> int:
        own = self.request.decoding.max_new_tokens
        return self.request.prompt.max_new_tokens if own is None else own


@dataclass(frozen=True)
class _Row:
    limit: int
    stops: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    id: str
    context: list[int]
    continuation: list[int]


class _RowsDone(StoppingCriteria):
    """A row is done when it has its own number of tokens, or when one of its own stop strings has appeared."""

    def __init__(self, rows: list[_Row], prompt_width: int, tokenizer: Any) -> None:
        self.rows, self.width, self.tokenizer = rows, prompt_width, tokenizer
        # A stop string of n bytes lies within the newest n tokens and the one that it starts in; more for safety.
        self.tail = [8 + max((len(s.encode()) for s in row.stops), default=0) for row in rows]
        self.done = [False] * len(rows)

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        new = input_ids[:, self.width :]
        for i, row in enumerate(self.rows):
            if not self.done[i]:
                self.done[i] = new.shape[1] >= row.limit or self._stopped(new[i], row, self.tail[i])
        return torch.tensor(self.done, device=input_ids.device)

    def _stopped(self, new: Tensor, row: _Row, tail: int) -> bool:
        if not row.stops:
            return False
        text = self.tokenizer.decode(new[-tail:].tolist(), skip_special_tokens=True)
        return any(stop in text for stop in row.stops)


class _SeededSampling(LogitsProcessor):
    """Draws each row's next token with a random stream of its own, by the inverse of the cumulative distribution.

    The stream depends on the key alone (run seed and request id): batching, order and resuming change nothing.
    """

    def __init__(self, keys: list[str]) -> None:
        self.streams = [random.Random(_sha256(key)) for key in keys]

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        draws = torch.tensor([[stream.random()] for stream in self.streams], dtype=torch.float64)
        token = torch.searchsorted(cumulative, draws.to(scores.device) * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


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


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
