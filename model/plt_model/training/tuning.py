"""Fine-tune a checkpoint on instructions: prompts with completions, or conversations; loss on the answers only.

    result = tune(load_tuning_recipe("sft"), model=Path("models/base-r2/model"), data=[Path("chat.jsonl")], out=out)

As `train`: the same call goes on after a kill, and returns at once when complete. The model keeps its loop count, since
training and inference have to agree on it. The tokenizer is saved with the chat template that the data were put in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from plt_model.loading import load_model, weights_hash
from plt_model.training.instructions import InstructionDataset, collate, load_instructions, with_chat_template
from plt_model.training.recipe import TuningRecipe
from plt_model.training.run import (
    Engine,
    Job,
    TrainResult,
    check_tokenizer,
    finished,
    load_tokenizer,
    run_job,
    warner,
)


def tune(
    recipe: TuningRecipe,
    *,
    model: Path,
    data: Sequence[Path],
    out: Path,
    tokenizer: str | None = None,
    seed: int | None = None,
    console: Console | None = None,
    report_to: Sequence[str] = (),
    fsdp: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> TrainResult:
    """Fine-tune the PLT in the folder `model` at its own loop count on the records of `data`.

    `tokenizer` replaces the one in the model's folder ("bytes", or a folder). Raises CheckpointError, InstructionError
    or TrainingError, one line each, and KeyboardInterrupt after a stop that left a checkpoint.
    """
    engine = Engine(tuple(report_to), fsdp, device, console)
    recipe = recipe if seed is None else recipe.model_copy(update={"seed": seed})
    loaded = load_model(model, dtype=torch.float32)
    encoder = with_chat_template(load_tokenizer(tokenizer or str(model)), recipe.chat_template)
    check_tokenizer(loaded.config, encoder)
    request = {
        "kind": "fine-tuning",
        "loops": loaded.config.plt_num_loops,
        "recipe": json.loads(recipe.model_dump_json(exclude={"description"})),
        "model": weights_hash(model),
        "tokenizer": hashlib.sha256(encoder.backend_tokenizer.to_str().encode()).hexdigest(),
        "data": [hashlib.sha256(path.read_bytes()).hexdigest() for path in data],
    }
    done = finished(out, request)
    if done is not None:
        return done
    examples = load_instructions(
        data,
        encoder,
        max_length=recipe.max_length,
        truncate=recipe.truncate,
        last_turn_only=recipe.last_turn_only,
        notify=warner(console or Console(stderr=True, highlight=False)),
    )
    steps = max(1, math.ceil(recipe.epochs * len(examples) / recipe.batch))
    rows = _Indexed(InstructionDataset(examples, size=steps * recipe.batch, seed=recipe.seed))
    pad = encoder.pad_token_id if encoder.pad_token_id is not None else encoder.eos_token_id
    job = Job(
        recipe=recipe,
        model=loaded,
        tokenizer=encoder,
        data=rows,
        describe=rows.rows.id,
        collate=lambda items: {
            **collate(items, pad_id=pad),
            "index": torch.stack([item["index"] for item in items]),
        },
        steps=steps,
        batch=recipe.batch,
        length=max(len(example.input_ids) for example in examples),
        request=request,
    )
    return run_job(job, out, engine)


class _Indexed(Dataset[dict[str, Tensor]]):
    """The items with their number, by which an error names them."""

    def __init__(self, rows: InstructionDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": torch.tensor(index)}


__all__ = ["tune"]
