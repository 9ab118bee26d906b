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

from plt_eval.bench import decode, diagnostics, prefill, throughput, train
from plt_eval.bench.floor import kv_bytes, measure_bandwidth, must_read, weight_bytes
from plt_eval.bench.gates import Gate, allowed, apart, different, red
from plt_eval.bench.memory import peak_of
from plt_eval.bench.rounds import Job, Spread, Stopwatch, Taken, Timed, interleave, ratio, warm_up
from plt_eval.bench.subjects import Family, prompt
from plt_eval.cli.main import main
from plt_model import PLTConfig
from plt_model.decode.prefill import read_prompt
from plt_model.decode.session import DecodeSession
from plt_model.decode.step import DecodeStep
from plt_model.training.flops import training_flops

CPU = torch.device("cpu")
CPU_TYPE = torch.float32
SMALL = ("--shape", "small", "--device", "cpu", "--threads", "1", "--rounds", "2")


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def family() -> Family:
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
    """A fast step with one fault."""

    about = "broken"

    def __init__(self, step: Any, fault: str) -> None:
        self.step, self.fault = step, fault

    def reach(self, tokens: int, capacity: int) -> int:
        """As FastStep's."""
        return min(-(-tokens // 64) * 64, capacity)

    def release(self) -> None:
        """As FastStep's."""

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


# --- the other benches ------------------------------------------------------------------------------------

BENCHES: dict[str, tuple[str, ...]] = {
    "throughput": ("--batch", "3", "--requests", "6", "--context", "30", "--tokens", "8", "--compile", "off"),
    "prefill": ("--context", "150,300", "--chunk", "64"),
    "train": ("--context", "60"),
    "diagnose": ("--context", "50"),
}
SUBJECTS = {
    "throughput": ["R=1", "R=2", "Llama generate()"],
    "prefill": ["R=1", "R=2"] * 2,
    "train": ["R=1", "R=2"],
    "diagnose": ["forward", "all measurements"],
}


@pytest.mark.parametrize("bench", BENCHES)
def test_the_other_benches(cli: Cli, tmp_path: Path, bench: str) -> None:
    file = tmp_path / "bench.json"
    code, out, err = cli("bench", bench, *SMALL, "--loops", "2", *BENCHES[bench], "--json", file)
    assert code == 0, err
    found = json.loads(file.read_text())
    assert [row["subject"] for row in found["rows"]] == SUBJECTS[bench]
    assert found["gates"]
    assert all(gate["green"] for gate in found["gates"])
    assert all(len(row["rounds"]) == 2 for row in found["rows"])
    assert found["settings"]["attention"]
    assert f"{len(found['gates'])} of {len(found['gates'])} gates green" in out
    if bench == "train":
        assert found["settings"]["compute"] == "bfloat16"
        for row in found["rows"]:
            flops = training_flops(PLTConfig(**{**found["model"]["config"], "plt_num_loops": row["loops"]}), 60)
            assert row["tflops"] == pytest.approx(flops * 60 / row["seconds"]["median"] / 1e12)
    if bench == "throughput":
        assert {row["tokens_a_round"] for row in found["rows"]} == {found["rows"][0]["tokens_a_round"]}
        assert 6 <= found["rows"][0]["tokens_a_round"] <= 6 * 8


class WrongSession(DecodeSession):
    """Writes one wrong token in one text."""

    def run(self, requests: Any) -> Iterator[Any]:
        for result in super().run(requests):
            if result.key == "1":
                result.tokens[0] = (result.tokens[0] + 1) % 500
            yield result


def _forgetful(model: Any, ids: Tensor, *, chunk: int, **more: Any) -> Any:
    """Chunks that do not know of the chunk before."""
    cache, logits = None, None
    for first in range(0, ids.shape[1], chunk):
        cache, logits = read_prompt(model, ids[:, first : first + chunk], cache=cache, **more)
        cache.carry = None
    return cache, logits


def _break(bench: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bench == "throughput":
        monkeypatch.setattr(throughput, "DecodeSession", WrongSession)
    elif bench == "prefill":
        monkeypatch.setattr(prefill, "read_prompt", _forgetful)
    elif bench == "train":
        real = train.loss

        def wrong(model: Any, ids: Tensor, compute: torch.dtype) -> Tensor:
            value = real(model, ids, compute)
            return value if model.config._attn_implementation == "eager" else value * 1.2

        monkeypatch.setattr(train, "loss", wrong)
    else:
        maps = diagnostics._of_whole_maps
        monkeypatch.setattr(diagnostics, "_of_whole_maps", lambda loops: {k: v + 1e-4 for k, v in maps(loops).items()})


@pytest.mark.parametrize("bench", BENCHES)
def test_a_fault_has_no_speed(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench: str) -> None:
    _break(bench, monkeypatch)
    file = tmp_path / "bench.json"
    code, out, err = cli("bench", bench, *SMALL, "--loops", "2", *BENCHES[bench], "--json", file)
    assert code == 1
    assert "red gate: " in err
    assert "tokens/s" not in out
    assert json.loads(file.read_text())["rows"] == []


def test_memory_that_work_takes() -> None:
    found = peak_of(lambda: torch.zeros(64 << 20, dtype=torch.uint8).add_(1), CPU)
    assert found is not None
    assert 60 << 20 <= found <= 100 << 20


def test_training_leaves_no_gradient_behind_and_hardly_moves_the_weights() -> None:
    own = Family.random("small", dtype=torch.float32, device=CPU, seed=1)
    model = own.model(2).train()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    work = train._step(model, prompt(30, 512, seed=1), torch.optim.AdamW(model.parameters(), lr=train.RATE), CPU_TYPE)
    work()
    assert all(weight.grad is None for weight in model.parameters())
    moved = max(float((weight - before[name]).abs().max().detach()) for name, weight in model.named_parameters())
    assert 0 < moved < 1e-5


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("decode", "--batch", "1,0"), "--batch '1,0': '0' is no number of at least 1"),
        (("decode", "--context", "4k"), "--context '4k': '4k' is no number"),
        (("decode", "--loops", "0"), "--loops '0'"),
        (("decode", "--shape", "huge"), "--shape huge: expected one of tiny, small, medium, 7b"),
        (("decode", "--baselines", "trips,vendor"), "'vendor' is none; expected all, none or some of"),
        (("decode", "--json", "no/such/folder/x.json"), "expected a file in a folder that exists"),
        (("decode", "--shape", "small", "--model", "plt-tiny:r2"), "give --shape or --model, not both"),
        (("decode", "--model", "plt-tinny:r2"), "no such model folder"),
        (("diagnose", "--layers", "3"), "--layers has an effect with --shape paper only"),
        (("train", "--dtype", "float16"), "--dtype float16: training computes in float32 or bfloat16"),
        (("prefill", "--shape", "paper"), "--shape paper: expected one of tiny, small, medium, 7b"),
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
