"""The answers of a run as result files of the official command.

    OUT/result/gpt-4o-2024-11-20/BFCL_v3_simple_result.json ...
    BFCL_PROJECT_ROOT=OUT bfcl evaluate --model gpt-4o-2024-11-20 --test-category simple

The command knows no models but those of its own list; the name says only how answers are read: as texts, or (-FC) as
calls.
"""

from __future__ import annotations

import json
from pathlib import Path

from plt_benchmarks.tools.scorer import result_of
from plt_benchmarks.tools.suite import CATEGORIES
from plt_eval.errors import UserError
from plt_eval.journal import naming_full_disk, write_atomically
from plt_eval.store import Run

STAND_INS = {"prompt": "gpt-4o-2024-11-20", "native": "gpt-4o-2024-11-20-FC"}


def write_results(run: Run, out: Path, *, partial: bool) -> list[str]:
    """Write one file a category; returns the categories. The command wants all problems of a category: others are
    refused, or with `partial` left out. Raises UserError."""
    identity = run.manifest.identity
    mode = identity.suite_version.rpartition("+")[2]
    if not identity.suite.startswith("tools") or mode not in STAND_INS:
        raise UserError(f"--format bfcl: {run.manifest.run_id} is a run of suite {identity.suite}, expected tools")
    if identity.n_samples > 1:
        raise UserError(f"--format bfcl: expected one answer a problem, found {identity.n_samples}")
    rows: dict[str, list[dict[str, object]]] = {}
    for sample in run.samples():
        if sample.error is None:
            category = sample.sample_id.rsplit("_", 1)[0]
            result = result_of(sample.judged, category, mode)
            rows.setdefault(category, []).append({"id": sample.sample_id, "result": result})
    if not run.manifest.data_revision.startswith("local:"):
        rows = _whole(rows, run.manifest.run_id, partial=partial)
    folder = out / "result" / STAND_INS[mode]
    with naming_full_disk(out):
        folder.mkdir(parents=True, exist_ok=True)
    for category, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        write_atomically(folder / f"BFCL_v3_{category}_result.json", lines)
    return list(rows)


def _whole(
    rows: dict[str, list[dict[str, object]]], run_id: str, *, partial: bool
) -> dict[str, list[dict[str, object]]]:
    cut = [category for category, found in rows.items() if len(found) < CATEGORIES[category]]
    if cut and not partial:
        found, wanted = len(rows[cut[0]]), CATEGORIES[cut[0]]
        raise UserError(
            f"{run_id} has {found} of {wanted} problems of {cut[0]}, and the official command wants all of a category; "
            "--partial leaves such categories out"
        )
    whole = {category: found for category, found in rows.items() if category not in cut}
    if not whole:
        raise UserError(f"{run_id} has no category with all of its problems")
    return whole
