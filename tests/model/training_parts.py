"""What the tests of training share: tiny recipes and data, and real processes to train in, that can be killed.

Processes come from a fork server that has imported torch once, so that one costs milliseconds and has no state of the
test's own process.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from random import SystemRandom
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from plt_model import PLTForCausalLM
from plt_model.training import checkpoints
from plt_model.training import run as run_module
from plt_model.training.recipe import Recipe
from plt_model.training.run import TrainingError, TrainResult, train
from plt_model.training.shards import MANIFEST, Manifest, ShardWriter, TokenizerRecord

VOCAB = 259
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "plt_window_size": [4, 0],
    "plt_gate_use_hidden_states": True,
}
LENGTH, BATCH, STEPS = 16, 4, 9
FIELDS: dict[str, Any] = {
    "name": "small",
    "model": SHAPE,
    "data": [{"name": "a", "weight": 2}, {"name": "b", "weight": 1}],
    "sequence_length": LENGTH,
    "tokens": LENGTH * BATCH * STEPS,
    "batch_tokens": LENGTH * BATCH,
    "optimizer": {"lr": 1e-2},
    "checkpoint": {"every": 2, "keep": 2},
}
CLOSE = 1e-5
"""Relative difference allowed between losses that were summed in another order."""

COMPARED = ("step", "loss", "grad_norm", "learning_rate", "tokens")
"""Of a line of metrics.jsonl: what has to be the same bit by bit; the rest is time."""


def small(**changes: Any) -> Recipe:
    """The tiny recipe with some fields changed."""
    return Recipe.model_validate({**FIELDS, **changes})


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**FIELDS, **changes}))
    return path


# --- data ---------------------------------------------------------------------------------------------


def write_source(folder: Path, tokens: int, *, seed: int = 0, vocab: int = VOCAB) -> Path:
    """Token data of one document that can be told apart anywhere: a noisy walk over the bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    ids = 3 + (np.cumsum(rng.integers(0, 3, size=tokens - 1)) + 13 * seed) % (vocab - 3)
    writer = ShardWriter(folder, "train", vocab_size=vocab, shard_tokens=997)
    writer.append(np.append(ids, 2), text_bytes=tokens - 1)
    manifest = Manifest(
        name=folder.name,
        created=datetime.now(UTC),
        plt_eval_version="0",
        command=(),
        tokenizer=TokenizerRecord(kind="bytes", path=None, sha256="0", vocab_size=vocab, bos=1, eos=2),
        dtype="uint16",
        shard_tokens=997,
        held_out=0,
        held_out_rule="",
        dedup_rule="",
        splits={"train": writer.close()},
        sources=(),
        files=None,
        request={},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


def write_data(folder: Path) -> Path:
    """The data of the tiny recipe: less than one training takes, so that it is passed over more than once."""
    write_source(folder / "a", 301, seed=1)
    write_source(folder / "b", 2005, seed=2)
    return folder


# --- training, here -----------------------------------------------------------------------------------


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(recipe: Recipe, data: Path, out: Path, loops: int = 2, **options: Any) -> TrainResult:
    return train(recipe, loops=loops, data=data, out=out, device="cpu", **{"console": quiet(), **options})


def curve(out: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without their times; every line has to be whole."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in COMPARED} for row in rows]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in curve(out)]


def last_weights(out: Path) -> dict[str, Tensor]:
    """The float32 weights of the newest checkpoint."""
    return load_file(checkpoints.checkpoints(out)[-1][1] / "model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    """The same curve and the same weights, bit by bit: in the last checkpoint, and in the model to ship."""
    assert curve(found) == curve(expected)
    assert [step for step, _ in checkpoints.checkpoints(found)] == [s for s, _ in checkpoints.checkpoints(expected)]
    one, other = last_weights(found), last_weights(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    shipped = "model/model.safetensors"
    assert (found / shipped).read_bytes() == (expected / shipped).read_bytes()


def close(found: list[float], expected: list[float], rel: float = CLOSE) -> None:
    """The same numbers but for rounding."""
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, rel=rel)


@contextmanager
def recorded() -> Iterator[list[list[int]]]:
    """Every window that a model is given, in order, as lists of token ids."""
    seen: list[list[int]] = []
    forward = PLTForCausalLM.forward

    @functools.wraps(forward)
    def listening(self: Any, input_ids: Any = None, *args: Any, **named: Any) -> Any:
        seen.extend(input_ids.tolist())
        return forward(self, input_ids, *args, **named)

    PLTForCausalLM.forward = listening  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        PLTForCausalLM.forward = forward  # type: ignore[method-assign]


# --- training, in processes ---------------------------------------------------------------------------

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["training_parts", "plt_model.training.tuning"])
Process = Any


def start(target: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> Process:
    """`target(*arguments)` in a process; what it prints goes to `log`."""
    process = _context.Process(target=_child, args=(target, arguments, log, environment))
    process.start()
    return process


def _child(target: Callable[..., Any], arguments: Sequence[Any], log: Path, environment: dict[str, str]) -> None:
    with log.open("ab") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    target(*arguments)


def train_here(recipe: Recipe, data: Path, out: Path, loops: int = 2, fsdp: bool = False) -> None:
    """The target of a process that trains; a stop is 130 and its message."""
    try:
        train(recipe, loops=loops, data=data, out=out, fsdp=fsdp, device="cpu")
    except KeyboardInterrupt as stop:
        print(stop)
        sys.exit(130)


def train_and_record(recipe: Recipe, data: Path, out: Path, record: Path, loops: int = 2, fsdp: bool = False) -> None:
    """Writes what this process's model was given to `record` with the number of the process."""
    with recorded() as seen:
        train(recipe, loops=loops, data=data, out=out, fsdp=fsdp, device="cpu")
    Path(f"{record}.{os.environ['RANK']}").write_text(json.dumps(seen))


def train_apart(recipe: Recipe, data: Path, out: Path) -> None:
    """Each process in a folder of its own, as on machines without a shared file system. Writes what it was told."""
    run_module.SHARED_WAIT_S = 0.5
    try:
        train(recipe, loops=2, data=data, out=out / os.environ["RANK"], device="cpu")
    except TrainingError as refused:
        (out / f"told.{os.environ['RANK']}").write_text(str(refused))


def unasked_port() -> int:
    """A free one of those that the kernel gives to nobody who does not name it: it is still free when it is bound."""
    while True:
        port = SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def in_two(target: Callable[..., Any], *arguments: Any, log: Path) -> None:
    """`target` in two processes that know of one another as torchrun's do."""
    port = str(unasked_port())
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(target, *arguments, log=log, RANK=r, LOCAL_RANK=r, **both) for r in ("0", "1")]
    until(lambda: all(p.exitcode is not None for p in processes) or any(p.exitcode for p in processes), processes)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [0, 0], log.read_text()


def until(done: Callable[[], bool], processes: Sequence[Process] = (), seconds: float = 240) -> None:
    """Wait for `done`. Kills the processes and fails when it does not come."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            for process in processes:
                process.kill()
            raise AssertionError(f"waited {seconds} s in vain")
        time.sleep(0.002)


def logged(out: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(process: Process, within: float) -> None:
    """SIGKILL after a moment of up to `within` seconds; a process that was done is fine."""
    time.sleep(random.random() * within)
    process.kill()
    process.join()
