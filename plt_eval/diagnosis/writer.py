"""A diagnosis' run directory, held for writing: what is measured already, batches as they come, the tables at the end.

    with DiagnosisWriter.open(root, identity) as writer:
        writer.begin(manifest)
        writer.add_batch(rows, heads, lines)
        writer.finish()

A batch is stored in three steps: its rows, its head similarities, its lines in samples.jsonl. It counts when all three
are there: what a kill left of one that is not whole is removed when the directory is opened again, and measured again.
So the tables at the end are the same however often the run was interrupted. They are made of the parts in order; the
parts go when the manifest says that the run is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from plt_diagnostics.heads import SCHEMA as HEADS_SCHEMA
from plt_diagnostics.registry import MEASUREMENTS
from plt_diagnostics.synthesis import summarise
from plt_diagnostics.tally import SCHEMA as ROWS_SCHEMA
from plt_eval.diagnosis.records import (
    DiagnosedSample,
    DiagnosisIdentity,
    DiagnosisManifest,
    DiagnosisMetrics,
    LoopMetric,
)
from plt_eval.diagnosis.store import HEADS, LOOPS, PARTS, SUMMARY, open_diagnosis, read_lines
from plt_eval.errors import UserError
from plt_eval.journal import Journal, naming_full_disk, replacing, sync_folder, write_atomically
from plt_eval.records import Session
from plt_eval.store import MANIFEST, METRICS, SAMPLES, HeldFolder, as_json, check_run_id, check_same_run, holding, now

_MEMBERS = b"samples"
"""Where a part's file of rows says which samples it is of: one may have no rows."""


class DiagnosisWriter(HeldFolder):
    """A context manager, see HeldFolder. Its one journal is samples.jsonl."""

    def __init__(self, path: Path, lock: filelock.BaseFileLock, manifest: DiagnosisManifest | None) -> None:
        super().__init__(path, lock)
        self.manifest = manifest
        """None before the first begin()."""
        self.done: dict[int, DiagnosedSample] = {}
        """The samples that are measured, by index."""
        self._next_part = 1
        if self.complete:
            open_diagnosis(path).check()
            self.done = read_lines(path / SAMPLES)
            self._remove_parts()
        else:
            self._read_parts()

    @classmethod
    def open(cls, root: Path, identity: DiagnosisIdentity, *, run_id: str | None = None) -> DiagnosisWriter:
        """Find or make the directory of `identity` below `root` and hold it. Raises UserError when another process
        holds it, when it holds another run, or when it is damaged."""
        path = root / (identity.default_run_id() if run_id is None else check_run_id(run_id))
        with holding(path) as lock:
            manifest = None
            if (path / MANIFEST).exists():
                manifest = open_diagnosis(path).manifest
                check_same_run(path, manifest.identity, identity)
            return cls(path, lock, manifest)

    @property
    def complete(self) -> bool:
        return self.manifest is not None and self.manifest.status == "complete"

    # --- a session ----------------------------------------------------------------------------------------

    def begin(self, manifest: DiagnosisManifest) -> None:
        """Start a session: `manifest` is that of a first one, with the session as its only one; what an earlier one
        wrote goes on to count."""
        if self.manifest is not None:
            sessions = (*self.manifest.sessions, *manifest.sessions)
            manifest = manifest.model_copy(
                update={
                    "sessions": sessions,
                    "started": self.manifest.started,
                    "peak_memory_bytes": self.manifest.peak_memory_bytes,
                }
            )
        self._save(manifest, status="running", ended=None)
        with naming_full_disk(self.path):
            (self.path / PARTS).mkdir(exist_ok=True)
            sync_folder(self.path)
        self._journals = (Journal(self.path / SAMPLES),)

    def add_batch(self, rows: pa.Table, heads: pa.Table, lines: Sequence[DiagnosedSample]) -> None:
        """Store one measured batch: a line for each of its samples, whose `part` is decided here. Raises DiskFull."""
        assert self._journals, "begin() comes first"
        part = f"{self._next_part:06d}"
        members = json.dumps([line.index for line in lines])
        write_table(self._rows_file(part), rows.replace_schema_metadata({_MEMBERS: members}))
        write_table(self._heads_file(part), heads)
        for line in lines:
            line = line.model_copy(update={"part": part})
            self._journals[0].append(line.model_dump(mode="json"))
            self.done[line.index] = line
        self._next_part += 1

    def finish(self, peak_memory_bytes: int | None) -> None:
        """Every sample is measured: put the tables together and say that the run is complete. Raises DiskFull."""
        self._close_journals()
        assert self.manifest is not None, "begin() comes first"
        parts = sorted({line.part for line in self.done.values()})
        rows = merge_rows([parquet.read_table(self._rows_file(part)) for part in parts])
        heads = merge_heads([parquet.read_table(self._heads_file(part)) for part in parts])
        summary = summarise(rows.to_pandas())
        write_table(self.path / LOOPS, rows)
        write_table(self.path / HEADS, heads)
        write_table(self.path / SUMMARY, pa.Table.from_pandas(summary, preserve_index=False).replace_schema_metadata())
        metrics = DiagnosisMetrics(
            run_id=self.manifest.run_id,
            loops=self.manifest.loops,
            samples=len(self.done),
            tokens=sum(line.tokens for line in self.done.values()),
            rows=tuple(_metrics(summary)),
        )
        write_atomically(self.path / METRICS, as_json(metrics))
        self._end("complete", peak_memory_bytes)
        self._remove_parts()

    def abandon(self, peak_memory_bytes: int | None) -> None:
        """The session was cut short: say so in the manifest, unless it came to its end. Raises DiskFull."""
        self._close_journals()
        if self.complete:
            return
        self._end("incomplete", peak_memory_bytes)

    # --- the manifest -------------------------------------------------------------------------------------

    def _end(self, status: str, peak_memory_bytes: int | None) -> None:
        assert self.manifest is not None
        ended = now()
        *earlier, last = self.manifest.sessions
        sessions: tuple[Session, ...] = (*earlier, last.model_copy(update={"ended": ended}))
        peaks = [peak for peak in (self.manifest.peak_memory_bytes, peak_memory_bytes) if peak is not None]
        self._save(
            self.manifest,
            status=status,
            ended=ended,
            sessions=sessions,
            peak_memory_bytes=max(peaks, default=None),
        )

    def _save(self, manifest: DiagnosisManifest, **changes: Any) -> None:
        done = self.done.values()
        counted = {"done": len(done), "seconds": sum(line.seconds for line in done)}
        manifest = manifest.model_copy(update=counted | changes)
        write_atomically(self.path / MANIFEST, as_json(manifest))
        self.manifest = manifest

    # --- parts --------------------------------------------------------------------------------------------

    def _read_parts(self) -> None:
        """Find the batches that are whole, and remove what is left of others."""
        lines = read_lines(self.path / SAMPLES)
        by_part: dict[str, set[int]] = {}
        for line in lines.values():
            by_part.setdefault(line.part, set()).add(line.index)
        whole = {part for part, named in by_part.items() if self._holds(part, named)}
        self.done = {index: line for index, line in lines.items() if line.part in whole}
        keep = {file.name for part in whole for file in (self._rows_file(part), self._heads_file(part))}
        for path in (self.path / PARTS).glob("*"):
            if path.name not in keep:
                path.unlink()
        self._next_part = 1 + max((int(part) for part in whole), default=0)

    def _holds(self, part: str, samples: set[int]) -> bool:
        """Whether both files of the part are there, with exactly these samples."""
        rows = self._rows_file(part)
        if not rows.is_file() or not self._heads_file(part).is_file():
            return False
        try:
            members = parquet.read_schema(rows).metadata[_MEMBERS]
        except (pa.ArrowInvalid, KeyError, TypeError) as error:
            raise UserError(f"{rows}: damaged: {' '.join(str(error).split())}; delete it to measure again") from error
        return set(json.loads(members)) == samples

    def _remove_parts(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self.path / PARTS)

    def _rows_file(self, part: str) -> Path:
        return self.path / PARTS / f"{part}-loops.parquet"

    def _heads_file(self, part: str) -> Path:
        return self.path / PARTS / f"{part}-heads.parquet"


# --- tables -------------------------------------------------------------------------------------------


def write_table(path: Path, table: pa.Table) -> None:
    """Replace `path` by `table` in one step that a kill or a power cut cannot halve. Raises DiskFull."""
    with replacing(path) as stream:
        parquet.write_table(table, stream, compression="zstd")


def merge_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows: by sample, loop, measurement (in the order of the registry), variant, layer, position, those of the
    whole sample first."""
    rank = {name: i for i, name in enumerate(MEASUREMENTS)}
    plain = pa.concat_tables([_without_dictionaries(table) for table in tables])
    order = plain.select(["sample", "loop", "variant"])
    order = order.append_column("rank", pa.array([rank[name] for name in plain["measurement"].to_pylist()], pa.int16()))
    for name in ("layer", "position"):
        order = order.append_column(name, pc.fill_null(plain[name], -1))
    keys = [(name, "ascending") for name in ("sample", "loop", "rank", "variant", "layer", "position")]
    merged: pa.Table = plain.take(pc.sort_indices(order, sort_keys=keys)).combine_chunks()
    return merged.cast(ROWS_SCHEMA)


def _without_dictionaries(table: pa.Table) -> pa.Table:
    types = [pa.string() if pa.types.is_dictionary(field.type) else field.type for field in table.schema]
    return table.replace_schema_metadata().cast(pa.schema(list(zip(table.schema.names, types, strict=True))))


def merge_heads(tables: Sequence[pa.Table]) -> pa.Table:
    """Means over all samples, of tables of means with their counts: by loop, layer and heads."""
    keys = HEADS_SCHEMA.names[:4]
    every = pa.concat_tables(tables)
    every = every.append_column("sum", pc.multiply(every["cosine"], every["count"].cast(pa.float64())))
    sums = every.group_by(keys, use_threads=False).aggregate([("sum", "sum"), ("count", "sum")])
    sums = sums.sort_by([(key, "ascending") for key in keys])
    cosine = pc.divide(sums["sum_sum"], sums["count_sum"].cast(pa.float64()))
    columns = [*(sums[key] for key in keys), cosine, sums["count_sum"]]
    return pa.table(dict(zip(HEADS_SCHEMA.names, columns, strict=True)), schema=HEADS_SCHEMA).combine_chunks()


def _metrics(summary: Any) -> list[LoopMetric]:
    """The sample-level rows of a summary, in the order of the registry, its variants, and the loops."""
    rows = summary[summary["layer"].isna() & summary["position"].isna()].to_dict("records")
    place = {name: (i, list(kind.variants)) for i, (name, kind) in enumerate(MEASUREMENTS.items())}

    def order(row: Mapping[str, Any]) -> tuple[int, int, int]:
        rank, variants = place[row["measurement"]]
        return rank, variants.index(row["variant"]), row["loop"]

    return [
        LoopMetric(
            measurement=row["measurement"],
            variant=row["variant"],
            loop=int(row["loop"]),
            value=_number(row["value"]),
            low=_number(row["low"]),
            high=_number(row["high"]),
            n=int(row["n"]),
            nonfinite=int(row["nonfinite"]),
        )
        for row in sorted(rows, key=order)
    ]


def _number(value: float) -> float | None:
    return float(value) if value == value else None  # NaN is the one that is not itself
