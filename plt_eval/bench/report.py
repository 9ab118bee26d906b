"""A bench as a table for people, and as JSON for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table
from rich.text import Text

from plt_eval.bench.outcome import Outcome, Row
from plt_eval.bench.rounds import Spread


def bench_json(outcome: Outcome) -> dict[str, Any]:
    """All raw rounds, gates and what follows from them. A refused configuration has its gates only."""
    return {
        "settings": outcome.settings,
        "gates": [
            {"where": where, "what": g.what, "found": g.found, "allowed": g.allowed, "green": g.green}
            for where, gates in outcome.gates.items()
            for g in gates
        ],
        "rows": [_row_json(row) for row in outcome.rows],
        "notes": outcome.notes,
    }


def print_outcome(outcome: Outcome, document: dict[str, Any]) -> None:
    """To stdout: what was timed where, the table, and what stands under it."""
    from plt_eval.tables import output_console

    console = output_console()
    machine, model = document["machine"], document["model"]
    place = ", ".join(machine["gpus"]) if document["device"] == "cuda" else machine["cpu"]
    attention = outcome.settings.get("attention")
    compute = outcome.settings.get("compute", document["dtype"])
    dtype = document["dtype"] + ("" if compute == document["dtype"] else f", computed in {compute}")
    for line in (
        f"{model['name']}, {model['parameters'] / 1e6:.1f}M parameters, {dtype}, attention {attention}",
        f"{place}, {document['threads']} threads, torch {document['packages'].get('torch')}, "
        f"reads {document['bandwidth']['bytes_per_second'] / 1e9:.1f} GB/s ({document['bandwidth']['kernel']})",
    ):
        console.print(Text(line))
    if outcome.rows:
        console.print(outcome_table(outcome))
    for note in outcome.notes:
        console.print(Text(note))
    green = sum(gate.green for gates in outcome.gates.values() for gate in gates)
    total = sum(map(len, outcome.gates.values()))
    console.print(Text(f"{green} of {total} gates green"))


def outcome_table(outcome: Outcome) -> Table:
    """One row a subject and configuration; columns that nothing has are left out."""
    table = Table(
        caption=Text(
            f"medians of {len(outcome.rows[0].timed.rounds)} interleaved rounds [smallest, largest]; ratios round "
            "by round; the first run of each (warm-up) is not among them"
        ),
        caption_justify="left",
    )
    columns = {name: show for name, show in COLUMNS.items() if any(show(row) for row in outcome.rows)}
    wheres = list(outcome.rows[0].where)
    for name in wheres:
        table.add_column(name, justify="right")
    table.add_column("subject", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    for i, row in enumerate(outcome.rows):
        new = i > 0 and outcome.rows[i - 1].where != row.where
        if new:
            table.add_section()
        cells = [str(row.where[name]) for name in wheres] + [row.subject]
        table.add_row(*(Text(cell) for cell in cells + [show(row) for show in columns.values()]))
    return table


def _step_time(row: Row) -> str:
    steps = row.facts.get("steps_a_round", 1)
    return _spread(row.seconds().times(1000 / steps), 4)


def _kv(row: Row) -> str:
    parts = row.facts.get("kv_bytes")
    return "" if parts is None else _mib(sum(parts.values()))


def _mib(size: float) -> str:
    return f"{size / 2**20:.2f}" if size < 2**24 else f"{size / 2**20:.0f}"


def _fact(name: str, form: str) -> Any:
    return lambda row: "" if row.facts.get(name) is None else format(row.facts[name], form)


COLUMNS: dict[str, Any] = {
    "ms": _step_time,
    "tokens/s": lambda row: f"{row.tokens_per_second().median:.4g}" if row.tokens else "",
    "× base": lambda row: _spread(row.against_one, 3),
    "KV, MiB": _kv,
    "of the floor": _fact("of_the_floor", ".0%"),
    "peak, MiB": lambda row: "" if row.facts.get("peak_bytes") is None else _mib(row.facts["peak_bytes"]),
    "TFLOP/s": _fact("tflops", ".3g"),
    "of the peak": _fact("of_the_peak", ".0%"),
    "warm-up, s": lambda row: f"{row.timed.warm_up_seconds:.1f}",
}


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}g} [{spread.low:.{digits}g}, {spread.high:.{digits}g}]"


def _row_json(row: Row) -> dict[str, Any]:
    return {
        **row.where,
        "subject": row.subject,
        "loops": row.loops,
        "tokens_a_round": row.tokens,
        "seconds": dataclasses.asdict(row.seconds()),
        "tokens_per_second": dataclasses.asdict(row.tokens_per_second()) if row.tokens else None,
        "ratio": {"to": row.base, **dataclasses.asdict(row.against_one)},
        "warm_up_seconds": row.timed.warm_up_seconds,
        "rounds": [dataclasses.asdict(taken) for taken in row.timed.rounds],
        **row.facts,
    }
