"""Decoding in slots that refill: every request's text is the one that generate() writes for it alone."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import EXACT, MODES, assert_close, build, quick, row, tiny, tokens
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from plt_model import PLTForCausalLM
from plt_model.decode import session as session_module
from plt_model.decode.cache import StaticCache
from plt_model.decode.prefill import read_prompt, read_prompts, side_by_side
from plt_model.decode.sampling import next_tokens
from plt_model.decode.session import DecodeSession, Request, Result

END = 2


def model_of(mode: str = "plt", loops: int = 3, dtype: torch.dtype = torch.float32, **settings: Any) -> PLTForCausalLM:
    model = build(tiny(**MODES[mode], plt_num_loops=loops, **settings), dtype=dtype, backend="sdpa")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def requests(lengths: list[int], new: list[int] | int = 7, **options: Any) -> list[Request]:
    limits = [new] * len(lengths) if isinstance(new, int) else new
    return [
        Request(f"r{i}", tokens(length, seed=i), limit, **options)
        for i, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


def alone(model: PLTForCausalLM, request: Request, processors: list[Any] | None = None) -> list[int]:
    """What generate() writes for one request, up to its stop token."""
    ids = row(request.prompt)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(request.stop_ids) or None,
        logits_processor=LogitsProcessorList(processors or []),
    )
    text: list[int] = out[0, len(request.prompt) :].tolist()
    return text[:-1] if text[-1] in request.stop_ids else text


class InverseDraw(LogitsProcessor):
    """The first token with draw * total < cumulative probability, in float64."""

    def __init__(self, draws: Iterator[float]) -> None:
        self.draws = draws

    def __call__(self, _: Any, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(-1).cumsum(-1)
        draw = torch.tensor([[next(self.draws)]], dtype=torch.float64)
        token = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


def sampler(request: Request) -> list[Any]:
    """transformers' warpers, then the draw; nothing for a greedy request."""
    if not request.temperature:
        return []
    chain: list[Any] = [TemperatureLogitsWarper(request.temperature)]
    if request.top_p < 1:
        chain.append(TopPLogitsWarper(request.top_p))
    return [*chain, InverseDraw(stream(request.key))]


def stream(key: str) -> Iterator[float]:
    return iter(random.Random(key).random, None)


def run(model: PLTForCausalLM, wanted: list[Request], slots: int = 3, **options: Any) -> dict[str, Result]:
    results = list(DecodeSession(model, slots=slots, **options).run(wanted))
    assert len(results) == len(wanted)
    return {result.key: result for result in results}


# --- the same text as generate() ----------------------------------------------------------------------


@pytest.mark.parametrize("sync_every", [1, 8], ids="sync-{}".format)
@pytest.mark.parametrize("gate", [True, False], ids=["gate-states", "gate-query"])
@pytest.mark.parametrize("mode", ["plt", "no-gswa"])
@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
def test_greedy(loops: int, mode: str, gate: bool, sync_every: int) -> None:
    """Unequal prompts and limits, more requests than slots."""
    model = model_of(mode, loops, plt_gate_use_hidden_states=gate)
    wanted = requests([6, 1, 9, 4, 5, 2, 3], [7, 9, 1, 2, 12, 5, 3])
    found = run(model, wanted, sync_every=sync_every)
    for request in wanted:
        result = found[request.key]
        assert result.tokens == alone(model, request), request.key
        assert (result.reason, result.prompt_tokens) == ("length", len(request.prompt))
        assert result.seconds > 0


@pytest.mark.parametrize("sync_every", [1, 3, 8], ids="sync-{}".format)
def test_stop_ids(sync_every: int) -> None:
    """A stop token ends a text and is not in it; each request has its own."""
    model = model_of()
    free = requests([6, 1, 9, 4, 5, 2], 12)
    ends = [frozenset(alone(model, request)[i : i + 1]) for i, request in enumerate(free)]
    wanted = [Request(r.key, r.prompt, 12, stop_ids=end) for r, end in zip(free, ends, strict=True)]
    found = run(model, wanted, slots=2, sync_every=sync_every)
    for request in wanted:
        assert found[request.key].tokens == alone(model, request)
        assert found[request.key].reason == "stop"
    assert found["r0"].tokens == []


def test_a_stop_id_as_the_last_token_allowed() -> None:
    model = model_of()
    free = alone(model, requests([6], 5)[0])
    last = next(i for i in range(1, 5) if free[i] not in free[:i])
    result = run(model, [Request("a", tokens(6, seed=0), last + 1, stop_ids=frozenset([free[last]]))])["a"]
    assert (result.tokens, result.reason) == (free[:last], "stop")


@pytest.mark.parametrize("sync_every", [1, 8], ids="sync-{}".format)
@pytest.mark.parametrize("count", [1, 4, 7])
def test_a_stop_callback(count: int, sync_every: int) -> None:
    """Asked once for each new token in turn; what it refuses is kept."""
    model, asked = model_of(), []

    def stopped(new: list[int]) -> bool:
        asked.append(list(new))
        return len(new) == count

    free = requests([6, 3, 2])
    found = run(model, [Request("a", free[0].prompt, 7, stopped=stopped), *free[1:]], slots=2, sync_every=sync_every)
    text = alone(model, free[0])
    assert (found["a"].tokens, found["a"].reason) == (text[:count], "stop")
    assert asked == [text[: i + 1] for i in range(count)]
    assert found["r1"].tokens == alone(model, free[1])


@pytest.mark.parametrize("sync_every", [1, 8], ids="sync-{}".format)
@pytest.mark.parametrize("loops", [1, 3], ids="R{}".format)
def test_sampled(loops: int, sync_every: int) -> None:
    """With the same draws the tokens of generate(), in a batch that mixes all settings."""
    model = model_of(loops=loops)
    settings = [(0.7, 1.0), (0.0, 1.0), (1.4, 0.9), (1.0, 0.3), (2.5, 1.0), (0.0, 0.5), (1.0, 0.999)]
    wanted = [
        Request(f"r{i}", tokens(3 + i % 3, seed=i), 10, temperature=t, top_p=p, stream=stream(f"r{i}") if t else None)
        for i, (t, p) in enumerate(settings)
    ]
    found = run(model, wanted, slots=4, sync_every=sync_every)
    for request in wanted:
        assert found[request.key].tokens == alone(model, request, sampler(request)), request.key


def test_sampling_depends_on_the_draws_alone() -> None:
    model = model_of()

    def texts(order: list[int], slots: int, seed: int = 0, **options: Any) -> list[list[int]]:
        wanted = [
            Request(str(i), tokens(4 + i, seed=i), 9, temperature=1.2, top_p=0.9, stream=stream(f"{seed}:{i}"))
            for i in order
        ]
        found = run(model, wanted, slots, **options)
        return [found[str(i)].tokens for i in range(5)]

    first = texts([0, 1, 2, 3, 4], 5)
    assert first == texts([3, 1, 4, 0, 2], 2, sync_every=4) == texts([0, 1, 2, 3, 4], 1)
    assert first != texts([0, 1, 2, 3, 4], 5, seed=1)


@given(data=st.data())
@quick(15)
def test_any_requests_in_any_session(data: st.DataObject) -> None:
    model = model_of(loops=data.draw(st.integers(1, 3)), num_hidden_layers=1)
    count = data.draw(st.integers(1, 7))
    wanted = []
    for i in range(count):
        warm = data.draw(st.booleans())
        wanted.append(
            Request(
                f"r{i}",
                tokens(data.draw(st.integers(1, 12)), seed=i),
                data.draw(st.integers(1, 9)),
                stop_ids=frozenset(data.draw(st.sets(st.integers(0, 36), max_size=3))),
                temperature=data.draw(st.sampled_from([0.5, 1.5])) if warm else 0.0,
                top_p=data.draw(st.sampled_from([0.6, 1.0])) if warm else 1.0,
                stream=stream(f"r{i}") if warm else None,
            )
        )
    capacity = data.draw(st.sampled_from([None, 21, 40]))
    options = {"sync_every": data.draw(st.integers(1, 9)), "chunk": data.draw(st.sampled_from([None, 1, 5, 2048]))}
    found = run(model, wanted, data.draw(st.integers(1, 5)), capacity=capacity, **options)
    for request in wanted:
        assert found[request.key].tokens == alone(model, request, sampler(request))


# --- slots --------------------------------------------------------------------------------------------


class Watched:
    """A session whose steps are recorded: the bucket, the reach and the logits of each; idle slots full of NaN."""

    def __init__(self, model: PLTForCausalLM, *, poison: bool = False, **options: Any) -> None:
        self.session = DecodeSession(model, **options)
        self.steps: list[tuple[int, int, Tensor]] = []
        self.poison, step = poison, self.session.step

        def watched(cache: StaticCache, new: Tensor, reach: int) -> Tensor:
            if self.poison:
                for slot in range(cache.slots):
                    if cache.lengths[slot] == 0:
                        poisoned(cache, slot)
            assert int(cache.lengths[: len(new)].max()) < reach <= cache.capacity
            logits: Tensor = step(cache, new, reach)
            self.steps.append((len(new), reach, logits))
            return logits

        self.session.step = watched

    def run(self, wanted: list[Request]) -> dict[str, Result]:
        return {result.key: result for result in self.session.run(wanted)}


def poisoned(cache: StaticCache, slot: int) -> None:
    for held in (*cache.keys, *cache.values, *cache.ring_keys, *cache.ring_values, cache.carry):
        held[slot] = float("nan")


def test_the_step_shrinks_with_the_live_requests() -> None:
    model = model_of()
    watched = Watched(model, slots=6)
    wanted = requests([4] * 7, [9, 3, 5, 2, 7, 9, 2])
    found = watched.run(wanted)
    # Steps left: 8 2 4 1 6 8, and 1 in the first free slot.
    assert [n for n, _, _ in watched.steps] == [6, 6, 4, 4, 4, 4, 2, 2]
    assert all(found[r.key].tokens == alone(model, r) for r in wanted)


def test_a_free_slot_is_refilled_at_once() -> None:
    """As many steps as the slots need when none ever waits."""
    watched = Watched(model_of(), slots=2)
    watched.run(requests([3] * 6, [9, 3, 3, 3, 3, 2]))
    assert len(watched.steps) == 9
    assert [n for n, _, _ in watched.steps] == [2] * 8 + [1]


@pytest.mark.parametrize("sync_every", [1, 8], ids="sync-{}".format)
def test_requests_that_come_later(sync_every: int) -> None:
    model = model_of()
    wanted = requests([3, 9, 1, 6, 2, 5], new=[9, 3, 12, 5, 1, 7])
    waves = iter([[], wanted[2:4], wanted[4:]])
    session = DecodeSession(model, slots=3, capacity=64, sync_every=sync_every)
    found = {result.key: result.tokens for result in session.run(wanted[:2], more=lambda: next(waves, []))}
    assert found == {request.key: alone(model, request) for request in wanted}


def test_requests_that_come_later_need_a_capacity() -> None:
    with pytest.raises(ValueError, match="capacity"):
        DecodeSession(model_of(), slots=2).run(requests([3]), more=list)


def test_a_bad_request_that_comes_later_is_refused() -> None:
    session = DecodeSession(model_of(), slots=2, capacity=16)
    with pytest.raises(ValueError, match=r"r0.*capacity"):
        list(session.run([Request("good", [5], 4)], more=lambda: requests([40])))


def test_results_come_as_they_finish() -> None:
    watched = Watched(model_of(), slots=2)
    keys = [result.key for result in watched.session.run(requests([3] * 4, [9, 3, 1, 2]))]
    assert keys == ["r1", "r2", "r3", "r0"]


def test_never_more_slots_than_requests() -> None:
    said: list[str] = []
    run(model_of(), requests([3, 4]), slots=64, notify=said.append)
    assert "2 slots" in said[0]


@pytest.mark.parametrize("sync_every", [1, 4], ids="sync-{}".format)
def test_idle_slots_never_leak(sync_every: int) -> None:
    """Their garbage may even be no numbers at all."""
    model = model_of(dtype=torch.float64)
    wanted = requests([4, 2, 7, 3, 5, 1], [3, 9, 2, 12, 5, 8])
    clean, dirty = (Watched(model, slots=5, sync_every=sync_every, poison=poison) for poison in (False, True))
    expected, found = clean.run(wanted), dirty.run(wanted)
    assert {k: r.tokens for k, r in found.items()} == {k: r.tokens for k, r in expected.items()}
    assert any(logits.isnan().any() for _, _, logits in dirty.steps)
    for (_, _, one), (_, _, other) in zip(clean.steps, dirty.steps, strict=True):
        live = ~other.isnan().any(-1)
        assert_close(other[live], one[live], 1e-12)


def test_logits_do_not_depend_on_the_neighbours() -> None:
    """The request in slot 0 stays there; its logits are those it has alone."""
    model = model_of(dtype=torch.float64)
    request = requests([5], 12)[0]
    single = Watched(model, slots=1)
    single.run([request])
    for others in (1, 2, 4, 6):
        crowd = Watched(model, slots=4)
        crowd.run([request, *requests([9, 3, 2, 8, 1, 30, 4], [3, 5, 9, 2, 4, 7, 1])[1 : 1 + others]])
        for (_, _, one), (_, _, other) in zip(single.steps, crowd.steps, strict=False):
            assert_close(other[0], one[0], EXACT)


def test_reach_follows_the_longest_text() -> None:
    watched = Watched(model_of(dtype=torch.float64), slots=2, capacity=600, sync_every=4)  # a type without a kernel
    watched.run(requests([250, 3], [20, 20]))
    assert [reach for _, reach, _ in watched.steps[:3]] == [256] * 3
    assert watched.steps[-1][1] == 320


@pytest.mark.parametrize("sync_every", [1, 8], ids="sync-{}".format)
def test_a_capacity_that_just_holds_the_request(sync_every: int) -> None:
    model = model_of()
    request = requests([6], 12)[0]
    assert run(model, [request], capacity=18, sync_every=sync_every)["r0"].tokens == alone(model, request)


# --- sampling -----------------------------------------------------------------------------------------


@given(data=st.data())
@quick(60)
def test_next_tokens_is_transformers_chain(data: st.DataObject) -> None:
    count, vocabulary = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 2, 37, 1000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))  # bf16 has many equal logits
    logits = (data.draw(st.sampled_from([0.0, 1.0, 8.0])) * torch.randn(count, vocabulary, generator=generator)).to(
        dtype
    )
    settings = [
        (data.draw(st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.3])), data.draw(st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0])))
        for _ in range(count)
    ]
    draws, expected = [], []
    for i, (temperature, top_p) in enumerate(settings):
        key = str(data.draw(st.integers(0, 99)))
        draws.append(next(stream(key)))
        scores = logits[i : i + 1].float()
        for processor in sampler(Request(key, [], 1, temperature=temperature, top_p=top_p)):
            scores = processor(None, scores)
        expected.append(int(scores.argmax()))
    temperatures, top_ps = (torch.tensor(column, dtype=torch.float64) for column in zip(*settings, strict=True))
    drawn = torch.tensor(draws, dtype=torch.float64)
    assert next_tokens(logits, temperatures, top_ps, drawn).tolist() == expected
    if all(top_p == 1 for t, top_p in settings if t):
        assert next_tokens(logits, temperatures, None, drawn).tolist() == expected
    if not any(t for t, _ in settings):
        assert next_tokens(logits).tolist() == expected


def test_draws_at_the_ends() -> None:
    """0 is the first token with any probability; the largest draw below 1 the last one with any."""
    logits = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf")]] * 2)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    assert next_tokens(logits, ones, None, draws).tolist() == [1, 2]


def test_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = torch.tensor([random.Random(7).random() for _ in range(1)], dtype=torch.float64)
    draws = (torch.arange(20_000, dtype=torch.float64) + draws) / 20_000
    ones = torch.ones(20_000, dtype=torch.float64)
    found = next_tokens(probabilities.log().expand(20_000, -1), ones, None, draws)
    assert_close(found.bincount(minlength=4) / 20_000, probabilities, 1e-4)
    found = next_tokens(probabilities.log().expand(20_000, -1), ones, 0.7 * ones, draws)
    assert_close(found.bincount(minlength=4) / 20_000, torch.tensor([0.625, 0.375, 0, 0]), 1e-4)


def test_a_row_of_no_numbers_disturbs_no_other() -> None:
    logits = torch.randn(3, 11)
    logits[1] = float("nan")
    warm = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    draws = torch.full((3,), 0.4, dtype=torch.float64)
    found = next_tokens(logits, warm, 0.9 * torch.ones_like(warm), draws)
    assert 0 <= int(found[1]) < 11
    kept = torch.tensor([0, 2])
    expected = next_tokens(logits[kept], warm[kept], 0.9 * torch.ones(2, dtype=torch.float64), draws[kept])
    assert torch.equal(found[kept], expected)


# --- prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 11, 12])
@pytest.mark.parametrize("mode", ["plt", "no-gswa"])
def test_a_prompt_in_chunks(mode: str, chunk: int | None) -> None:
    model = model_of(mode, dtype=torch.float64)
    ids = torch.tensor([tokens(12), tokens(12, seed=1)])
    with torch.no_grad():
        whole = model(ids, use_cache=True)
    cache, logits = read_prompt(model, ids, chunk=chunk)
    assert_close(logits, whole.logits[:, -1])
    assert_close(cache.carry, whole.past_key_values.carry)
    more, logits = read_prompt(model, ids[:, :3], chunk=chunk, cache=cache)
    assert more is cache
    with torch.no_grad():
        assert_close(logits, model(torch.cat([ids, ids[:, :3]], dim=1)).logits[:, -1])


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("mode", ["plt", "no-gswa"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [9, 2, 7], [1, 6], [1, 1]], ids=str)
def test_prompts_side_by_side(lengths: list[int], mode: str, chunk: int | None) -> None:
    """Each one's cache and logits are those of the prompt alone (the valid part of its windows, that is)."""
    model = model_of(mode, dtype=torch.float64)
    prompts = [tokens(length, seed=i) for i, length in enumerate(lengths)]
    caches, logits = read_prompts(model, prompts, chunk=chunk)
    for i, prompt in enumerate(prompts):
        own, expected = read_prompt(model, row(prompt))
        assert_close(logits[i], expected[0])
        assert caches[i].get_seq_length() == len(prompt)
        assert_close(caches[i].carry, own.carry)
        for mine, theirs in zip(caches[i].layers, own.layers, strict=True):
            assert_close(mine.keys, theirs.keys)
            assert_close(mine.values, theirs.values)
            if mode == "plt":
                kept = min(len(prompt), 3)
                assert_close(mine.window_keys[..., -kept:, :], theirs.window_keys[..., -kept:, :])
                assert_close(mine.window_values[..., -kept:, :], theirs.window_values[..., -kept:, :])


@pytest.mark.parametrize(
    ("lengths", "most", "count"),
    [
        ([5, 5, 5], 8, 3),
        ([5, 5, 5], 2, 2),
        ([40, 50], 8, 2),
        ([10, 50], 8, 1),
        ([50, 40, 10, 50], 8, 2),
        ([60, 60], 8, 1),
        ([30, 30, 30, 30], 8, 3),
        ([500, 1], 8, 1),
    ],
    ids=str,
)
def test_which_prompts_are_read_together(lengths: list[int], most: int, count: int) -> None:
    assert side_by_side(lengths, most=most, positions=100) == count


def test_what_a_reader_refuses() -> None:
    model = model_of()
    for read in (
        lambda: read_prompt(model, torch.empty(1, 0, dtype=torch.long)),
        lambda: read_prompts(model, [[3], []]),
    ):
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            read()
    with pytest.raises(ValueError, match="chunk is 0: expected at least 1"):
        read_prompt(model, row([3]), chunk=0)
    cache, _ = read_prompt(model, row([3]))
    with pytest.raises(ValueError, match="cannot go with a cache"):
        read_prompt(model, row([3]), mask_BS=torch.ones(1, 1, dtype=torch.bool), cache=cache)


# --- what can go wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request("bad", [], 5), "the prompt has no tokens"),
        (Request("bad", [3, 37], 5), "token 37 in the prompt: expected 0 to 36"),
        (Request("bad", [-1, 3], 5), "token -1 in the prompt"),
        (Request("bad", [3], 0), "max_new_tokens is 0"),
        (Request("bad", [3] * 10, 11), "10 tokens of prompt and 11 new ones do not fit the capacity of 20"),
        (Request("bad", [3], 5, temperature=-1.0), "temperature is -1.0"),
        (Request("bad", [3], 5, temperature=float("nan")), "temperature is nan"),
        (Request("bad", [3], 5, top_p=1.5), "top_p is 1.5"),
        (Request("bad", [3], 5, temperature=1.0), "no stream to draw from"),
        (Request("good", [3], 5), "another one has this key"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_bad_request_is_refused_before_any_work(request_: Request, said: str) -> None:
    watched = Watched(model_of(), slots=2, capacity=20)
    with pytest.raises(ValueError, match=f"request '{request_.key}'.*{said}"):
        watched.session.run([Request("good", [3], 5), request_])
    assert not watched.steps


@pytest.mark.parametrize("name", ["slots", "capacity", "chunk", "sync_every"])
def test_a_bad_setting_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0: expected at least 1"):
        DecodeSession(model_of(), **{"slots": 2, name: 0})


@pytest.mark.parametrize("mode", ["sequential", "no-shift"])
def test_a_model_of_several_trips_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="one trip a pass"):
        DecodeSession(model_of(mode), slots=2)


def test_no_requests() -> None:
    assert list(DecodeSession(model_of(), slots=2).run([])) == []


@pytest.mark.parametrize("sync_every", [1, 8], ids="sync-{}".format)
@pytest.mark.parametrize("how", ["stopped", "stream", "first"])
def test_a_request_that_fails_loses_no_result(
    how: str, sync_every: int, caches: list[weakref.ref[StaticCache]]
) -> None:
    """What is done when it fails comes out first; the error says whose it is."""
    model = model_of()

    def stopped(new: list[int]) -> bool:
        if len(new) == (1 if how == "first" else 4):
            raise RuntimeError("broken")
        return False

    bad = Request("bad", tokens(4, seed=9), 20, stopped=stopped)
    if how == "stream":
        bad = Request("bad", tokens(4, seed=9), 20, temperature=1.0, stream=iter([0.5] * 3))
    wanted = [*requests([3, 5], [2, 3 if how == "stream" else 4]), bad]
    if how == "first":
        wanted = [wanted[0], Request("r1", wanted[1].prompt, 1), bad]
    got: list[str] = []
    results = DecodeSession(model, slots=3, sync_every=sync_every).run(wanted)
    with pytest.raises(ValueError if how == "stream" else RuntimeError) as error:
        collect(results, got)
    assert "'bad'" in str(error.value) + str(getattr(error.value, "__notes__", ""))
    expected = {"first": ["r1"], "stopped": ["r0", "r1"], "stream": ["r0", "r1"]}[how]
    if how == "stream" and sync_every == 8:
        expected = []  # the draws of a round are taken before it
    assert got == expected
    assert caches[0]() is None  # even while the error and its traceback are held


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[StaticCache]]:
    """Every cache that a session allocates in this test."""
    made: list[weakref.ref[StaticCache]] = []
    allocate = session_module._allocated

    def recorded(*given: Any) -> StaticCache:
        cache = allocate(*given)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(session_module, "_allocated", recorded)
    return made


def collect(results: Iterator[Result], into: list[str]) -> None:
    for result in results:
        into.append(result.key)


def test_closing_the_iterator_frees_everything(caches: list[weakref.ref[StaticCache]]) -> None:
    session = DecodeSession(model_of(), slots=2)
    results = session.run(requests([3] * 5, [2, 9, 9, 9, 9]))
    next(results)
    assert caches[0]() is not None
    gc.disable()
    try:
        results.close()
        assert caches[0]() is None
    finally:
        gc.enable()
    assert list(results) == []
    assert len(list(session.run(requests([3])))) == 1


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
def test_an_interruption_passes_through_and_frees_the_cache(
    interruption: type[BaseException], caches: list[weakref.ref[StaticCache]]
) -> None:
    model = model_of()
    watched = Watched(model, slots=2)
    inner, calls = watched.session.step, []

    def step(cache: StaticCache, new: Tensor, reach: int) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise interruption("now")
        return inner(cache, new, reach)

    watched.session.step = step
    got: list[str] = []
    results = watched.session.run(requests([3, 3, 3], [2, 9, 9]))
    with pytest.raises(interruption, match="now"):
        collect(results, got)
    assert got == ["r0"]
    gc.collect()  # the traceback, whose frames hold the step's cache
    assert caches[0]() is None


def test_ctrl_c_in_a_callback_passes_through() -> None:
    def stopped(_: list[int]) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(DecodeSession(model_of(), slots=2).run(requests([3, 4], stopped=stopped)))


@pytest.mark.parametrize("how", ["no room", "torch", "another"])
def test_a_cache_that_does_not_fit_is_said_at_once(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    session = DecodeSession(model_of(), slots=2, capacity=10**12 if how == "no room" else 40)

    def failing(*_: Any, device: Any, **__: Any) -> StaticCache:
        if str(device) == "meta":
            return StaticCache(session.model.config, slots=1, capacity=1, dtype=torch.float32, device="cpu")
        said = "DefaultCPUAllocator: can't allocate memory" if how == "torch" else "another error"
        raise RuntimeError(said)

    if how != "no room":
        monkeypatch.setattr(session_module, "StaticCache", failing)
    kind, said = (RuntimeError, "another error") if how == "another" else (MemoryError, "2 slots of .* does not fit")
    with pytest.raises(kind, match=said):
        next(session.run(requests([3, 4])))


@pytest.mark.parametrize("outer", [torch.inference_mode, torch.no_grad])
def test_the_caller_may_change_between_modes(outer: Callable[[], Any]) -> None:
    """One result is taken in inference mode, the next outside."""
    model = model_of()
    wanted = requests([3, 4, 5], [2, 4, 6])
    results = DecodeSession(model, slots=2).run(wanted)
    with outer():
        first = next(results)
    found = {r.key: r.tokens for r in [first, *results]}
    assert found == {r.key: alone(model, r) for r in wanted}
    assert torch.is_grad_enabled()
