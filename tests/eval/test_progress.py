"""Progress where no bar can be drawn: a line, but not too often."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from plt_eval import progress
from plt_eval.diagnosis.progress import DiagnosisProgress
from plt_eval.progress import LOG_EVERY_S, RunProgress
from plt_eval.records import SampleRecord


class Clock:
    """time.monotonic that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def verdict(number: int, passed: bool, error: str | None = None) -> SampleRecord:
    return SampleRecord(sample_id=str(number), index=0, values={"base": passed}, judged="", detail={}, error=error)


def test_a_log_gets_a_line_now_and_then(clock: Clock) -> None:
    log = io.StringIO()
    with DiagnosisProgress(Console(file=log), "[toy] r2", total=9, done=3) as bar:
        bar.measured(1, 20)
        assert log.getvalue() == "", "not at once"
        clock.now += LOG_EVERY_S
        bar.measured(2, 20)
        bar.measured(1, 20)
    assert log.getvalue() == "[toy] r2: 6/9 samples measured\n"


def test_the_line_of_a_run_counts_what_an_earlier_session_left(clock: Clock) -> None:
    log = io.StringIO()
    with RunProgress(Console(file=log), "toy", total=9) as bar:
        bar.resume([verdict(0, True), verdict(1, False)], drawn=2)
        bar.drew()
        bar.missed()
        clock.now += LOG_EVERY_S
        bar.judged(verdict(2, True))
    assert log.getvalue() == "toy: 3/9 judged, 5 drawn, base 2 pass, 1 missing\n"


def test_a_terminal_has_the_bar_alone(clock: Clock) -> None:
    screen = io.StringIO()
    with DiagnosisProgress(Console(file=screen, force_terminal=True, width=100), "toy", total=9, done=0) as bar:
        clock.now += 2 * LOG_EVERY_S
        bar.measured(4, 80)
    assert "4/9" in screen.getvalue()
    assert "samples measured" not in screen.getvalue()
