"""Supervised fine-tuning data: instructions as tokens, with a loss on the answers only.

    tokenizer = with_chat_template(tokenizer, None)                # the tokenizer's own template, or ours
    examples = load_instructions([Path("train.jsonl")], tokenizer, max_length=2048)
    dataset = InstructionDataset(examples, size=steps * batch, seed=0)
    batch = collate([dataset[0], dataset[1]], pad_id=tokenizer.pad_token_id)
    loss = model(**batch).loss

A label is the token itself where the token belongs to an answer, and -100 elsewhere: in a conversation the content of
the assistant's turns with the token that ends each, in a plain prompt and completion the completion and one
end-of-text token. The whole text is rendered and tokenised once, and the answers' characters are mapped to tokens, so
that the model sees the very tokens it would see anywhere else.

The loss is a mean over answer tokens, not over examples. To make it one mean over a whole global batch (gradient
accumulation, several devices), pass the model `num_items_in_batch`, the number of labels that are not -100 in that
batch; transformers' Trainer does. The first token of a sequence is never predicted, so it never has a label.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .chat_answers import CHAT_TEMPLATE, ChatAnswers, Span, check_eos, special_tokens, with_chat_template
from .instruction_files import (
    Conversation,
    Instruction,
    InstructionError,
    PromptCompletion,
    check_instructions,
    read_instructions,
)

__all__ = [
    "CHAT_TEMPLATE",
    "IGNORE",
    "Encoder",
    "Example",
    "InstructionDataset",
    "InstructionError",
    "check_instructions",
    "collate",
    "load_instructions",
    "read_instructions",
    "with_chat_template",
]

IGNORE = -100
"""The label of a token that carries no loss."""

Ids = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Example:
    """One record in tokens; both arrays are [T] int32. `id` names the record ("file:line")."""

    id: str
    input_ids: Ids
    labels: Ids


# --- records to tokens --------------------------------------------------------------------------------


class Encoder:
    """Turns records into examples, and counts in `seen` what a user should know of them.

    `tokenizer` is a fast Hugging Face tokenizer (one with offsets) with an end-of-text token, and for conversations
    with a chat template. `last_turn_only` keeps the loss to the last assistant's turn of a conversation. An example of
    more than `max_length` tokens is left out, or with `truncate` cut there. Raises InstructionError.
    """

    def __init__(
        self, tokenizer: Any, *, max_length: int, truncate: bool = False, last_turn_only: bool = False
    ) -> None:
        if max_length < 2:
            raise InstructionError(f"max_length: expected at least 2 tokens, found {max_length}")
        if not tokenizer.is_fast:
            found = type(tokenizer).__name__
            raise InstructionError(f"expected a fast tokenizer, one that knows each token's characters; found {found}")
        check_eos(tokenizer)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.truncate, self.last_turn_only = truncate, last_turn_only
        self.seen: dict[str, tuple[int, str]] = {}
        self._answers: ChatAnswers | None = None
        self._special = special_tokens(tokenizer)
        unknown = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {None, tokenizer.eos_token_id}
        self._unknown = np.array(sorted(unknown), np.int32)

    def encode(self, record: Instruction) -> Example | None:
        """The example, or None when there is nothing to learn in it (no answer, or none within `max_length`) or when it
        is too long; `seen` says which."""
        text = self._conversation(record) if isinstance(record, Conversation) else self._prompt_completion(record)
        if text is None:
            self._count("records without an answer, left out", record.id)
            return None
        ids, labels = text
        limit = self.max_length
        if len(ids) > limit and not self.truncate:
            self._count(f"records of more than {limit} tokens, left out", record.id)
            return None
        ids, labels = ids[:limit], labels[:limit]
        if (labels == IGNORE).all():
            self._count(f"records without an answer within {limit} tokens, left out", record.id)
            return None
        if len(text[0]) > limit:
            self._count(f"records of more than {limit} tokens, cut there", record.id)
        if np.isin(labels, self._unknown).any():
            self._count("records whose answer has text that the tokenizer has no token for", record.id)
        return Example(record.id, ids, labels)

    def notes(self) -> list[str]:
        """A line for each thing that was seen, as in "records without an answer, left out: 3 (first: f:7)"."""
        return [f"{what}: {count} (first: {first})" for what, (count, first) in self.seen.items()]

    def _count(self, what: str, place: str) -> None:
        count, first = self.seen.get(what, (0, place))
        self.seen[what] = (count + 1, first)

    def _conversation(self, record: Conversation) -> tuple[Ids, Ids] | None:
        wanted = [i for i, turn in enumerate(record.turns) if turn.role == "assistant"]
        if self.last_turn_only:
            wanted = wanted[-1:]
        wanted = [i for i in wanted if record.turns[i].learn and record.turns[i].content.strip()]
        if not wanted:
            return None
        self._look_for_specials(record.id, [turn.content for turn in record.turns])
        try:
            self._answers = self._answers or ChatAnswers(self.tokenizer)
            text, spans = self._answers.find(record.turns, wanted)
        except InstructionError as error:
            raise InstructionError(f"{record.id}: {error}") from None
        ids, offsets = self._tokenize(text, add_special_tokens=False)
        return self._labelled(record.id, ids, offsets, spans)

    def _prompt_completion(self, record: PromptCompletion) -> tuple[Ids, Ids] | None:
        eos = self.tokenizer.eos_token
        completion = record.completion.removesuffix(eos)
        if not completion.strip():
            return None
        self._look_for_specials(record.id, [record.prompt, completion])
        text = record.prompt + completion
        ids, offsets = self._tokenize(text, add_special_tokens=True)
        while offsets and offsets[-1][1] == 0:  # what the tokenizer itself adds at the end
            del ids[-1], offsets[-1]
        ids.append(self.tokenizer.eos_token_id)
        offsets.append((len(text), len(text) + 1))
        return self._labelled(record.id, ids, offsets, [(len(record.prompt), len(text) + 1)])

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
        """Ids and each one's characters in `text`; the beginning-of-text token at most once."""
        out = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, truncation=False, verbose=False
        )
        ids, offsets = list(out["input_ids"]), list(out["offset_mapping"])
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            return ids[1:], offsets[1:]
        return ids, offsets

    def _labelled(self, place: str, ids: list[int], offsets: list[Span], spans: Sequence[Span]) -> tuple[Ids, Ids]:
        tokens, places = np.array(ids, np.int32), np.array(offsets, np.int32)
        if any(((places[:, 0] < edge) & (edge < places[:, 1])).any() for edge, _ in spans):
            self._count("records where one token holds the prompt's end and the answer's beginning", place)
        return tokens, answer_labels(tokens, places, spans)

    def _look_for_specials(self, place: str, texts: Iterable[str]) -> None:
        if any(self._special.search(text) for text in texts):
            self._count("records that spell out special tokens, which stand in their text as in any prompt", place)


def answer_labels(ids: Ids, offsets: Ids, spans: Sequence[Span]) -> Ids:
    """`ids` [T] where a token holds at least one character of a span, else IGNORE; the first, never predicted, IGNORE.

    `offsets` [T, 2] are each token's characters (begin, end), `spans` the answers', in order. Tokenizers disagree about
    the blanks between offsets (some trim them), so that a token is taken to begin where the one before it ended.
    """
    begins, ends = offsets.T
    begins = np.minimum(begins, np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]))
    span_begins, span_ends = np.array(spans).T
    # The last span that begins before the token's end; -1 for a token before all spans.
    at = np.searchsorted(span_begins, ends, side="left") - 1
    held = (begins < ends) & (at >= 0) & (begins < span_ends[at])
    held[:1] = False
    return np.where(held, ids, IGNORE).astype(np.int32)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def load_instructions(
    paths: Iterable[Path],
    tokenizer: Any,
    *,
    max_length: int,
    truncate: bool = False,
    last_turn_only: bool = False,
    notify: Callable[[str], None] = _warn,
) -> list[Example]:
    """Every usable record of the files, in order.

    All records are checked before any is tokenised. `notify` gets one line for each kind of record that is left out,
    cut, or otherwise worth a look, with their number and the first one's place. See Encoder for the options. Raises
    InstructionError for the first record that is not sound, and when no record can be used.
    """
    files = list(paths)
    encoder = Encoder(tokenizer, max_length=max_length, truncate=truncate, last_turn_only=last_turn_only)
    count = check_instructions(files)
    encoded = (encoder.encode(record) for record in read_instructions(files))
    examples = [example for example in encoded if example is not None]
    if not examples:
        raise InstructionError(f"no record of {count} can be used: {'; '.join(encoder.notes())}")
    for note in encoder.notes():
        notify(note)
    return examples


# --- examples to batches ------------------------------------------------------------------------------


class InstructionDataset(Dataset[dict[str, Any]]):
    """`size` items drawn epoch after epoch from `examples`, each epoch in an order of its own.

    Item i depends on `examples`, `seed` and i alone, on every machine: a run of more steps begins with the items of a
    shorter one, and a resumed run goes on where it was. Read it in order (no shuffling sampler). Raises
    InstructionError without examples or for a negative size.
    """

    def __init__(self, examples: Sequence[Example], *, size: int, seed: int) -> None:
        if not examples:
            raise InstructionError("expected at least one example, found none")
        if size < 0 or seed < 0:
            raise InstructionError(f"expected size and seed of at least 0, found {size} and {seed}")
        self.examples, self.size, self.seed = examples, size, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """ "id" (the record's file:line), and [T] int64 "input_ids", "labels" and "attention_mask" (all ones)."""
        example = self._example(index)
        ids = torch.from_numpy(example.input_ids.astype(np.int64))
        labels = torch.from_numpy(example.labels.astype(np.int64))
        return {"id": example.id, "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    def id(self, index: int) -> str:
        """The record that item `index` is made of, as "file:line"."""
        return self._example(index).id

    def _example(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(f"item {index} of {self.size}")
        epoch, place = divmod(index, len(self.examples))
        if epoch != self._epoch:
            # Raw bits sorted: unlike numpy's shuffles, their order is promised never to change.
            keys = np.random.PCG64([self.seed, epoch]).random_raw(len(self.examples))
            self._epoch, self._order = epoch, np.argsort(keys, kind="stable")
        return self.examples[int(self._order[place])]


def collate(items: Sequence[Mapping[str, Any]], pad_id: int, *, multiple: int = 1) -> dict[str, Tensor]:
    """What `model(**batch)` takes: [B, T] int64 "input_ids" (padded on the right with `pad_id`), "labels" (with IGNORE)
    and "attention_mask" (with 0); T is the longest item's length, rounded up to a multiple of `multiple`."""
    longest = max(len(item["input_ids"]) for item in items)
    width = -(-longest // multiple) * multiple
    fills = {"input_ids": pad_id, "labels": IGNORE, "attention_mask": 0}
    return {
        name: torch.stack([_padded(torch.as_tensor(item[name]), width, fill) for item in items])
        for name, fill in fills.items()
    }


def _padded(row: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(row, (0, width - len(row)), value=fill)
