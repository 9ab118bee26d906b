"""transformers' generate on a PLT: greedy, padded, sampled and beam search; and what it must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plt_cases import BACKENDS, MODES, assert_close, build, left_padded, reference_of, row, tiny, tokens
from reference import Reference
from torch import Tensor
from transformers import DynamicCache, set_seed

from plt_model import PLTCache, PLTForCausalLM

NEW = 7


def model_of(mode: str = "plt", loops: int = 3, backend: str = "sdpa", **settings: Any) -> PLTForCausalLM:
    """A model that never ends a text of its own accord (its vocabulary is 37 tokens)."""
    model = build(tiny(**MODES[mode], plt_num_loops=loops, **settings), backend=backend)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def generate(model: PLTForCausalLM, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **{"do_sample": False, **options})


def by_argmax(reference: Reference, ids: list[int], count: int = NEW) -> list[int]:
    """Greedy text from the reference, which reads everything again for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(reference.run(ids).logits[-1].argmax()))
    return ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loops", [1, 2, 3, 4], ids="R{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_greedy(mode: str, loops: int, backend: str) -> None:
    model = model_of(mode, loops, backend)
    ids = tokens(6)
    expected = by_argmax(reference_of(model, tiny(**MODES[mode], plt_num_loops=loops)), ids)
    assert generate(model, row(ids))[0].tolist() == expected


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"prefill_chunk_size": 2}, {"cache_implementation": "dynamic"}]
)
def test_greedy_by_other_ways(options: dict[str, Any]) -> None:
    model, ids = model_of(), row(tokens(7))
    assert torch.equal(generate(model, ids, **options), generate(model, ids))


@pytest.mark.parametrize("prompt", [1, 2], ids="S{}".format)
def test_a_very_short_prompt(prompt: int) -> None:
    model, ids = model_of(), tokens(prompt)
    assert generate(model, row(ids))[0].tolist() == by_argmax(reference_of(model, tiny()), ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_left_padded_batch_equals_single_runs(mode: str, backend: str) -> None:
    model = model_of(mode, backend=backend)
    rows = [tokens(9), tokens(1, seed=1), tokens(5, seed=2)]
    ids, mask, _ = left_padded(rows)
    together = generate(model, ids, mask)
    for found, alone in zip(together, rows, strict=True):
        assert found[9:].tolist() == generate(model, row(alone))[0, len(alone) :].tolist()


def test_it_stops_at_the_end_token_of_each_row() -> None:
    model = model_of()
    prompts = [tokens(4, seed=s) for s in range(4)]
    free = generate(model, torch.tensor(prompts))[:, 4:].tolist()
    end = free[0][2]
    stopped = generate(model, torch.tensor(prompts), eos_token_id=end)[:, 4:].tolist()
    for text, whole in zip(stopped, free, strict=True):
        kept = whole[: whole.index(end) + 1] if end in whole else whole
        assert text == kept + [0] * (len(text) - len(kept))


def test_going_on_with_the_cache_of_an_earlier_turn() -> None:
    model, ids = model_of(), row(tokens(5))
    cache = PLTCache(model.config)
    first = generate(model, ids, past_key_values=cache)
    longer = torch.cat([first, row(tokens(3, seed=8))], dim=1)
    found = generate(model, longer, past_key_values=cache)
    assert found[0].tolist() == by_argmax(reference_of(model, tiny()), longer[0].tolist())


def test_sampling_depends_on_the_seed_alone() -> None:
    model, ids = model_of(), torch.tensor([tokens(6), tokens(6, seed=1)])

    def sample(seed: int, **options: Any) -> list[list[int]]:
        set_seed(seed)
        return generate(model, ids, do_sample=True, temperature=1.3, top_p=0.95, **options).tolist()

    assert sample(3) == sample(3) == sample(3, use_cache=False)
    assert len({str(sample(seed)) for seed in range(6)}) == 6


def test_several_samples_of_one_prompt() -> None:
    model = model_of()
    set_seed(5)
    texts = generate(model, row(tokens(6)), do_sample=True, num_return_sequences=4)
    assert texts.shape == (4, 6 + NEW)
    assert len({str(text) for text in texts.tolist()}) > 1


def log_probability(reference: Reference, ids: list[int], prompt: int) -> float:
    """log p of the text after the prompt, in nats."""
    scores = torch.log_softmax(reference.run(ids).logits, dim=-1)
    return sum(float(scores[t - 1, ids[t]]) for t in range(prompt, len(ids)))


@pytest.mark.parametrize("mode", MODES)
def test_beam_search(mode: str) -> None:
    """Beams are reordered at every step; the scores reported are the texts' true ones."""
    model, ids = model_of(mode), row(tokens(6))
    reference = reference_of(model, tiny(**MODES[mode]))
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 1.0}
    out = generate(model, ids, return_dict_in_generate=True, output_scores=True, **options)
    assert torch.equal(out.sequences, generate(model, ids, use_cache=False, **options))
    for text, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        assert log_probability(reference, text, 6) / NEW == pytest.approx(score, abs=1e-5)
    greedy = by_argmax(reference, ids[0].tolist())
    assert out.sequences_scores[0] * NEW >= log_probability(reference, greedy, 6) - 1e-5


def test_beam_search_over_a_left_padded_batch() -> None:
    model = model_of()
    rows = [tokens(8), tokens(3, seed=1)]
    ids, mask, _ = left_padded(rows)
    together = generate(model, ids, mask, num_beams=3)
    for found, alone in zip(together, rows, strict=True):
        assert found[8:].tolist() == generate(model, row(alone), num_beams=3)[0, len(alone) :].tolist()


def test_guidance_keeps_two_caches_apart() -> None:
    model, ids = model_of(), row(tokens(6))
    options = {"guidance_scale": 1.7, "negative_prompt_ids": row(tokens(4, seed=3))}
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False, **options))


def test_scores_of_generate_are_the_models_logits() -> None:
    model, ids = model_of(), row(tokens(6))
    out = generate(model, ids, return_dict_in_generate=True, output_logits=True)
    expected = reference_of(model, tiny()).run(out.sequences[0].tolist()).logits[5:-1]
    assert_close(torch.cat(out.logits).double(), expected, 1e-5)


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized", "sliding_window"])
def test_a_cache_of_another_kind_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation.*{kind}"):
        generate(model_of(), row(tokens(4)), cache_implementation=kind)


def test_a_cache_object_of_another_kind_is_refused() -> None:
    model, ids = model_of(), row(tokens(4))
    with pytest.raises(ValueError, match=r"DynamicCache.*PLTCache"):
        generate(model, ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"DynamicCache.*PLTCache"):
        model(ids, past_key_values=DynamicCache(), use_cache=True)


@pytest.mark.parametrize("assistant", ["another", "itself"])
def test_assisted_generation_is_refused(assistant: str) -> None:
    """It would take tokens back, which windows and carried vectors cannot."""
    model = model_of()
    helper = model if assistant == "itself" else model_of(loops=1)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, row(tokens(6)), assistant_model=helper)


def test_prompt_lookup_is_refused() -> None:
    again = tokens(4) * 3  # so that there is something to look up
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model_of(), row(again), prompt_lookup_num_tokens=3)


def test_early_exit_is_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, row(tokens(6)), assistant_early_exit=1)
    assert generate(model, row(tokens(6))).shape[0] == 1


def test_a_cache_does_not_take_tokens_back() -> None:
    model = model_of()
    cache = PLTCache(model.config)
    with torch.no_grad():
        model(row(tokens(5)), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot take tokens back"):
        cache.crop(-1)
    assert cache.get_seq_length() == 5
