"""Timing several things fairly: once each a round, the order turned on, so that a busy moment meets all of them.

timed = interleave([Job("R=1", ...), Job("R=2", ...)], rounds=5, watch=Stopwatch(device))
ratio(timed["R=2"], timed["R=1"])       # Spread: median [low, high] of the rounds' own ratios
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Taken:
    """One timing: seconds on the wall, and of all cores of this process (None where the work is a GPU's)."""

    seconds: float
    cpu_seconds: float | None


@dataclass
class Timed:
    """All timings of one job: the first, uncounted run (compilation and what else happens once), and the rounds."""

    warm_up_seconds: float
    rounds: list[Taken] = field(default_factory=list)

    def seconds(self) -> list[float]:
        """Of each round."""
        return [taken.seconds for taken in self.rounds]


@dataclass(frozen=True)
class Spread:
    """A median and the smallest and largest beside it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def times(self, factor: float) -> Spread:
        """In another unit; a negative factor has no meaning here."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def per(self, amount: float) -> Spread:
        """`amount` a unit of this: tokens and seconds give tokens a second."""
        return Spread(amount / self.median, amount / self.high, amount / self.low)


@dataclass(frozen=True)
class Job:
    """Something to time. `prepare` puts it at its start, untimed, before every run of `work`."""

    name: str
    work: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


class Stopwatch:
    """Times work to its end: on a GPU also what the host has only asked for.

    `wall` and `cpu` are clocks in seconds, `wait` returns when the device is idle; tests bring their own.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        wall: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.process_time,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self._wall, self._cpu = wall, cpu
        self._on_cpu = device.type == "cpu"
        self._wait = wait or (lambda: None if self._on_cpu else torch.cuda.synchronize(device))

    def __call__(self, work: Callable[[], object]) -> Taken:
        self._wait()
        cpu, wall = self._cpu(), self._wall()
        work()
        self._wait()
        taken = self._wall() - wall
        return Taken(taken, self._cpu() - cpu if self._on_cpu else None)


def warm_up(job: Job, watch: Stopwatch) -> Timed:
    """Run it once, uncounted but timed."""
    job.prepare()
    return Timed(watch(job.work).seconds)


def interleave(
    jobs: Sequence[Job],
    timed: dict[str, Timed],
    *,
    rounds: int,
    watch: Stopwatch,
    tick: Callable[[str], object] = lambda _: None,
) -> dict[str, Timed]:
    """Add `rounds` timings of each job to what `warm_up` gave, by name: round i begins with job i, so that none is
    always first. `tick` hears the name of what was timed."""
    for i in range(rounds):
        start = i % len(jobs)
        for job in (*jobs[start:], *jobs[:start]):
            job.prepare()
            timed[job.name].rounds.append(watch(job.work))
            tick(job.name)
    return timed


def ratio(mine: Timed, base: Timed) -> Spread:
    """How many times longer than `base`, round by round."""
    return Spread.of([a / b for a, b in zip(mine.seconds(), base.seconds(), strict=True)])
