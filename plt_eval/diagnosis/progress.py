"""The progress bar of a diagnosis: how many samples are measured, how fast, and how long it will take."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from plt_eval.progress import LOG_EVERY_S, Rate


class DiagnosisProgress:
    """A bar over the samples of one run, or a line now and then where it cannot be drawn."""

    def __init__(self, console: Console, title: str, *, total: int, done: int) -> None:
        self._console, self._title, self._total, self._done = console, title, total, done
        self._logged_at = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("samples, {task.fields[tokens]} tokens", markup=False),
            Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tokens = 0
        self._task = self._bar.add_task(title, total=total, completed=done, tokens=0)

    def measured(self, samples: int, tokens: int) -> None:
        """So many more, and their tokens."""
        self._done += samples
        self._tokens += tokens
        self._bar.update(self._task, advance=samples, tokens=self._tokens)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            line = f"{self._title}: {self._done}/{self._total} samples measured"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> DiagnosisProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
