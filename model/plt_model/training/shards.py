"""Tokens on disk: documents one after another in memory-mapped shards, and a manifest that says what they are.

    data = TokenData.open(Path("data/python"), "train")
    window = data.read(start=4096, count=257)      # int64 [257], across shard boundaries
    data.verify()                                  # every byte against its recorded SHA-256

A data folder holds `manifest.json` and, for each split that has documents, `train-00000.bin`, ... and `train.docs.bin`.
A shard is a flat run of little-endian uint16 (vocabulary up to 65,536) or uint32 token ids; all shards of a split but
its last hold the same number, and a document may go on from one into the next. A document is the tokenizer's
beginning-of-sequence id (if it has one), the tokens of its text, and the end-of-sequence id. The `.docs.bin` table
holds two little-endian uint64 a document: where it starts, in tokens of the split, and the UTF-8 bytes of its text.

ShardWriter writes one split, and can go on after a kill from a state that it gave before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION: Final = 1
"""Raised whenever a reader of the earlier version would misread a file."""

MANIFEST = "manifest.json"
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
Tokens = npt.NDArray[np.int64]

_UINT16_VOCAB = 1 << 16
_DOCUMENT_ROW = np.dtype([("start", "<u8"), ("bytes", "<u8")])


class ShardError(ValueError):
    """Token data that cannot be used: the message names the file, what was found and what was expected."""


# --- the manifest -------------------------------------------------------------------------------------


class Record(BaseModel):
    """What all records share: unknown fields are an error, as are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TokenizerRecord(Record):
    """What turned text into ids. `kind` is "bytes" or "folder"; `path` is the folder as it was given."""

    kind: Literal["bytes", "folder"]
    path: str | None = None
    sha256: str
    """Of the tokenizer's files, or of the definition of the byte tokenizer."""
    vocab_size: int = Field(ge=1)
    bos: int | None
    """Put in front of every document; None if the tokenizer has none."""
    eos: int
    """Ends every document."""


class ShardRecord(Record):
    """One file of tokens."""

    file: str
    tokens: int = Field(ge=1)
    sha256: str


class SplitRecord(Record):
    """One split. `tokens` counts the beginnings and ends of documents too; `bytes` is the UTF-8 text behind them."""

    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    documents: int = Field(ge=0)
    shards: tuple[ShardRecord, ...]
    docs: ShardRecord | None
    """The table of documents (its `tokens` counts rows); None when there are none."""

    @model_validator(mode="after")
    def _sums(self) -> Self:
        found = sum(shard.tokens for shard in self.shards)
        if found != self.tokens:
            raise ValueError(f"the shards hold {found} tokens, the split says {self.tokens}")
        if self.documents != (0 if self.docs is None else self.docs.tokens):
            raise ValueError("the table of documents and the split differ in the number of documents")
        return self


class Amount(Record):
    """So many documents, and the UTF-8 bytes of their text."""

    documents: int = Field(ge=0)
    bytes: int = Field(ge=0)


class PackageRecord(Amount):
    """What one installed package gave; all of it is in one split. `left_out` counts files beyond the limit of bytes."""

    package: str
    version: str
    licence: str
    split: Split
    left_out: int = Field(default=0, ge=0)


class SourceRecord(Record):
    """One source of documents. Read documents are kept, dropped as duplicates, or rejected for a reason."""

    kind: str
    location: str
    revision: str | None
    sha256: str
    """Of everything read: h := SHA-256(h | SHA-256(name of the record) | SHA-256(its text)), from 32 zero bytes."""
    read: int = Field(ge=0)
    kept: Amount
    duplicates: int = Field(ge=0)
    rejected: dict[str, int]
    """How many, by reason."""
    licences: dict[str, Amount]
    packages: tuple[PackageRecord, ...] = ()
    skipped_packages: dict[str, str] = Field(default_factory=dict)
    """Installed packages that were not read at all, and why."""


class FileTable(Record):
    """The side file with one line a document that came from an installed package."""

    file: str
    rows: int = Field(ge=0)
    sha256: str


class Manifest(Record):
    """Everything about a data folder but the tokens."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: datetime
    plt_eval_version: str
    command: tuple[str, ...]
    tokenizer: TokenizerRecord
    dtype: Literal["uint16", "uint32"]
    shard_tokens: int = Field(ge=1)
    held_out: float = Field(ge=0, lt=1)
    held_out_rule: str
    dedup_rule: str
    splits: dict[Split, SplitRecord]
    sources: tuple[SourceRecord, ...]
    files: FileTable | None
    request: dict[str, Any]
    """What decides the tokens, in full: an equal request need not be built again."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data folder. Raises ShardError."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ShardError(f"{folder} holds no token data: it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ShardError(f"{path}: {where}: {first['msg']} (of {error.error_count()} problems)") from error


def dtype_for(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest type of the format that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= _UINT16_VOCAB else "uint32"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- reading ------------------------------------------------------------------------------------------


class TokenData:
    """One split of a data folder, memory-mapped. Pickles as its path, so that worker processes map it themselves."""

    def __init__(self, folder: Path, split: Split, manifest: Manifest, shards: Sequence[npt.NDArray[Any]]) -> None:
        self.folder = folder
        self.split: Split = split
        self.manifest = manifest
        self._record = manifest.splits[split]
        self._shards = shards
        sizes = [shard.tokens for shard in self._record.shards]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    @classmethod
    def open(cls, folder: Path, split: Split) -> TokenData:
        """Open `folder`'s `split` after checking the manifest and the size of every file; a split without documents
        opens with 0 tokens. Raises ShardError. Hashes are checked by `verify`."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        if split not in manifest.splits:
            raise ShardError(f"{folder / MANIFEST}: no split {split}, it has {', '.join(sorted(manifest.splits))}")
        record = manifest.splits[split]
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        for file, size in _expected_sizes(record, dtype.itemsize):
            _check_size(folder / file, size)
        shards = [np.memmap(folder / shard.file, dtype=dtype, mode="r") for shard in record.shards]
        return cls(folder, split, manifest, shards)

    @property
    def tokens(self) -> int:
        """Tokens in all, those that begin and end documents included."""
        return self._record.tokens

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text behind the tokens."""
        return self._record.bytes

    @property
    def documents(self) -> int:
        return self._record.documents

    @property
    def vocab_size(self) -> int:
        return self.manifest.tokenizer.vocab_size

    def __len__(self) -> int:
        return self.tokens

    def __reduce__(self) -> tuple[Callable[[Path, Split], TokenData], tuple[Path, Split]]:
        return TokenData.open, (self.folder, self.split)

    def read(self, start: int, count: int) -> Tokens:
        """Tokens `start` to `start + count` of the split, int64 [count]. Raises IndexError outside of it."""
        if start < 0 or count < 0 or start + count > self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of {self.tokens} in {self.folder} {self.split}")
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < count:
            offset = start + done - int(self._starts[shard])
            piece = self._shards[shard][offset : offset + count - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return out

    def document_starts(self) -> Tokens:
        """Where documents start and the last one ends, in tokens: int64 [documents + 1]."""
        return np.append(self._document_table()["start"].astype(np.int64), self.tokens)

    def document_bytes(self) -> Tokens:
        """UTF-8 bytes of the text of each document: int64 [documents]."""
        return self._document_table()["bytes"].astype(np.int64)

    def read_document(self, index: int) -> Tokens:
        """One document with its beginning and end, int64. Raises IndexError."""
        table = self._document_table()
        if not 0 <= index < len(table):
            raise IndexError(f"document {index} of {len(table)} in {self.folder} {self.split}")
        start = int(table["start"][index])
        end = int(table["start"][index + 1]) if index + 1 < len(table) else self.tokens
        return self.read(start, end - start)

    def verify(self) -> None:
        """Read every file of the split against its SHA-256. Raises ShardError naming the first that differs."""
        for record in _files(self._record):
            found = file_sha256(self.folder / record.file)
            if found != record.sha256:
                raise ShardError(f"{self.folder / record.file}: SHA-256 is {found}, the manifest says {record.sha256}")

    def _document_table(self) -> npt.NDArray[Any]:
        if self._record.docs is None:
            return np.empty(0, dtype=_DOCUMENT_ROW)
        return np.memmap(self.folder / self._record.docs.file, dtype=_DOCUMENT_ROW, mode="r")


def _files(record: SplitRecord) -> list[ShardRecord]:
    return [*record.shards, *([] if record.docs is None else [record.docs])]


def _expected_sizes(record: SplitRecord, itemsize: int) -> list[tuple[str, int]]:
    sizes = [(shard.file, shard.tokens * itemsize) for shard in record.shards]
    if record.docs is not None:
        sizes.append((record.docs.file, record.docs.tokens * _DOCUMENT_ROW.itemsize))
    return sizes


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path}: missing, the manifest says {expected} bytes") from None
    if found != expected:
        raise ShardError(f"{path}: found {found} bytes, the manifest says {expected}")


# --- writing ------------------------------------------------------------------------------------------


class WriterState(Record):
    """How far a ShardWriter is: all that it needs to go on, besides its files."""

    closed: tuple[ShardRecord, ...] = ()
    open_tokens: int = Field(default=0, ge=0)
    documents: int = Field(default=0, ge=0)
    bytes: int = Field(default=0, ge=0)


class ShardWriter:
    """Writes the documents of one split into `folder`, `shard_tokens` a file.

        writer = ShardWriter(folder, "train", vocab_size=259, shard_tokens=1 << 26)
        writer.append(ids, text_bytes=5)
        state = writer.sync()                 # now safe against a kill: pass it as `state` to go on from here
        record = writer.close()

    The files are the same however often the writing was interrupted. They count for nothing before the folder has a
    manifest. Raises ShardError when the files are not those of `state`.
    """

    def __init__(
        self, folder: Path, split: Split, *, vocab_size: int, shard_tokens: int, state: WriterState | None = None
    ) -> None:
        if shard_tokens < 1:
            raise ShardError(f"shard_tokens must be at least 1, found {shard_tokens}")
        self.folder = folder
        self.split: Split = split
        self._vocab_size = vocab_size
        self._dtype = np.dtype(dtype_for(vocab_size)).newbyteorder("<")
        self._shard_tokens = shard_tokens
        state = state or WriterState()
        self._closed = list(state.closed)
        self._open_tokens = state.open_tokens
        self._documents = state.documents
        self._bytes = state.bytes
        self._tokens = sum(shard.tokens for shard in state.closed) + state.open_tokens
        self._discard_later_files()
        self._docs = open_at(folder / self._docs_name, state.documents * _DOCUMENT_ROW.itemsize)
        self._shard = open_at(folder / self._shard_name(), state.open_tokens * self._dtype.itemsize)

    @property
    def tokens(self) -> int:
        return self._tokens

    def append(self, ids: npt.NDArray[Any], *, text_bytes: int) -> None:
        """Add a document: all of its `ids`, beginning and end included, an integer array [tokens]; `text_bytes` of
        UTF-8 behind them. Raises ShardError for an empty document or an id outside of the vocabulary."""
        if len(ids) == 0:
            raise ShardError("a document must have at least one token, found none")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            wrong = low if low < 0 else high
            raise ShardError(f"token id {wrong} is outside of the vocabulary of {self._vocab_size}")
        row = np.array([(self._tokens, text_bytes)], dtype=_DOCUMENT_ROW)
        self._docs.write(row.tobytes())
        self._documents += 1
        self._bytes += text_bytes
        left = ids.astype(self._dtype)
        while len(left):
            room = self._shard_tokens - self._open_tokens
            piece, left = left[:room], left[room:]
            self._shard.write(piece.tobytes())
            self._open_tokens += len(piece)
            self._tokens += len(piece)
            if self._open_tokens == self._shard_tokens:
                self._close_shard()
                self._shard = open_at(self.folder / self._shard_name(), 0)

    def sync(self) -> WriterState:
        """Put everything appended on the disk, and say from where to go on."""
        sync_stream(self._docs)
        sync_stream(self._shard)
        return WriterState(
            closed=tuple(self._closed), open_tokens=self._open_tokens, documents=self._documents, bytes=self._bytes
        )

    def close(self) -> SplitRecord:
        """End the last shard and say what there is. A split without documents leaves no files."""
        if self._open_tokens:
            self._close_shard()
        else:
            self._shard.close()
            (self.folder / self._shard_name()).unlink()
        sync_stream(self._docs)
        self._docs.close()
        docs_path = self.folder / self._docs_name
        docs = None
        if self._documents:
            docs = ShardRecord(file=self._docs_name, tokens=self._documents, sha256=file_sha256(docs_path))
        else:
            docs_path.unlink()
        return SplitRecord(
            tokens=self._tokens,
            bytes=self._bytes,
            documents=self._documents,
            shards=tuple(self._closed),
            docs=docs,
        )

    def abandon(self) -> None:
        """Close the files as they are; what was not synced may be lost."""
        self._docs.close()
        self._shard.close()

    @property
    def _docs_name(self) -> str:
        return f"{self.split}.docs.bin"

    def _shard_name(self) -> str:
        return f"{self.split}-{len(self._closed):05d}.bin"

    def _close_shard(self) -> None:
        sync_stream(self._shard)
        self._shard.close()
        name = self._shard_name()
        sha256 = file_sha256(self.folder / name)
        self._closed.append(ShardRecord(file=name, tokens=self._open_tokens, sha256=sha256))
        self._open_tokens = 0

    def _discard_later_files(self) -> None:
        """Remove shards begun after the state was taken, and see that the closed ones are whole."""
        for shard in self._closed:
            _check_size(self.folder / shard.file, shard.tokens * self._dtype.itemsize)
        known = {shard.file for shard in self._closed} | {self._shard_name()}
        for path in self.folder.glob(f"{self.split}-*.bin"):
            if path.name not in known:
                path.unlink()


def open_at(path: Path, size: int) -> Any:
    """`path` opened for reading and writing, cut to its first `size` bytes and at their end. Raises ShardError when it
    has fewer."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    found = os.fstat(fd).st_size
    if found < size:
        os.close(fd)
        raise ShardError(f"{path}: found {found} bytes, expected at least {size}")
    os.ftruncate(fd, size)
    os.lseek(fd, size, os.SEEK_SET)
    return os.fdopen(fd, "r+b")


def sync_stream(stream: Any) -> None:
    """Have what was written to `stream` on the disk before going on."""
    stream.flush()
    os.fsync(stream.fileno())
