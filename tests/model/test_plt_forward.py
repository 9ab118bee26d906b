"""Random models against the slow reference in float64: every option, both backends, short and long requests."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import (
    BACKENDS,
    MODES,
    assert_close,
    assert_same_gates,
    assert_same_run,
    build,
    left_padded,
    quick,
    reference_of,
    row,
    tiny,
    tokens,
)

KV_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}


def check(settings: dict[str, Any], ids: list[int], seed: int = 0) -> None:
    """Both backends equal the reference on logits, states and gates."""
    model = build(settings, seed=seed)
    trace = reference_of(model, settings).run(ids)
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        with torch.no_grad():
            out = model(row(ids), output_loop_states=True)
        assert_same_run(out, trace)
        if settings.get("plt_gswa", True) and settings.get("plt_loop_mode", "plt") == "plt":
            assert_same_gates(out, trace)
        else:
            assert len(out.loop_gates) == 0


def crossed() -> list[Any]:
    """Loops x window x length in full; the other options drawn, the same ones every time."""
    sizes = [*product((0, 1, 5), (1, 4, 23)), (64, 1), (64, 23), (64, 80), (500, 23)]
    cases = []
    for loops, (window, length) in product((1, 2, 3, 4), sizes):
        draw = random.Random(f"{loops} {window} {length}")
        heads = draw.choice(list(KV_HEADS))
        gate, normalize = draw.choice(["hidden", "query"]), draw.choice([True, False])
        scales = draw.choice([(None, None), (0.707, 0.053), (0.5, None), (None, 2)])
        settings = tiny(
            plt_num_loops=loops,
            plt_window_size=[window, 0],
            num_key_value_heads=KV_HEADS[heads],
            plt_gate_use_hidden_states=gate == "hidden",
            plt_normalize_per_loop=normalize,
            plt_emb_scale=scales[0],
            plt_hidden_scale=scales[1],
        )
        name = f"R{loops}-w{window}-S{length}-{heads}-{gate}-{'norm' if normalize else 'raw'}-{scales[0]}-{scales[1]}"
        cases.append(pytest.param(settings, length, id=name))
    return cases


@pytest.mark.parametrize(("settings", "length"), crossed())
def test_options(settings: dict[str, Any], length: int) -> None:
    check(settings, tokens(length, seed=settings["plt_num_loops"]))


@pytest.mark.parametrize("gate", [True, False], ids=["gate-hidden", "gate-query"])
@pytest.mark.parametrize("normalize", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_baselines_and_ablations(mode: str, loops: int, normalize: bool, gate: bool) -> None:
    settings = tiny(
        **MODES[mode], plt_num_loops=loops, plt_normalize_per_loop=normalize, plt_gate_use_hidden_states=gate
    )
    check(settings, tokens(11))


@pytest.mark.parametrize("loops", [2, 3], ids="R{}".format)
@pytest.mark.parametrize(("first", "second"), [(a, b) for a in MODES for b in MODES if a < b])
def test_the_baselines_differ_from_one_another(first: str, second: str, loops: int) -> None:
    """Control: with the same weights, no two of the modes are the same function."""
    ids = row(tokens(11))
    logits = [build(tiny(**MODES[m], plt_num_loops=loops))(ids).logits for m in (first, second)]
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_one_loop_is_the_plain_llama_in_every_mode(mode: str) -> None:
    ids = row(tokens(9))
    plain = build(tiny(plt_num_loops=1))(ids).logits
    assert_close(build(tiny(**MODES[mode], plt_num_loops=1))(ids).logits, plain)


@given(data=st.data())
@quick(60)
def test_any_combination(data: st.DataObject) -> None:
    scale = st.sampled_from([None, 0, 1, 0.707, -0.3])
    settings = tiny(
        **MODES[data.draw(st.sampled_from(list(MODES)))],
        plt_num_loops=data.draw(st.integers(1, 4)),
        plt_window_size=[data.draw(st.sampled_from([0, 1, 2, 5, 64])), 0],
        num_hidden_layers=data.draw(st.integers(1, 3)),
        num_key_value_heads=data.draw(st.sampled_from([1, 2, 4])),
        head_dim=data.draw(st.sampled_from([2, 6, 8])),
        plt_gate_use_hidden_states=data.draw(st.booleans()),
        plt_normalize_per_loop=data.draw(st.booleans()),
        plt_emb_scale=data.draw(scale),
        plt_hidden_scale=data.draw(scale),
        attention_bias=data.draw(st.booleans()),
        mlp_bias=data.draw(st.booleans()),
        tie_word_embeddings=data.draw(st.booleans()),
        rope_theta=data.draw(st.sampled_from([100.0, 10000.0, 500000.0])),
        rms_norm_eps=data.draw(st.sampled_from([1e-6, 1e-2])),
    )
    check(settings, tokens(data.draw(st.integers(1, 17))), seed=data.draw(st.integers(0, 9)))


@pytest.mark.parametrize("window", [5, 64], ids="w{}".format)
def test_a_request_longer_than_any_slice(window: int) -> None:
    """Fast backends work in slices of queries: no slip at their edges, with and without padding."""
    settings = tiny(plt_num_loops=2, num_hidden_layers=1, num_attention_heads=2, plt_window_size=[window, 0])
    model = build(settings, backend="sdpa")
    long, short = tokens(1100), tokens(1030, seed=1)
    reference = reference_of(model, settings)
    traces = [reference.run(ids) for ids in (long, short)]
    with torch.no_grad():
        assert_close(model(row(long)).logits[0], traces[0].logits)
        ids, mask, where = left_padded([long, short])
        out = model(ids, attention_mask=mask, position_ids=where).logits
    assert_close(out[0], traces[0].logits)
    assert_close(out[1, 70:], traces[1].logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [True, False], ids=["positions given", "positions from the mask"])
def test_left_padding_changes_nothing(backend: str, mode: str, given: bool) -> None:
    settings = tiny(**MODES[mode])
    model = build(settings, backend=backend)
    rows = [tokens(9), tokens(1, seed=1), tokens(4, seed=2)]
    ids, mask, where = left_padded(rows)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=where if given else None, output_loop_states=True)
    for b, ids_of_row in enumerate(rows):
        trace = reference_of(model, settings).run(ids_of_row)
        assert_same_run(out, trace, row=b, skip=9 - len(ids_of_row))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_at_padding_does_not_matter(backend: str) -> None:
    model = build(tiny(), backend=backend)
    rows = [tokens(9), tokens(4, seed=2)]
    with torch.no_grad():
        found = []
        for pad in (0, 5):
            ids, mask, where = left_padded(rows, pad)
            found.append(model(ids, attention_mask=mask, position_ids=where).logits[1, 5:])
    assert torch.equal(*found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_is_not_seen(backend: str, mode: str) -> None:
    model = build(tiny(**MODES[mode]), backend=backend)
    ids = tokens(12)
    with torch.no_grad():
        whole, cut = model(row(ids)).logits[0, :7], model(row(ids[:7] + tokens(5, seed=4))).logits[0, :7]
    assert_close(cut, whole, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_in_place_of_tokens(backend: str) -> None:
    model = build(tiny(), backend=backend)
    ids = row(tokens(8))
    with torch.no_grad():
        assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_rows_of_a_batch_are_independent() -> None:
    model = build(tiny(), backend="sdpa")
    rows = [tokens(8, seed=s) for s in range(3)]
    with torch.no_grad():
        together = model(torch.tensor(rows)).logits
        for b, ids in enumerate(rows):
            assert_close(together[b], model(row(ids)).logits[0])
