"""Training recipes: small YAML files that say everything that decides a trained model, except its loop count.

    name: mine
    model: {hidden_size: 128, num_hidden_layers: 2, ...}    # any field of PLTConfig but plt_num_loops
    tokenizer: bytes                                        # or a folder with a Hugging Face tokenizer
    data:
      - {name: python, weight: 1, source: {kind: folder, path: src, glob: "**/*.py"}}
    sequence_length: 256
    tokens: 5_000_000
    batch_tokens: 8192

`load_recipe("mine.yaml")`, or the name of a bundled one (`bundled_recipes()`). A mistake in the file is one line: the
file, the field, what was found and what was expected.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from plt_model.configuration_plt import PLTConfig
from plt_model.loading import one_line

BYTES = "bytes"
"""The tokenizer that needs no files: plt_model.tokenizer."""

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class RecipeError(ValueError):
    """A recipe cannot be used; the message is one line for the user."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("expected no truth value")
        return value


class DataEntry(_Strict):
    """One ingredient of the mix: `weight` is its share of the training windows, relative to the others'; `source` says
    what it is built from (see `plt-eval data build`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    source: dict[str, Any] | None = None


class Optimizer(_Strict):
    """AdamW for everything, or ("muon") Muon for the layers' matrices, at `muon_lr` (default: lr), with AdamW for the
    rest. Biases and norm weights are not decayed. `clip` bounds the global gradient norm."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0, lt=1e6, allow_inf_nan=False)
    muon_lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    muon_momentum: Fraction = 0.95
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _muon_is_meant(self) -> Optimizer:
        if self.kind != "muon" and {"muon_lr", "muon_momentum"} & self.model_fields_set:
            raise ValueError(f"muon_lr and muon_momentum have no effect with kind {self.kind}")
        return self


class Schedule(_Strict):
    """Linear warm-up over the first `warmup` of the steps, then decay to `final` times the peak rate."""

    warmup: Fraction = 0.05
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final: Fraction = 0.0

    def factor(self, step: int, steps: int) -> float:
        """The share of the peak rate at optimizer step `step`, counted from 0, of `steps`."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - warm) / max(1, steps - warm))
        left = (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1 - done
        return self.final + (1 - self.final) * left


class Checkpointing(_Strict):
    """A checkpoint after every `every` optimizer steps and at the end; the last `keep` of them stay."""

    every: Positive = 500
    keep: int = Field(default=2, ge=2)


class Common(_Strict):
    """What pre-training and fine-tuning share. `micro_batch`: sequences a device takes at a time (default: the whole
    batch); gradients are accumulated over the rest, and the result does not depend on it beyond rounding."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    precision: Literal["float32", "bf16"] = "float32"
    gradient_checkpointing: bool = False
    micro_batch: Positive | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    checkpoint: Checkpointing = Checkpointing()
    log_every: Positive = 1
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @model_validator(mode="after")
    def _logs_meet_checkpoints(self) -> Common:
        if self.checkpoint.every % self.log_every:
            raise ValueError(
                f"checkpoint.every is {self.checkpoint.every}: expected a multiple of log_every ({self.log_every}), "
                "so that a resumed log has no gap"
            )
        return self

    def digest(self) -> str:
        """sha256 of everything that decides the result."""
        fields = self.model_dump(mode="json", exclude={"description"})
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class Recipe(Common):
    """Pre-training. `tokens` in all, `batch_tokens` an optimizer step, windows of `sequence_length` tokens."""

    model: dict[str, Any]
    tokenizer: str = BYTES
    data: tuple[DataEntry, ...] = Field(min_length=1)
    sequence_length: int = Field(ge=2)
    tokens: Positive
    batch_tokens: Positive

    @model_validator(mode="after")
    def _adds_up(self) -> Recipe:
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"batch_tokens is {self.batch_tokens}: expected a multiple of sequence_length ({self.sequence_length})"
            )
        if self.steps < 1:
            raise ValueError(f"tokens is {self.tokens}: expected at least batch_tokens ({self.batch_tokens})")
        names = [entry.name for entry in self.data]
        if len(set(names)) < len(names):
            raise ValueError("data: two entries have the same name")
        if "plt_num_loops" in self.model:
            raise ValueError("model.plt_num_loops: loops are not the recipe's to say; pass --loops")
        return self

    @property
    def batch(self) -> int:
        """Windows an optimizer step."""
        return self.batch_tokens // self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.tokens // self.batch_tokens

    def config(self, loops: int) -> PLTConfig:
        """The model's configuration at `loops` loops. Raises RecipeError."""
        known = {"model_type", *PLTConfig().to_dict(), "rope_theta"}
        for key in self.model:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise RecipeError(f"recipe {self.name}: model.{key}: no such field of PLTConfig{hint}")
        fields = dict(self.model)
        theta = fields.pop("rope_theta", None)
        try:
            if theta is not None:
                fields["rope_parameters"] = {"rope_type": "default", "rope_theta": _number("rope_theta", theta)}
            config = PLTConfig(**fields, plt_num_loops=loops)
        except (ValueError, TypeError, StrictDataclassError) as refused:
            raise RecipeError(f"recipe {self.name}: model: {one_line(refused)}") from refused
        if self.sequence_length > config.max_position_embeddings:
            raise RecipeError(
                f"recipe {self.name}: sequence_length is {self.sequence_length}: expected at most "
                f"model.max_position_embeddings ({config.max_position_embeddings})"
            )
        return config


class TuningRecipe(Common):
    """Supervised fine-tuning: `batch` examples an optimizer step, `epochs` passes over the data. Examples of more than
    `max_length` tokens are left out, or cut with `truncate`."""

    epochs: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    batch: Positive = 32
    max_length: int = Field(default=2048, ge=2)
    truncate: bool = False
    last_turn_only: bool = False
    chat_template: str | None = None


_Kind = TypeVar("_Kind", bound=Common)


def load_recipe(name: str | Path) -> Recipe:
    """The pre-training recipe in a file, or the bundled one of that name. Raises RecipeError."""
    return _load(name, Recipe)


def load_tuning_recipe(name: str | Path) -> TuningRecipe:
    """The fine-tuning recipe in a file, or the bundled one of that name. Raises RecipeError."""
    return _load(name, TuningRecipe)


def bundled_recipes() -> dict[str, Traversable]:
    """The recipes that the package ships, by name."""
    folder = files("plt_model.training") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def _load(name: str | Path, kind: type[_Kind]) -> _Kind:
    path = Path(name)
    bundled = bundled_recipes()
    if path.is_file():
        found: Path | Traversable = path
    elif str(name) in bundled:
        found = bundled[str(name)]
    else:
        near = difflib.get_close_matches(str(name), bundled, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RecipeError(f"--recipe {name}: no such file or bundled recipe{hint}; bundled: {', '.join(bundled)}")
    try:
        raw = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as broken:
        raise RecipeError(f"{name}: not valid YAML: {one_line(broken)}") from broken
    if not isinstance(raw, dict):
        raise RecipeError(f"{name}: found {type(raw).__name__}, expected the fields of a recipe")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_first_fault(error, kind)}") from error


def _first_fault(error: ValidationError, kind: type[BaseModel]) -> str:
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _fields_at(kind, fault["loc"][:-1]), n=1)
        return f"{where}: no such field" + (f" (did you mean {near[0]}?)" if near else "")
    if fault["type"] == "missing":
        return f"{where}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, found {fault['input']!r}" if where else message


def _fields_at(kind: type[BaseModel], where: Sequence[int | str]) -> list[str]:
    """The fields of the model at a place within `kind`, as in ("data", 0)."""
    for step in where:
        if isinstance(step, str):
            annotation = kind.model_fields[step].annotation
            inner = (annotation, *get_args(annotation))
            kind = next(part for part in inner if isinstance(part, type) and issubclass(part, BaseModel))
    return list(kind.model_fields)


def _number(field: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{field} is {value!r}: expected a number") from None
