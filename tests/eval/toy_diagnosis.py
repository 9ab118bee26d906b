"""Diagnoses of no model at all: run directories as `plt-eval diagnose` leaves them, with numbers that a formula gave.

Real schemas and real summaries (plt_diagnostics.synthesis) over made-up rows: what is drawn can be checked by value.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from plt_diagnostics.heads import SCHEMA as HEADS_SCHEMA
from plt_diagnostics.registry import VERSION
from plt_diagnostics.synthesis import summarise
from plt_diagnostics.tally import SCHEMA
from plt_eval.diagnosis.records import DataRecord, DiagnosisIdentity, DiagnosisManifest, ModelRecord
from plt_eval.diagnosis.store import HEADS, LOOPS, SUMMARY
from plt_eval.journal import write_atomically
from plt_eval.store import MANIFEST

FIRST_OF = {"angular_change": 2, "offset_cost": 2, "attention_kl": 2, "gate": 2, "output_shift": 2, "peak_loop": 2}
DEFAULTS = {
    "step_size": "raw",
    "angular_change": "raw",
    "effective_rank": "normed",
    "fixed_point_gap": "raw/as_next",
    "offset_cost": "normed",
    "attention_entropy": "mixed",
    "attention_kl": "mixed",
    "head_rank": "",
    "head_cosine": "",
    "gate": "",
    "logit_lens_rank": "",
    "next_token_nll": "",
    "output_shift": "",
    "output_entropy": "",
    "peak_loop": "",
}
OTHERS = {"step_size": "normed", "offset_cost": "raw", "attention_entropy": "local", "effective_rank": "raw"}
SAMPLES = 12
HEADS_EACH = 4
START = datetime(2026, 1, 1, tzinfo=UTC)


def mean(measurement: str, loops: int, loop: int) -> float:
    """What every sample's values lie around."""
    if measurement == "peak_loop":
        return 1.0 / (loops - 1)
    base = 2.0 + list(DEFAULTS).index(measurement)
    scaled = base * (1 + 0.1 * loops) * 0.8**loop
    bounded = {"angular_change": math.cos(loop + loops), "gate": 0.3 + 0.1 * loop, "head_cosine": 0.2 + 0.1 * loop}
    return bounded.get(measurement, scaled)


def write_diagnosis(
    root: Path,
    label: str = "toy",
    loops: int = 4,
    *,
    data: str = "python",
    started: int = 0,
    status: str = "complete",
    measurements: Sequence[str] = tuple(DEFAULTS),
    loop_mode: str | None = "plt",
) -> Path:
    """A diagnosis of `label` at `loops`, begun `started` minutes after the first."""
    identity = DiagnosisIdentity(
        model=label,
        weights_sha256=hashlib.sha256(label.encode()).hexdigest(),
        config_sha256="0" * 64,
        loops=loops,
        loop_mode=loop_mode,
        dtype="float32",
        measurements=tuple(measurements),
        measurements_version=VERSION,
        data=data,
        data_sha256=hashlib.sha256(data.encode()).hexdigest(),
        tokenizer_sha256="0" * 64,
        sequence_length=128,
        samples=SAMPLES,
        seed=0,
    )
    folder = root / f"{identity.default_run_id()}-{started}"
    folder.mkdir(parents=True)
    write_atomically(folder / MANIFEST, _manifest(folder.name, identity, started, status).model_dump_json())
    if status != "complete":
        return folder
    rows = pa.Table.from_pylist(list(_rows(loops, measurements)), schema=SCHEMA)
    parquet.write_table(rows, folder / LOOPS)
    parquet.write_table(pa.Table.from_pylist(list(_heads(loops)), schema=HEADS_SCHEMA), folder / HEADS)
    summarise(rows.to_pandas(), resamples=200).to_parquet(folder / SUMMARY)
    return folder


def _manifest(run_id: str, identity: DiagnosisIdentity, started: int, status: str) -> DiagnosisManifest:
    family, _, member = identity.model.partition(":r")
    return DiagnosisManifest.model_validate(
        {
            "run_id": run_id,
            "identity": identity,
            "identity_sha256": identity.sha256(),
            "model": ModelRecord(
                label=identity.model,
                folder="/nowhere",
                family=family if member else None,
                trained_loops=int(member) if member else None,
                weights_sha256=identity.weights_sha256,
                parameters=1000,
            ),
            "adapter": "plt",
            "shifts": True,
            "defaults": {name: DEFAULTS[name] for name in identity.measurements},
            "data": DataRecord(
                name=identity.data,
                source="/nowhere",
                sha256=identity.data_sha256,
                tokenizer="bytes",
                tokenizer_sha256="0" * 64,
                sequence_length=128,
                candidates=SAMPLES,
                windows=False,
            ),
            "device": "cpu",
            "batch_size": None,
            "status": status,
            "started": START + timedelta(minutes=started),
            "ended": START + timedelta(minutes=started, seconds=10),
            "total": SAMPLES,
            "done": SAMPLES,
            "tokens": SAMPLES * 128,
            "seconds": 1.0,
            "peak_memory_bytes": None,
            "sessions": (),
        }
    )


def _rows(loops: int, measurements: Sequence[str]) -> Iterator[dict[str, Any]]:
    noise = np.random.default_rng(loops)
    for sample in range(SAMPLES):
        for name in measurements:
            for loop in range(FIRST_OF.get(name, 1), loops + 1):
                value = mean(name, loops, loop) * (1 + 0.05 * noise.standard_normal())
                yield _row(sample, loop, name, DEFAULTS[name], value)
                if name in OTHERS:
                    yield _row(sample, loop, name, OTHERS[name], 1000 + value)
                if name == "attention_entropy":
                    yield {**_row(sample, loop, name, DEFAULTS[name], 2000 + value), "layer": 0}


def _row(sample: int, loop: int, measurement: str, variant: str, value: float) -> dict[str, Any]:
    where = {"sample": sample, "loop": loop, "measurement": measurement, "variant": variant}
    return {**where, "layer": None, "position": None, "value": value, "count": 128, "nonfinite": 0}


def _heads(loops: int) -> Iterator[dict[str, Any]]:
    for loop in range(1, loops + 1):
        for layer in range(2):
            for i in range(HEADS_EACH):
                for j in range(HEADS_EACH):
                    cosine = 1.0 if i == j else 0.1 * loop + 0.05 * layer + 0.02 * abs(i - j)
                    where = {"loop": loop, "layer": layer, "head_i": i, "head_j": j}
                    yield {**where, "cosine": cosine, "count": SAMPLES}
