"""An exported folder runs in a stock transformers, in a process where this project cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plt_cases import FIXTURES, assert_close, build, fixture, row, tiny, tokens
from safetensors.torch import load_file, save_file

from plt_model.export import export_for_transformers
from plt_model.loading import load_model

STRANGER = """
import json, sys
packages, ours, folders, ids, result = json.loads(sys.argv[1])

class Closed:
    # This project does not exist here, however it is installed.
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ours:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.path += packages
sys.meta_path.insert(0, Closed)
for name in ours:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
found = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__ == "PLTConfig"
    assert AutoModel.from_pretrained(folder, trust_remote_code=True).config.model_type == "iquestpltcoder"
    prompt = torch.tensor([ids])
    with torch.no_grad():
        found[folder + " logits"] = model(prompt).logits
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found[folder + " text"] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
save_file(found, result)
assert not any(name.split(".")[0] in ours for name in sys.modules)
"""

OURS = ["plt_model", "plt_eval", "plt_benchmarks", "plt_diagnostics"]


def run_elsewhere(folders: list[Path], ids: list[int], tmp_path: Path) -> dict[str, torch.Tensor]:
    """Logits and greedy text of each folder, from an isolated interpreter without site files or environment."""
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    assert packages
    home = tmp_path / "home"
    home.mkdir()
    result = tmp_path / "result.safetensors"
    job = json.dumps([packages, OURS, [str(f) for f in folders], ids, str(result)])
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STRANGER, job],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(result)


def test_exported_folders_run_without_this_project(tmp_path: Path) -> None:
    """A checkpoint as released, one that spells its gates the older way, in shards, and a model of ours."""
    case = fixture("a_r2_w4")
    sources = {"released": case.folder, "older": tmp_path / "older", "sharded": tmp_path / "sharded"}
    sources["older"].mkdir()
    (sources["older"] / "config.json").write_text(json.dumps(case.config))
    older = {name.replace(".plt_gate.", ".loop_gate_proj."): w for name, w in case.weights.items()}
    save_file(older, sources["older"] / "model.safetensors", metadata={"format": "pt"})
    settings = tiny(vocab_size=199, plt_num_loops=4, plt_gate_use_hidden_states=False, rope_theta=1234.0)
    build(settings, dtype=torch.float32).save_pretrained(sources["sharded"], max_shard_size="20KB")
    assert len(list(sources["sharded"].glob("*.safetensors"))) > 1

    exported = {name: tmp_path / f"{name}_out" for name in sources}
    for name, source in sources.items():
        export_for_transformers(source, exported[name])
    found = run_elsewhere(list(exported.values()), case.ids, tmp_path)

    for name, source in sources.items():
        model = load_model(source, dtype=torch.float32)
        with torch.no_grad():
            assert_close(found[f"{exported[name]} logits"], model(row(case.ids)).logits, 1e-5, name)
        ids = row(case.ids)
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(found[f"{exported[name]} text"], text), name
    assert_close(found[f"{exported['released']} logits"][0], case.expected["logits"], 5e-5)


def test_what_is_written(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    load_model(FIXTURES / "a_r2_w4").save_pretrained(source)
    (source / "tokenizer.json").write_text('{"of": "the source"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    written = export_for_transformers(source, out)
    assert sorted(written) == sorted(p for p in out.iterdir() if p.is_file())
    assert (out / "tokenizer.json").read_text() == '{"of": "the source"}'
    assert (out / "chat_template.jinja").exists()
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModelForCausalLM"}
    original = json.loads((source / "config.json").read_text())
    assert {key: config[key] for key in original if key.startswith(("plt_", "rope_"))} == {
        key: value for key, value in original.items() if key.startswith(("plt_", "rope_"))
    }
    with torch.no_grad():
        ids = row(tokens(9))
        assert torch.equal(load_model(out)(ids).logits, load_model(source)(ids).logits)


def test_the_older_spelling_is_written_in_the_present_one(tmp_path: Path) -> None:
    """In the files and in their index, which still agree."""
    case = fixture("a_r2_w4")
    source, out = tmp_path / "source", tmp_path / "out"
    load_model(case.folder).save_pretrained(source, max_shard_size="100KB")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(".plt_gate.", ".loop_gate_proj."))
    for file in source.glob("*.safetensors"):
        held = {name.replace(".plt_gate.", ".loop_gate_proj."): w for name, w in load_file(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    export_for_transformers(source, out)
    written = {name: file.name for file in sorted(out.glob("*.safetensors")) for name in load_file(file)}
    assert set(written) == set(case.weights)
    assert json.loads((out / index.name).read_text())["weight_map"] == written
    for file in out.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            assert torch.equal(weight, case.weights[name])


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_for_transformers(FIXTURES / "a_r2_w4", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        export_for_transformers(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
