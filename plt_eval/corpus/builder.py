"""Sources x tokenizer -> a data folder: read, drop duplicates, split, tokenise, write, and say what was done.

    manifest = build([parse_source({"kind": "installed"}, "here")], "bytes", Path("data/python"), name="python")

A build that was stopped or killed goes on where it stood, and ends with the same files as one that was not: what is
done lies in OUT/.build with a state that is replaced whole every few seconds, and whatever came after the state is cut
off. The manifest comes last, so a folder has it only when everything is there. Asking again for what is complete only
reads the manifest; asking for something else in the same folder is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

import filelock
from pydantic import Field, ValidationError
from rich.console import Console

from plt_eval.corpus.documents import (
    DEDUP_RULE,
    HELD_OUT_RULE,
    Document,
    Reading,
    Rejected,
    digest,
    normalised,
    split_of,
)
from plt_eval.corpus.encoders import Encoder, Ids, encode_in_order, load_encoder
from plt_eval.corpus.progress import BuildProgress
from plt_eval.corpus.sources import Source, parse_source
from plt_eval.errors import UserError
from plt_eval.journal import naming_full_disk, sync_folder, write_atomically
from plt_model.training.recipe import BYTES
from plt_model.training.shards import (
    MANIFEST,
    SPLITS,
    Amount,
    FileTable,
    Manifest,
    PackageRecord,
    Record,
    ShardError,
    ShardWriter,
    SourceRecord,
    Split,
    SplitRecord,
    TokenData,
    WriterState,
    dtype_for,
    file_sha256,
    open_at,
    read_manifest,
    sync_stream,
)

HELD_OUT = 0.01
SHARD_TOKENS = 1 << 27
WORK = ".build"
FILES = "files.jsonl"
SAVE_EVERY_S = 5.0
"""At most so much work is done again after a kill, in seconds."""

_STATE = "state.json"
_SEEN = "seen.bin"
_LOCK = ".lock"
_KEY_BYTES = 16
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20

Number = TypeVar("Number", int, float)


class BuildInterrupted(KeyboardInterrupt):
    """Ctrl-C; what was done is stored, and the message says how to go on."""


class RecipeEntry(Protocol):
    """What this needs of an entry of a recipe's data."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> dict[str, Any] | None: ...


class RecipeData(Protocol):
    """What this needs of a recipe."""

    @property
    def tokenizer(self) -> str: ...

    @property
    def data(self) -> Sequence[RecipeEntry]: ...


def build_recipe_data(
    recipe: RecipeData,
    out: Path,
    console: Console | None = None,
    *,
    held_out: float | None = None,
    shard_tokens: int | None = None,
    workers: int = 1,
    command: Sequence[str] = (),
) -> dict[str, Manifest]:
    """Build every entry of the recipe's data in `out`/NAME: goes on with what was begun, and leaves alone what is
    complete. An entry without a source has to be there already.

    `held_out` and `shard_tokens` as in `build`; None is what the entry's folder was begun with, for a new one what the
    first other entry was, and for all new ones the default. Raises UserError and BuildInterrupted.
    """
    sources = {
        entry.name: None if entry.source is None else parse_source(entry.source, f"recipe: data entry {entry.name}")
        for entry in recipe.data
    }
    begun = {name: _stored_request(out / name) for name, source in sources.items() if source is not None}
    manifests = {}
    for name, source in sources.items():
        folder = out / name
        if source is None:
            manifests[name] = _built_elsewhere(folder, name, recipe.tokenizer)
            continue
        earlier = [begun[name], *begun.values()]
        manifests[name] = build(
            [source],
            recipe.tokenizer,
            folder,
            name=name,
            held_out=_stored(earlier, "held_out", HELD_OUT) if held_out is None else held_out,
            shard_tokens=_stored(earlier, "shard_tokens", SHARD_TOKENS) if shard_tokens is None else shard_tokens,
            workers=workers,
            console=console,
            command=command,
        )
    return manifests


def build(
    sources: Sequence[Source],
    tokenizer: str,
    out: Path,
    *,
    name: str,
    held_out: float = HELD_OUT,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
    console: Console | None = None,
    command: Sequence[str] = (),
) -> Manifest:
    """Make `out` the data folder of `sources`, in this order, by `tokenizer` ("bytes" or a folder).

    `held_out` is the share of documents kept from training, `shard_tokens` the tokens a file, `workers` the processes
    that tokenise. Progress goes to `console` (stderr). Raises UserError and BuildInterrupted; what was done until then
    is stored, and the same call goes on with it.
    """
    _check_arguments(sources, tokenizer, held_out, shard_tokens, workers)
    console = console or Console(stderr=True)
    encoder = load_encoder(tokenizer)
    plan = _Plan(tuple(sources), encoder, out, name, held_out, shard_tokens, workers, tuple(command))
    stored = _complete(out, plan.request())
    if stored is not None and not (out / WORK).exists():
        return stored  # without the lock: several trainings may read the same data
    with _locked(out):
        stored = _complete(out, plan.request())
        if stored is not None:
            shutil.rmtree(out / WORK, ignore_errors=True)  # all that a kill at the very end can leave
            return stored
        try:
            with naming_full_disk(out):
                return _Build(plan, console).run()
        except ShardError as error:
            raise UserError(f"{error}; delete {out / WORK} to begin again") from error


@dataclass(frozen=True)
class _Plan:
    """What was asked for."""

    sources: tuple[Source, ...]
    encoder: Encoder
    out: Path
    name: str
    held_out: float
    shard_tokens: int
    workers: int
    command: tuple[str, ...]

    def request(self) -> dict[str, Any]:
        """All that decides the files, as JSON types."""
        return {
            "name": self.name,
            "sources": [source.request() for source in self.sources],
            "tokenizer": self.encoder.record.model_dump(mode="json", exclude={"path"}),
            "held_out": self.held_out,
            "held_out_rule": HELD_OUT_RULE,
            "dedup_rule": DEDUP_RULE,
            "shard_tokens": self.shard_tokens,
        }


# --- the state between sessions -----------------------------------------------------------------------


class _SourceState(Record):
    """How far one source has been read, and what came of it."""

    fingerprint: str
    revision: str | None
    read: int = 0
    size: int = 0
    kept: Amount = Amount(documents=0, bytes=0)
    duplicates: int = 0
    rejected: dict[str, int] = Field(default_factory=dict)
    licences: dict[str, Amount] = Field(default_factory=dict)
    packages: dict[str, PackageRecord] = Field(default_factory=dict)
    sha256: str = "00" * 32
    done: bool = False


class _State(Record):
    """Everything needed to go on: the files of the build count up to these lengths."""

    request: dict[str, Any]
    sources: tuple[_SourceState, ...] = ()
    writers: dict[Split, WriterState] = Field(default_factory=dict)
    seen: int = 0
    files_bytes: int = 0
    files_rows: int = 0


@dataclass
class _Tally:
    """A source's state while it changes."""

    fingerprint: str
    revision: str | None
    read: int = 0
    size: int = 0
    documents: int = 0
    bytes: int = 0
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    licences: dict[str, list[int]] = field(default_factory=dict)
    packages: dict[str, PackageRecord] = field(default_factory=dict)
    chain: str = "00" * 32
    done: bool = False

    @classmethod
    def of(cls, state: _SourceState) -> _Tally:
        return cls(
            fingerprint=state.fingerprint,
            revision=state.revision,
            read=state.read,
            size=state.size,
            documents=state.kept.documents,
            bytes=state.kept.bytes,
            duplicates=state.duplicates,
            rejected=Counter(state.rejected),
            licences={name: [amount.documents, amount.bytes] for name, amount in state.licences.items()},
            packages=dict(state.packages),
            chain=state.sha256,
            done=state.done,
        )

    def state(self) -> _SourceState:
        return _SourceState(
            fingerprint=self.fingerprint,
            revision=self.revision,
            read=self.read,
            size=self.size,
            kept=Amount(documents=self.documents, bytes=self.bytes),
            duplicates=self.duplicates,
            rejected=dict(sorted(self.rejected.items())),
            licences={name: Amount(documents=n, bytes=size) for name, (n, size) in sorted(self.licences.items())},
            packages=self.packages,
            sha256=self.chain,
            done=self.done,
        )

    def keep(self, kept: _Kept) -> None:
        document, size = kept.document, kept.text_bytes
        self.documents += 1
        self.bytes += size
        amount = self.licences.setdefault(document.licence, [0, 0])
        amount[0] += 1
        amount[1] += size
        package = document.package
        if package is None:
            return
        row = self.packages.get(package.unit) or PackageRecord(
            package=package.unit,
            version=package.version,
            licence=document.licence,
            split=kept.split,
            documents=0,
            bytes=0,
        )
        self.packages[package.unit] = row.model_copy(update={"documents": row.documents + 1, "bytes": row.bytes + size})


# --- the work -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """A document that goes into a split."""

    document: Document
    split: Split
    key: bytes
    text_bytes: int


@dataclass
class _Batch:
    """Some records of one source, judged; they are stored together or not at all."""

    source: int
    read: int = 0
    size: int = 0
    chain: str = ""
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    kept: list[_Kept] = field(default_factory=list)
    last: bool = False

    def texts(self) -> list[str]:
        return [kept.document.text for kept in self.kept]


class _Build:
    """One session of a build."""

    def __init__(self, plan: _Plan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._work = plan.out / WORK
        self._request = plan.request()

    def run(self) -> Manifest:
        if not (self._work / MANIFEST).exists():
            self._work.mkdir(parents=True, exist_ok=True)
            self._write()
        return self._publish()

    def _write(self) -> None:
        """Read every source to its end, and leave the files and the manifest in the work folder."""
        state = self._load_state()
        self._readings = self._open_sources(state)
        self._tallies = [_Tally.of(one) for one in state.sources]
        for reading in self._readings[len(self._tallies) :]:
            self._tallies.append(_Tally(reading.fingerprint, reading.revision))
        self._writers = self._open_writers(state)
        self._seen = _SeenTexts(self._work / _SEEN, state.seen)
        self._files = _FileRows(self._work / FILES, state.files_bytes, state.files_rows)
        self._save()  # from here on the build is bound to its input
        try:
            self._copy()
        except KeyboardInterrupt as error:
            raise BuildInterrupted(f"{self._plan.out}: stopped; run the same command again to go on") from error
        finally:
            for writer in self._writers.values():
                writer.abandon()
            self._seen.close()
            self._files.close()
        self._seal()

    def _copy(self) -> None:
        saved = time.monotonic()
        with BuildProgress(self._console, self._plan.name) as progress:
            batches = ((batch, batch.texts()) for batch in self._batches())
            for batch, rows in encode_in_order(self._plan.encoder, batches, workers=self._plan.workers):
                self._show(progress, batch)
                self._store(batch, rows)
                progress.advance(batch.size, len(batch.kept), sum(kept.text_bytes for kept in batch.kept))
                if time.monotonic() - saved >= SAVE_EVERY_S:
                    self._save()
                    saved = time.monotonic()
        self._save()

    def _show(self, progress: BuildProgress, batch: _Batch) -> None:
        """Begin the bar of the batch's source, if it is not there already."""
        tally = self._tallies[batch.source]
        number = f" {batch.source + 1}/{len(self._tallies)}" if len(self._tallies) > 1 else ""
        title = f"{self._plan.name}{number}: {self._plan.sources[batch.source].kind}"
        progress.source(title, self._readings[batch.source].total, tally.size, tally.documents)

    def _batches(self) -> Iterator[_Batch]:
        """The records that are still to be read. Runs ahead of what is stored."""
        for index, (reading, tally) in enumerate(zip(self._readings, self._tallies, strict=True)):
            if tally.done:
                continue
            chain = tally.chain
            batch, characters = _Batch(index), 0
            for record in reading.records(tally.read):
                chain = self._judge(record, batch, chain)
                characters += len(record.text) if isinstance(record, Document) else 0
                if batch.read >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                    yield batch
                    batch, characters = _Batch(index), 0
            batch.chain, batch.last = chain, True
            yield batch

    def _judge(self, record: Document | Rejected, batch: _Batch, chain: str) -> str:
        """Keep the record or not; returns the hash of everything read so far."""
        batch.read += 1
        batch.size += record.size
        data = b""
        if isinstance(record, Rejected):
            batch.rejected[record.reason] += 1
        else:
            try:
                data = record.text.encode("utf-8")
                self._judge_document(record, len(data), batch)
            except UnicodeEncodeError:
                data = record.text.encode("utf-8", "surrogatepass")
                batch.rejected["lone surrogates"] += 1
        name = hashlib.sha256(record.name.encode("utf-8", "surrogateescape")).digest()
        batch.chain = hashlib.sha256(bytes.fromhex(chain) + name + hashlib.sha256(data).digest()).hexdigest()
        return batch.chain

    def _judge_document(self, document: Document, text_bytes: int, batch: _Batch) -> None:
        normal = normalised(document.text)
        if not normal:
            batch.rejected["empty"] += 1
            return
        sha256 = digest(normal)
        if not self._seen.add(sha256[:_KEY_BYTES]):
            batch.duplicates += 1
            return
        split = split_of(document, sha256, self._plan.held_out)
        batch.kept.append(_Kept(document, split, sha256[:_KEY_BYTES], text_bytes))

    def _store(self, batch: _Batch, rows: list[Ids]) -> None:
        tally = self._tallies[batch.source]
        for kept, ids in zip(batch.kept, rows, strict=True):
            self._writers[kept.split].append(ids, text_bytes=kept.text_bytes)
            self._seen.store(kept.key)
            tally.keep(kept)
            if kept.document.package is not None:
                self._files.append(kept)
        tally.read += batch.read
        tally.size += batch.size
        tally.duplicates += batch.duplicates
        tally.rejected.update(batch.rejected)
        tally.chain = batch.chain
        tally.done = batch.last

    # --- between sessions ---------------------------------------------------------------------------------

    def _load_state(self) -> _State:
        path = self._work / _STATE
        if not path.exists():
            return _State(request=self._request)
        try:
            state = _State.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged state of a build; delete {self._work} to begin again") from error
        _refuse_difference(self._plan.out, state.request, self._request, f"delete {self._work} to begin again")
        return state

    def _open_sources(self, state: _State) -> list[Reading]:
        readings = []
        for source, known in itertools.zip_longest(self._plan.sources, state.sources):
            reading = source.open(self._plan.out, known.revision if known is not None else None)
            if known is not None and reading.fingerprint != known.fingerprint:
                raise UserError(
                    f"{reading.location}: changed since the build of {self._plan.out} began; "
                    f"delete {self._work} to begin again"
                )
            readings.append(reading)
        return readings

    def _open_writers(self, state: _State) -> dict[Split, ShardWriter]:
        return {
            split: ShardWriter(
                self._work,
                split,
                vocab_size=self._plan.encoder.record.vocab_size,
                shard_tokens=self._plan.shard_tokens,
                state=state.writers.get(split),
            )
            for split in SPLITS
        }

    def _save(self) -> None:
        state = _State(
            request=self._request,
            sources=tuple(tally.state() for tally in self._tallies),
            writers={split: writer.sync() for split, writer in self._writers.items()},
            seen=self._seen.sync(),
            files_bytes=self._files.sync(),
            files_rows=self._files.rows,
        )
        write_atomically(self._work / _STATE, state.model_dump_json())

    # --- the end ------------------------------------------------------------------------------------------

    def _seal(self) -> None:
        """Close the files from the last state, and write the manifest beside them."""
        state = self._load_state()
        splits = {split: writer.close() for split, writer in self._open_writers(state).items()}
        if not any(split.tokens for split in splits.values()):
            raise UserError(f"{self._plan.out}: the sources hold no document; {_rejections(state)}")
        manifest = self._manifest(state, splits)
        write_atomically(self._work / MANIFEST, manifest.model_dump_json(indent=2) + "\n")

    def _manifest(self, state: _State, splits: dict[Split, SplitRecord]) -> Manifest:
        plan = self._plan
        files = None
        if state.files_rows:
            files = FileTable(file=FILES, rows=state.files_rows, sha256=file_sha256(self._work / FILES))
        return Manifest(
            name=plan.name,
            created=datetime.now(UTC),
            plt_eval_version=metadata.version("plt-eval"),
            command=plan.command,
            tokenizer=plan.encoder.record,
            dtype=dtype_for(plan.encoder.record.vocab_size),
            shard_tokens=plan.shard_tokens,
            held_out=plan.held_out,
            held_out_rule=HELD_OUT_RULE,
            dedup_rule=DEDUP_RULE,
            splits=splits,
            sources=tuple(
                _source_record(source, reading, one)
                for source, reading, one in zip(plan.sources, self._readings, state.sources, strict=True)
            ),
            files=files,
            request=self._request,
        )

    def _publish(self) -> Manifest:
        """Move the finished files into the folder, the manifest last; goes on with a move that was cut short."""
        manifest = read_manifest(self._work)
        _refuse_difference(self._plan.out, manifest.request, self._request, f"delete {self._work} to begin again")
        names = [record.file for split in manifest.splits.values() for record in split.shards]
        names += [split.docs.file for split in manifest.splits.values() if split.docs is not None]
        names += [] if manifest.files is None else [manifest.files.file]
        for name in [*names, MANIFEST]:
            if (self._work / name).exists():
                os.replace(self._work / name, self._plan.out / name)
            if name == names[-1]:
                sync_folder(self._plan.out)
        sync_folder(self._plan.out)
        shutil.rmtree(self._work)
        return manifest


class _SeenTexts:
    """The keys of all texts kept, in memory and in a file; `store` follows `add` once the text is written."""

    def __init__(self, path: Path, count: int) -> None:
        self._stream = open_at(path, count * _KEY_BYTES)
        data = path.read_bytes()
        self._keys = {data[at : at + _KEY_BYTES] for at in range(0, len(data), _KEY_BYTES)}
        self._count = count

    def add(self, key: bytes) -> bool:
        """False when it was there."""
        if key in self._keys:
            return False
        self._keys.add(key)
        return True

    def store(self, key: bytes) -> None:
        self._stream.write(key)
        self._count += 1

    def sync(self) -> int:
        sync_stream(self._stream)
        return self._count

    def close(self) -> None:
        self._stream.close()


class _FileRows:
    """The table of files from installed packages, as JSON lines."""

    def __init__(self, path: Path, size: int, rows: int) -> None:
        self._stream = open_at(path, size)
        self._size = size
        self.rows = rows

    def append(self, kept: _Kept) -> None:
        package = kept.document.package
        assert package is not None
        row = {
            "file": kept.document.name,
            "package": package.name,
            "version": package.version,
            "licence": kept.document.licence,
            "sha256": hashlib.sha256(kept.document.text.encode("utf-8")).hexdigest(),
            "bytes": kept.text_bytes,
            "split": kept.split,
        }
        self._size += self._stream.write(json.dumps(row).encode("ascii") + b"\n")
        self.rows += 1

    def sync(self) -> int:
        sync_stream(self._stream)
        return self._size

    def close(self) -> None:
        self._stream.close()


# --- helpers ------------------------------------------------------------------------------------------


def _check_arguments(
    sources: Sequence[Source], tokenizer: str, held_out: float, shard_tokens: int, workers: int
) -> None:
    if not sources:
        raise UserError("--source: at least one is needed")
    if not 0 <= held_out < 1:
        raise UserError(f"--held-out {held_out}: expected a share from 0 to below 1")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens {shard_tokens}: expected at least 1")
    if workers < 1:
        raise UserError(f"--workers {workers}: expected at least 1")
    if workers > 1 and tokenizer == BYTES:
        raise UserError(f"--workers {workers} has no effect with the tokenizer {BYTES}: reading is what takes its time")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / _LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{out}: another process is building there") from None
    try:
        yield
    finally:
        lock.release()


def _complete(out: Path, request: dict[str, Any]) -> Manifest | None:
    """The manifest of a folder that holds just this. Raises UserError when it holds something else."""
    if not (out / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(out)
        _refuse_difference(out, manifest.request, request, "choose another folder")
        for split in manifest.splits:
            TokenData.open(out, split)
    except ShardError as error:
        raise UserError(f"{error}; delete {out} to build it again") from error
    return manifest


def _stored_request(out: Path) -> dict[str, Any]:
    """What the build in this folder was asked for, complete or not; empty without one, or when it is damaged."""
    found: dict[str, Any] = {}
    # In the order in which a build writes them, so that one that ends meanwhile is not missed; the last one counts.
    for path in (out / WORK / _STATE, out / WORK / MANIFEST, out / MANIFEST):
        record = _State if path.name == _STATE else Manifest
        with suppress(FileNotFoundError, ValueError):
            found = record.model_validate_json(path.read_text(encoding="utf-8")).request
    return found


def _stored(requests: Sequence[dict[str, Any]], name: str, default: Number) -> Number:
    """The number `name` of the first request that has it."""
    return next((request[name] for request in requests if isinstance(request.get(name), int | float)), default)


def _built_elsewhere(folder: Path, name: str, tokenizer: str) -> Manifest:
    try:
        manifest = read_manifest(folder)
    except ShardError as error:
        raise UserError(f"recipe: data entry {name} has no source, and {error}") from error
    if manifest.tokenizer.sha256 != load_encoder(tokenizer).record.sha256:
        found = manifest.tokenizer.path or manifest.tokenizer.kind
        raise UserError(f"{folder}: made with the tokenizer {found}, the recipe's is {tokenizer}, which differs")
    return manifest


def _refuse_difference(out: Path, stored: dict[str, Any], asked: dict[str, Any], advice: str) -> None:
    for name in asked:
        if stored.get(name) != asked[name]:
            there, here = (json.dumps(one.get(name))[:200] for one in (stored, asked))
            raise UserError(f"{out} holds another build: {name} is {there} there, asked for {here}; {advice}")


def _source_record(source: Source, reading: Reading, state: _SourceState) -> SourceRecord:
    return SourceRecord(
        kind=source.kind,
        location=reading.location,
        revision=state.revision,
        sha256=state.sha256,
        read=state.read,
        kept=state.kept,
        duplicates=state.duplicates,
        rejected=state.rejected,
        licences=state.licences,
        packages=tuple(
            row.model_copy(update={"left_out": reading.left_out.get(unit, 0)}) for unit, row in state.packages.items()
        ),
        skipped_packages=reading.skipped_packages,
    )


def _rejections(state: _State) -> str:
    reasons: Counter[str] = Counter()
    for source in state.sources:
        reasons.update(source.rejected)
    if not reasons:
        return "nothing was read"
    return "rejected: " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
