"""Progress bars, or a line now and then where none can be drawn; the one of a run says what is drawn, what is judged,
what passes, and how long it will take.

    class Downloads(LoggedBar):
        def _line(self) -> str: ...         # what a log gets to read

    with Downloads(console, "files", TextColumn("{task.fields[size]}"), total=9, size="") as bar:
        bar.fetched()                       # which updates self._bar and calls self._log()
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from plt_eval.records import SampleRecord

LOG_EVERY_S = 30.0
"""Where no bar can be drawn (a log file), one line so often, in seconds."""


def _nothing() -> Sequence[str]:
    return ()


class _Bar(Progress):
    """With the lines of `below` under it, as they are when it is drawn; gone with its end."""

    def __init__(self, *columns: ProgressColumn, below: Callable[[], Sequence[str]], **options: Any) -> None:
        self._below = below
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for line in self._below():
            yield Text(line, no_wrap=True, overflow="ellipsis")

    def stop(self) -> None:
        self._below = _nothing
        super().stop()


class LoggedBar(ABC):
    """A bar with `columns` between it and its clocks, for one task; where it cannot be drawn, `_log` prints a line in
    place of it. `total`, `completed` and `fields` are the task's as rich.progress has them; `below` is asked for lines
    to draw under it. Use as a context manager.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        *columns: ProgressColumn,
        total: float | None,
        completed: int = 0,
        below: Callable[[], Sequence[str]] = _nothing,
        **fields: Any,
    ) -> None:
        self._console = console
        self._logged_at = time.monotonic()
        self._bar = _Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            below=below,
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=completed, **fields)

    @abstractmethod
    def _line(self) -> str:
        """How far it is, in one line."""

    def _log(self) -> None:
        """Print the line, if it is time for one and no bar is there."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._logged_at < LOG_EVERY_S:
            return
        self._logged_at = now
        self._console.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class RunProgress(LoggedBar):
    """A bar over the samples of one run. Thread-safe."""

    def __init__(
        self, console: Console, title: str, *, total: int, below: Callable[[], Sequence[str]] = _nothing
    ) -> None:
        self._lock = threading.Lock()
        self._passes: Counter[str] = Counter()
        self._drawn = 0
        self._missing = 0
        self.place: Callable[[], str] = str
        """Says where is judged, if not here: as in "on 3 machines"."""
        counts = TextColumn("{task.fields[passes]}", markup=False)
        super().__init__(console, title, MofNCompleteColumn(), counts, Rate(), total=total, below=below, passes="")

    def resume(self, samples: list[SampleRecord], drawn: int) -> None:
        """Count what an earlier session left: its verdicts, and completions that still await theirs."""
        with self._lock:
            for sample in samples:
                self._count(sample)
            self._drawn = len(samples) + drawn
            self._bar.update(self._task, passes=self.counts())
        # Restarted, so that the rate and the time left are of this session's work.
        self._bar.reset(self._task, completed=len(samples), start=True)

    def drew(self) -> None:
        """One more completion is there."""
        with self._lock:
            self._drawn += 1
            self._bar.update(self._task, passes=self.counts())

    def judged(self, sample: SampleRecord) -> None:
        """One more verdict is there; one with an error counts as missing."""
        with self._lock:
            self._count(sample)
            advance = 0 if sample.error is not None else 1
            self._bar.update(self._task, advance=advance, passes=self.counts())
            self._log()

    def missed(self) -> None:
        """The engine gave up on one."""
        with self._lock:
            self._missing += 1
            self._bar.update(self._task, passes=self.counts())

    def counts(self) -> str:
        """As in "40 drawn, base 31, plus 28 pass, 2 missing"."""
        parts = [f"{self._drawn} drawn"]
        if self._passes:
            first = list(self._passes.items())[:2]  # a suite's leading ones; more would crowd out the bar
            parts.append(", ".join(f"{name} {count}" for name, count in first) + " pass")
        if self._missing:
            parts.append(f"{self._missing} missing")
        if place := self.place():
            parts.append(place)
        return ", ".join(parts)

    def _line(self) -> str:
        task = self._bar.tasks[0]
        return f"{task.description}: {task.completed:.0f}/{task.total:.0f} judged, {self.counts()}"

    def _count(self, sample: SampleRecord) -> None:
        if sample.error is not None:
            self._missing += 1
        for name, value in sample.values.items():
            if isinstance(value, bool):
                self._passes[name] += value


class Rate(ProgressColumn):
    """Samples a second, or a minute where that is easier to read."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("-/s")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{speed * 60:.1f}/min")
