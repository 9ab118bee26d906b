"""Train the checkpoint that `plt-eval demo` runs: a byte-level PLT of 0.4 million parameters, in minutes on a CPU.

    python scripts/train_demo_model.py --out plt_eval/demo/plt-demo \
        --problems benchmarks/plt_benchmarks/data/demo_problems.jsonl

The data are generated one-line Python functions (add, subtract, multiply, compare... by a constant). The constants
of the problems never occur in training. It learns to read a docstring and copy a constant: enough to show the tool at
work on numbers that are not zero, and nothing more.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from plt_model import PLTConfig, PLTForCausalLM
from plt_model.tokenizer import byte_tokenizer

# name, docstring, body, example inputs
TASKS = [
    ("add_{k}", "Return x plus {k}.", "return x + {k}", [[0], [1], [-7], [250]]),
    ("subtract_{k}", "Return x minus {k}.", "return x - {k}", [[0], [1], [-7], [250]]),
    ("times_{k}", "Return x times {k}.", "return x * {k}", [[0], [1], [-7], [250]]),
    ("above_{k}", "Tell whether x is greater than {k}.", "return x > {k}", [[0], [99], [100], [9999]]),
    ("remainder_{k}", "Return the remainder of x divided by {k}.", "return x % {k}", [[0], [5], [1234], [777]]),
    ("first_{k}", "Return the first {k} items of x.", "return x[:{k}]", [[[]], [[1, 2]], [list(range(1000))]]),
    ("last_{k}", "Return the last {k} items of x.", "return x[-{k}:]", [[[1]], [[1, 2]], [list(range(1000))]]),
    ("join_{k}", "Return x with {k} put at its end.", "return x + [{k}]", [[[]], [[4]], [[1, 2]]]),
    ("larger_{k}", "Return the larger of x and {k}.", "return max(x, {k})", [[0], [500], [-7], [99999]]),
    ("count_{k}", "Count how often {k} occurs in x.", "return x.count({k})", [[[]], [[1, 1]], ["K"]]),
]
HELD_OUT = {k for k in range(11, 1000) if k % 7 == 3}


def write_function(task: tuple[str, str, str, list], k: int) -> tuple[str, str]:
    """-> the prompt (signature and docstring) and the completion (body)."""
    name, doc, body, _ = task
    prompt = f'def {name.format(k=k)}(x):\n    """{doc.format(k=k)}"""\n'
    return prompt, f"    {body.format(k=k)}\n"


def problem(index: int, task: tuple[str, str, str, list], k: int) -> dict:
    """One record in the official HumanEval+ row format."""
    prompt, completion = write_function(task, k)
    inputs = [[[k, 3, k] if value == "K" else value for value in row] for row in task[3]]
    return {
        "task_id": f"Demo/{index}",
        "prompt": prompt,
        "entry_point": task[0].format(k=k),
        "canonical_solution": completion,
        "test": "",
        "contract": "",
        "base_input": inputs[:2],
        "plus_input": inputs[2:],
        "atol": 0,
    }


def batches(rng: random.Random, encode, size: int, length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless [size, length] batches of functions side by side, with the pads out of the loss."""
    allowed = [k for k in range(2, 1000) if k not in HELD_OUT]
    while True:
        ids = torch.zeros(size, length, dtype=torch.long)
        for row in ids:
            text = "".join(write_function(rng.choice(TASKS), rng.choice(allowed))) + "</s>"
            tokens = encode(text)["input_ids"][:length]
            row[: len(tokens)] = torch.tensor(tokens)
        yield ids, ids.masked_fill(ids == 0, -100)


def train(model: PLTForCausalLM, steps: int, size: int, length: int, peak: float) -> float:
    """Adam with warm-up and cosine decay; returns the mean loss of the last 50 steps, in nats per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warm) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    source = batches(random.Random(0), byte_tokenizer(), size, length)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        ids, labels = next(source)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {sum(losses[-50:]) / len(losses[-50:]):.4f}", flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--problems", type=Path, required=True, help="file of the held-out problems")
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = PLTConfig(
        vocab_size=259,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        plt_num_loops=args.loops,
        plt_window_size=[16, 0],
        plt_gate_use_hidden_states=True,
        plt_emb_scale=0.7,
        plt_hidden_scale=0.3,
    )
    model = PLTForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.loops} loops")
    loss = train(model, args.steps, size=24, length=112, peak=2e-3)
    print(f"final loss {loss:.4f} nats per byte")
    model.to(torch.bfloat16).save_pretrained(args.out)
    byte_tokenizer().save_pretrained(args.out)
    rng = random.Random(1)
    held_out = sorted(HELD_OUT)
    rows = [problem(i, TASKS[i % len(TASKS)], rng.choice(held_out)) for i in range(3 * len(TASKS))]
    args.problems.parent.mkdir(parents=True, exist_ok=True)
    args.problems.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
