"""Fine-tune a checkpoint on instructions: prompts with completions, or conversations; loss on the answers only.

    result = tune(load_tuning_recipe("sft"), model=Path("models/base-r2/model"), data=[Path("chat.jsonl")], out=out)

As `train`: the same call goes on after a kill, and returns at once when complete. The model keeps its loop count, since
training and inference have to agree on it. Where there are conversations, the tokenizer is saved with the chat template
that they were put in.
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
from transformers.utils import logging as transformers_logging

from plt_model.loading import load_model, weights_hash
from plt_model.training.instruction_files import Conversation
from plt_model.training.instructions import (
    InstructionDataset,
    collate,
    load_instructions,
    read_instructions,
    with_chat_template,
)
from plt_model.training.recipe import TuningRecipe
from plt_model.training.run import (
    Engine,
    Job,
    TrainingError,
    TrainResult,
    check_engine,
    check_tokenizer,
    finished,
    load_tokenizer,
    run_job,
    warner,
    with_seed,
)
from plt_model.training.shards import file_sha256


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
    recipe = with_seed(recipe, seed)
    check_engine(recipe, engine)
    transformers_logging.disable_progress_bar()
    loaded = load_model(model, dtype=torch.float32)
    encoder = load_tokenizer(tokenizer or str(model))
    # Records that are no conversations are put in no template, and the model must not be asked in one.
    if any(isinstance(record, Conversation) for record in read_instructions(data)):
        encoder = with_chat_template(encoder, recipe.chat_template)
    elif recipe.chat_template is not None:
        raise TrainingError(f"recipe {recipe.name}: chat_template has no effect: no record is a conversation")
    check_tokenizer(loaded.config, encoder)
    request = {
        "kind": "fine-tuning",
        "loops": loaded.config.plt_num_loops,
        "recipe": json.loads(recipe.model_dump_json(exclude={"description"})),
        "model": weights_hash(model),
        "data": [file_sha256(path) for path in data],
        "tokenizer": _tokenizer_hash(encoder),
    }
    done = finished(out, request)
    if done is not None:
        return done
    notify = warner(console or Console(stderr=True, highlight=False))
    longest = min(recipe.max_length, loaded.config.max_position_embeddings)
    if longest < recipe.max_length:
        notify(f"max_length is {recipe.max_length}, but the model's context is {longest} tokens: that is the limit")
    examples = load_instructions(
        data,
        encoder,
        max_length=longest,
        truncate=recipe.truncate,
        last_turn_only=recipe.last_turn_only,
        notify=notify,
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


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of all that decides the tokens of a record."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class _Indexed(Dataset[dict[str, Tensor]]):
    """The items with their number, by which an error names them."""

    def __init__(self, rows: InstructionDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": torch.tensor(index)}


__all__ = ["tune"]
