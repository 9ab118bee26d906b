"""Log-likelihoods against the model's own logits, request by request, and what sharing a context saves."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hf_parts import SHAPE, save
from transformers import LlamaConfig, LlamaForCausalLM

from plt_eval.engines import hf_likelihood
from plt_eval.engines.base import Loglikelihood, LoglikelihoodRequest
from plt_eval.engines.hf import HFEngine
from plt_eval.errors import UserError
from plt_model import PLTConfig, PLTForCausalLM

QUESTIONS = {
    "two plus two is": [" four", " five", " 4", " a long one, and wrong"],
    "three and three make": [" six", " 7", " twenty"],  # read beside the one before, which is shorter
    "x = ": ["1", "2"],
    "": ["start", "begin", ""],
    "a longer context than the others, by far": ["!", "?", "."],
    "alone": [" and unshared"],
    "also alone, but longer": ["!"],
    "trailing ": ["s", "spaces"],
}


def ask(questions: dict[str, list[str]] = QUESTIONS) -> list[LoglikelihoodRequest]:
    pairs = [(context, choice) for context, choices in questions.items() for choice in choices]
    return [LoglikelihoodRequest(f"q{i}", *pair) for i, pair in enumerate(pairs)]


def answers(engine: HFEngine, asked: list[LoglikelihoodRequest]) -> dict[str, Loglikelihood]:
    found = list(engine.loglikelihood(asked))
    assert len(found) == len(asked)
    return {answer.request_id: answer for answer in found}


def assert_plain(engine: HFEngine, asked: list[LoglikelihoodRequest], got: dict[str, Loglikelihood]) -> None:
    """Each answer is the sum that one forward over the whole text gives."""
    for request in asked:
        ids = engine.tokenizer(request.context + request.continuation)["input_ids"]
        spaces = len(request.context) - len(request.context.rstrip())
        count = len((request.context[len(request.context) - spaces :] + request.continuation).encode())
        with torch.no_grad():
            logprobs = engine.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        places = range(len(ids) - count, len(ids))
        expected = sum(float(logprobs[i - 1, ids[i]]) for i in places)
        assert got[request.id].tokens == count
        assert got[request.id].logprob == pytest.approx(expected, abs=1e-5)
        assert got[request.id].greedy == all(int(logprobs[i - 1].argmax()) == ids[i] for i in places)


CHANGES = {
    "1 loop": {"plt_num_loops": 1},
    "2 loops": {"plt_num_loops": 2},
    "3 loops": {"plt_num_loops": 3, "plt_gate_use_hidden_states": True, "plt_normalize_per_loop": False},
    "sequential": {"plt_num_loops": 2, "plt_loop_mode": "sequential"},
    "no shift": {"plt_num_loops": 2, "plt_clp_shift": False},
    "no window": {"plt_num_loops": 2, "plt_gswa": False},
}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_sharing_a_context_changes_nothing(
    tmp_path: Path, open_engine: Callable[..., HFEngine], changes: dict[str, object], batch_size: int
) -> None:
    config = PLTConfig(**SHAPE, plt_window_size=[3, 0], plt_hidden_scale=0.3, **changes)
    engine = open_engine(save(tmp_path / "plt", PLTForCausalLM(config)), batch_size=batch_size)
    assert_plain(engine, ask(), answers(engine, ask()))


def test_a_context_longer_than_a_chunk(
    folder: Path, open_engine: Callable[..., HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_likelihood, "read_prompt", partial(hf_likelihood.read_prompt, chunk=7))
    engine = open_engine(folder)
    assert_plain(engine, ask(), answers(engine, ask()))


def test_of_any_architecture(tmp_path: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(save(tmp_path / "llama", LlamaForCausalLM(LlamaConfig(**SHAPE))), batch_size=3)
    assert_plain(engine, ask(), answers(engine, ask()))


def test_the_greedy_flag(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    """Of a group and of a single one; the first token and a later one decide."""
    engine = open_engine(folder)
    ids = engine.tokenizer("hello")["input_ids"]
    with torch.no_grad():
        for _ in range(2):
            best = engine.model(torch.tensor([ids])).logits[0, -1, 3:131].argmax() + 3
            engine.model.lm_head.weight[best] *= 5  # an ASCII byte, so that the text says it exactly
            ids.append(int(best))
    both = engine.tokenizer.decode(ids[-2:])
    one = {"own": both, "first": both[0] + "\x00", "other": "\x00" + both[1], "short": both[0]}
    asked = [LoglikelihoodRequest(name, "hello", text) for name, text in one.items()]
    expected = {name: name in ("own", "short") for name in one}
    assert {i: answer.greedy for i, answer in answers(engine, asked).items()} == expected
    assert {request.id: answers(engine, [request])[request.id].greedy for request in asked} == expected
    assert_plain(engine, asked, answers(engine, asked))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens, padding among them, of each forward."""
    seen: list[int] = []
    real = PLTForCausalLM.forward

    def forward(self: PLTForCausalLM, input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        seen.append(input_ids.numel())
        return real(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(PLTForCausalLM, "forward", forward)
    return seen


def test_a_shared_context_is_read_once(folder: Path, open_engine: Callable[..., HFEngine], counted: list[int]) -> None:
    engine = open_engine(folder, batch_size=8)
    context = "a question that is asked with four answers to choose from: "
    answers(engine, ask({context: ["A1", "B2", "C3", "D4"]}))
    assert counted == [len(context), 4 * 2], "the trailing space goes with the answers, less the last token"
    counted.clear()
    answers(engine, ask({context.rstrip(): ["A", "B", "C", "D"]}))
    assert counted == [len(context)], "the context's last token says it all"


def test_what_is_not_shared_costs_what_it_did(
    folder: Path, open_engine: Callable[..., HFEngine], counted: list[int]
) -> None:
    """One forward a batch, of the longest first."""
    engine = open_engine(folder, batch_size=2)
    answers(engine, ask({"a" * n: ["b"] for n in (3, 30, 29, 5)}))
    assert counted == [2 * 32, 2 * 7]


def test_contexts_of_about_one_length_are_read_side_by_side(
    folder: Path, open_engine: Callable[..., HFEngine], counted: list[int]
) -> None:
    answers(open_engine(folder, batch_size=64), ask({"a" * n: ["bcd", "e"] for n in (20, 18, 19)}))
    assert counted == [3 * 21, 6 * 2]


def test_contexts_of_very_different_length_are_not_padded_to_one(
    folder: Path, open_engine: Callable[..., HFEngine], counted: list[int]
) -> None:
    engine = open_engine(folder, batch_size=64)
    lengths = (60, 58, 5, 4)
    answers(engine, ask({"a" * n: ["b", "c"] for n in lengths}))
    assert sum(counted) <= 1.25 * (sum(lengths) + len(lengths))


def test_memory_that_runs_out_halves_the_batch(
    folder: Path, open_engine: Callable[..., HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    real = PLTForCausalLM.forward

    def forward(self: PLTForCausalLM, input_ids: torch.Tensor, *args: object, **kwargs: object) -> object:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, input_ids, *args, **kwargs)

    engine = open_engine(folder, notify=said.append)
    expected = answers(engine, ask())
    monkeypatch.setattr(PLTForCausalLM, "forward", forward)
    got = answers(engine, ask())
    assert got.keys() == expected.keys()
    for name, answer in got.items():
        assert answer.logprob == pytest.approx(expected[name].logprob, abs=1e-5)
    assert re.search(r"^out of memory at batch size \d: going on with [12]$", said[-1])
    with pytest.raises(UserError, match="out of memory at batch size 4 on cpu; try --batch-size auto"):
        answers(open_engine(folder, batch_size=4), ask())
