"""Write a checkpoint as a folder that a stock transformers loads, without this project:

    plt-eval export path/to/checkpoint --format transformers --out folder
    AutoModelForCausalLM.from_pretrained("folder", trust_remote_code=True)

The folder holds the weights (untouched, or renamed where the checkpoint spells the gates the older way), the
tokenizer's files, a config with an `auto_map`, and the four source files that make up the model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CODE = ("configuration_plt.py", "attention_plt.py", "attention_flex.py", "cache_plt.py", "modeling_plt.py")
AUTO_MAP = {
    "AutoConfig": "configuration_plt.PLTConfig",
    "AutoModel": "modeling_plt.PLTModel",
    "AutoModelForCausalLM": "modeling_plt.PLTForCausalLM",
}
_OLD_GATE, _NEW_GATE = ".loop_gate_proj.", ".plt_gate."


def export_for_transformers(source: Path, out: Path) -> list[Path]:
    """Copy the checkpoint in `source` to the new or empty folder `out`, with the code that runs it.

    Returns the files written. Raises ValueError when `source` is no PLT checkpoint or `out` is not empty.
    """
    from .loading import read_config, weight_files

    config = read_config(source)
    weights = weight_files(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    raw = json.loads((source / "config.json").read_text())
    raw.update(auto_map=AUTO_MAP, architectures=["PLTForCausalLM"], model_type=config.model_type)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    written = [out / "config.json"]
    for name in CODE:
        written.append(Path(shutil.copyfile(Path(__file__).with_name(name), out / name)))
    for file in weights:
        written.append(_copy_weights(file, out / file.name))
    index = source / "model.safetensors.index.json"
    if index.exists():
        (out / index.name).write_text(index.read_text().replace(_OLD_GATE, _NEW_GATE))
        written.append(out / index.name)
    skip = {path.name for path in written} | {"config.json"}
    for file in sorted(source.iterdir()):
        if file.suffix in {".json", ".model", ".txt", ".jinja"} and file.name not in skip:
            written.append(Path(shutil.copyfile(file, out / file.name)))
    return written


def _copy_weights(source: Path, target: Path) -> Path:
    """Copy one safetensors file, giving gate tensors their present name (remote code reads only that)."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(source, framework="pt") as opened:
        renames = any(_OLD_GATE in name for name in opened.keys())  # noqa: SIM118 (not a dict)
    if not renames:
        return Path(shutil.copyfile(source, target))
    tensors = {name.replace(_OLD_GATE, _NEW_GATE): tensor for name, tensor in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt"})
    return target
