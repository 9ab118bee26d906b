"""What a bench hands back: gates, and one row for each thing that was timed where all gates were green."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from plt_eval.bench.gates import Gate, red
from plt_eval.bench.rounds import Job, Spread, Stopwatch, Timed, interleave, ratio, warm_up
from plt_eval.bench.subjects import Family


class Watcher(Protocol):
    """Hears how far a bench is."""

    def expect(self, steps: int) -> None:
        """So many steps are to come, beside those that were said before."""

    def did(self, what: str) -> None:
        """One of them is done."""


@dataclass(frozen=True)
class Setup:
    """What all benches share: the weights, the loop counts (1 first, which the others are compared with), how many
    rounds, the clock, and who hears of progress."""

    family: Family
    loops: tuple[int, ...]
    rounds: int
    watch: Stopwatch
    watcher: Watcher
    seed: int = 0


@dataclass
class Row:
    """One subject in one configuration (`where`, as {"batch": 1, "context": 512}).

    tokens: of all texts, in one round. against_one: of the time of `base`, round by round. facts: what else is known,
    in JSON types.
    """

    where: Mapping[str, int]
    subject: str
    loops: int
    tokens: int
    timed: Timed
    base: str
    against_one: Spread
    facts: dict[str, Any] = field(default_factory=dict)

    def seconds(self) -> Spread:
        """Of a round."""
        return Spread.of(self.timed.seconds())

    def tokens_per_second(self) -> Spread:
        return self.seconds().per(self.tokens)


@dataclass
class Outcome:
    """`settings`: what was timed and how, in JSON types. `gates`: by configuration, in words."""

    kind: str
    settings: dict[str, Any]
    gates: dict[str, list[Gate]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refused(self) -> dict[str, list[Gate]]:
        """The configurations whose speed is not printed, with their red gates."""
        return {where: red(gates) for where, gates in self.gates.items() if red(gates)}


def in_words(where: Mapping[str, int]) -> str:
    """As in "batch 1, context 512"."""
    return ", ".join(f"{name} {value}" for name, value in where.items())


def run_configuration(
    outcome: Outcome,
    setup: Setup,
    where: Mapping[str, int],
    jobs: Sequence[Job],
    check: Callable[[], list[Gate]],
) -> dict[str, Timed] | None:
    """Warm up, check, and time one configuration. None, and only the gates in `outcome`, when one is red: what does
    not compute the right thing has no speed."""
    timed = {}
    for job in jobs:
        timed[job.name] = warm_up(job, setup.watch)
        setup.watcher.did(f"{in_words(where)}: warmed up {job.name}")
    gates = check()
    setup.watcher.did(f"{in_words(where)}: checked")
    outcome.gates[in_words(where)] = gates
    if red(gates):
        return None
    return interleave(
        jobs,
        timed,
        rounds=setup.rounds,
        watch=setup.watch,
        tick=lambda name: setup.watcher.did(f"{in_words(where)}: {name}"),
    )


def steps_of(jobs: int, rounds: int) -> int:
    """What run_configuration reports."""
    return jobs * (rounds + 1) + 1


def against(timed: Mapping[str, Timed], name: str, base: str) -> Spread:
    """The ratio of two of them."""
    return ratio(timed[name], timed[base])
