"""plt-eval bench vllm: what it prints follows from gates that can be red. (What it measures is no matter of tests.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plt_eval.bench.outcome import Setup
from plt_eval.bench.rounds import Stopwatch
from plt_eval.bench.subjects import Family
from plt_eval.bench.vllm import VLLMSettings, VLLMSubject, saved
from plt_eval.cli.main import main

CPU = torch.device("cpu")
QUICK = ("--shape", "small", "--loops", "2", "--tokens", "4", "--rounds", "1", "--compile", "off")


class Silent:
    def expect(self, steps: int) -> None: ...

    def did(self, what: str) -> None: ...


def bench(tmp_path: Path, *arguments: str) -> dict[str, object]:
    file = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "vllm", *QUICK, *arguments, "--json", str(file)])
    assert not ended.value.code
    return json.loads(file.read_text())


@pytest.mark.slow
def test_decoding_is_timed_by_loops_and_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(tmp_path, "--batch", "2", "--context", "48")
    assert [row["subject"] for row in found["rows"]] == ["R=1", "R=2", "R=2, trips"]
    assert all(row["tokens_a_round"] == 8 and len(row["rounds"]) == 1 for row in found["rows"])
    assert {gate["what"] for gate in found["gates"]} == {
        f"{name}, {what}" for name in ("R=1", "R=2", "R=2, trips") for what in ("logits", "greedy tokens")
    }
    assert "of R=1's tokens a second" in capsys.readouterr().out


def test_other_weights_make_the_gates_red() -> None:
    right, wrong = (Family.random("small", dtype=torch.float32, device=CPU, seed=seed) for seed in (0, 1))
    options = VLLMSettings((2,), (48,), 4, eager=True).engine()
    prompts = [list(range(5, 50)), list(range(9, 20))]
    with saved(right) as folder, VLLMSubject.opened(right, folder, 2, "one", options) as subject:
        for family, green in ((right, True), (wrong, False)):
            setup = Setup(family, (1, 2), 1, Stopwatch(CPU), Silent())
            gates = subject.gates(setup, prompts)
            assert [gate.green for gate in gates] == [green, green], gates


@pytest.mark.slow
def test_overhead_is_timed_against_vllms_own_benchmark(tmp_path: Path) -> None:
    found = bench(tmp_path, "--overhead", "--batch", "2", "--context", "32", "--requests", "4")
    assert [row["subject"] for row in found["rows"]] == ["vllm bench throughput", "--engine vllm"] * 2
    assert all(gate["green"] for gate in found["gates"])


@pytest.mark.slow
def test_hits_of_the_prefix_cache_are_timed_against_cold_prompts(tmp_path: Path) -> None:
    found = bench(tmp_path, "--prefix", "--batch", "1", "--context", "300")
    assert [row["subject"] for row in found["rows"]] == ["R=1, cold", "R=1, hit", "R=2, cold", "R=2, hit"]
    assert all(gate["green"] for gate in found["gates"])
