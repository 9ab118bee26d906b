"""`plt-eval export`: a run in the format of evalplus or BFCL, or a checkpoint for a stock transformers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from plt_eval.cli._find import find_run
from plt_eval.errors import UserError


class Format(StrEnum):
    """What to write."""

    evalplus = "evalplus"
    bfcl = "bfcl"
    transformers = "transformers"


def export(
    source: Annotated[
        str, typer.Argument(help="A run (evalplus, bfcl), or a checkpoint folder or bundled model (transformers).")
    ],
    format_: Annotated[Format, typer.Option("--format", help="What to write.")],
    out: Annotated[Path, typer.Option(help="File (evalplus), folder (bfcl) or new folder (transformers) to write.")],
    partial: Annotated[bool, typer.Option("--partial", help="evalplus, bfcl: also an incomplete run.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="evalplus, bfcl: where runs are stored (default results/runs).")
    ] = None,
) -> None:
    """Write a run or a checkpoint for other tools.

    evalplus: a run as the official samples file. bfcl: a run of suite tools as the official result files.
    transformers: a checkpoint as a folder that a stock transformers loads with trust_remote_code=True.
    """
    if format_ is Format.evalplus:
        count = export_evalplus(source, out, results or Path("results/runs"), partial=partial)
        typer.echo(f"{out}: {count} samples")
        return
    if format_ is Format.bfcl:
        _export_bfcl(source, out, results or Path("results/runs"), partial=partial)
        return
    if partial or results is not None:
        raise UserError("--partial and --results have no effect with --format transformers")
    from plt_eval.models import names_family, resolve_model

    _export_transformers(resolve_model(source).folder if names_family(source) else Path(source), out)


def export_evalplus(source: str, out: Path, results: Path, *, partial: bool) -> int:
    """Write {"task_id", "solution"} lines of what was judged, in order; returns how many. Raises UserError."""
    import json

    from plt_eval.journal import naming_full_disk, write_atomically

    run = find_run(source, results)
    identity = run.manifest.identity
    if "evalplus" not in identity.suite_version:
        raise UserError(
            f"--format evalplus: {run.manifest.run_id} is a run of suite {identity.suite}, expected humaneval or mbpp"
        )
    done = sorted((s for s in run.samples() if s.error is None), key=lambda s: (_natural(s.sample_id), s.index))
    total = run.manifest.total
    if len(done) < total and not partial:
        raise UserError(
            f"{run.manifest.run_id} has {len(done)} of {total} samples; complete it, or pass --partial "
            "(evalplus itself refuses a file that leaves problems out)"
        )
    lines = [json.dumps({"task_id": s.sample_id, "solution": s.judged}) + "\n" for s in done]
    with naming_full_disk(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "".join(lines))
    return len(lines)


def _export_bfcl(source: str, out: Path, results: Path, *, partial: bool) -> None:
    """Raises UserError."""
    from plt_eval.tools_agent.results import STAND_INS, write_results

    run = find_run(source, results)
    categories = write_results(run, out, partial=partial)
    model = STAND_INS[run.manifest.identity.suite_version.rpartition("+")[2]]
    typer.echo(f"{out}: {len(categories)} categories, for bfcl-eval as")
    typer.echo(f"BFCL_PROJECT_ROOT={out} bfcl evaluate --model {model} --test-category {','.join(categories)}")


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that puts HumanEval/2 before HumanEval/10."""
    import re

    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _export_transformers(source: Path, out: Path) -> None:
    from plt_model.export import export_for_transformers

    try:
        written = export_for_transformers(source, out)
    except ValueError as error:  # what it raises for the user's mistakes
        raise UserError(str(error)) from error
    typer.echo(f"{out}: {len(written)} files; load it with trust_remote_code=True")
