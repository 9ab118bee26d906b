"""An estimate as tables for people and JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from plt_eval.estimate.constants import Range, load_constants
from plt_eval.estimate.evaluation import Plan, RunEstimate, total_wall
from plt_eval.estimate.memory import GIB
from plt_eval.estimate.training import TrainingEstimate, TrainingPlan
from plt_eval.estimate.workload import Workload


def duration(seconds: float) -> str:
    """As in "41 s", "12 min", "3.4 h", "2.1 d"."""
    for limit, size, unit in ((100, 1, "s"), (100 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds / 86400)} d"


def spanned(value: Range | None, form: Any = None) -> str:
    """The middle, with low and high below it."""
    if value is None:
        return "-"
    shown = form or _short
    if value.low == value.high:
        return str(shown(value.middle))
    return f"{shown(value.middle)}\n[{shown(value.low)}, {shown(value.high)}]"


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def size(value: float) -> str:
    """Bytes, as in "3.7 MiB", "14.2 GiB"."""
    return f"{value / GIB:,.1f} GiB" if value >= GIB / 10 else f"{value / 2**20:.3g} MiB"


# --- evaluation -----------------------------------------------------------------------------------------


def print_runs(
    console: Console, plan: Plan, work: Sequence[Workload], rows: Sequence[RunEstimate], *, explain: bool
) -> None:
    device = plan.speed.device
    title = (
        f"{plan.shape.name}, {plan.dtype}, {plan.engine}: {plan.machines} x {plan.gpus} x {device.name}"
        f"; judging on {plan.cores} cores"
    )
    table = Table(title=Text(title), title_justify="left")
    table.add_column("suite", overflow="fold")
    for heading in (
        "R", "weights a GPU", "KV a text", "KV of the batch", "texts that fit", "at a time", "GPUs", "GPU-h writing",
        "writing", "judging", "wall", "judging CPU-h", "disk",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [
            row.suite, str(row.loops), size(row.weights), size(row.kv.total),
            "-" if row.batch is None else size(row.batch * row.kv.total),
            "-" if row.sequences is None else f"{row.sequences:,}",
            "-" if row.batch is None else f"{row.batch:,}", str(row.gpus), spanned(row.gpu_hours),
            spanned(row.generation, duration), spanned(row.judging, duration), spanned(row.wall, duration),
            spanned(row.judging_cpu_hours), _disk(row),
        ]  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if len(rows) > 1:
        console.print(f"all of it: {_one_line(total_wall(list(rows), plan))}", soft_wrap=True)
    _print_notes(console, [(f"R={row.loops}", note) for row in rows for note in row.notes])
    for one in work:
        assumed = [name for name, source in one.sources.items() if source.startswith("assumed")]
        if assumed:
            console.print(f"{one.name}: assumed, not measured: {', '.join(assumed)}", soft_wrap=True)
    if explain:
        _explain_source(console, plan.speed.measured.source, plan.speed.measured.machine)
        if not plan.on_cpu:
            console.print(f"loading of weights: {load_constants().loading.source}", soft_wrap=True)
            console.print(f"start: {plan.speed.measured.start_source}", soft_wrap=True)
        for one in work:
            for name, source in one.sources.items():
                console.print(f"{one.name}, {name}: {source}", soft_wrap=True)
        for row in rows:
            for step in row.steps:
                console.print(f"{row.suite} R={row.loops}: {step}", soft_wrap=True)
        fits = {
            "decoding step (x, a, b, c, d)": plan.speed.decoding,
            "reading (share of the peak's time, e)": plan.speed.reading,
        }
        for name, fit in fits.items():
            numbers = ", ".join(f"{value:.3g}" for value in fit.coefficients)
            console.print(f"fitted, {name}: {numbers}; measured over fitted {fit.low:.2f} to {fit.high:.2f}")


def _disk(row: RunEstimate) -> str:
    if not row.disk:
        return "-"
    return size(row.disk) + (f"\nothers {size(row.disk_of_judges)}" if row.disk_of_judges else "")


def runs_json(plan: Plan, work: Sequence[Workload], rows: Sequence[RunEstimate]) -> dict[str, Any]:
    """What `--json` prints: bytes, seconds and hours; ranges as {"low", "middle", "high"}."""
    return {
        "kind": "evaluation",
        "model": {"name": plan.shape.name, "parameters": plan.shape.parameters},
        "device": plan.speed.device.model_dump(),
        "measured": {"machine": plan.speed.measured.machine, "source": plan.speed.measured.source},
        "engine": plan.engine,
        "dtype": plan.dtype,
        "machines": plan.machines,
        "gpus": plan.gpus,
        "suites": [{"suite": one.name, "answers": one.answers, "sources": one.sources} for one in work],
        "rows": [_row(row) for row in rows],
        "wall": _dumped(total_wall(list(rows), plan)),
    }


def _row(row: RunEstimate) -> dict[str, Any]:
    values = {name: _dumped(getattr(row, name)) for name in (f.name for f in dataclasses.fields(row))}
    return {**values, "kv": {**dataclasses.asdict(row.kv), "total": row.kv.total}}


# --- training -------------------------------------------------------------------------------------------


def print_trainings(console: Console, plan: TrainingPlan, rows: Sequence[TrainingEstimate], *, explain: bool) -> None:
    how = "FSDP2" if plan.sharded else "DDP" if plan.world > 1 else "one process"
    machines = f"{plan.machines} x {plan.gpus} x {plan.speed.device.name}"
    title = f"{plan.recipe.name}: {machines}, {how}, {plan.recipe.steps:,} steps"
    table = Table(title=Text(title), title_justify="left")
    for heading in (
        "R", "FLOPs a step", "state", "copies", "activations", "logits", "a process", "fits",
        "a step", "GPU-hours", "wall",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in rows:
        memory = row.memory
        cells = [
            str(row.loops), f"{row.step_flops:.3g}", size(memory.state), size(memory.copies),
            size(memory.activations), size(memory.logits), size(memory.total), _yes(row.fits),
            spanned(row.step_seconds, duration), spanned(row.gpu_hours), spanned(row.wall, duration),
        ]  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    _print_notes(console, [(f"R={row.loops}", note) for row in rows for note in row.notes])
    if explain:
        _explain_source(console, plan.speed.measured.source, plan.speed.measured.machine)
        for row in rows:
            for step in row.told:
                console.print(f"R={row.loops}: {step}", soft_wrap=True)


def _yes(value: bool | None) -> str:
    return {None: "-", True: "yes", False: "no"}[value]


def trainings_json(plan: TrainingPlan, rows: Sequence[TrainingEstimate]) -> dict[str, Any]:
    """What `train --json` prints."""
    return {
        "kind": "training",
        "recipe": plan.recipe.name,
        "device": plan.speed.device.model_dump(exclude={"bandwidth"}),
        "measured": {"machine": plan.speed.measured.machine, "source": plan.speed.measured.source},
        "machines": plan.machines,
        "gpus": plan.gpus,
        "sharded": plan.sharded,
        "rows": [
            {
                **{f.name: _dumped(getattr(row, f.name)) for f in dataclasses.fields(row)},
                "memory": {**dataclasses.asdict(row.memory), "total": row.memory.total},
            }
            for row in rows
        ],
    }


# --- shared ---------------------------------------------------------------------------------------------


def _print_notes(console: Console, notes: Sequence[tuple[str, str]]) -> None:
    """Each once, with the rows that it is about."""
    about: dict[str, list[str]] = {}
    for where, note in notes:
        if where not in about.setdefault(note, []):
            about[note].append(where)
    everywhere = {where for where, _ in notes}
    for note, places in about.items():
        of = "" if len(places) == len(everywhere) else f" ({', '.join(places)})"
        console.print(f"note: {note}{of}", style="yellow", soft_wrap=True, markup=False)


def _explain_source(console: Console, source: str, machine: str) -> None:
    console.print(f"measured on {machine}: {source}", soft_wrap=True, markup=False)


def _one_line(value: Range | None) -> str:
    return spanned(value, duration).replace("\n", " ")


def _dumped(value: Any) -> Any:
    if isinstance(value, Range):
        return value.model_dump()
    return list(value) if isinstance(value, tuple) else value


__all__ = ["duration", "print_runs", "print_trainings", "runs_json", "size", "spanned", "trainings_json"]
