"""A model folder as the engines that compute themselves take it: what it is, its tokenizer, its numbers, its name.

checkpoint = Checkpoint("models/tiny-r2/model", label=None, loops=2, loop_mode=None)
prompts = checkpoint.prompts(config, generation_config, tokenizer=None, chat_template="auto")
checkpoint.identity("hf", config, torch.float32, prompts)
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from plt_eval.engines.hf_prompts import Prompts
from plt_eval.errors import UserError
from plt_eval.models import ResolvedModel, no_such_model
from plt_model import PLTConfig
from plt_model.loading import CheckpointError, read_config, weight_files, weights_hash
from plt_model.tokenizer import byte_tokenizer


class Checkpoint:
    """A checkpoint folder. `label` is its name in records (default: :func:`folder_label`). Raises UserError for what is
    none, and for loops or a loop mode that belong to PLTs where it is no PLT."""

    def __init__(self, model: str, *, label: str | None, loops: int | None, loop_mode: str | None) -> None:
        self.folder = Path(model)
        if not self.folder.is_dir():
            raise UserError(f"--model {no_such_model(str(model))}")
        self.label = folder_label(self.folder) if label is None else label
        self.is_plt = _model_type(self.folder) == PLTConfig.model_type
        if not self.is_plt and (loops not in (None, 1) or loop_mode not in (None, "plt")):
            raise UserError(f"--loops {loops}: {self.folder} is no PLT checkpoint; only those can run several loops")

    @cached_property
    def weights_sha256(self) -> str:
        """Raises UserError when files are missing."""
        try:
            return weights_hash(self.folder)
        except CheckpointError as broken:
            raise UserError(f"--model {broken}") from broken

    def prompts(self, config: Any, generation_config: Any, *, tokenizer: str | None, chat_template: str) -> Prompts:
        """What stands between text and tokens. `tokenizer` is a folder, "bytes", or None for the checkpoint's own;
        `chat_template` is on, off or auto: used if there is one. Raises UserError."""
        loaded = self._tokenizer(tokenizer, config.vocab_size)
        has = getattr(loaded, "chat_template", None) is not None
        if chat_template == "on" and not has:
            raise UserError("--chat-template on: the tokenizer has no chat template")
        eos = _eos_ids(generation_config, config, loaded)
        return Prompts(loaded, use_chat=has and chat_template != "off", eos=eos)

    def _tokenizer(self, chosen: str | None, vocab_size: int) -> Any:
        if chosen == "bytes":
            return byte_tokenizer(vocab_size)
        where = self.folder if chosen is None else Path(chosen)
        if not any((where / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            raise UserError(f"{where}: no tokenizer in it; pass --tokenizer FOLDER, or --tokenizer bytes")
        tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
        if len(tokenizer) > vocab_size:
            raise UserError(
                f"{where}: the tokenizer has {len(tokenizer)} tokens, the model {vocab_size}: "
                "they do not belong together"
            )
        return tokenizer

    def identity(self, engine: str, config: Any, dtype: torch.dtype, prompts: Prompts) -> dict[str, Any]:
        """What decides the text: see Engine.identity. `config` is the model's, at its loops."""
        values: Mapping[str, Any] = config.to_dict()
        kept = {name: value for name, value in values.items() if name not in _NOISE}
        template = prompts.tokenizer.chat_template if prompts.use_chat else None
        return {
            "engine": engine,
            "model": self.label,
            "weights_sha256": self.weights_sha256,
            "config_sha256": _sha256(json.dumps(kept, sort_keys=True, default=str)),
            "loops": values.get("plt_num_loops", 1),
            "loop_mode": values.get("plt_loop_mode", "plt") if self.is_plt else None,
            "dtype": str(dtype).removeprefix("torch."),
            "tokenizer_sha256": _sha256(json.dumps(sorted(prompts.tokenizer.get_vocab().items()))),
            "chat_template_sha256": None if template is None else _sha256(str(template)),
        }


@dataclass(frozen=True)
class ServedModel:
    """The checkpoint that an endpoint serves, by the word of who asks it; `loop_mode` is None where it is no PLT."""

    label: str
    weights_sha256: str
    loops: int
    loop_mode: str | None

    @classmethod
    def of(cls, model: ResolvedModel) -> ServedModel:
        """Raises UserError for what is no checkpoint, and as Checkpoint does for loops."""
        label = None if model.family is None else model.label
        checkpoint = Checkpoint(str(model.folder), label=label, loops=model.loops, loop_mode=None)
        own = read_config(model.folder) if checkpoint.is_plt else None
        loops = model.loops or (1 if own is None else own.plt_num_loops)
        mode = None if own is None else own.plt_loop_mode
        return cls(checkpoint.label, checkpoint.weights_sha256, loops, mode)

    def identity(self) -> dict[str, Any]:
        """As in Checkpoint.identity, what of it is known."""
        return {
            "model": self.label,
            "weights_sha256": self.weights_sha256,
            "loops": self.loops,
            "loop_mode": self.loop_mode,
        }


_NOISE = ("_name_or_path", "transformers_version", "dtype", "architectures")
"""Of a configuration: what may differ where the model does not."""


def folder_label(folder: Path) -> str:
    """The folder's name; of RUN/model, where trainings leave their models, RUN, and of RUN/r2/model RUN-r2.

    No slash is in it: of a path, records show the last part only.
    """
    folder = folder.resolve()
    if folder.name != "model":
        return folder.name
    training = folder.parent
    names = [training.parent.name, training.name] if re.fullmatch(r"r\d+", training.name) else [training.name]
    return "-".join(filter(None, names)) or folder.name


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where torch sees one. Raises UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here")
    return torch.device(name)


def pick_dtype(name: str, folder: Path, device: torch.device, notify: Callable[[str], None]) -> torch.dtype:
    """The type of that name; "auto" is the checkpoint's own on a GPU, and on a CPU float32 where that fits in memory
    (`notify` hears when it does not)."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."), None)
    own = saved if isinstance(saved, torch.dtype) else torch.float32
    if device.type != "cpu" or own == torch.float32:
        return own
    size = sum(file.stat().st_size for file in weight_files(folder))
    if 2 * size > 0.6 * psutil.virtual_memory().available:
        notify(f"running in {str(own).removeprefix('torch.')}: float32 would not fit in this machine's memory")
        return own
    return torch.float32


@contextmanager
def warnings_told(notify: Callable[[str], None]) -> Iterator[None]:
    """What plt_model warns of within, `notify` hears at the end."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in said:
        notify(str(warning.message))


def _model_type(folder: Path) -> str:
    """The checkpoint's model_type, read without trusting the rest of the file."""
    path = folder / "config.json"
    if folder.is_dir() and path.is_file():
        try:
            kind = json.loads(path.read_text()).get("model_type")
        except (ValueError, AttributeError):
            kind = None
        if isinstance(kind, str) and kind != PLTConfig.model_type:
            return kind
    try:
        read_config(folder)
    except CheckpointError as broken:
        raise UserError(f"--model {broken}") from broken
    return PLTConfig.model_type


def _eos_ids(generation_config: Any, config: Any, tokenizer: Any) -> list[int]:
    found: set[int] = set()
    for holder in (generation_config, config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else (value or []))
    return sorted(token for token in found if token < config.vocab_size)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
