"""Our engines as models of lm-eval.

    lm = ModelLM(HFEngine("models/tiny-r2/model", loops=2))      # tokens as lm-eval's own HFLM has them
    lm = ModelLM(VLLMEngine("models/tiny-r2/model"))             # likewise
    lm = EndpointLM(OpenAIEngine(endpoint=..., model=...))       # texts; what a server cannot do is refused
    lm = PltLM(pretrained="models/tiny-r2/model", loops=2)       # from the --model_args of lm-eval's command

Everything that decides a number is done as lm-eval's HFLM does it: the border between context and continuation, what is
cut off where the context is too small, rolling windows, stop strings, defaults. Only the computing is the engine's.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines.base import Completion, Decoding, Engine, GenerationRequest, LoglikelihoodRequest
from plt_eval.engines.hf import HFEngine
from plt_eval.engines.hf_prompts import Job
from plt_eval.engines.vllm import VLLMEngine
from plt_eval.errors import UserError
from plt_eval.lm_harness.answers import AnswerRecord, Answers, Kind, Unanswered, request_keys, samples_text
from plt_eval.models import ResolvedModel, resolve_model
from plt_eval.records import storable

logger = logging.getLogger("lm_eval.models.plt")
"""Below lm-eval's own, which its command shows."""

MOST_NEW_TOKENS = 256
"""Where a task does not say, as in lm-eval's HFLM."""
CONTEXT = 2048
"""Tokens, where neither the model nor its tokenizer says, as in lm-eval's HFLM."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
    "early_stopping": (False,),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "typical_p": (1, None),
}
"""Options of generation that no engine has, with the values at which they change nothing."""
ONLY_SAMPLING = ("top_p", "top_k", "min_p", "typical_p", "seed")
"""Options that change nothing where text is not drawn at random."""

Open = Mapping[str, Sequence[Any]]
"""Requests without an answer: name -> arguments."""


@dataclass(frozen=True)
class Wanted:
    """What a request for text asks for. `limit` new tokens at most; a temperature of 0 is greedy."""

    stops: tuple[str, ...]
    limit: int
    temperature: float
    top_p: float


def wanted(options: Mapping[str, Any], *, eos: str | None = None) -> Wanted:
    """A task's generation options, read as lm-eval reads them. Raises UserError for one that no engine has."""
    sampling = samples_text(options)
    given = normalize_gen_kwargs(dict(options), MOST_NEW_TOKENS)
    stops = handle_stop_sequences(given.pop("until", None), eos=eos)
    limit = int(given.pop("max_gen_toks"))
    given.pop("do_sample", None)
    # Without a temperature, drawing at random means 1, as in transformers.
    temperature = float(options.get("temperature") or 1.0) if sampling else 0.0
    given.pop("temperature", None)
    top_p = float(given.get("top_p") or 1.0) if sampling else 1.0
    given.pop("top_p", None)
    for name, value in given.items():
        if name in ONLY_SAMPLING and not sampling:
            continue
        if name not in NEUTRAL or value not in NEUTRAL[name]:
            raise UserError(f"it asks for text with {name}={value!r}, which plt-eval's engines do not have")
    return Wanted(tuple(dict.fromkeys(stop for stop in stops if stop)), limit, temperature, top_p)


class AnsweringLM(LM):
    """A model that asks an engine only what `answers` does not hold yet, and adds what it hears as it comes."""

    def __init__(self, engine: Engine, *, seed: int = 0) -> None:
        super().__init__()
        self.engine = engine
        self.seed = seed
        self.answers = Answers()

    @property
    def tokenizer_name(self) -> str:
        """The model's name; lm-eval tells caches of prompts apart by it."""
        return str(self.engine.identity().get("model", self.engine.name))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results say of the model: the engine's own account."""
        return {"plt_eval": {**self.engine.identity(), **self.engine.facts()}}

    def refusal(self, kind: Kind, arguments: Sequence[Any]) -> str | None:
        """Why this model cannot answer such a request, if it cannot."""
        raise NotImplementedError

    def _answer(
        self, kind: Kind, requests: Sequence[Any], draw: Callable[[Open], Iterable[AnswerRecord | str]]
    ) -> list[Any]:
        """Values in the order of `requests`. `draw` gives a record for each that is open, or says why it has none.
        Raises Unanswered when any is left, and UserError for what the engine cannot do."""
        arguments = [request.args for request in requests]
        keys = request_keys(kind, arguments)
        waiting = {key: own for key, own in zip(keys, arguments, strict=True) if key not in self.answers}
        for own in waiting.values():
            if (why := self.refusal(kind, own)) is not None:
                raise UserError(why)
        failures = []
        for record in draw(waiting) if waiting else ():
            if isinstance(record, str):
                failures.append(record)
                continue
            self.answers.add(record)
            self.cache_hook.add_partial(kind, waiting[record.request], record.value)
        left = [key for key in waiting if key not in self.answers]
        if left:
            raise Unanswered(len(left), len(keys), (failures or ["the engine returned nothing"])[0])
        return [self.answers[key].value for key in keys]

    def _decoding(self, asked: Wanted) -> Decoding:
        return Decoding(asked.temperature, asked.top_p, self.seed, asked.limit)


class ModelLM(AnsweringLM, TemplateLM):
    """An engine that computes itself. `max_length` is the context in tokens, where it is not the model's own."""

    def __init__(self, engine: HFEngine | VLLMEngine, *, seed: int = 0, max_length: int | None = None) -> None:
        super().__init__(engine, seed=seed)
        self.engine: HFEngine | VLLMEngine = engine
        self.tokenizer = engine.tokenizer
        self._max_length = max_length

    @cached_property
    def max_length(self) -> int:
        """Tokens that can be read. To vLLM the one that they predict belongs to the context too."""
        if self._max_length is not None:
            return self._max_length
        if isinstance(self.engine, VLLMEngine):
            return self.engine.context - 1
        return int(resolve_max_length(self.engine.model.config, self.tokenizer, default=CONTEXT))

    @property
    def device(self) -> Any:
        return self.engine.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        own = self.tokenizer.eos_token_id
        return int(own if own is not None else self.engine.prompts.first_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        own = self.tokenizer.bos_token_id
        return int(own if own is not None else self.eot_token_id)

    def refusal(self, kind: Kind, arguments: Sequence[Any]) -> str | None:
        """Media, and generation options that the engine does not have."""
        if kind == "generate_until":
            if len(arguments) > 2:
                return "it shows images or sounds to the model, which plt-eval's engines do not take"
            asked = wanted(arguments[1])
            if asked.limit >= self.max_length:
                return (
                    f"it asks for up to {asked.limit} new tokens, but the model's context holds "
                    f"{self.max_length}, prompt included; --max-new-tokens (lm-eval: --gen_kwargs max_gen_toks=N) "
                    "sets fewer"
                )
        return None

    # --- text to tokens -------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless the text brings its first along."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as the tokenizer's template writes them; without the system's turn where it knows none."""
        form = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **form))
        except jinja2.exceptions.TemplateError:
            rest = [turn for turn in chat_history if turn["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(rest, tokenize=False, **form))

    def _border(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """-> tokens of the context, at least one, and of the continuation."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
        if before:
            return before, after
        if after[:1] == [self.prefix_token_id]:
            return after[:1], after[1:]
        return [self.prefix_token_id], after

    def _fit(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """The last tokens that the context holds; the very last one is predicted and never read."""
        if len(after) > self.max_length:
            raise UserError(
                f"a continuation of {len(after)} tokens does not fit the model's context of {self.max_length}"
            )
        return (before + after)[-(self.max_length + 1) :][: -len(after) or None], after

    # --- answers --------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """(sum of log-probabilities of the continuation's tokens, whether greedy decoding would write them)."""
        return self._answer("loglikelihood", requests, self._score)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Sum of log-probabilities of a text's tokens, each with as much of the text before it as windows allow."""
        return self._answer("loglikelihood_rolling", requests, self._score_rolling)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Texts up to a stop string."""
        return self._answer("generate_until", requests, self._write)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        items = [(str(i), *self._fit(before, after)) for i, (_, before, after) in enumerate(requests)]
        found = {int(one.request_id): one for one in self.engine.loglikelihood_tokens(items)}
        return [(found[i].logprob, found[i].greedy) for i in range(len(items))]

    def _score(self, waiting: Open) -> Iterator[AnswerRecord]:
        items = ((key, *self._fit(*self._border(*own))) for key, own in waiting.items())
        for one in self.engine.loglikelihood_tokens(items):
            yield _likelihood("loglikelihood", one.request_id, one.logprob, one.greedy)

    def _score_rolling(self, waiting: Open) -> Iterator[AnswerRecord]:
        windows = {key: self._windows(text) for key, (text,) in waiting.items()}
        left = {key: len(own) for key, own in windows.items()}
        totals: dict[str, list[float]] = {key: [0.0] * len(own) for key, own in windows.items()}
        yield from (_likelihood("loglikelihood_rolling", key, 0.0, True) for key, count in left.items() if not count)
        items = [(f"{key}#{i}", *window) for key, own in windows.items() for i, window in enumerate(own)]
        for one in self.engine.loglikelihood_tokens(items):
            key, _, place = one.request_id.partition("#")
            totals[key][int(place)] = one.logprob
            left[key] -= 1
            if not left[key]:
                yield _likelihood("loglikelihood_rolling", key, sum(totals[key]), False)

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(read, predicted) tokens, as lm-eval cuts a text: every token is predicted once."""
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(pair) for pair in rolling]

    def _write(self, waiting: Open) -> Iterator[AnswerRecord | str]:
        jobs = (self._job(key, *own) for key, own in waiting.items())
        yield from map(_text, self.engine.generate_jobs(jobs))

    def _job(self, key: str, context: str, options: Mapping[str, Any]) -> Job:
        asked = wanted(options, eos=self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))
        plain = has_bos_prefix(context, self.tokenizer.bos_token)
        ids = self.tok_encode(context, add_special_tokens=False if plain else None)
        room = self.max_length - asked.limit
        return Job(
            id=key,
            ids=ids[-room:] or [self.engine.prompts.first_id],
            limit=asked.limit,
            stops=asked.stops,
            chat=False,
            decoding=self._decoding(asked),
            apart=True,
        )


class Turns(str):
    """A conversation where lm-eval expects a text: its turns, in JSON."""

    __slots__ = ()


class EndpointLM(AnsweringLM):
    """An OpenAI-compatible endpoint. The chat service writes texts only; the completions service gives likelihoods of a
    continuation too, where the server echoes log-probabilities."""

    @property
    def chat(self) -> bool:
        """Whether it is the chat service."""
        return bool(self.engine.identity().get("api") == "chat")

    def refusal(self, kind: Kind, arguments: Sequence[Any]) -> str | None:
        """Likelihoods that an endpoint does not tell, media, and generation options that the engine does not have."""
        where = self.engine.identity().get("endpoint")
        if kind != "generate_until" and self.chat:
            return (
                f"the task needs log-likelihoods, which a chat service does not tell ({where}): use --api completions"
            )
        if kind == "loglikelihood_rolling" or (kind == "loglikelihood" and not str(arguments[0]).strip()):
            return (
                f"it needs the likelihood of a text's first token, which no endpoint tells ({where}): use --engine hf"
            )
        if kind == "generate_until":
            if len(arguments) > 2:
                return "it shows images or sounds to the model, which plt-eval's engines do not take"
            wanted(arguments[1])
            if isinstance(arguments[0], Turns) and json.loads(arguments[0])[-1]["role"] == "assistant":
                return f"it begins the assistant's answer, for which the chat protocol has no form ({where})"
        return None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: ARG002
        """The turns themselves: the server has the template."""
        if not self.chat:
            raise UserError("a chat template needs the chat service: --api chat")
        return Turns(json.dumps(chat_history))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """(sum of log-probabilities of the continuation's tokens, whether greedy decoding would write them)."""
        return self._answer("loglikelihood", requests, self._score)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Refused."""
        return self._answer("loglikelihood_rolling", requests, lambda _: ())

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Texts up to a stop string."""
        return self._answer("generate_until", requests, self._write)

    def _score(self, waiting: Open) -> Iterator[AnswerRecord]:
        items = [LoglikelihoodRequest(key, *_border_of_text(*own)) for key, own in waiting.items()]
        for one in self.engine.loglikelihood(items):
            yield _likelihood("loglikelihood", one.request_id, one.logprob, one.greedy)

    def _write(self, waiting: Open) -> Iterator[AnswerRecord | str]:
        requests = []
        for key, (context, options) in waiting.items():
            asked = wanted(options)
            prompt = Prompt(context, asked.stops, _messages(context), "", asked.stops, asked.limit)
            requests.append(GenerationRequest(key, prompt, self._decoding(asked)))
        yield from map(_text, self.engine.generate(requests))


def _messages(context: str) -> tuple[Message, ...]:
    if not isinstance(context, Turns):
        return (Message("user", context),)
    return tuple(Message(turn["role"], turn["content"]) for turn in json.loads(context))


def _border_of_text(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of the context counts as the continuation's, as in lm-eval's models."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _likelihood(kind: Kind, key: str, logprob: float, greedy: bool) -> AnswerRecord:
    return AnswerRecord(request=key, kind=kind, logprob=logprob if math.isfinite(logprob) else None, greedy=greedy)


def _text(completion: Completion) -> AnswerRecord | str:
    if completion.error is not None:
        return completion.error
    return AnswerRecord(
        request=completion.request_id,
        kind="generate_until",
        text=storable(completion.text),
        finish_reason="length" if completion.finish_reason == "length" else "stop",
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion.completion_tokens,
        seconds=completion.seconds,
    )


# --- lm-eval's --model plt ----------------------------------------------------------------------------


_HF = (
    *("pretrained", "loops", "loop_mode", "dtype", "device", "batch_size"),
    *("tokenizer", "decoder", "attention", "compile", "max_length"),
)
_VLLM = (
    *("pretrained", "loops", "loop_mode", "dtype", "tokenizer", "compile", "max_length"),
    *("tensor_parallel", "max_model_len", "gpu_memory_utilization"),
)
_OPENAI = ("endpoint", "api_model", "api", "api_key_env", "concurrency", "retries", "request_timeout")


_KNOWN = {"hf": _HF, "vllm": _VLLM, "openai": _OPENAI}
"""Engine -> its arguments."""


class PltLM(LM):
    """What lm-eval's command makes of `--model plt --model_args ...`.

    `pretrained` is a checkpoint folder or a bundled model (plt-tiny:r2); loops, loop_mode, dtype, tokenizer, decoder,
    attention and compile are `plt-eval run`'s options, max_length the context in tokens, seed that of texts drawn at
    random. `engine=vllm` takes of these all but decoder, attention, device and batch_size, and tensor_parallel,
    max_model_len and gpu_memory_utilization. `engine=openai` takes endpoint (several with + between them), api_model,
    api, api_key_env, concurrency, retries and request_timeout.
    Raises UserError for anything else."""

    def __new__(cls, **arguments: Any) -> Any:
        return _made(**arguments)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """What lm-eval calls; `additional_config` has its own --batch_size, --max_batch_size and --device."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return _made(**{**given, **arg_dict})


_LEAST = {
    "loops": 1,
    "tensor_parallel": 1,
    "max_model_len": 2,
    "max_length": 1,
    "concurrency": 1,
    "retries": 0,
    "seed": 0,
}
"""Whole numbers, and from where on."""


def _check(name: str, value: Any) -> Any:
    """The value of an argument, a number where it has to be one. Raises UserError."""
    from plt_eval.cli import run

    kinds = {
        "decoder": run.Decoder,
        "compile": run.Compile,
        "attention": run.Attention,
        "dtype": run.Dtype,
        "loop_mode": run.LoopMode,
        "api": run.Api,
    }
    if name in kinds and value not in list(kinds[name]):
        raise UserError(f"--model_args {name}={value}: expected {', '.join(kinds[name])}")
    if name in _LEAST:
        if not str(value).isascii() or not str(value).isdigit() or int(value) < _LEAST[name]:
            raise UserError(f"--model_args {name}={value}: expected a number from {_LEAST[name]}")
        return int(value)
    if name == "gpu_memory_utilization":
        if not re.fullmatch(r"0?\.\d+|1(\.0*)?", str(value)) or not float(value) > 0:
            raise UserError(f"--model_args {name}={value}: expected a number above 0 and at most 1")
        return float(value)
    if name == "request_timeout":
        if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", str(value)) or not float(value) > 0:
            raise UserError(f"--model_args {name}={value}: expected a number of seconds above 0")
        return float(value)
    return value


def _made(*, engine: str = "hf", seed: int = 0, **arguments: Any) -> LM:
    arguments.pop("trust_remote_code", None)  # lm-eval's own, for data sets
    if engine not in _KNOWN:
        raise UserError(f"--model_args engine={engine}: expected {', '.join(_KNOWN)}")
    known = _KNOWN[engine]
    if engine != "hf":
        for name in ("device", "batch_size"):
            arguments.pop(name, None)  # lm-eval always gives these
    if arguments.pop("max_batch_size", None) is not None:
        raise UserError("--max_batch_size has no effect with --model plt: --batch_size auto takes as many as fit")
    for name in arguments:
        if name not in known:
            raise UserError(f"--model_args {name}: with --model plt and engine={engine} expected {', '.join(known)}")
    seed = _check("seed", seed)
    arguments = {name: value if value is None else _check(name, value) for name, value in arguments.items()}
    if engine == "openai":
        return _endpoint_lm(seed, **arguments)
    return _vllm_lm(seed, **arguments) if engine == "vllm" else _model_lm(seed, **arguments)


def _model_lm(
    seed: int,
    *,
    pretrained: str | None = None,
    loops: int | None = None,
    device: str | None = None,
    batch_size: int | str | None = None,
    max_length: int | None = None,
    **arguments: Any,
) -> ModelLM:
    import torch

    from plt_eval.cli.options import parse_batch_size

    model = _resolved(pretrained, loops)
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        logger.info("--device %s: torch sees no CUDA device here; running on cpu", device)
        device = "cpu"
    if device == "cuda:0":
        device = "cuda"
    if device not in (None, "auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: expected cpu or cuda")
    engine = HFEngine(
        str(model.folder),
        loops=model.loops,
        label=None if model.family is None else model.label,
        device=device or "auto",
        batch_size=parse_batch_size(None if batch_size is None else str(batch_size)),
        notify=logger.info,
        **arguments,
    )
    return ModelLM(engine, seed=seed, max_length=max_length)


def _vllm_lm(
    seed: int,
    *,
    pretrained: str | None = None,
    loops: int | None = None,
    max_length: int | None = None,
    **arguments: Any,
) -> ModelLM:
    model = _resolved(pretrained, loops)
    label = None if model.family is None else model.label
    engine = VLLMEngine(str(model.folder), loops=model.loops, label=label, notify=logger.info, **arguments)
    return ModelLM(engine, seed=seed, max_length=max_length)


def _resolved(pretrained: str | None, loops: int | None) -> ResolvedModel:
    if pretrained is None:
        raise UserError(
            "--model_args pretrained is missing: give a checkpoint folder, or a bundled model (plt-tiny:r2)"
        )
    return resolve_model(str(pretrained), loops)


def _endpoint_lm(
    seed: int,
    *,
    endpoint: str | None = None,
    api_model: str | None = None,
    api_key_env: str | None = None,
    request_timeout: float | None = None,
    **arguments: Any,
) -> EndpointLM:
    import os

    from plt_eval.engines.openai import OpenAIEngine

    if not endpoint or not api_model:
        raise UserError("--model_args engine=openai needs endpoint and api_model")
    key = os.environ.get(api_key_env or "OPENAI_API_KEY")
    if api_key_env and not key:
        raise UserError(f"--model_args api_key_env={api_key_env}: no such environment variable, or it is empty")
    if request_timeout is not None:
        arguments["timeout_s"] = request_timeout
    urls = re.split(r"\+(?=https?://)", str(endpoint))
    engine = OpenAIEngine(endpoint=urls, model=str(api_model), api_key=key, notify=logger.info, **arguments)
    return EndpointLM(engine, seed=seed)
