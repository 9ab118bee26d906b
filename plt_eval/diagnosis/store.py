"""Diagnoses on disk, opened for reading; run.py writes them.

for diagnosis in list_diagnoses(Path("results/runs")):
    print(diagnosis.manifest.run_id, diagnosis.state(), diagnosis.manifest.loops)
    summary = diagnosis.summary()          # a pandas table; loops.parquet is rows(), heads.parquet heads()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plt_eval.diagnosis.records import (
    DIAGNOSIS,
    SCHEMA_VERSION,
    DiagnosedSample,
    DiagnosisManifest,
    DiagnosisMetrics,
)
from plt_eval.errors import UserError
from plt_eval.records import Manifest
from plt_eval.store import (
    EVALUATION,
    MANIFEST,
    METRICS,
    SAMPLES,
    State,
    is_held,
    last_lines,
    open_folders,
    read_record,
    run_kind,
)

if TYPE_CHECKING:
    from pandas import DataFrame

LOOPS = "loops.parquet"
HEADS = "heads.parquet"
SUMMARY = "summary.parquet"
PARTS = "parts"


@dataclass(frozen=True)
class Diagnosis:
    """The run directory of a diagnosis, opened for reading. It may still be growing: the tables come last."""

    path: Path
    manifest: DiagnosisManifest

    def rows(self, measurements: Collection[str] | None = None) -> DataFrame:
        """loops.parquet, or its rows of some measurements: columns sample, loop, measurement, variant, layer, position,
        value, count, nonfinite, as plt_diagnostics.tally.SCHEMA says. Raises UserError while the diagnosis is not
        complete."""
        wanted = None if measurements is None else [("measurement", "in", set(measurements))]
        return _read_table(self, LOOPS, wanted)

    def heads(self) -> DataFrame:
        """heads.parquet: columns loop, layer, head_i, head_j, cosine, count. Raises UserError as rows does."""
        return _read_table(self, HEADS)

    def summary(self) -> DataFrame:
        """summary.parquet: plt_diagnostics.synthesis.summarise of rows(). Raises UserError as rows does."""
        return _read_table(self, SUMMARY)

    def check(self) -> None:
        """Raises UserError where a complete diagnosis lacks one of its tables, or one is damaged."""
        for name in (LOOPS, HEADS, SUMMARY):
            _read_table(self, name)
        self.metrics()

    def metrics(self) -> DiagnosisMetrics | None:
        """None until the diagnosis is complete. Raises UserError."""
        if self.manifest.status != "complete":
            return None
        return read_record(self.path / METRICS, DiagnosisMetrics, SCHEMA_VERSION)

    def samples(self) -> Iterator[DiagnosedSample]:
        """The last line on each sample, by index. Raises UserError."""
        lines = read_lines(self.path / SAMPLES)
        yield from (lines[index] for index in sorted(lines))

    def state(self) -> State:
        """The manifest's status, or "killed" for one that says "running" while nobody holds its lock."""
        status = self.manifest.status
        return "killed" if status == "running" and not is_held(self.path) else status

    def done(self) -> int:
        """Samples measured; counted in the journal while the run has not ended by itself. Raises UserError."""
        if self.manifest.status == "running":
            return len(read_lines(self.path / SAMPLES))
        return self.manifest.done


def open_diagnosis(path: Path) -> Diagnosis:
    """Open the run directory `path` for reading. Raises UserError when it is none, not a diagnosis, or damaged."""
    kind = run_kind(path)
    if kind != DIAGNOSIS:
        if kind == EVALUATION:
            read_record(path / MANIFEST, Manifest)  # a damaged manifest names no kind: say that it is damaged
        raise UserError(f"{path} is a run of kind {kind!r}: expected a {DIAGNOSIS}, as `plt-eval diagnose` writes it")
    return Diagnosis(path, read_record(path / MANIFEST, DiagnosisManifest, SCHEMA_VERSION))


def list_diagnoses(root: Path, *, problem: Callable[[UserError], None] | None = None) -> list[Diagnosis]:
    """All diagnoses below `root`, oldest first; none when `root` does not exist. One that cannot be read raises
    UserError, or is handed to `problem` and left out."""
    found = open_folders(root, DIAGNOSIS, open_diagnosis, problem)
    return sorted(found, key=lambda one: (one.manifest.started, one.manifest.run_id))


def read_lines(path: Path) -> dict[int, DiagnosedSample]:
    """The last line on each sample of a samples.jsonl, by index. Raises UserError."""
    return last_lines(path, DiagnosedSample, lambda line: line.index)


def _read_table(diagnosis: Diagnosis, name: str, wanted: list[tuple[str, str, set[str]]] | None = None) -> DataFrame:
    """A table of pandas: measurement and variant are categories; layer and position, where empty, are NA."""
    from pyarrow import ArrowInvalid, parquet

    path = diagnosis.path / name
    if diagnosis.manifest.status != "complete":
        raise UserError(f"{diagnosis.path}: not complete, it has no {name} yet: run the same command again to go on")
    if not path.is_file():
        raise UserError(f"{path}: missing, though the diagnosis is complete; delete the folder and diagnose again")
    try:
        frame = parquet.read_table(path, filters=wanted).to_pandas()
    except ArrowInvalid as error:
        raise UserError(f"{path}: damaged, no Parquet file; delete the folder and diagnose again") from error
    kinds = {"layer": "Int16", "position": "Int32"}
    found: DataFrame = frame.astype(
        {column: kind for column, kind in kinds.items() if column in frame and name != HEADS}
    )
    return found
