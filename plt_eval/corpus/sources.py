"""Where documents come from: the `source` of a recipe's data entry, or --source on the command line.

    {kind: folder, path: src, glob: "**/*.py", licence: MIT}
    {kind: jsonl, path: "data/*.jsonl.gz", text: content, licence_field: license}
    {kind: parquet, path: data/train.parquet, text: text}
    {kind: hub, dataset: org/name, revision: main, split: train, text: content}
    {kind: installed, packages: [rich, attrs]}
    {kind: trace, seed: 0, programs: 60000}

Each source says by `open` what it will read, and then streams its records in an order that never changes, from any
record on: never is a corpus in memory.
"""

from __future__ import annotations

import glob as globbing
import gzip
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from plt_eval.corpus.documents import Document, Reading, Rejected
from plt_eval.errors import UserError, one_line

Records = Iterator[Document | Rejected]
UNKNOWN = "unknown"
"""The licence of a document for which none is given."""


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def open(self, out: Path, revision: str | None) -> Reading:
        """Find the input. Nothing below `out`, where the tokens go, is read; `revision` is the one that an earlier
        session of the same build settled on, if any. Raises UserError."""
        raise NotImplementedError

    def request(self) -> dict[str, Any]:
        """What decides the documents, with paths made absolute."""
        fields = self.model_dump(mode="json")
        if "path" in fields:
            fields["path"] = os.path.abspath(fields["path"])
        return fields


class FolderSource(_Source):
    """The files below `path` that match any pattern of `glob`; each is a document."""

    kind: Literal["folder"]
    path: str
    glob: Names = ("**/*",)
    licence: str = UNKNOWN

    def open(self, out: Path, revision: str | None) -> Reading:  # noqa: ARG002
        root = Path(self.path)
        if not root.is_dir():
            raise UserError(f"source folder: path {self.path} is not a folder")
        found = {path for pattern in self.glob for path in _globbed(root, pattern)}
        away = out.resolve()
        files = sorted(path for path in found if path.is_file() and not path.resolve().is_relative_to(away))
        if not files:
            raise UserError(f"source folder: no file below {self.path} matches {', '.join(self.glob)}")

        def records(start: int) -> Records:
            for path in files[start:]:
                yield _file_record(path, path.relative_to(root).as_posix(), self.licence)

        return Reading(str(root), None, _fingerprint(files), sum(path.stat().st_size for path in files), records)


class _Table(_Source):
    """Rows with a field of text. `path` may be a pattern. The licence is that of `licence_field` in each row, where one
    is named, else `licence`."""

    path: str
    text: str = "text"
    licence: str = UNKNOWN
    licence_field: str | None = None

    def _files(self, out: Path) -> list[Path]:
        away = out.resolve()
        names = [self.path] if Path(self.path).is_file() else sorted(globbing.glob(self.path, recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
        files = [path for path in files if not path.resolve().is_relative_to(away)]
        if not files:
            raise UserError(f"source {getattr(self, 'kind', '')}: no file is called {self.path}")
        return files


class JsonlSource(_Table):
    """JSON objects, one a line, plain or compressed by gzip (`.gz`)."""

    kind: Literal["jsonl"]

    def open(self, out: Path, revision: str | None) -> Reading:  # noqa: ARG002
        files = self._files(out)
        packed = any(path.suffix == ".gz" for path in files)
        total = None if packed else sum(path.stat().st_size for path in files)

        def records(start: int) -> Records:
            lines = ((path, *line) for path in files for line in _lines(path))
            for path, number, line in itertools.islice(lines, start, None):
                name = f"{path}:{number}"
                yield _row_record(name, _json_object(name, line), self, len(line))

        return Reading(self.path, None, _fingerprint(files), total, records)


class ParquetSource(_Table):
    """The rows of Parquet files; only the named columns are read."""

    kind: Literal["parquet"]

    def open(self, out: Path, revision: str | None) -> Reading:  # noqa: ARG002
        from pyarrow import parquet

        files = self._files(out)
        columns = [self.text, *([] if self.licence_field is None else [self.licence_field])]
        rows = []
        for path in files:
            with _parquet(path) as opened:
                missing = [column for column in columns if column not in opened.schema_arrow.names]
                if missing:
                    known = ", ".join(opened.schema_arrow.names)
                    raise UserError(f"{path}: no column {missing[0]}, it has {known}")
                rows.append(opened.metadata.num_rows)

        def records(start: int) -> Records:
            for path, count in zip(files, rows, strict=True):
                if start >= count:
                    start -= count
                    continue
                with parquet.ParquetFile(path) as opened:
                    batches = opened.iter_batches(batch_size=256, columns=columns)
                    every = (row for batch in batches for row in batch.to_pylist())
                    for number, row in enumerate(itertools.islice(every, start, None), start=start):
                        yield _row_record(f"{path}#{number}", row, self, 1)
                start = 0

        return Reading(self.path, None, _fingerprint(files), sum(rows), records)


class HubSource(_Source):
    """A dataset on the Hugging Face hub, or a dataset folder, streamed. Without a `revision` the newest is looked up
    once, recorded, and kept to."""

    kind: Literal["hub"]
    dataset: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    text: str = "text"
    licence: str = UNKNOWN
    licence_field: str | None = None

    def request(self) -> dict[str, Any]:
        local = Path(self.dataset).is_dir()
        return super().request() | ({"dataset": os.path.abspath(self.dataset)} if local else {})

    def open(self, out: Path, revision: str | None) -> Reading:  # noqa: ARG002
        local = Path(self.dataset).is_dir()
        commit = None if local else revision or _hub_commit(self.dataset, self.revision)
        fingerprint = _fingerprint(sorted(Path(self.dataset).rglob("*"))) if local else f"{self.dataset}@{commit}"
        rows = self._load(commit)
        features = rows.features
        if features is not None and self.text not in features:
            raise UserError(f"source hub: {self.dataset} has no field {self.text}, it has {', '.join(features)}")
        counted = (rows.info.splits or {}).get(self.split)
        total = counted.num_examples if counted is not None and counted.num_examples else None

        def records(start: int) -> Records:
            for number, row in enumerate(_streamed(self.dataset, rows.skip(start)), start=start):
                yield _row_record(f"{self.dataset}#{number}", row, self, 1)

        return Reading(self.dataset, commit, fingerprint, total, records)

    def _load(self, commit: str | None) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.dataset, self.config, split=self.split, revision=commit, streaming=True)
        except _hub_errors() as error:
            raise UserError(f"source hub: {self.dataset} cannot be opened: {one_line(error)}") from error


class InstalledSource(_Source):
    """Python source on this machine under permissive licences: see plt_eval.corpus.installed. `held_out` is the share
    of packages and top-level standard modules that are held out as a whole; `max_bytes_per_package` limits each."""

    kind: Literal["installed"]
    packages: Names | None = None
    max_bytes_per_package: int = Field(default=2_000_000, ge=1)
    held_out: Share = 0.04

    def open(self, out: Path, revision: str | None) -> Reading:  # noqa: ARG002
        from plt_eval.corpus.installed import open_installed

        return open_installed(self.packages, self.max_bytes_per_package, self.held_out)


class TraceSource(_Source):
    """Generated programs and what their variables come to: see plt_benchmarks.trace. No document is a program that the
    suite asks about."""

    kind: Literal["trace"]
    seed: int = Field(default=0, ge=0)
    programs: int = Field(ge=1)

    def request(self) -> dict[str, Any]:
        from plt_benchmarks.trace.programs import GENERATOR_VERSION

        return super().request() | {"generator": GENERATOR_VERSION}

    def open(self, out: Path, revision: str | None) -> Reading:  # noqa: ARG002
        from plt_benchmarks.trace.programs import (
            GENERATOR_VERSION,
            canonical,
            training_documents,
            without_assertions,
        )

        def records(start: int) -> Records:
            texts = enumerate(training_documents(self.seed, self.programs))
            for number, text in itertools.islice(texts, start, None):
                program = canonical(without_assertions(text))
                yield Document(str(number), text, "Apache-2.0", 1, key=program.encode("utf-8"))

        version = f"generator {GENERATOR_VERSION}"
        return Reading("plt_benchmarks.trace", version, version, self.programs, records)


Source = Annotated[
    FolderSource | JsonlSource | ParquetSource | HubSource | InstalledSource | TraceSource, Field(discriminator="kind")
]
KINDS = ("folder", "jsonl", "parquet", "hub", "installed", "trace")
_ADAPTER: TypeAdapter[Source] = TypeAdapter(Source)


def parse_source(fields: object, where: str) -> Source:
    """The source that a mapping describes. Raises UserError, with `where` it stands, for what does not fit."""
    if not isinstance(fields, dict):
        raise UserError(f"{where}: expected a mapping with a kind, found {type(fields).__name__}")
    kind = fields.get("kind")
    if kind not in KINDS:
        raise UserError(f"{where}: kind must be one of {', '.join(KINDS)}, found {kind!r}")
    try:
        return _ADAPTER.validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        found = "" if first["type"] == "missing" else f", found {first['input']!r}"
        raise UserError(f"{where}: {kind}: {field}: {first['msg']}{found}") from error


def parse_source_option(text: str) -> Source:
    """As --source writes it: kind=folder,path=src,glob=*.py,glob=*.pyi. Raises UserError."""
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--source {text}: expected name=value, found {part!r} (values cannot hold commas)")
        name, value = name.strip(), value.strip()
        if name in fields:
            earlier = fields[name]
            fields[name] = (*earlier, value) if isinstance(earlier, tuple) else (earlier, value)
        else:
            fields[name] = value
    return parse_source(fields, f"--source {text}")


# --- records ------------------------------------------------------------------------------------------


def _file_record(path: Path, name: str, licence: str) -> Document | Rejected:
    data = path.read_bytes()
    try:
        return Document(name, data.decode("utf-8-sig"), licence, len(data))
    except UnicodeDecodeError:
        return Rejected(name, "not UTF-8", len(data))


def _row_record(name: str, row: dict[str, Any], source: _Table | HubSource, size: int) -> Document | Rejected:
    if source.text not in row:
        raise UserError(f"{name}: no field {source.text}, it has {', '.join(map(str, row)) or 'none'}")
    text = row[source.text]
    if text is None:
        return Rejected(name, "no text", size)
    if not isinstance(text, str):
        raise UserError(f"{name}: field {source.text}: expected a string, found {type(text).__name__}")
    licence = source.licence
    if source.licence_field is not None:
        if source.licence_field not in row:
            raise UserError(f"{name}: no field {source.licence_field}, it has {', '.join(map(str, row))}")
        licence = _licence_name(row[source.licence_field])
    return Document(name, text, licence, size)


def _licence_name(value: object) -> str:
    """A licence, or a list of them, as one name."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " AND ".join(sorted(str(one) for one in value)) or UNKNOWN
    return str(value) if value else UNKNOWN


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file: {one_line(error)}") from error


def _json_object(name: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{name}: not JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected a JSON object, found {type(value).__name__}")
    return value


def _parquet(path: Path) -> Any:
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {one_line(error)}") from error


def _hub_commit(dataset: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
    except _hub_errors() as error:
        raise UserError(f"source hub: {dataset} at revision {revision or 'main'}: {one_line(error)}") from error
    if commit is None:
        raise UserError(f"source hub: {dataset} has no commit at revision {revision or 'main'}")
    return str(commit)


def _streamed(dataset: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; what goes wrong on the way is one line."""
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except _hub_errors() as error:
            why = f"{one_line(error)}; the same command goes on from here"
            raise UserError(f"source hub: {dataset}: {why}") from error
        yield row


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's libraries raise for a wrong name, a broken file or a network that is away."""
    from datasets.exceptions import DatasetsError

    # huggingface_hub has changed its HTTP library before: take the errors of whichever is loaded.
    clients = [sys.modules[name] for name in ("httpx", "httpx2", "requests") if name in sys.modules]
    network = [client.RequestException if client.__name__ == "requests" else client.HTTPError for client in clients]
    return (DatasetsError, OSError, ValueError, *network)


def _globbed(root: Path, pattern: str) -> Iterator[Path]:
    try:
        return root.glob(pattern)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"source folder: glob {pattern!r}: {error}") from error


def _fingerprint(files: Sequence[Path]) -> str:
    """Changes with any file's name, size or time of change."""
    stats = [(str(path.absolute()), path.stat()) for path in files if path.is_file()]
    lines = "\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
