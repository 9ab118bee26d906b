"""The progress bar of a bench: what was done last, and how long the rest will take."""

from __future__ import annotations

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from plt_eval.progress import LoggedBar


class BenchProgress(LoggedBar):
    """A bar over warm-ups, checks and timings. A bench says how many are to come when it knows."""

    def __init__(self, console: Console, title: str) -> None:
        self._title, self._total, self._done, self._last = title, 0, 0, "preparing"
        super().__init__(
            console, title, MofNCompleteColumn(), TextColumn("{task.fields[last]}", markup=False), total=None, last="-"
        )

    def expect(self, steps: int) -> None:
        """So many are to come, beside those that were said before."""
        self._total += steps
        self._bar.update(self._task, total=self._total)

    def did(self, what: str) -> None:
        """One is done."""
        self._done, self._last = self._done + 1, what
        self._bar.update(self._task, completed=self._done, last=what)
        self._log()

    def _line(self) -> str:
        return f"{self._title}: {self._done}/{self._total}, {self._last}"
