"""The measurements of this machine's CPU, in less than a minute: `plt-eval estimate --calibrate`.

Real parts at shapes of random weights: decode sessions and prompts at two, training steps at three; the start of a
process, and Muon's step at two matrices. What estimates for --gpu cpu rest on from then on. On a machine that others
use it measures what they leave.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from rich.console import Console

from plt_eval.bench.floor import measure_bandwidth
from plt_eval.bench.progress import BenchProgress
from plt_eval.bench.subjects import Family, prompt
from plt_eval.bench.train import RATE, loss
from plt_eval.estimate.constants import Measured, MuonPoint, Point, Range, calibration_file
from plt_eval.journal import write_atomically
from plt_eval.provenance import hardware
from plt_model.decode.prefill import read_prompt
from plt_model.decode.session import DecodeSession, Request

Clock = Callable[[], float]
SHAPES, LOOPS, BATCHES = ("small", "medium"), (1, 2, 4), (1, 8)
SHORT, LONG, PROMPT = 2, 10, 32
"""New tokens of two runs of a session: a step is a part of their difference. Tokens of their prompts."""
READ = {"small": (32, 256), "medium": (256,)}
TRAINED, TRAINED_LENGTH = {"tiny": (1, 8), "small": (8,), "medium": (1,)}, 128
"""Sequences of a training step by shape, and their length."""
MUON = (64, 256)
"""Sides of square matrices for Muon."""
TRIES = 2
MATRIX = 1024
ENGINE = "import plt_eval.engines.hf, plt_eval.runner, plt_benchmarks.registry"


def calibrate(console: Console, *, clock: Clock = time.perf_counter) -> Measured:
    """Measure, and keep it in the cache folder. `clock` tells seconds: real ones, or a process' and its children's."""
    cpu = torch.device("cpu")
    began = datetime.now(UTC)
    with BenchProgress(console, "calibrate") as progress, torch.random.fork_rng(devices=[]):
        a_loop_count = len(SHAPES) * (len(BATCHES) + 1) + sum(map(len, TRAINED.values()))
        progress.expect(len(LOOPS) * a_loop_count + 4)
        bandwidth = measure_bandwidth(cpu, clock=clock).bytes_per_second
        progress.did("the memory")
        flops = _matrix_product(clock)
        progress.did("a matrix product")
        decode, prefill, train = list[Point](), list[Point](), list[Point]()
        for name in TRAINED:
            family = Family.random(name, dtype=torch.float32, device=cpu, seed=0)
            family.attention(None)
            for loops in LOOPS:
                if name in SHAPES:
                    for batch in BATCHES:
                        decode.append(_decode(family, name, loops, batch, clock))
                        progress.did(f"decoding, {name} R={loops}")
                    prefill += [_prefill(family, name, loops, length, clock) for length in READ[name]]
                    progress.did(f"reading, {name} R={loops}")
                for batch in TRAINED[name]:
                    train.append(_train(family, name, loops, batch, clock))
                    progress.did(f"training, {name} R={loops}")
        muon = tuple(MuonPoint(rows=side, columns=side, seconds=_muon(side, clock)) for side in MUON)
        progress.did("Muon")
        starts = sorted(_timed(_start, clock) for _ in range(TRIES))
        progress.did("starts")
    here = hardware()
    measured = Measured(
        machine=f"{here.cpu}, {here.cores} cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
        when=f"{began:%Y-%m-%d %H:%M} UTC, load {os.getloadavg()[0]:.1f}",
        cores=here.cores,
        source="plt-eval estimate --calibrate",
        bandwidth=bandwidth,
        flops=flops,
        decode=tuple(decode),
        prefill=tuple(prefill),
        train=tuple(train),
        muon=muon,
        start=Range(low=starts[0], middle=starts[(TRIES - 1) // 2], high=starts[-1]),
    )
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, measured.model_dump_json(indent=1) + "\n")
    return measured


def _timed(work: Callable[[], object], clock: Clock) -> float:
    began = clock()
    work()
    return clock() - began


def _point(name: str, loops: int, batch: int, context: int, times: list[float]) -> Point:
    times = sorted(times)
    middle = times[(len(times) - 1) // 2]
    return Point(
        shape=name, dtype="float32", loops=loops, batch=batch, context=context, seconds=middle, low=times[0],
        high=times[-1],
    )  # fmt: skip


def _matrix_product(clock: Clock) -> float:
    a = torch.ones(MATRIX, MATRIX)
    return 2 * MATRIX**3 / min(_timed(lambda: a @ a, clock) for _ in range(2 * TRIES))


def _decode(family: Family, name: str, loops: int, batch: int, clock: Clock) -> Point:
    session = DecodeSession(family.model(loops), slots=batch)
    ids = prompt(PROMPT, family.config.vocab_size, seed=0)[0].tolist()

    def run(new: int) -> None:
        for _ in session.run([Request(str(i), ids, max_new_tokens=new) for i in range(batch)]):
            pass

    run(SHORT)
    times = []
    for _ in range(TRIES):
        short = _timed(lambda: run(SHORT), clock)
        times.append(max(1e-6, (_timed(lambda: run(LONG), clock) - short) / (LONG - SHORT)))
    return _point(name, loops, batch, PROMPT + (SHORT + LONG) // 2, times)


def _prefill(family: Family, name: str, loops: int, length: int, clock: Clock) -> Point:
    model, ids = family.model(loops), prompt(length, family.config.vocab_size, seed=0)
    read_prompt(model, ids)
    return _point(name, loops, 1, length, [_timed(lambda: read_prompt(model, ids), clock) for _ in range(TRIES)])


def _train(family: Family, name: str, loops: int, batch: int, clock: Clock) -> Point:
    model, ids = family.model(loops), prompt(TRAINED_LENGTH, family.config.vocab_size, seed=0, batch=batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step() -> None:
        loss(model, ids, torch.float32).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return _point(name, loops, batch, TRAINED_LENGTH, [_timed(step, clock) for _ in range(TRIES)])


def _muon(side: int, clock: Clock) -> float:
    matrix = torch.nn.Parameter(torch.ones(side, side))
    matrix.grad = torch.eye(side)
    optimizer = torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw")
    return min(_timed(optimizer.step, clock) for _ in range(TRIES + 1))


def _start() -> None:
    subprocess.run([sys.executable, "-c", ENGINE], check=True, capture_output=True)


__all__ = ["calibrate"]
