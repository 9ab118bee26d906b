"""The model of a diagnosis: what is known of a checkpoint before its weights are loaded, and how it is opened.

subject = Subject.of(resolve_model("plt-tiny:r3"), notify=print)
subject.weights_sha256, subject.most_tokens
model = subject.open()
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from plt_diagnostics import open_model
from plt_diagnostics.adapters.protocol import LoopedModel
from plt_eval.engines.checkpoint import folder_label, pick_device, pick_dtype
from plt_eval.engines.hf_batches import out_of_memory
from plt_eval.errors import UserError
from plt_eval.models import ResolvedModel, no_such_model
from plt_model.loading import CheckpointError, check_weights, weights_hash

_LOOPS = ("plt_num_loops", "total_ut_steps")
"""What families call their loop count in config.json."""

_NOISE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
"""Fields of config.json that change nothing of what a loop computes."""


@dataclass(frozen=True)
class Subject:
    """A model to open at one loop count: all that is known of it before it is loaded. `loops` and `loop_mode` None are
    the checkpoint's own."""

    folder: Path
    label: str
    family: str | None
    loops: int | None
    loop_mode: str | None
    dtype: torch.dtype
    device: torch.device
    trust_remote_code: bool
    config: dict[str, Any]
    weights_sha256: str
    notify: Callable[[str], None]

    @classmethod
    def of(
        cls,
        model: ResolvedModel,
        *,
        loop_mode: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        label: str | None = None,
        notify: Callable[[str], None] = print,
    ) -> Subject:
        """Read what can be read without loading the weights. `label` None: the family's, or the folder's own. Raises
        UserError, CheckpointError."""
        if not model.folder.is_dir():
            raise UserError(f"--model {no_such_model(str(model.folder))}")
        config = _read_config(model.folder)
        where = pick_device(device)
        return cls(
            folder=model.folder,
            label=label or (model.label if model.family is not None else folder_label(model.folder)),
            family=model.family,
            loops=model.loops,
            loop_mode=loop_mode,
            dtype=pick_dtype(dtype, model.folder, where, notify),
            device=where,
            trust_remote_code=trust_remote_code,
            config=config,
            weights_sha256=weights_hash(model.folder),
            notify=notify,
        )

    @property
    def trained_loops(self) -> int | None:
        """The loop count in config.json, which is that of the training; None where there is none."""
        found = next((self.config[name] for name in _LOOPS if name in self.config), None)
        return found if isinstance(found, int) else None

    @property
    def most_tokens(self) -> int | None:
        """The longest text that the model is made for, in tokens; None where it does not say."""
        found = self.config.get("max_position_embeddings")
        return found if isinstance(found, int) else None

    @property
    def config_sha256(self) -> str:
        decisive = {name: value for name, value in self.config.items() if name not in _NOISE}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def open(self) -> LoopedModel:
        """Load it; what the model has to say of its loop count goes to `notify`. Raises CheckpointError, UserError."""
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            try:
                model = open_model(
                    self.folder,
                    loops=self.loops,
                    loop_mode=self.loop_mode,
                    dtype=self.dtype,
                    device=self.device,
                    trust_remote_code=self.trust_remote_code,
                )
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise UserError(f"--model {self.folder}: does not fit in the memory of {self.device}") from error
        for message in dict.fromkeys(str(warning.message) for warning in said):
            self.notify(message)
        return model

    def parameters(self) -> int:
        """Numbers in the weight files; a tied head is there once."""
        return sum(math.prod(shape) for shape in check_weights(self.folder).values())


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json in it, so it is not a model folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config
