"""`plt-eval bench`: fair rounds, gates that refuse, and the command at a shape of seconds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plt_eval.bench import decode
from plt_eval.bench.floor import kv_bytes, measure_bandwidth, must_read, weight_bytes
from plt_eval.bench.gates import Gate, allowed, apart, different, red
from plt_eval.bench.rounds import Job, Spread, Stopwatch, Taken, Timed, interleave, ratio, warm_up
from plt_eval.bench.subjects import Family, prompt
from plt_eval.cli.main import main
from plt_model.decode.step import DecodeStep

CPU = torch.device("cpu")
SMALL = ("--shape", "small", "--device", "cpu", "--threads", "1", "--rounds", "2")


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def family() -> Family:
    torch.set_num_threads(1)
    return Family.random("small", dtype=torch.float32, device=CPU, seed=0)


class Cli:
    """main() in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return int(caught.value.code or 0), out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(capsys)


# --- rounds -----------------------------------------------------------------------------------------------


def test_rounds_take_turns_and_warm_up_is_not_counted() -> None:
    clock, busy, order = Clock(), iter([]), []

    def job(name: str, seconds: float) -> Job:
        def work() -> None:
            order.append(name)
            clock.now += seconds * next(busy)

        def prepare() -> None:
            clock.now += 1000.0

        return Job(name, work, prepare)

    jobs = [job("a", 1.0), job("b", 2.0), job("c", 4.0)]
    watch = Stopwatch(CPU, wall=clock, cpu=lambda: clock.now / 2)
    busy = iter([50.0] * 3)
    timed = {j.name: warm_up(j, watch) for j in jobs}
    order.clear()
    busy = iter([1.0] * 3 + [10.0] * 3 + [1.0] * 6)  # the machine is busy in the second round, for all
    ticks: list[str] = []
    interleave(jobs, timed, rounds=4, watch=watch, tick=ticks.append)
    assert "".join(order) == "".join(ticks) == "abc" + "bca" + "cab" + "abc"
    assert [t.warm_up_seconds for t in timed.values()] == [50, 100, 200]
    assert timed["b"].seconds() == [2, 20, 2, 2]
    assert timed["b"].rounds[1] == Taken(20, 10)
    assert ratio(timed["b"], timed["a"]) == Spread(2, 2, 2)  # a busy round moves no ratio
    assert ratio(timed["c"], timed["b"]) == Spread(2, 2, 2)


def test_ratios_are_of_rounds_not_of_medians() -> None:
    a, b = Timed(0), Timed(0)
    a.rounds = [Taken(x, None) for x in (1.0, 2.0, 4.0)]
    b.rounds = [Taken(x, None) for x in (3.0, 2.0, 2.0)]
    assert ratio(b, a) == Spread(1, 0.5, 3)


def test_a_spread_turns_round_when_it_becomes_a_rate() -> None:
    spread = Spread.of([4.0, 1.0, 2.0])
    assert spread == Spread(2, 1, 4)
    assert spread.per(8) == Spread(4, 2, 8)
    assert spread.times(10) == Spread(20, 10, 40)


def test_a_gpu_is_waited_for_before_and_after() -> None:
    clock, pending = Clock(), [5.0]

    def wait() -> None:
        clock.now += pending.pop() if pending else 0.0

    watch = Stopwatch(torch.device("cuda"), wall=clock, cpu=clock, wait=wait)
    assert watch(lambda: pending.append(3.0)) == Taken(3.0, None)


# --- gates ------------------------------------------------------------------------------------------------


def test_a_gate_is_red_above_what_is_allowed_and_without_a_number() -> None:
    gates = [Gate("x", found, 0.5) for found in (0.5, 0.51, math.nan, math.inf)]
    assert red(gates) == gates[1:]
    assert gates[1].line() == "x: 0.51 apart, allowed 0.5"


def test_apart_is_of_the_worst_row() -> None:
    expected = torch.randn(3, 4, 100, dtype=torch.float64)
    found = expected.clone()
    assert apart(found, expected) == 0
    found[1, 2] += 0.1 * (expected[1, 2].var(correction=0) ** 0.5)
    assert apart(found, expected) == pytest.approx(0.1)
    found[0, 0, 0] = math.nan
    assert math.isnan(apart(found, expected))


def test_what_16_bits_may_be_apart_follows_the_model() -> None:
    assert allowed(torch.float32, 0.3) == 1e-4
    assert allowed(torch.bfloat16, 0.03) == pytest.approx(0.07)


def test_tokens_that_are_missing_differ_all() -> None:
    assert different([1, 2, 3], torch.tensor([[1, 5, 3]])) == 1
    assert different([1, 2], [1, 2, 3]) == 3


# --- subjects, floor --------------------------------------------------------------------------------------


def test_all_loop_counts_and_the_llama_share_one_set_of_tensors(family: Family) -> None:
    def place(name: str, model: Any) -> int:
        return int(model.get_parameter(name).untyped_storage().data_ptr())

    steps = [DecodeStep(family.model(loops)) for loops in (1, 2)]
    for name in ("model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        held = {place(name, model) for model in (steps[0].model, steps[1].model, family.llama())}
        assert len(held) == 1, name
    assert [family.model(loops).config.plt_num_loops for loops in (1, 2, 1)] == [1, 2, 1]


def test_bytes_of_keys_and_values(family: Family) -> None:
    """(1 + (R-1)(w+1)/S) of one loop's, and R-1 vectors."""
    one = kv_bytes(family.model(1).config, slots=3, context=200, dtype=torch.bfloat16)
    three = kv_bytes(family.model(3).config, slots=3, context=200, dtype=torch.bfloat16)
    looped = kv_bytes(family.model(3, mode="sequential").config, slots=3, context=200, dtype=torch.bfloat16)
    assert one == {"shared": 3 * 2 * 2 * 2 * 32 * 200 * 2, "windows": 0, "carry": 0}
    assert three["shared"] + three["windows"] == one["shared"] * (200 + 2 * 17) / 200
    assert three["carry"] == 3 * 2 * 128 * 2
    assert looped == {"shared": 3 * one["shared"], "windows": 0, "carry": 0}


def test_bytes_that_a_step_reads(family: Family) -> None:
    """Every weight once but the embedding's, and the gates only where there are later passes."""
    plain, looped = family.model(1), family.model(3)
    sizes = {name: weight.nbytes for name, weight in plain.named_parameters()}
    gates = sum(size for name, size in sizes.items() if ".plt_gate." in name)
    table = sizes["model.embed_tokens.weight"]
    assert weight_bytes(plain) == sum(sizes.values()) - table - gates
    assert weight_bytes(looped) == sum(sizes.values()) - table
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    assert weight_bytes(looped, trips=3) == weight_bytes(looped) + 2 * layers
    held = kv_bytes(looped.config, slots=2, context=50, dtype=torch.float32)
    assert must_read(looped, slots=2, context=50) == weight_bytes(looped) + sum(held.values())


def test_bandwidth_is_of_the_fastest_kernel() -> None:
    ticks: Iterator[int] = itertools.count()
    found = measure_bandwidth(CPU, clock=lambda: float(next(ticks)))  # every kernel takes one tick
    assert found.bytes_per_second == found.buffer
    assert found.buffer >= 1 << 28 or found.buffer >= 8 * (found.cache or 0)


def test_prompts_are_the_same_everywhere() -> None:
    assert torch.equal(prompt(9, 50, seed=3, batch=2), prompt(9, 50, seed=3, batch=2))
    assert int(prompt(999, 50, seed=3).max()) < 50


# --- decode -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode(cli: Cli, tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "bench.json"
    arguments = ("--loops", "2", "--batch", "1,3", "--context", "40", "--tokens", "3", "--compile", "off")
    code, out, err = cli("bench", "decode", *SMALL, *arguments, "--dtype", dtype, "--json", file)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert [(row["batch"], row["subject"]) for row in found["rows"]] == [
        (batch, subject)
        for batch in (1, 3)
        for subject in ("R=1", "R=2", "R=2, trips", "R=2, looped", "Llama generate()")
    ]
    for row in found["rows"]:
        assert len(row["rounds"]) == 2
        assert all(taken["seconds"] > 0 and taken["cpu_seconds"] > 0 for taken in row["rounds"])
        assert row["tokens_a_round"] == 3 * row["batch"]
        assert row["subject"] in out
    assert all(gate["green"] for gate in found["gates"])
    assert f"{len(found['gates'])} of {len(found['gates'])} gates green" in out
    assert found["machine"]["cores"] >= 1
    assert "torch" in found["packages"]
    assert found["dtype"] == dtype
    assert found["command"][0] == "plt-eval"
    first = found["rows"][0]
    assert first["ratio"] == {"to": "R=1", "median": 1, "low": 1, "high": 1}
    assert first["of_the_floor"] == pytest.approx(
        first["floor_seconds_a_step"] * 3 / first["seconds"]["median"], rel=1e-6
    )


class Broken:
    """A step with one fault."""

    def __init__(self, step: Any, fault: str) -> None:
        self.step, self.fault = step, fault

    def __call__(self, cache: Any, tokens: Tensor, reach: int) -> Tensor:
        if self.fault == "forgets-the-carry":
            cache.carry.zero_()
        if self.fault == "loses-a-position":
            cache.lengths[len(tokens) - 1] -= 1
        if self.fault == "short-reach":
            reach = 8
        if self.fault == "forgets-a-ring" and cache.ring_keys[0].shape[1]:
            cache.ring_values[-1].mul_(0)
        logits: Tensor = self.step(cache, tokens, reach)
        return logits * torch.nan if self.fault == "no-number" else logits


FAULTS = ("forgets-the-carry", "loses-a-position", "short-reach", "forgets-a-ring", "no-number")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_step_has_no_speed(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, dtype: str
) -> None:
    monkeypatch.setattr(decode, "fast_step", lambda step, *, compile: Broken(step, fault))  # noqa: ARG005
    file = tmp_path / "bench.json"
    arguments = ("--loops", "2", "--context", "40", "--tokens", "2", "--baselines", "none", "--dtype", dtype)
    code, out, err = cli("bench", "decode", *SMALL, *arguments, "--json", file)
    assert code == 1
    assert "red gate: batch 1, context 40: R=2, logits of the step: " in err
    assert "no speed is printed" in err
    assert "tokens/s" not in out
    found = json.loads(file.read_text())
    assert found["rows"] == []
    assert not all(gate["green"] for gate in found["gates"])


def test_only_the_configuration_with_a_red_gate_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the last of three slots: a single text does not have it."""

    class LastSlot(Broken):
        def __call__(self, cache: Any, tokens: Tensor, reach: int) -> Tensor:
            logits: Tensor = self.step(cache, tokens, reach)
            if len(tokens) == 3:
                logits[2] += torch.randn_like(logits[2])
            return logits

    monkeypatch.setattr(decode, "fast_step", lambda step, *, compile: LastSlot(step, ""))  # noqa: ARG005
    arguments = ("--loops", "1", "--batch", "1,3", "--context", "40", "--tokens", "2", "--baselines", "none")
    code, out, err = cli("bench", "decode", *SMALL, *arguments)
    assert code == 1
    assert err.count("red gate") == err.count("red gate: batch 3, context 40") == 1
    assert "tokens/s" in out


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("decode", "--batch", "1,0"), "--batch '1,0': '0' is no number of at least 1"),
        (("decode", "--context", "4k"), "--context '4k': '4k' is no number"),
        (("decode", "--loops", "0"), "--loops '0'"),
        (("decode", "--shape", "huge"), "--shape huge: expected one of small, medium, 7b"),
        (("decode", "--baselines", "trips,vendor"), "'vendor' is none; expected all, none or some of"),
        (("decode", "--json", "no/such/folder/x.json"), "expected a file in a folder that exists"),
        (("decode", "--shape", "small", "--model", "plt-tiny:r2"), "give --shape or --model, not both"),
        (("decode", "--model", "plt-tinny:r2"), "no such model folder"),
        (("prefill", "--shape", "small", "--attention", "magic"), "--attention magic: "),
    ],
)
def test_a_mistake_is_one_line(cli: Cli, arguments: tuple[str, ...], line: str) -> None:
    code, out, err = cli("bench", *arguments, "--device", "cpu")
    assert (code, out) == (2, "")
    assert line in err.splitlines()[-1]
    assert "Traceback" not in err


def test_help_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, plt_eval.cli.bench; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
