"""A training's folder when things go wrong around it: two at once, files that went missing, a stop at the very end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import filelock
import pytest
from rich.console import Console
from training_parts import curve, in_two, quiet, run, small, train_apart, write_data

from plt_model.training import checkpoints, progress
from plt_model.training.run import LOCK, RESULT
from plt_model.training.trainer import METRICS, TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished training that logs every other step."""
    out = tmp_path_factory.mktemp("complete") / "out"
    run(small(log_every=2), data, out)
    return out


@pytest.fixture
def copy(tmp_path: Path, complete: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "out"))


def test_only_one_training_writes_a_folder(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with filelock.FileLock(out / LOCK), pytest.raises(TrainingError, match="another process is training there"):
        run(small(), data, out)
    assert run(small(), data, out).model.is_dir()


def test_machines_without_a_shared_file_system_are_told_before_the_first_step(tmp_path: Path, data: Path) -> None:
    in_two(train_apart, small(), data, tmp_path, log=tmp_path / "log")
    for process in ("0", "1"):
        told = (tmp_path / f"told.{process}").read_text()
        assert "process 1 does not see" in told
        assert "file system that all machines share" in told
    assert not (tmp_path / "0" / METRICS).exists()


def test_what_is_complete_may_be_read_while_it_is_held(copy: Path, data: Path) -> None:
    with filelock.FileLock(copy / LOCK):
        assert run(small(log_every=2), data, copy).steps == small().steps


def test_a_kill_before_the_result_changes_none_of_its_numbers(copy: Path, data: Path) -> None:
    before = json.loads((copy / RESULT).read_text())
    (copy / RESULT).unlink()
    after = run(small(log_every=2), data, copy)
    for name in ("steps", "tokens", "loss", "seconds", "step_seconds", "tokens_per_second"):
        assert getattr(after, name) == before[name], name
    assert (after.version, after.ended is not None) == (before["version"], True)


def test_time_is_training_s_alone(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving takes a second each time here, and none of it is counted."""
    publish = checkpoints.publish
    now = __import__("time").monotonic
    late = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now() + late[0])

    def slowly(*arguments: Any) -> Path:
        late[0] += 1000.0
        return publish(*arguments)

    monkeypatch.setattr(checkpoints, "publish", slowly)
    result = run(small(), data, tmp_path / "out")
    assert late[0] >= 2000
    assert result.seconds < 900
    assert result.step_seconds < 900


def test_a_model_that_went_missing_is_written_again(copy: Path, complete: Path, data: Path) -> None:
    shutil.rmtree(copy / "model")
    result = run(small(log_every=2), data, copy)
    weights = "model.safetensors"
    assert (result.model / weights).read_bytes() == (complete / "model" / weights).read_bytes()
    assert curve(copy) == curve(complete)


def test_a_damaged_result_is_one_line(copy: Path, data: Path) -> None:
    (copy / RESULT).write_text('{"steps": ')
    with pytest.raises(TrainingError, match=r"result\.json: damaged; delete it to finish again") as caught:
        run(small(log_every=2), data, copy)
    assert "\n" not in str(caught.value)


def test_a_log_that_went_missing_is_one_line(copy: Path, data: Path) -> None:
    (copy / RESULT).unlink()
    (copy / METRICS).unlink()
    with pytest.raises(TrainingError, match=r"metrics\.jsonl is missing or empty"):
        run(small(log_every=2), data, copy)


def test_a_stop_during_the_last_checkpoint_is_heard(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would come after this training must not begin; the training itself is complete."""
    publish = checkpoints.publish

    def stop(folder: Path, step: int) -> Path:
        if step == small().steps:
            os.kill(os.getpid(), signal.SIGINT)
        return publish(folder, step)

    monkeypatch.setattr(checkpoints, "publish", stop)
    with pytest.raises(KeyboardInterrupt, match="is complete"):
        run(small(), data, tmp_path / "out")
    assert (tmp_path / "out" / RESULT).is_file()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_is_within_its_range(tmp_path: Path, data: Path, seed: int) -> None:
    with pytest.raises(TrainingError, match=rf"--seed {seed}: expected a number from 0 to 4294967295"):
        run(small(), data, tmp_path / "out", seed=seed)


def test_an_error_gives_the_terminal_back(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    close = progress.RichProgress.close
    monkeypatch.setattr(progress.RichProgress, "close", lambda self: (bars.append(self._bar), close(self)))
    monkeypatch.setattr("plt_model.training.trainer.PLTTrainer._clip_grad_norm", fail)
    with pytest.raises(ZeroDivisionError):
        run(small(), data, tmp_path / "out", console=Console(file=quiet().file, force_terminal=True))
    assert bars
    assert not bars[0].live.is_started


def fail(*_: Any) -> Any:
    raise ZeroDivisionError
