"""The progress bar of a training: loss, tokens a second, on a GPU the model FLOP utilisation, and the time left."""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from plt_model.training.flops import peak_flops

LOG_EVERY_S = 30.0
"""Where no bar can be drawn (a log file), one line so often, in seconds."""


class RichProgress(TrainerCallback):
    """A bar on a terminal, else a line now and then."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._logged_at = -LOG_EVERY_S
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, said="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._bar.reset(self._task, total=state.max_steps, completed=state.global_step, start=True)
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if not logs or "tokens_per_second" not in logs:
            return
        said = f"loss {logs['loss']:.3f}, {_short(logs['tokens_per_second'])} tokens/s{_utilisation(logs)}"
        self._bar.update(self._task, said=said)
        now = time.monotonic()
        if self._console.is_terminal or now - self._logged_at < LOG_EVERY_S:
            return
        self._logged_at = now
        done, total = state.global_step, state.max_steps
        line = f"{self._title}: step {done}/{total}, {said}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.close()

    def close(self) -> None:
        """Give the terminal back; an error ends training without on_train_end."""
        self._bar.stop()


def _utilisation(logs: dict[str, float]) -> str:
    flops = logs.get("flops_per_second")
    if flops is None or not torch.cuda.is_available():
        return ""
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return f", {flops / 1e12:.1f} TFLOP/s"
    devices = int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else 1
    return f", MFU {100 * flops / (peak * devices):.1f}%"


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
