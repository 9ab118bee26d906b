"""Speculative decoding: several tokens of a request are read in one step, and what was guessed wrong is forgotten."""

from __future__ import annotations

import pytest
from vllm_cases import CHECKPOINT, LOOPS, Measured, texts
from vllm_engine import ON_GPU, Ask, opened

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}


@pytest.mark.parametrize("loops", [pytest.param(r, marks=[] if r in (2, 4) else pytest.mark.slow) for r in LOOPS])
def test_guesses_by_ngrams(loops: int, measured: Measured) -> None:
    told = texts(loops)
    with opened(CHECKPOINT, {"hf_overrides": {"plt_num_loops": loops}, "speculative_config": NGRAM}) as engine:
        for names, budget in ((("echo",), 0), (("echo", "long", "short", "even"), 0), (("long", "echo", "edge"), 20)):
            before = [engine.metric(f"spec_decode_num_{what}_tokens") for what in ("draft", "accepted")]
            asks = [Ask(told[n].prompt, len(told[n].continuation), at=2 * i) for i, n in enumerate(names)]
            answers = engine.run(*asks, budget=budget)
            for name, answer in zip(names, answers, strict=True):
                measured.exact("speculation by n-grams", loops, answer, told[name])
            after = [engine.metric(f"spec_decode_num_{what}_tokens") for what in ("draft", "accepted")]
            guessed, right = (b - a for a, b in zip(before, after, strict=True))
            assert 0 < right < guessed
        assert any(step.mixed and max(step.decodes.values()) > 1 for step in engine.steps)
        # On a GPU vLLM drafts for all requests of a step or for none.
        whole = all(len({min(n, 2) for n in step.decodes.values()}) < 2 for step in engine.steps)
        assert ON_GPU or not whole, "only whole batches"
