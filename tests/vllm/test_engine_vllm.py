"""--engine vllm beside --engine hf: the same prompts, the same greedy texts, the same likelihoods, in float32."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plt_benchmarks.protocols import Prompt
from plt_benchmarks.registry import get_suite
from plt_eval.engines.base import Completion, Decoding, GenerationRequest, LoglikelihoodRequest
from plt_eval.engines.hf import HFEngine
from plt_eval.engines.vllm import VLLMEngine
from plt_eval.errors import UserError
from plt_eval.models import resolve_model

LOOPS = (1, 2, 3, 4)
TOLERANCE = 5e-5
"""Of a token's log-probability, in float32."""

FUNCTION = 'def {name}(items):\n    """Return the {what} of items.\n\n    >>> {name}([1, 2, 3])\n    """\n'
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


SHARE: dict[str, Any] = {"gpu_memory_utilization": 0.1} if torch.cuda.is_available() else {}
"""Of a GPU, on which other engines stand, too."""


class Pair:
    """The two engines on one checkpoint."""

    def __init__(self, loops: int) -> None:
        model = resolve_model(f"plt-tiny:r{loops}")
        self.loops = loops
        self.hf = HFEngine(str(model.folder), loops=loops, dtype="float32", notify=lambda _: None)
        self.vllm = VLLMEngine(
            str(model.folder), loops=loops, dtype="float32", compile="off", notify=lambda _: None, **SHARE
        )

    def close(self) -> None:
        self.vllm.close()
        self.hf.close()


@pytest.fixture(scope="module", params=LOOPS, ids=lambda loops: f"R={loops}")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with closing(Pair(request.param)) as made:
        yield made


@pytest.fixture
def two(pair: Pair) -> VLLMEngine:
    """For what does not depend on the loops; tests that take it run with two alone."""
    if pair.loops != 2:
        raise AssertionError("mark the test with only_two")
    return pair.vllm


only_two = pytest.mark.parametrize("pair", [2], indirect=True, ids=["R=2"])


def asked(prompts: list[Prompt], **decoding: Any) -> list[GenerationRequest]:
    return [GenerationRequest(f"p{i}#0", prompt, Decoding(**decoding)) for i, prompt in enumerate(prompts)]


def plain(text: str, *stops: str, limit: int = 32) -> Prompt:
    return Prompt(text=text, stop=stops, messages=(), prefill="", chat_stop=(), max_new_tokens=limit)


def drawn(engine: HFEngine | VLLMEngine, requests: list[GenerationRequest]) -> dict[str, Completion]:
    return {one.request_id: replace(one, seconds=None) for one in engine.generate(requests)}


# --- texts --------------------------------------------------------------------------------------------


def test_greedy_texts_are_those_of_hf(pair: Pair) -> None:
    (trace,) = get_suite("trace")
    samples = trace.load(None).samples[::25]
    names = ("total", "largest", "mean_of", "count_even")
    prompts = [trace.prompt(sample) for sample in samples]
    prompts += [plain(FUNCTION.format(name=name, what=name), *STOPS, limit=64) for name in names]
    prompts += [plain("", limit=5), plain("x", limit=1)]
    requests = asked(prompts)
    expected = drawn(pair.hf, requests)
    assert drawn(pair.vllm, requests) == expected
    assert {one.finish_reason for one in expected.values()} == {"stop", "length"}


def test_texts_end_at_the_token_that_completes_a_stop_string(pair: Pair) -> None:
    choose = random.Random(0)
    begun = asked([plain(FUNCTION.format(name=name, what=name), limit=40) for name in "abcdefgh"])
    whole = drawn(pair.hf, begun)
    cut = []
    for request in begun:
        text = whole[request.id].text
        at = choose.randrange(len(text) - 2)
        cut.append(replace(request, prompt=replace(request.prompt, stop=("never", text[at : at + 2]))))
    expected = drawn(pair.hf, cut)
    assert drawn(pair.vllm, cut) == expected
    assert all(one.finish_reason == "stop" for one in expected.values())


def test_several_texts_of_one_prompt_at_once_are_the_same(pair: Pair) -> None:
    """They share blocks that are computed in the very step that shares them."""
    words = random.Random(3)
    long = "".join(words.choice("abcdefgh =+()\n") for _ in range(300))
    requests = [GenerationRequest(f"p#{i}", plain(long, limit=12)) for i in range(6)]
    expected = drawn(pair.hf, requests[:1])["p#0"].text
    assert {one.text for one in drawn(pair.vllm, requests).values()} == {expected}


@only_two
def test_sampled_texts_depend_on_seed_and_request_alone(two: VLLMEngine) -> None:
    prompts = [plain(FUNCTION.format(name=name, what=name), limit=24) for name in "abcdef"]
    requests = asked(prompts, temperature=1.0, top_p=0.95, seed=7)
    together = drawn(two, requests)
    assert len({one.text for one in together.values()}) == len(prompts)
    for request in (requests[4], requests[1]):
        assert drawn(two, [request]) == {request.id: together[request.id]}
    other = drawn(two, asked(prompts, temperature=1.0, top_p=0.95, seed=8))
    assert all(other[key].text != together[key].text for key in together)


@only_two
def test_threads_ask_at_once_and_each_gets_its_own(two: VLLMEngine) -> None:
    requests = [GenerationRequest("same id", plain(f"value = {i}\n", limit=8 + i)) for i in range(8)]
    alone = [drawn(two, [request])["same id"] for request in requests]
    together: dict[int, Completion] = {}

    def ask(i: int) -> None:
        together[i] = drawn(two, [requests[i]])["same id"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(requests))] == alone


@only_two
def test_what_nobody_waits_for_any_more_is_given_up(two: VLLMEngine) -> None:
    requests = asked([plain("a = 1\n", limit=4), *(plain(f"b = {i}\n", limit=1500) for i in range(4))])
    waiting = two.generate(requests)
    assert next(waiting).completion_tokens == 4
    waiting.close()
    assert two.steps.call(lambda llm: llm.llm_engine.get_num_unfinished_requests()) == 0


@only_two
def test_a_prompt_beyond_the_context_is_an_error_and_a_text_ends_with_it(two: VLLMEngine) -> None:
    fits, long = "x" * (two.context - 9), "x" * two.context
    found = drawn(two, asked([plain(fits, limit=40), plain(long, limit=40)]))
    assert (found["p0#0"].completion_tokens, found["p0#0"].finish_reason) == (8, "length")
    assert found["p1#0"].finish_reason == "error"
    assert f"{two.context} (--max-model-len)" in str(found["p1#0"].error)


# --- likelihoods --------------------------------------------------------------------------------------


def questions(written: dict[str, str]) -> list[LoglikelihoodRequest]:
    """Long contexts with several choices, of one token and of many; hits that reach into a continuation; no context."""
    choose = random.Random(1)

    def text(count: int) -> str:
        return "".join(choose.choice("abcdefgh =+()\n") for _ in range(count))

    found = []
    for i in range(6):
        context = text(choose.randint(100, 400)) + "."
        found += [LoglikelihoodRequest(f"{i}.{j}", context, text(choose.choice((1, 1, 4, 40)))) for j in range(4)]
        found.append(LoglikelihoodRequest(f"{i} again", context, found[-1].continuation))
    long = text(700)
    found += [LoglikelihoodRequest(f"cut {at}", long[:at] + ".", long[at:]) for at in (1, 200, 600)]
    found += [LoglikelihoodRequest("no context", "", "x = 1"), LoglikelihoodRequest("nothing", "x = 1", "")]
    return found + [
        LoglikelihoodRequest(f"greedy {i}", before, after) for i, (before, after) in enumerate(written.items())
    ]


def test_likelihoods_are_those_of_hf(pair: Pair) -> None:
    begun = asked([plain(FUNCTION.format(name=name, what=name).rstrip(), limit=12) for name in "abc"])
    texts = drawn(pair.hf, begun)
    requests = questions({one.prompt.text: texts[one.id].text for one in begun})
    expected = {one.request_id: one for one in pair.hf.loglikelihood(requests)}
    for _ in range(2):  # the second time all of it is in the prefix cache
        found = {one.request_id: one for one in pair.vllm.loglikelihood(requests)}
        assert found.keys() == expected.keys()
        for key, one in expected.items():
            assert (found[key].tokens, found[key].greedy) == (one.tokens, one.greedy), key
            assert found[key].logprob == pytest.approx(one.logprob, abs=TOLERANCE * max(1, one.tokens)), key
    assert all(expected[f"greedy {i}"].greedy for i in range(3))


@only_two
def test_what_cannot_be_read_whole_is_refused(two: VLLMEngine) -> None:
    with pytest.raises(UserError, match=r"q: \d+ tokens are to be read, and vLLM's context holds .*--max-model-len"):
        list(two.loglikelihood([LoglikelihoodRequest("q", "x" * two.context, "yz")]))


# --- which run this is, and what is refused ---------------------------------------------------------------


def test_identity_is_that_of_hf_but_for_the_engine(pair: Pair) -> None:
    mine, other = dict(pair.vllm.identity()), dict(pair.hf.identity())
    assert (mine.pop("engine"), other.pop("engine")) == ("vllm", "hf")
    assert mine == other
    assert mine["loops"] == pair.loops
    assert pair.vllm.facts()["vllm"].startswith("0.")


def test_a_start_that_vllm_refuses_is_one_line() -> None:
    folder = str(resolve_model("plt-tiny:r2").folder)
    engine = VLLMEngine(folder, tensor_parallel=2, compile="off", notify=lambda _: None)  # three heads
    with pytest.raises(UserError) as refused:
        list(engine.generate(asked([plain("x")])))
    assert "--tensor-parallel" in str(refused.value)
    assert "\n" not in str(refused.value)
    engine.close()


# --- the command --------------------------------------------------------------------------------------


def command(folder: Path, *more: str) -> list[str]:
    run = [sys.executable, "-m", "plt_eval", "run", "--suite", "trace", "--dtype", "float32", "--results", str(folder)]
    return [*run, "--json", *more]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}


def outcome(arguments: list[str]) -> tuple[list[dict[str, Any]], str]:
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_run_of_two_loop_counts_scores_as_hf_and_prints_json_alone(tmp_path: Path) -> None:
    chosen = ("--model", "plt-tiny", "--loops", "1,2", "--limit", "8")
    expected, _ = outcome(command(tmp_path / "hf", *chosen))
    mine = command(tmp_path / "vllm", *chosen, "--engine", "vllm", "--compile", "off")
    found, said = outcome(mine)
    assert [one["loops"] for one in found] == [1, 2]
    assert [one["metrics"] for one in found] == [one["metrics"] for one in expected]
    assert said.count("starting vLLM") == 2
    assert not [line for line in said.splitlines() if "INFO" in line or "WARNING" in line or "Warning" in line]
    again, said = outcome(mine)
    assert [one["metrics"] for one in again] == [one["metrics"] for one in found]
    assert "starting vLLM" not in said


@pytest.mark.slow
def test_ctrl_c_ends_the_engine_and_the_same_command_goes_on(tmp_path: Path) -> None:
    chosen = ("--model", "plt-tiny:r2", "--limit", "30", "--engine", "vllm", "--compile", "off", "--batch-size", "1")
    whole, _ = outcome(command(tmp_path / "whole", *chosen))
    folder = tmp_path / "stopped"
    process = subprocess.Popen(
        command(folder, *chosen), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_until(lambda: any(file.read_text().count("\n") > 2 for file in folder.glob("*/completions.jsonl")))
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=300)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("plt-eval: interrupted:")
    found, _ = outcome(command(folder, *chosen))
    assert found[0]["metrics"] == whole[0]["metrics"]


def wait_until(there: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "nothing was drawn"
        time.sleep(0.05)
