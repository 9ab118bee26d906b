"""Makes tests/vllm/fixtures: a tiny checkpoint, texts, and what plt_model computes of them at 1, 2, 3 and 4 loops.

    python tests/vllm/make_fixtures.py

Run it in the main environment: what vLLM must reproduce then depends neither on vLLM nor on the older transformers
that it pins. plt_model itself is proved by tests/model/test_plt_fixtures.py. The weights are bf16 numbers, so they are
the same in every precision; the logits are computed in float64 and rounded to float32. Each text is a random prompt and
its greedy continuation. The prompts are chosen so that at every loop count the two best tokens of each step are well
apart (no rounding may change the text), and that guessing the text "echo" by its n-grams succeeds as well as fails.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm_cases import CHECKPOINT, FIXTURES, LOOPS, SHAPE, save, weights

from plt_model import PLTCache, PLTForCausalLM

MARGIN = 0.01
"""Least distance between the two best logits of a greedy step: 200 times what vLLM may be off."""

TEXTS = {
    "one": (1, 14),
    "short": (9, 14),
    "edge": (30, 14),
    "even": (64, 14),
    "long": (93, 14),
    "sibling": (70, 14),
    "echo": (40, 24),
}
"""Tokens of the prompt and of the continuation. Blocks have 32 positions: `edge`, `even` and `long` begin one in their
continuation, `even` fills two exactly; `sibling` has the first two blocks of `long`; `echo` says five tokens eight
times over."""


def greedy(model: PLTForCausalLM, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """-> the continuation, and the logits of every position but the last."""
    ids, cache, new = list(prompt), PLTCache(model.config), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            new = [int(model(torch.tensor([new]), past_key_values=cache, use_cache=True).logits[0, -1].argmax())]
            ids += new
        return ids[len(prompt) :], model(torch.tensor([ids[:-1]])).logits[0]


def guesses(ids: list[int], start: int) -> tuple[int, int]:
    """How often the next token is, and is not, what followed the last occurrence of the last one or two tokens."""
    right = wrong = 0
    for t in range(start, len(ids)):
        for n in (2, 1):
            followers = [ids[i + n] for i in range(t - n) if ids[i : i + n] == ids[t - n : t]]
            if followers:
                right, wrong = right + (followers[0] == ids[t]), wrong + (followers[0] != ids[t])
                break
    return right, wrong


def good(name: str, prompt: list[int], continuation: list[int], logits: Tensor) -> bool:
    steps = logits[len(prompt) - 1 :]
    assert steps.argmax(-1).tolist() == continuation
    best = steps.topk(2).values
    if (best[:, 0] - best[:, 1]).min() < MARGIN:
        return False
    return name != "echo" or min(guesses(prompt + continuation, len(prompt))) >= 2


def runs_of(name: str, prompt: list[int], models: dict[int, PLTForCausalLM]) -> dict[int, tuple[list[int], Tensor]]:
    """The prompt continued at every loop count; empty when it is not good at one of them."""
    runs = {}
    for loops, model in sorted(models.items(), reverse=True):
        runs[loops] = greedy(model, prompt, TEXTS[name][1])
        if not good(name, prompt, *runs[loops]):
            return {}
    return runs


def main() -> None:
    models = {}
    for loops in LOOPS:
        settings = {**SHAPE, "plt_num_loops": loops}
        models[loops] = save(settings, weights(settings), CHECKPOINT).double()
    prompts: dict[str, list[int]] = {}
    texts: dict[str, dict[str, list[int]]] = {str(loops): {} for loops in LOOPS}
    expected: dict[str, Tensor] = {}
    for name, (length, _) in TEXTS.items():
        for seed in itertools.count():
            draw = random.Random(f"{name} {seed}")
            prompt = [draw.randrange(3, SHAPE["vocab_size"]) for _ in range(length)]
            if name == "sibling":
                prompt[:64] = prompts["long"][:64]
            if name == "echo":
                prompt = prompt[: length // 8] * 8
            if runs := runs_of(name, prompt, models):
                break
        print(name, "seed", seed, flush=True)
        prompts[name] = prompt
        for loops, (continuation, logits) in runs.items():
            texts[str(loops)][name] = continuation
            expected[f"{loops}.{name}"] = logits.float()
    (FIXTURES / "texts.json").write_text(json.dumps({"prompts": prompts, "continuations": texts}) + "\n")
    save_file(expected, FIXTURES / "logits.safetensors")


if __name__ == "__main__":
    shutil.rmtree(CHECKPOINT, ignore_errors=True)
    Path(CHECKPOINT).mkdir(parents=True)
    main()
