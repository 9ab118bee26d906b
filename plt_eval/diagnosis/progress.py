"""The progress bar of a diagnosis: how many samples are measured, how fast, and how long it will take."""

from __future__ import annotations

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from plt_eval.progress import LoggedBar, Rate


class DiagnosisProgress(LoggedBar):
    """A bar over the samples of one run, of which `done` are measured already."""

    def __init__(self, console: Console, title: str, *, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done
        self._tokens = 0
        counts = TextColumn("samples, {task.fields[tokens]} tokens", markup=False)
        super().__init__(console, title, MofNCompleteColumn(), counts, Rate(), total=total, completed=done, tokens=0)

    def measured(self, samples: int, tokens: int) -> None:
        """So many more, and their tokens."""
        self._done += samples
        self._tokens += tokens
        self._bar.update(self._task, advance=samples, tokens=self._tokens)
        self._log()

    def _line(self) -> str:
        return f"{self._title}: {self._done}/{self._total} samples measured"
