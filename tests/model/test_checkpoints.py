"""Checkpoints: whole or absent, and what a killed or damaged training ends with: what it would have ended with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_parts import (
    STEPS,
    assert_same_run,
    curve,
    kill_at_random,
    logged,
    quiet,
    run,
    said,
    small,
    start,
    train_here,
    until,
    write_data,
)

from plt_model.training import checkpoints
from plt_model.training import run as run_module
from plt_model.training.trainer import PLTTrainer

# --- folders ------------------------------------------------------------------------------------------


def write(folder: Path, step: int) -> Path:
    """A small checkpoint, published."""
    inner = checkpoints.staging(folder, step) / "optimizer"
    inner.mkdir(parents=True)
    (inner / "state").write_bytes(b"moments" * 100)
    (inner.parent / "model.safetensors").write_bytes(b"weights" * 100)
    return checkpoints.publish(folder, step)


def warnings_of(folder: Path) -> tuple[int | None, list[str]]:
    """The step of the last good checkpoint, and what was said."""
    heard: list[str] = []
    found = checkpoints.last_good(folder, heard.append)
    return (None if found is None else found[0]), heard


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def seal_with(content: bytes) -> Callable[[Path], None]:
    def seal(checkpoint: Path) -> None:
        (checkpoint / "seal.json").write_bytes(content)

    return seal


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit of the weights": lambda c: flip(c / "model.safetensors"),
    "a bit of the weights' header": lambda c: flip(c / "model.safetensors", 9),
    "a bit of the optimizer": lambda c: flip(largest(c / "optimizer")),
    "the optimizer cut": lambda c: cut(largest(c / "optimizer")),
    "the weights emptied": lambda c: (c / "model.safetensors").write_bytes(b""),
    "the weights gone": lambda c: (c / "model.safetensors").unlink(),
    "the optimizer gone": lambda c: shutil.rmtree(c / "optimizer"),
    "the seal gone": lambda c: (c / "seal.json").unlink(),
    "the seal cut": lambda c: (cut(c / "seal.json"), cut(c / "seal.json")),
    "a seal of noise": seal_with(b"\xff\x00garbage"),
    "a seal of nothing": seal_with(b""),
    "a seal of null": seal_with(b"null"),
    "a seal of a list": seal_with(b"[]"),
    "a seal of no files": seal_with(b'{"step": 6, "sha256": {}}'),
    "a seal of a list of files": seal_with(b'{"step": 6, "sha256": ["a"]}'),
    "a seal of numbers": seal_with(b'{"step": 6, "sha256": {"model.safetensors": 1}}'),
    "only an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
}


def largest(folder: Path) -> Path:
    return max((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_left_aside(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for step in (2, 4, 6):
        write(tmp_path, step)
    assert warnings_of(tmp_path) == (6, [])
    damage(tmp_path / "checkpoint-6")
    step, (warning,) = warnings_of(tmp_path)
    assert step == 4
    assert warning.startswith("checkpoint-6 is damaged and is left aside: ")
    assert "\n" not in warning


def test_when_all_are_damaged_each_is_told(tmp_path: Path) -> None:
    for step in (2, 4):
        flip(write(tmp_path, step) / "model.safetensors")
    step, heard = warnings_of(tmp_path)
    assert step is None
    assert [warning.split()[0] for warning in heard] == ["checkpoint-4", "checkpoint-2"]


def test_a_folder_that_was_never_published_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, 2)
    partial = checkpoints.staging(tmp_path, 4)
    shutil.copytree(tmp_path / "checkpoint-2", partial)
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "damaged-checkpoint-6").mkdir()
    assert warnings_of(tmp_path) == (2, [])
    assert warnings_of(tmp_path / "nowhere") == (None, [])


def test_steps_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write(tmp_path, step)
    assert [step for step, _ in checkpoints.checkpoints(tmp_path)] == [9, 10, 100]


def test_published_again_it_is_the_new_one(tmp_path: Path) -> None:
    write(tmp_path, 2)
    flip(tmp_path / "checkpoint-2" / "model.safetensors")
    write(tmp_path, 2)
    assert warnings_of(tmp_path) == (2, [])


@pytest.mark.parametrize("keep", [2, 3])
def test_the_last_few_are_kept(tmp_path: Path, keep: int) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    checkpoints.staging(tmp_path, 5).mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    checkpoints.prune(tmp_path, keep)
    assert [step for step, _ in checkpoints.checkpoints(tmp_path)] == [2, 4, 6, 8][-keep:]
    assert not list(tmp_path.glob(".checkpoint*"))
    assert (tmp_path / "metrics.jsonl").exists()


# --- trainings ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The training that nothing befell."""
    out = tmp_path_factory.mktemp("through") / "out"
    run(small(), data, out)
    assert [row["step"] for row in curve(out)] == list(range(1, STEPS + 1))
    return out


@pytest.fixture(scope="module")
def fallen(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """One that ended in step 7, with the checkpoints 4 and 6."""
    out = tmp_path_factory.mktemp("fallen") / "out"
    log = PLTTrainer.log

    def fail(self: PLTTrainer, logs: dict[str, float], *rest: Any) -> None:
        log(self, logs, *rest)
        if self.state.global_step == 7:
            raise RuntimeError("pulled the plug")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLTTrainer, "log", fail)
        with pytest.raises(RuntimeError, match="pulled"):
            run(small(), data, out)
    assert [step for step, _ in checkpoints.checkpoints(out)] == [4, 6]
    assert logged(out) == 7
    return out


@pytest.fixture
def out(tmp_path: Path, fallen: Path) -> Path:
    """A copy of the fallen one."""
    return shutil.copytree(fallen, tmp_path / "out")


def test_a_fallen_training_goes_on(out: Path, data: Path, through: Path) -> None:
    console = quiet()
    run(small(), data, out, console=console)
    assert_same_run(out, through)
    assert "damaged" not in said(console)


@pytest.mark.parametrize(
    "name", ["a bit of the weights", "the optimizer cut", "the weights gone", "a seal of noise", "a seal of no files"]
)
def test_a_damaged_one_costs_only_time(out: Path, data: Path, through: Path, name: str) -> None:
    DAMAGES[name](out / "checkpoint-6")
    console = quiet()
    run(small(), data, out, console=console)
    assert said(console).count("checkpoint-6 is damaged and is left aside") == 1
    assert_same_run(out, through)


def test_without_a_good_one_it_starts_again(out: Path, data: Path, through: Path) -> None:
    flip(out / "checkpoint-4" / "model.safetensors")
    (out / "checkpoint-6" / "seal.json").unlink()
    console = quiet()
    run(small(), data, out, console=console)
    assert "checkpoint-4 is damaged" in said(console)
    assert "checkpoint-6 is damaged" in said(console)
    assert_same_run(out, through)


def test_a_line_that_a_kill_cut_is_written_again(out: Path, data: Path, through: Path) -> None:
    path = out / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run(small(), data, out)
    assert_same_run(out, through)


def test_killed_between_the_last_checkpoint_and_the_result(tmp_path: Path, data: Path, through: Path) -> None:
    out = shutil.copytree(through, tmp_path / "out")
    (out / "result.json").unlink()
    (out / "model").rename(out / "model.partial")
    result = run(small(), data, out)
    assert_same_run(out, through)
    assert result.tokens == STEPS * 64
    assert not (out / "model.partial").exists()


PLACES = {
    "weights written": (run_module.PLTTrainer, "_save_optimizer_and_scheduler"),
    "all written": (checkpoints, "publish"),
    "being sealed": (checkpoints, "_sha256"),
    "sealed": (checkpoints, "sync"),
    "named": (checkpoints, "prune"),
    "last weights": (run_module, "_write_model"),
}


def train_until(place: str, data: Path, out: Path) -> None:
    """The target of a process that kills itself the first time that it comes by a place."""
    holder, name = PLACES[place]

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(holder, name, die)
    train_here(small(), data, out)


def test_killed_at_every_place_of_a_checkpoint(tmp_path: Path, data: Path, through: Path) -> None:
    """One process after the other goes on and dies further on."""
    out, log = tmp_path / "out", tmp_path / "log"
    for place in PLACES:
        process = start(train_until, place, data, out, log=log)
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        heard: list[str] = []
        checkpoints.last_good(out, heard.append)
        assert heard == [], place
    run(small(), data, out)
    assert_same_run(out, through)
    assert not list(out.glob("*.partial")) + list(out.glob(".checkpoint*")) + list(out.glob("damaged*"))


def test_killed_at_random_moments(tmp_path: Path, data: Path, through: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    random.seed()
    for _ in range(3):
        process = start(train_here, small(), data, out, log=log)
        before = logged(out)
        until(lambda before=before, process=process: logged(out) != before or process.exitcode is not None)  # type: ignore[misc]
        kill_at_random(process, 0.15)
    run(small(), data, out)
    assert_same_run(out, through)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_asked_to_stop_it_saves_and_says_where(tmp_path: Path, data: Path, number: signal.Signals) -> None:
    long = small(tokens=64 * 400, checkpoint={"every": 300})
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(train_here, long, data, out, log=log)
    until(lambda: logged(out) >= 2 or process.exitcode is not None, [process])
    os.kill(process.pid, number)
    process.join()
    ((step, folder),) = checkpoints.checkpoints(out)
    assert process.exitcode == 130
    last = log.read_text().splitlines()[-1]
    assert last == f"stopped at step {step} of 400, saved {folder}; the same command goes on from there"
    assert logged(out) == step


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_stop_between_two_logged_steps_changes_nothing(tmp_path: Path, data: Path, log_every: int) -> None:
    """Stopped after step 5; lines are written after steps 3, 6 and 9, or after all."""
    recipe = small(log_every=log_every, checkpoint={"every": 6})
    before = _handlers()
    with pytest.MonkeyPatch.context() as patch:
        step = PLTTrainer.training_step

        def stopping(self: PLTTrainer, *arguments: Any) -> Any:
            if self.state.global_step == 4:
                signal.raise_signal(signal.SIGINT)
            return step(self, *arguments)

        patch.setattr(PLTTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 5 of 9"):
            run(recipe, data, tmp_path / "stopped")
    run(recipe, data, tmp_path / "stopped")
    run(recipe, data, tmp_path / "through")
    assert curve(tmp_path / "stopped") == curve(tmp_path / "through")
    assert _handlers() == before


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_the_last_step_is_logged_whatever_the_rhythm(tmp_path: Path, data: Path) -> None:
    """9 steps, a line every 4 steps (or every 100): the last line is step 9's, the mean since the line before."""
    run(small(), data, tmp_path / "all")
    every = curve(tmp_path / "all")
    for log_every, steps in ((4, [4, 8, 9]), (100, [9])):
        out = tmp_path / str(log_every)
        result = run(small(log_every=log_every, checkpoint={"every": 100}), data, out)
        found = curve(out)
        assert [row["step"] for row in found] == steps
        for begin, row in zip([0, *steps], found, strict=False):
            part = [r["loss"] for r in every[begin : int(row["step"])]]
            assert row["loss"] == pytest.approx(sum(part) / len(part), rel=1e-6)
        assert result.tokens == found[-1]["tokens"] == every[-1]["tokens"]
        assert [step for step, _ in checkpoints.checkpoints(out)] == [9]


def test_a_checkpoint_is_a_model_of_its_own(through: Path) -> None:
    """It holds no pickle that could run code, and what it counts is what was done."""
    for step, folder in checkpoints.checkpoints(through):
        progress = json.loads((folder / "progress.json").read_text())
        assert progress["tokens"] == step * 64
        assert not (folder / "training_args.bin").exists()
        assert (folder / "config.json").exists()
