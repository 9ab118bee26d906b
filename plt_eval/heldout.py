"""Held-out bits per byte: how well a model predicts text it was not trained on, the same unit for any tokenizer.

    data = TokenData.open(Path("data/python"), "heldout")
    found = bits_per_byte(model, data, sequence_length=256, limit_tokens=200_000)
    found.bits_per_byte, found.low, found.high

What is summed: documents are scored one by one, so no text of another document is ever context. Every token of a
document is predicted exactly once, its end-of-sequence token too; the beginning-of-sequence token is given, not
predicted. (A tokenizer without one: the end-of-sequence token, the end of whatever came before, is given instead.)
A document longer than `sequence_length` is read in windows of that many tokens. Window k begins `stride` tokens after
window k-1, and counts the tokens that no earlier window has predicted. With the default, stride = sequence_length,
windows stand side by side and a token is predicted from what its own window holds to the left of it, 1 to
sequence_length tokens, as in training; a smaller stride gives each token at least sequence_length - stride tokens of
context, at sequence_length / stride times the cost.

    bits per byte = sum of -ln p over all predicted tokens / ln 2 / UTF-8 bytes of the documents' text

The interval is a bootstrap over documents, or over groups of documents that are alike (packages), of that ratio. Fewer
than MIN_UNITS of them say nothing of how it varies, so there is none.

Which documents a limit takes depends on the data and the limit alone, never on the model. All documents are put in a
fixed random order, and the groups take turns: each gives its first document of that order, then its second, and so on.
So a limit is spread over as many groups as there are, where a plain draw would follow the largest. For the same end,
documents longer than limit / MIN_UNITS come after their group's others and after those of the others' turn, and one
that does not fit into what is left of the limit is passed over. (Hence a small limit prefers short documents.)
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from plt_eval.corpus.installed import STANDARD_LIBRARY
from plt_eval.errors import UserError
from plt_eval.journal import read_journal, replacing
from plt_model.training.shards import TokenData

RESAMPLES = 2000
"""Of the bootstrap."""

MIN_UNITS = 8
"""Documents or groups, as many as are resampled, below which there is no interval: a bootstrap of a few units is far
too narrow."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """Bits per byte with its 95% interval (None where fewer than MIN_UNITS units were scored), nats per predicted
    token, and what they are of: `tokens` predicted, UTF-8 `bytes`, `documents`, and the resampled `units`: documents
    or groups."""

    bits_per_byte: float
    low: float | None
    high: float | None
    nats_per_token: float
    tokens: int
    bytes: int
    documents: int
    units: int


@dataclass(frozen=True)
class DocumentScores:
    """What a model made of each document: arrays [documents] of the documents' index in the split, their nats
    (sum of -ln p), predicted tokens, UTF-8 bytes, and group."""

    index: Integers
    nats: Floats
    tokens: Integers
    bytes: Integers
    group: Integers

    def save(self, path: Path) -> None:
        """As .npz, in one step that a kill cannot halve. Raises DiskFull."""
        with replacing(path) as stream:
            np.savez(stream, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: Path) -> DocumentScores:
        """What `save` wrote. Raises UserError for anything else."""
        try:
            with np.load(path) as arrays:
                return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: no scores of documents: {error}; delete it to score again") from error


def bits_per_byte(
    model: nn.Module,
    data: TokenData,
    *,
    sequence_length: int,
    batch_size: int = 16,
    limit_tokens: int | None = None,
    stride: int | None = None,
    groups: npt.ArrayLike | None = None,
    device: str | torch.device | None = None,
) -> HeldOut:
    """Score `data` and sum up: see score_documents and summarise, whose arguments and errors these are."""
    scores = score_documents(
        model,
        data,
        sequence_length=sequence_length,
        batch_size=batch_size,
        limit_tokens=limit_tokens,
        stride=stride,
        groups=groups,
        device=device,
    )
    return summarise(scores)


# --- scoring ------------------------------------------------------------------------------------------


def score_documents(
    model: nn.Module,
    data: TokenData,
    *,
    sequence_length: int,
    batch_size: int = 16,
    limit_tokens: int | None = None,
    stride: int | None = None,
    groups: npt.ArrayLike | None = None,
    device: str | torch.device | None = None,
) -> DocumentScores:
    """Predict the documents of `data`, or whole documents drawn in turns over the groups as far as `limit_tokens` reach
    (at least one): the same ones for every model, see above.

    `model` is any causal language model of transformers; it is moved to `device` (default: where it is).
    `sequence_length` and `stride` are in tokens, `batch_size` in windows. `groups` [documents of the split] says which
    documents belong together; default: each to itself. Raises UserError for data that the model cannot read or that
    have no text, ValueError for lengths that make no sense.
    """
    stride = sequence_length if stride is None else stride
    if not 1 <= stride <= sequence_length or batch_size < 1:
        raise ValueError(f"sequence_length {sequence_length}, stride {stride}, batch_size {batch_size}")
    _check_vocabulary(model, data)
    own = np.arange(data.documents) if groups is None else np.asarray(groups, dtype=np.int64)
    if own.shape != (data.documents,):
        raise ValueError(f"groups has shape {own.shape}: expected [{data.documents}]")
    chosen = _choose(data, own, limit_tokens)
    windows = _windows(data, chosen, sequence_length, stride)
    nats = np.zeros(len(chosen))
    with _evaluating(model, device) as where:
        for rows in _batches(windows, batch_size):
            ids, targets = _read(data, rows)
            found = _row_nats(model, ids.to(where), targets.to(where))
            np.add.at(nats, [row.slot for row in rows], found.cpu().numpy())
    if not np.isfinite(nats).all():
        raise UserError(
            f"{data.folder}: the model gives no finite likelihood to {(~np.isfinite(nats)).sum()} documents"
        )
    tokens = np.zeros(len(chosen), dtype=np.int64)
    np.add.at(tokens, [row.slot for row in windows], [row.length - row.skip for row in windows])
    return DocumentScores(chosen, nats, tokens, data.document_bytes()[chosen], own[chosen])


@dataclass(frozen=True)
class _Window:
    """Inputs are tokens start .. start + length - 1 of the split (`given` instead of the first where that is not
    None), targets the ones after them; the first `skip` targets were predicted by an earlier window. `slot` is the
    document's place among the chosen ones."""

    slot: int
    start: int
    length: int
    skip: int
    given: int | None


def _check_vocabulary(model: nn.Module, data: TokenData) -> None:
    config: Any = model.config
    if data.vocab_size > config.vocab_size:
        raise UserError(
            f"{data.folder}: tokenized for a vocabulary of {data.vocab_size}, the model has {config.vocab_size}: "
            "they do not belong together"
        )


def _choose(data: TokenData, groups: Integers, limit_tokens: int | None) -> Integers:
    """The documents to score, by index, rising."""
    lengths = np.diff(data.document_starts())
    if len(lengths) == 0 or data.bytes == 0:
        raise UserError(f"{data.folder}: no {data.split} text to predict; raise the share that is held out")
    if limit_tokens is None or lengths.sum() <= limit_tokens:
        return np.arange(len(lengths))
    order = _in_turns(groups, last=lengths > limit_tokens / MIN_UNITS)
    chosen, left, shortest = [], limit_tokens, int(lengths.min())
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length <= left:
            chosen.append(document)
            left -= length
        if left < shortest:
            break
    return np.sort(np.array(chosen or order[:1], dtype=np.int64))


def _in_turns(groups: Integers, *, last: npt.NDArray[np.bool_]) -> Integers:
    """All documents, by index: in a random order, always the same, each group's first, each group's second, ... Those
    that are to come `last` do so within their group and within the turn."""
    order = np.random.default_rng(0).permutation(len(groups))
    order = order[np.argsort(last[order], kind="stable")]
    _, group, sizes = np.unique(groups[order], return_inverse=True, return_counts=True)
    turn = np.empty(len(order), dtype=np.int64)
    turn[np.argsort(group, kind="stable")] = np.concatenate([np.arange(size) for size in sizes])
    found: Integers = order[np.argsort(turn, kind="stable")]
    return found


def _windows(data: TokenData, chosen: Integers, sequence_length: int, stride: int) -> list[_Window]:
    """All windows, longest first, so that those of a batch are about equally long."""
    tokenizer = data.manifest.tokenizer
    given = tokenizer.eos if tokenizer.bos is None else None
    windows = []
    starts = data.document_starts()
    for slot, document in enumerate(chosen.tolist()):
        first, end = int(starts[document]), int(starts[document + 1])
        begin = first - 1 if given is not None else first  # the token that is given stands before the document
        targets = end - 1 - begin
        done = 0
        for offset in range(0, targets, stride):
            if offset and offset + sequence_length - stride >= targets:
                break  # the window before it has reached the end
            length = min(sequence_length, targets - offset)
            windows.append(_Window(slot, begin + offset, length, done - offset, None if offset else given))
            done = offset + length
    return sorted(windows, key=lambda window: -window.length)


def _batches(windows: list[_Window], size: int) -> Iterator[list[_Window]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _read(data: TokenData, rows: list[_Window]) -> tuple[Tensor, Tensor]:
    """-> inputs and targets, int64 [rows, longest], padded on the right; targets that do not count are -100."""
    width = max(row.length for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        if row.given is None:
            read = torch.from_numpy(data.read(row.start, row.length + 1))
        else:
            read = torch.from_numpy(np.concatenate([[row.given], data.read(row.start + 1, row.length)]))
        ids[i, : row.length] = read[:-1]
        targets[i, row.skip : row.length] = read[1 + row.skip :]
    return ids, targets


def _row_nats(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Sum of -ln p over the targets that count: float64 [rows]. Padding stands to the right of all that is read."""
    logits = model(input_ids=ids, use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return losses.view_as(targets).double().sum(-1)


@contextmanager
def _evaluating(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The model in evaluation mode on `device`, without gradients; its mode is put back."""
    was_training = model.training
    if device is not None:
        model.to(device)
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


# --- packages -----------------------------------------------------------------------------------------


def package_groups(data: TokenData) -> Integers | None:
    """Which documents of the split are files of one installed package (of the standard library: of one top-level
    module), for `groups`: int64 [documents]. None where any document is not such a file. Raises UserError for a
    damaged table of files."""
    table = data.manifest.files
    if table is None:
        return None
    units, sizes = [], []
    for number, row in read_journal(data.folder / table.file):
        try:
            if row["split"] == data.split:
                units.append(_unit(row["package"], row["file"]))
                sizes.append(int(row["bytes"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{data.folder / table.file}:{number}: not a file of a package: {error!r}") from error
    if not np.array_equal(sizes, data.document_bytes()):
        return None
    _, groups = np.unique(units, return_inverse=True)
    return groups.astype(np.int64)


def _unit(package: str, file: str) -> str:
    """What was held out as a whole: a package, or a module of the standard library."""
    if package != STANDARD_LIBRARY:
        return package
    return package + "/" + file.removeprefix(f"{package}/").partition("/")[0].removesuffix(".py")


# --- summing up ---------------------------------------------------------------------------------------


def summarise(scores: DocumentScores) -> HeldOut:
    """The ratio over all documents, and its 95% interval by bootstrap over groups (seeded: always the same); none for
    fewer than MIN_UNITS groups."""
    nats, size = _by_group(scores, scores.nats), _by_group(scores, scores.bytes.astype(np.float64))
    ratios = _resampled(nats, size) / math.log(2)
    low, high = _interval(ratios)
    total = math.fsum(scores.nats)
    return HeldOut(
        bits_per_byte=total / math.log(2) / int(scores.bytes.sum()),
        low=low,
        high=high,
        nats_per_token=total / int(scores.tokens.sum()),
        tokens=int(scores.tokens.sum()),
        bytes=int(scores.bytes.sum()),
        documents=len(scores.index),
        units=len(nats),
    )


def difference(scores: DocumentScores, base: DocumentScores) -> tuple[float, float | None, float | None]:
    """Bits per byte of `scores` less those of `base`, with the 95% interval of the difference: both models meet the
    same documents in every resample, so what is hard for both cancels. No interval for fewer than MIN_UNITS groups.
    Raises ValueError for different documents."""
    if not np.array_equal(scores.index, base.index) or not np.array_equal(scores.bytes, base.bytes):
        raise ValueError("the two models were scored on different documents")
    delta, size = _by_group(scores, scores.nats - base.nats), _by_group(scores, scores.bytes.astype(np.float64))
    low, high = _interval(_resampled(delta, size) / math.log(2))
    return float(math.fsum(scores.nats - base.nats) / math.log(2) / scores.bytes.sum()), low, high


def _by_group(scores: DocumentScores, values: Floats) -> Floats:
    """Sums [groups] of values [documents]."""
    _, group = np.unique(scores.group, return_inverse=True)
    return np.bincount(group, weights=values).astype(np.float64)


def _resampled(above: Floats, below: Floats, *, seed: int = 0) -> Floats:
    """Ratios of the sums of as many groups, drawn with replacement: [RESAMPLES], or none for fewer than MIN_UNITS
    groups."""
    count = len(above)
    if count < MIN_UNITS:
        return np.empty(0)
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(RESAMPLES // 100):  # in portions, so that the table of draws stays small
        times = rng.multinomial(count, np.full(count, 1 / count), size=100)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append((times @ above) / (times @ below))
    found = np.concatenate(ratios)
    return found[np.isfinite(found)]  # a draw of empty documents alone has no ratio


def _interval(ratios: Floats) -> tuple[float | None, float | None]:
    if len(ratios) == 0:
        return None, None
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
