"""Write a small checkpoint folder of a foreign family: config.json with auto_map, its code, random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent


def write_ouro(folder: Path, **settings: Any) -> Path:
    """A folder as the hub's: nothing in it is known to transformers but through its auto_map."""
    folder.mkdir(parents=True)
    for name in ("configuration_ouro.py", "modeling_ouro.py"):
        shutil.copy(HERE / name, folder / name)
    auto_map = {
        "AutoConfig": "configuration_ouro.OuroConfig",
        "AutoModel": "modeling_ouro.OuroModel",
        "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
    }
    values = {"model_type": "ouro", "architectures": ["OuroForCausalLM"], "auto_map": auto_map, **settings}
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(7)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
