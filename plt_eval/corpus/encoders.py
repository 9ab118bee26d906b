"""Text to token ids, as a data folder wants them: beginning (if the tokenizer has one), tokens, end.

    encoder = load_encoder("bytes")                   # or a folder with a Hugging Face tokenizer
    encoder.encode(["def f():\\n    pass\\n"])          # [int array]

A document's text never becomes a special token: "</s>" in a text is the characters, not the end of the document.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from plt_eval.errors import UserError
from plt_model.training.recipe import BYTES
from plt_model.training.shards import TokenizerRecord

Ids = npt.NDArray[Any]
_Batch = TypeVar("_Batch")

_BYTES_BOS, _BYTES_EOS, _BYTES_FIRST = 1, 2, 3
_BYTES_DEFINITION = "bytes: 0 <pad>, 1 <s>, 2 </s>, 3 + b for byte b of UTF-8"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Whatever of these a tokenizer folder has decides its ids."""


class Encoder(Protocol):
    """A tokenizer with its record for the manifest. May be handed to another process."""

    record: TokenizerRecord

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each document, beginning and end included: integer arrays [tokens]."""
        ...


class ByteEncoder:
    """What plt_model.tokenizer.byte_tokenizer gives, by arithmetic on the bytes: some hundred times as fast."""

    def __init__(self) -> None:
        self.record = TokenizerRecord(
            kind="bytes",
            sha256=hashlib.sha256(_BYTES_DEFINITION.encode()).hexdigest(),
            vocab_size=_BYTES_FIRST + 256,
            bos=_BYTES_BOS,
            eos=_BYTES_EOS,
        )

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [self._one(text.encode("utf-8")) for text in texts]

    def _one(self, data: bytes) -> Ids:
        ids = np.empty(len(data) + 2, dtype=np.uint16)
        ids[0], ids[-1] = _BYTES_BOS, _BYTES_EOS
        np.add(np.frombuffer(data, dtype=np.uint8), _BYTES_FIRST, out=ids[1:-1], dtype=np.uint16)
        return ids


class FolderEncoder:
    """A Hugging Face tokenizer in a folder, with its own Python code where that is trusted. Raises UserError when there
    is none, or it has no end of sequence."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.folder, self._trusted = folder, trust_remote_code
        self._tokenizer = _load_tokenizer(folder, trust_remote_code)
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise UserError(f"--tokenizer {folder}: it has no eos_token, which has to end every document")
        self.record = TokenizerRecord(
            kind="folder",
            path=str(folder),
            sha256=tokenizer_sha256(folder),
            vocab_size=1 + max(self._tokenizer.get_vocab().values()),
            bos=self._tokenizer.bos_token_id,
            eos=eos,
        )

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        rows = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        start = [] if self.record.bos is None else [self.record.bos]
        return [np.array([*start, *row, self.record.eos], dtype=np.int64) for row in rows["input_ids"]]

    def __reduce__(self) -> tuple[Callable[[], FolderEncoder], tuple[()]]:
        return partial(FolderEncoder, self.folder, trust_remote_code=self._trusted), ()


def load_encoder(tokenizer: str, *, trust_remote_code: bool = False) -> Encoder:
    """ "bytes", or the folder of a Hugging Face tokenizer. Raises UserError."""
    return ByteEncoder() if tokenizer == BYTES else FolderEncoder(Path(tokenizer), trust_remote_code=trust_remote_code)


def has_tokenizer(folder: Path) -> bool:
    """Whether any file of a tokenizer is in `folder`."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def tokenizer_sha256(folder: Path) -> str:
    """One hash over the names and contents of the files that decide a tokenizer's ids."""
    total = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            total.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def encode_in_order(
    encoder: Encoder, batches: Iterable[tuple[_Batch, list[str]]], *, workers: int
) -> Iterator[tuple[_Batch, list[Ids]]]:
    """Each batch with the ids of its texts, in the order given; `workers` processes encode (1: this one), with at most
    two batches a worker under way."""
    if workers == 1:
        for batch, texts in batches:
            yield batch, encoder.encode(texts)
        return
    with _pool(workers, encoder) as pool:
        waiting: deque[tuple[_Batch, Future[list[Ids]]]] = deque()
        try:
            for batch, texts in batches:
                waiting.append((batch, pool.submit(_encode_in_worker, texts)))
                if len(waiting) > 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int, encoder: Encoder) -> Executor:
    # Spawned: a forked process would inherit the locks of the tokenizer's threads.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(encoder,))


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_encoder = encoder


def _encode_in_worker(texts: list[str]) -> list[Ids]:
    assert _worker_encoder is not None
    return _worker_encoder.encode(texts)


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    if not folder.is_dir():
        raise UserError(f'--tokenizer {folder}: expected "{BYTES}" or a folder with a tokenizer, found no such folder')
    if not has_tokenizer(folder):
        raise UserError(f"--tokenizer {folder}: no tokenizer there, expected tokenizer.json or its like")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--tokenizer {folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
