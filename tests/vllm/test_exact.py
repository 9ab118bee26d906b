"""A PLT in vLLM computes plt_model's logits, however vLLM cuts, mixes, shares, drops and repeats its work.

Each scenario first proves that it took place (a batch was mixed, a prefix was hit, a request was preempted).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from vllm_cases import CHECKPOINT, LOOPS, TOLERANCE, Measured, Text, off, texts
from vllm_engine import BLOCK, ON_GPU, Ask, Engine, opened


@dataclass(repr=False)
class Case:
    loops: int
    engine: Engine
    texts: dict[str, Text]

    def ask(self, name: str, *, at: int = 0, cancel: int | None = None, whole: bool = True) -> Ask:
        text = self.texts[name]
        return Ask(text.prompt, len(text.continuation), at=at, cancel=cancel, whole=whole)


WAYS = [(loops, graphs) for loops in LOOPS for graphs in ((True, False) if ON_GPU else (False,))]
"""Loop counts, on a GPU with CUDA graphs and without."""


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"R{way[0]}{'-graphs' * way[1]}")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    loops, graphs = request.param
    options = {
        "enforce_eager": ON_GPU and not graphs,
        "hf_overrides": {} if loops == 4 else {"plt_num_loops": loops},  # the checkpoint's own
        # Every block of the windows stays to be hit, not only the last of a prompt; a model without windows refuses it.
        "prefix_cache_retention_interval": BLOCK if loops > 1 else 0,
    }
    with opened(CHECKPOINT, options) as engine:
        assert engine.graphs == graphs
        yield Case(loops, engine, texts(loops))


NAMES = ("one", "short", "edge", "even", "long", "sibling", "echo")
SIX = {"long": 0, "one": 0, "even": 2, "short": 3, "sibling": 5, "edge": 9}
"""Requests of different lengths and the steps at which they arrive."""


@pytest.mark.parametrize("name", NAMES)
def test_prompt_in_one_piece_then_decode(case: Case, name: str, measured: Measured) -> None:
    (answer,) = case.engine.run(case.ask(name))
    assert answer.first == 0
    assert len(answer.logits) == len(case.texts[name].logits)
    measured.exact("prefill and decode", case.loops, answer, case.texts[name])


@pytest.mark.parametrize("budget", [1, 5, 32, 45])
def test_prompt_in_pieces(case: Case, budget: int, measured: Measured) -> None:
    (answer,) = case.engine.run(case.ask("long"), budget=budget)
    pieces = [step.prefills[0] for step in case.engine.steps if step.prefills]
    assert max(pieces) == budget
    assert sum(pieces) == len(case.texts["long"].prompt)
    measured.exact("chunked prefill", case.loops, answer, case.texts["long"])


def test_prompts_in_pieces_side_by_side(case: Case, measured: Measured) -> None:
    names = ("even", "edge", "echo")
    answers = case.engine.run(*[case.ask(name) for name in names], chunk=7)
    assert any(set(step.prefills.values()) == {7} and len(step.prefills) == 3 for step in case.engine.steps)
    for name, answer in zip(names, answers, strict=True):
        measured.exact("chunked prefill, three prompts", case.loops, answer, case.texts[name])


def test_six_requests_at_once(case: Case, measured: Measured) -> None:
    answers = case.engine.run(*[case.ask(name, at=at) for name, at in SIX.items()], budget=40)
    assert sum(step.mixed for step in case.engine.steps) >= 4
    assert max(len(step.decodes) for step in case.engine.steps) >= 4
    assert not case.engine.preemptions
    for name, answer in zip(SIX, answers, strict=True):
        measured.exact("six concurrent requests", case.loops, answer, case.texts[name])


def test_a_decode_and_a_one_token_piece_in_one_batch(case: Case, measured: Measured) -> None:
    """Both schedule one token: the prompt's first must read no carry, its later ones their neighbour's."""
    names = ("short", "one", "edge")
    answers = case.engine.run(*[case.ask(name, at=at) for at, name in enumerate(names)], chunk=1)
    assert any(step.mixed and set(step.prefills.values()) == {1} for step in case.engine.steps)
    for name, answer in zip(names, answers, strict=True):
        measured.exact("one-token pieces beside decodes", case.loops, answer, case.texts[name])


def test_prefix_hit(case: Case, measured: Measured) -> None:
    (cold,) = case.engine.run(case.ask("long", whole=False))
    (again,) = case.engine.go_on(case.ask("long", whole=False))
    (sibling,) = case.engine.go_on(case.ask("sibling", whole=False))
    assert (cold.cached, again.cached, sibling.cached) == (0, 2 * BLOCK, 2 * BLOCK)
    assert again.tokens == cold.tokens
    assert float(off(again.logits, cold.logits).max()) <= TOLERANCE
    for name, answer in (("long", cold), ("long", again), ("sibling", sibling)):
        measured.exact("prefix hit", case.loops, answer, case.texts[name])


@pytest.mark.parametrize("length", [BLOCK + 1, 50, 2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 9, 3 * BLOCK + 4])
def test_prefix_hit_of_any_length(case: Case, length: int, measured: Measured) -> None:
    """The first token after the hit is wanted too, and blocks that hold what the model itself has said."""
    text = case.texts["long"]
    case.engine.run(case.ask("long", whole=False))
    (answer,) = case.engine.go_on(Ask(text.ids[:length], new=1 if length < len(text.prompt) else 6, whole=False))
    assert answer.cached == (length - 1) // BLOCK * BLOCK
    measured.exact("prefix hit of any length", case.loops, answer, text, length)


def test_prefix_hit_on_a_running_request(case: Case, measured: Measured) -> None:
    names = ("long", "sibling", "long", "short")
    asks = [case.ask(name, at=5 * i, whole=False) for i, name in enumerate(names)]
    answers = case.engine.run(*asks)
    assert [a.cached for a in answers] == [0, 2 * BLOCK, 2 * BLOCK, 0]
    assert any(step.mixed and 1 in step.prefills for step in case.engine.steps)
    for name, answer in zip(names, answers, strict=True):
        measured.exact("prefix hit on a running request", case.loops, answer, case.texts[name])


def test_prefix_hit_within_a_step(case: Case, measured: Measured) -> None:
    """Requests admitted together: vLLM lets the later ones hit blocks that the same step computes, and may leave one
    token of a prompt to read (the fourth)."""
    text = case.texts["long"]
    names = ("long", "long", "sibling")
    asks = [case.ask(name, whole=False) for name in names]
    *answers, one_left = case.engine.run(*asks, Ask(text.prompt[: 2 * BLOCK + 1], new=1, whole=False))
    assert [a.cached for a in (*answers, one_left)] == [0, 2 * BLOCK, 2 * BLOCK, 2 * BLOCK]
    assert len(case.engine.steps[0].prefills) == 4
    for name, answer in zip(names, answers, strict=True):
        measured.exact("prefix hit within a step", case.loops, answer, case.texts[name])
    measured.exact("prefix hit within a step", case.loops, one_left, text, 2 * BLOCK + 1)


def test_prefix_hit_on_what_a_decode_fills(case: Case, measured: Measured) -> None:
    """A prompt that begins as another request's prompt and answer, arriving before, while and after the answer fills a
    block."""
    text, length = case.texts["long"], 3 * BLOCK + 1
    late = [Ask(text.ids[:length], new=4, at=at, whole=False) for at in range(1, 8)]
    first, *others = case.engine.run(case.ask("long", whole=False), *late)
    assert {other.cached for other in others} == {2 * BLOCK, 3 * BLOCK}
    measured.exact("prefix hit on a decode", case.loops, first, text)
    for other in others:
        measured.exact("prefix hit on a decode", case.loops, other, text, length)


def test_prefix_hit_and_pieces(case: Case, measured: Measured) -> None:
    case.engine.run(case.ask("long", whole=False))
    (answer,) = case.engine.go_on(case.ask("sibling", whole=False), budget=2)
    assert answer.cached == 2 * BLOCK
    measured.exact("prefix hit, then pieces", case.loops, answer, case.texts["sibling"])


@pytest.mark.parametrize("budget", [0, 20])
def test_preempted_requests(case: Case, budget: int, measured: Measured) -> None:
    before = case.engine.metric("num_preemptions")
    names = ("long", "even", "edge")
    answers = case.engine.run(*[case.ask(name, whole=False) for name in names], budget=budget, squeeze=True)
    assert case.engine.preemptions == case.engine.metric("num_preemptions") - before > 0
    for name, answer in zip(names, answers, strict=True):
        measured.exact("preemption", case.loops, answer, case.texts[name])


@pytest.mark.slow
@pytest.mark.parametrize(("loops", "blocks"), [(1, 7), (2, 15), (3, 30), (4, 36)])
def test_preempted_for_want_of_memory(loops: int, blocks: int, measured: Measured) -> None:
    """A KV cache that is really small: enough to admit requests, too little for all that they say."""
    told = texts(loops)
    names = ("long", "even", "sibling", "edge", "long", "echo")
    options = {"hf_overrides": {"plt_num_loops": loops}, "num_gpu_blocks_override": blocks}
    with opened(CHECKPOINT, {**options, "max_model_len": 128, "enable_prefix_caching": False}) as engine:
        asks = [Ask(told[n].prompt, len(told[n].continuation), whole=False) for n in names]
        answers = engine.run(*asks, budget=64)
        assert engine.preemptions > 0
        for name, answer in zip(names, answers, strict=True):
            measured.exact("preemption, small cache", loops, answer, told[name])


def test_pages_of_one_kind(measured: Measured) -> None:
    told, names = texts(2), ("long", "even")
    options = {"hf_overrides": {"plt_num_loops": 2}, "disable_hybrid_kv_cache_manager": True}
    with opened(CHECKPOINT, options) as engine:
        for run in (engine.run, engine.go_on):
            answers = run(*[Ask(told[n].prompt, len(told[n].continuation), at=2, whole=False) for n in names])
            for name, answer in zip(names, answers, strict=True):
                measured.exact("pages of one kind", 2, answer, told[name])
        assert answers[0].cached == 2 * BLOCK


def test_cancelled_requests_beside_others(case: Case, measured: Measured) -> None:
    names = ("long", "even", "short", "edge", "sibling", "one")
    cancelled = {"long": 3, "short": 1, "sibling": 6}
    asks = [case.ask(name, at=2 * i, cancel=cancelled.get(name)) for i, name in enumerate(names)]
    answers = case.engine.run(*asks, budget=50)
    for name, answer in zip(names, answers, strict=True):
        full = len(case.texts[name].continuation)
        assert len(answer.tokens) < full if name in cancelled else len(answer.tokens) == full
        measured.exact("cancelled requests", case.loops, answer, case.texts[name])
    (after,) = case.engine.run(case.ask("echo"))
    measured.exact("after cancelled requests", case.loops, after, case.texts["echo"])


def test_decode_is_one_trip(case: Case) -> None:
    """Every step that only decodes calls each weight once, with the R passes of each request as rows."""
    case.engine.run(case.ask("even"), case.ask("short"), case.ask("long"))
    decodes = [step for step in case.engine.steps if not step.prefills]
    assert len(decodes) == len(case.texts["even"].continuation) - 1
    one_trip = [] if case.engine.graphs else [3 * case.loops]
    assert [step.rows for step in decodes] == [one_trip] * len(decodes)


def test_decode_is_one_trip_beside_a_prompt(case: Case) -> None:
    """A prompt takes R trips; the decodes in its batch are in one of them, or have one of their own, as the last token
    of a prompt has that is left over."""
    asks = [case.ask("one"), case.ask("short"), case.ask("echo", at=3), case.ask("sibling", at=6)]
    case.engine.run(*asks, budget=16)
    mixed = [step for step in case.engine.steps if step.mixed]
    assert len(mixed) > 3
    for step in mixed:
        prompts = sum(n for n in step.prefills.values() if n > 1)
        decodes = sum(step.decodes.values()) + sum(n for n in step.prefills.values() if n == 1)
        if not prompts:
            assert step.rows == ([] if case.engine.graphs else [case.loops * decodes])
            continue
        together = [prompts + case.loops * decodes] + [prompts] * (case.loops - 1)
        apart = [case.loops * decodes] + [prompts] * case.loops
        assert sorted(step.rows) in (sorted(together), sorted(apart)), f"{decodes} decodes, {prompts} of prompts"


Schedule = tuple[list[tuple[str, int, int | None, bool]], int, int]
"""Requests as (text, arrival, cancelled after, prompt's logits wanted), then a step's budget and a prompt's chunk."""


def schedules() -> st.SearchStrategy[Schedule]:
    request = st.tuples(st.sampled_from(NAMES), st.integers(0, 12), st.none() | st.integers(1, 6), st.booleans())
    requests = st.lists(request, min_size=2, max_size=6)
    return st.tuples(requests, st.sampled_from([0, 8, 17, 33, 70]), st.sampled_from([0, 1, 3, 16]))


def run_schedule(case: Case, schedule: Schedule, measured: Measured) -> None:
    requests, budget, chunk = schedule
    asks = [case.ask(name, at=at, cancel=cancel, whole=whole) for name, at, cancel, whole in requests]
    answers = case.engine.run(*asks, budget=budget, chunk=chunk)
    for (name, *_), answer in zip(requests, answers, strict=True):
        measured.exact("schedules by hypothesis", case.loops, answer, case.texts[name])


def examples(count: int) -> hypothesis_settings:
    """The same ones every time."""
    return hypothesis_settings(max_examples=count, derandomize=True, suppress_health_check=list(HealthCheck))


@examples(5)
@given(schedule=schedules())
def test_schedules(case: Case, schedule: Schedule, measured: Measured) -> None:
    run_schedule(case, schedule, measured)


@pytest.mark.slow
@examples(100)
@given(schedule=schedules())
def test_many_schedules(case: Case, schedule: Schedule, measured: Measured) -> None:
    run_schedule(case, schedule, measured)
