"""Between text and tokens: what the engines that compute themselves read for a prompt, and what text its tokens are.

prompts = Prompts(tokenizer, use_chat=True, eos=[2])
job = prompts.job(request)                 # token ids, limit, stop strings
prompts.completion(job, new_ids, ended=True, seconds=0.2)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from torch import Tensor

from plt_benchmarks.protocols import Prompt
from plt_eval.engines.base import (
    Completion,
    Decoding,
    FinishReason,
    GenerationRequest,
    LoglikelihoodRequest,
    first_stop,
)
from plt_eval.errors import UserError

_CUT = "-----the-answer-continues-here-----"


@dataclass(frozen=True)
class Job:
    """A request in tokens: the prompt's `ids`, at most `limit` new ones, an end at any of the `stops`. `apart`: the new
    tokens' text is what they say by themselves, not as they continue the prompt."""

    id: str
    ids: list[int]
    limit: int
    stops: tuple[str, ...]
    chat: bool
    decoding: Decoding
    apart: bool = False

    def draws(self) -> Iterator[float]:
        """Uniform numbers in [0, 1), one a token, for as long as anybody asks. They depend on the run's seed and the
        request's id alone: batching, order, decoder and resuming change nothing."""
        stream = random.Random(hashlib.sha256(f"{self.decoding.seed}:{self.id}".encode()).hexdigest())
        while True:
            yield stream.random()


class StopCheck:
    """Whether a stop string has appeared, asked after each new token."""

    def __init__(self, stops: Sequence[str], tokenizer: Any) -> None:
        self.stops, self.tokenizer = stops, tokenizer
        # A stop string of n bytes lies within the newest n tokens and the one that it starts in; more for safety.
        self.tail = 8 + max((len(stop.encode()) for stop in stops), default=0)

    def __call__(self, new_ids: Sequence[int]) -> bool:
        if not self.stops:
            return False
        text = self.tokenizer.decode(new_ids[-self.tail :], skip_special_tokens=True)
        return any(stop in text for stop in self.stops)

    def first(self, new_ids: Sequence[int], seen: int) -> int | None:
        """After how many tokens a stop string had appeared first, where it is more than `seen`, which were asked about
        before; None where none has."""
        if not self.stops:
            return None
        text = self.tokenizer.decode(new_ids[max(0, seen - self.tail) :], skip_special_tokens=True)
        if not any(stop in text for stop in self.stops):
            return None
        counts = range(seen + 1, len(new_ids) + 1)
        return next((count for count in counts if self(new_ids[max(0, count - self.tail) : count])), None)


class Prompts:
    """A tokenizer, whether its chat template is used, and the tokens that end a text."""

    def __init__(self, tokenizer: Any, *, use_chat: bool, eos: Sequence[int]) -> None:
        self.tokenizer, self.use_chat, self.eos = tokenizer, use_chat, tuple(eos)

    @property
    def pad_id(self) -> int:
        """What fills up short rows; never read."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else (*self.eos, 0)[0])

    @property
    def first_id(self) -> int:
        """What is read where there is nothing to read: the beginning of a text, or the end of one before it."""
        bos = self.tokenizer.bos_token_id
        return int(bos if bos is not None else (*self.eos, 0)[0])

    # --- text to tokens -------------------------------------------------------------------------------

    def job(self, request: GenerationRequest) -> Job:
        """The request in tokens."""
        prompt, own = request.prompt, request.decoding.max_new_tokens
        chat = self.is_chat(prompt)
        return Job(
            id=request.id,
            ids=self.encode(prompt, request.tools) or [self.first_id],
            limit=prompt.max_new_tokens if own is None else own,
            stops=prompt.chat_stop if chat else prompt.stop,
            chat=chat,
            decoding=request.decoding,
        )

    def is_chat(self, prompt: Prompt) -> bool:
        """Whether this prompt goes through the chat template."""
        return self.use_chat and bool(prompt.messages)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template knows what to do with tools."""
        return self.use_chat and "tools" in str(self.tokenizer.chat_template)

    def encode(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of a prompt; the beginning-of-text token at most once."""
        if not self.is_chat(prompt):
            return self.tokens(prompt.text)
        turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
        if not prompt.prefill:
            known = {"tools": [dict(tool) for tool in tools]} if tools else {}
            text = self._templated(turns, add_generation_prompt=True, **known)
        else:
            turns.append({"role": "assistant", "content": prompt.prefill + _CUT})
            whole = self._templated(turns)
            text, found, _ = whole.partition(_CUT)
            if not found:
                raise UserError("the tokenizer's chat template drops the assistant's turn; pass --chat-template off")
        return self.tokens(text, add_special_tokens=False)

    def _templated(self, turns: list[dict[str, str]], **options: Any) -> str:
        """Raises UserError where the template refuses the turns: some know no system message, or want them in turns."""
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except jinja2.exceptions.TemplateError as error:
            raise UserError(
                f"the tokenizer's chat template refuses these messages: {error}; pass --chat-template off"
            ) from error

    def tokens(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text; the beginning-of-text token at most once."""
        ids: list[int] = self.tokenizer(text, **options)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def border(self, request: LoglikelihoodRequest) -> tuple[list[int], list[int]]:
        """-> tokens of the context, at least one, and of the continuation. Trailing spaces of the context count as the
        continuation's, as the tokens that span the border do."""
        spaces = len(request.context) - len(request.context.rstrip())
        context = request.context[: len(request.context) - spaces]
        whole = self.tokens(request.context + request.continuation)
        start = len(self.tokens(context)) if context else 0
        if start == 0:
            whole = whole if whole[:1] == [self.first_id] else [self.first_id, *whole]
            start = 1
        return whole[:start], whole[start:]

    def pad(self, sequences: Sequence[Sequence[int]], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 [sequences, longest], filled up on one side."""
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            ids[i, place], mask[i, place] = torch.tensor(sequence, dtype=torch.long), 1
        return ids.to(device), mask.to(device)

    # --- tokens to text -------------------------------------------------------------------------------

    def completion(self, job: Job, new_ids: list[int], *, ended: bool, seconds: float) -> Completion:
        """The text of new tokens (the one that ended it is not among them), cut before the first stop string. `ended`:
        the model ended it; else it did so only where a stop string is found."""
        text = self._continuing([] if job.apart else job.ids, new_ids)
        cut = first_stop(text, job.stops)
        reason: FinishReason = "stop" if ended or cut is not None else "length"
        return Completion(
            request_id=job.id,
            text=text[:cut],
            finish_reason=reason,
            chat=job.chat,
            prompt_tokens=len(job.ids),
            completion_tokens=len(new_ids),
            seconds=seconds,
        )

    def _continuing(self, prompt_ids: list[int], new_ids: list[int]) -> str:
        """The new tokens' text as it continues the prompt (some tokenizers drop a leading space otherwise)."""
        tail = prompt_ids[-8:]
        before, both = (self.tokenizer.decode(x, skip_special_tokens=True) for x in (tail, tail + new_ids))
        if both.startswith(before):
            return str(both[len(before) :])
        return str(self.tokenizer.decode(new_ids, skip_special_tokens=True))
