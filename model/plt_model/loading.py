"""Load a checkpoint from a folder, and say in one line what is wrong with it when it cannot be.

model = load_model(Path("LoopCoder-V2"), loops=2, dtype=torch.float32)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from .attention_plt import chosen
from .configuration_plt import PLTConfig
from .modeling_plt import PLTForCausalLM


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line: the file, what was found and what was expected."""


def config_values(folder: Path) -> dict[str, Any]:
    """What a model folder's config.json holds, of whatever family. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json in it, so it is not a model folder")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise CheckpointError(f"{path}: not valid JSON ({broken})") from broken
    return raw if isinstance(raw, dict) else {}


def read_config(folder: Path) -> PLTConfig:
    """The checkpoint's configuration, validated. Raises CheckpointError."""
    raw = config_values(folder)
    path, kind = folder / "config.json", raw.get("model_type")
    if kind != PLTConfig.model_type:
        raise CheckpointError(f"{path}: model_type is {kind!r}: expected {PLTConfig.model_type!r}")
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    if dtype is not None and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise CheckpointError(f"{path}: dtype is {dtype!r}: no such type in torch")
    try:
        config: PLTConfig = PLTConfig.from_dict(raw)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as refused:
        raise CheckpointError(f"{path}: {one_line(refused)}") from refused
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of its index. Raises CheckpointError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is in it")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as broken:
        raise CheckpointError(f"{index}: not a valid index of weight files ({one_line(broken)})") from broken
    if not names or not all(isinstance(name, str) and "/" not in name for name in names):
        raise CheckpointError(f"{index}: not a valid index of weight files (weight_map names none, or no file names)")
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: named in {index.name} but missing")
    return [folder / name for name in names]


def check_weights(folder: Path) -> dict[str, list[int]]:
    """Open every weight file and read its header: the shape of every tensor, by name (the gates' present spelling).
    Raises CheckpointError naming the file that is corrupt."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    shapes[name.replace(".loop_gate_proj.", ".plt_gate.")] = opened.get_slice(name).get_shape()
        except SafetensorError as broken:
            raise CheckpointError(f"{file}: corrupt or cut short ({one_line(broken)})") from broken
    return shapes


def check_fit(folder: Path, config: PLTConfig) -> None:
    """The tensors of the files are those that the configuration asks for. All gates may be absent, and a tied head."""
    found = check_weights(folder)
    with torch.device("meta"):
        wanted = {name: list(tensor.shape) for name, tensor in PLTForCausalLM(config).state_dict().items()}
    has_gates = any(".plt_gate." in name for name in found)
    optional = [*([] if has_gates else [".plt_gate."]), *(["lm_head."] if config.tie_word_embeddings else [])]
    missing = [name for name in wanted if name not in found and not any(part in name for part in optional)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing from the weights, the first is {missing[0]}"
        )
    extra = [name for name in found if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(f"{folder}: config.json has no place for {len(extra)} tensors, the first is {extra[0]}")
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise CheckpointError(
                f"{folder}: the weights do not fit config.json: {name} is {found[name]}, expected {shape}"
            )


def weights_hash(folder: Path) -> str:
    """sha256 over the bytes of the weight files, in order."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def load_model(
    folder: Path,
    *,
    loops: int | None = None,
    loop_mode: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str = "auto",
) -> PLTForCausalLM:
    """The model of a checkpoint folder, in evaluation mode on `device`.

    `loops` and `loop_mode` default to the checkpoint's own, `dtype` to the one it was saved in; `attn_implementation`
    is a name that :func:`plt_model.attention_plt.chosen` knows. Raises CheckpointError for a folder that is not a
    whole, sound PLT checkpoint, and ValueError for an attention that cannot be had.
    """
    config = read_config(folder)
    check_fit(folder, config)
    attention, _ = chosen(attn_implementation, device, dtype or config.dtype or torch.float32)
    try:
        model = PLTForCausalLM.from_pretrained(
            folder,
            config=config,
            loops=loops,
            loop_mode=loop_mode,
            dtype=dtype or "auto",
            attn_implementation=attention,
        )
    except (RuntimeError, SafetensorError) as broken:
        raise CheckpointError(f"{folder}: the weights do not fit config.json ({one_line(broken)})") from broken
    loaded: PLTForCausalLM = model.to(device).eval()
    return loaded


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks, as a part of another message."""
    return " ".join(str(error).split())[:300]
