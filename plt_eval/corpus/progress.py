"""The progress of a build: documents, text a second, and time left where the size of the input is known."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import TextColumn

from plt_eval.progress import LoggedBar


class BuildProgress(LoggedBar):
    """A bar for each source of a build in turn."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._total: int | None = None
        self._done = 0
        self._documents = 0
        self._bytes = 0
        self._began = time.monotonic()
        super().__init__(console, title, TextColumn("{task.fields[counts]}", markup=False), total=None, counts="")

    def source(self, title: str, total: int | None, done: int, documents: int) -> None:
        """The source that is now read, and what an earlier session did of it; nothing new if it is the same."""
        if title == self._title:
            return
        self._title, self._total, self._done, self._documents, self._bytes = title, total, done, documents, 0
        self._began = time.monotonic()
        # Restarted, so that the rate and the time left are of this session's work on this source.
        self._bar.reset(self._task, description=title, total=total, completed=done, start=True)

    def advance(self, size: int, documents: int, text_bytes: int) -> None:
        """So much more of the input is read, and so many documents of so many bytes are stored."""
        self._done += size
        self._documents += documents
        self._bytes += text_bytes
        self._bar.update(self._task, completed=self._done, counts=self.counts())
        self._log()

    def counts(self) -> str:
        """As in "1,204 documents, 8.1 MB/s"."""
        speed = self._bytes / max(time.monotonic() - self._began, 1e-9)
        return f"{self._documents:,} documents, {speed / 1e6:.1f} MB/s"

    def _line(self) -> str:
        share = f"{100 * self._done / self._total:.0f}% read, " if self._total else ""
        return f"{self._title}: {share}{self.counts()}"
