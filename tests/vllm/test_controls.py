"""The tests of test_exact.py can fail: with the carry zeroed, whatever reads it is wrong, and only that.

And the other way to decode, a trip through the layers for each pass, says the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm_cases import CHECKPOINT, TOLERANCE, VISIBLE, Measured, Text, off, texts
from vllm_engine import BLOCK, Answer, Ask, Engine, opened


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow), 4], ids="R{}".format)
def forgetful(request: pytest.FixtureRequest) -> Iterator[tuple[int, Engine]]:
    options = {
        "hf_overrides": {"plt_num_loops": request.param},
        "additional_config": {"plt": {"carry": "zero"}},
        "prefix_cache_retention_interval": BLOCK,
    }
    with opened(CHECKPOINT, options) as engine:
        yield request.param, engine


def errors(answer: Answer, text: Text) -> list[float]:
    """How far off the logits of each position are, from answer.first on."""
    return off(answer.logits, text.logits[answer.first : answer.first + len(answer.logits)]).tolist()


def test_without_a_carry_one_piece_is_exact_and_decode_is_not(
    forgetful: tuple[int, Engine], measured: Measured
) -> None:
    loops, engine = forgetful
    for name in ("one", "short", "edge", "even", "long"):
        text = texts(loops)[name]
        (answer,) = engine.run(Ask(text.prompt, new=2))
        *prompt, first_step = errors(answer, text)
        assert max(prompt) <= TOLERANCE, f"R={loops}, {name}"
        assert first_step > VISIBLE, f"R={loops}, {name}: the first decode step is off by {first_step} only"
        measured.keep("carry zeroed: decode (must be off)", loops, first_step)


def test_without_a_carry_pieces_are_wrong_from_the_second_on(forgetful: tuple[int, Engine], measured: Measured) -> None:
    loops, engine = forgetful
    text = texts(loops)["long"]
    (answer,) = engine.run(Ask(text.prompt, new=1), budget=40)
    wrong = errors(answer, text)
    assert max(wrong[:40]) <= TOLERANCE
    assert wrong[40] > VISIBLE
    measured.keep("carry zeroed: second piece (must be off)", loops, wrong[40])


def test_without_a_carry_a_prefix_hit_is_wrong(forgetful: tuple[int, Engine], measured: Measured) -> None:
    loops, engine = forgetful
    text = texts(loops)["long"]
    engine.run(Ask(text.prompt, new=1, whole=False))
    (answer,) = engine.go_on(Ask(text.ids[: 2 * BLOCK + 1], new=1, whole=False))
    assert answer.cached == 2 * BLOCK
    (wrong,) = errors(answer, text)
    assert wrong > VISIBLE
    measured.keep("carry zeroed: prefix hit (must be off)", loops, wrong)


@pytest.mark.parametrize("loops", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_trip_for_each_pass_says_the_same(loops: int, measured: Measured) -> None:
    told = texts(loops)
    names = ("long", "short", "even")
    options = {
        "hf_overrides": {"plt_num_loops": loops},
        "additional_config": {"plt": {"trips": "each"}},
        "enforce_eager": True,
    }
    with opened(CHECKPOINT, options) as engine:
        answers = engine.run(*[Ask(told[n].prompt, 14, at=3 * i) for i, n in enumerate(names)], budget=40)
        for name, answer in zip(names, answers, strict=True):
            measured.exact("a trip for each pass", loops, answer, told[name])
        decodes = [step for step in engine.steps if not step.prefills]
        assert decodes
        assert all(step.rows == [len(step.decodes)] * loops for step in decodes)
