"""Open a model folder whose code comes with it, as on the hub: config.json's auto_map names the files.

config = remote_config(folder, trust_remote_code=True)
model = load_remote(folder, config, dtype=None, device="cpu")

Such code runs on this machine with all rights of the user, so it is run only where that was asked for. It was written
for some version of transformers, not always for this one: whatever it raises becomes one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from plt_model.loading import CheckpointError, config_values, one_line


class AdapterError(CheckpointError):
    """A model that no adapter can open or run; the message is one line: the model, what was found, what to do."""


def remote_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The configuration of a folder, by its own code. Raises AdapterError: not trusted, or not to be run here."""
    kind = config_values(folder).get("model_type")
    if not trust_remote_code:
        raise AdapterError(
            f"{folder}: a model of type {kind!r} runs code from its own folder: read it, then pass --trust-remote-code "
            "(trust_remote_code=True in Python)"
        )
    with one_line_errors(str(folder)):
        return AutoConfig.from_pretrained(folder, trust_remote_code=True)


def load_remote(folder: Path, config: Any, *, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    """The causal language model of a folder that is trusted, in evaluation mode. config: as it is to run. dtype: None
    is the checkpoint's own. Raises AdapterError: code that does not run here, weights that do not fit."""
    with one_line_errors(str(folder)):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, trust_remote_code=True, dtype=dtype or "auto", output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise AdapterError(f"{folder}: {len(missing)} tensors are missing from the weights, the first is {missing[0]}")
    return model.to(device).eval()


@contextmanager
def one_line_errors(
    name: str, besides: tuple[type[Exception], ...] = (MemoryError, torch.OutOfMemoryError)
) -> Iterator[None]:
    """Around code of others, which may raise anything: an AdapterError that begins with `name`. Errors `besides` are
    left as they are: a lack of memory, at least, is for the caller to meet."""
    try:
        yield
    except besides:
        raise
    except Exception as failed:
        raise AdapterError(
            f"{name}: its code or weights do not work with transformers {transformers.__version__} "
            f"({type(failed).__name__}: {one_line(failed)})"
        ) from failed


def require(model: nn.Module, names: tuple[str, ...], family: str) -> None:
    """The model has the parts that an adapter reads. Raises AdapterError naming the first that it has not."""
    for name in names:
        try:
            attrgetter(name)(model)
        except AttributeError as absent:
            raise AdapterError(
                f"{type(model).__name__} has no {name}, which the {family} adapter reads: is it another version of the "
                "model's code?"
            ) from absent
