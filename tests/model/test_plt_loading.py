"""Checkpoints: sharded, bf16, both gate spellings, saved and loaded again; and one clear line for a broken one."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plt_cases import FIXTURES, assert_close, build, fixture, row, tiny, tokens
from reference import Reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from plt_model import PLTConfig, PLTForCausalLM
from plt_model.loading import CheckpointError, check_weights, load_model, read_config, weights_hash

NAME = "a_r2_w4"
NORM = "model.norm.weight"


def old_spelling(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".plt_gate.", ".loop_gate_proj."): w for name, w in weights.items()}


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint in the released layout: one file, or `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: w.contiguous() for name, w in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def logits_of(folder: Path, **options: Any) -> Tensor:
    with torch.no_grad():
        return load_model(folder, **{"dtype": torch.float64, **options})(row(fixture(NAME).ids)).logits[0]


def state(model: PLTForCausalLM) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in model.state_dict().items()}


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("shards", [1, 3], ids="{}-files".format)
@pytest.mark.parametrize("spelling", ["plt_gate", "loop_gate_proj"])
def test_released_layouts(tmp_path: Path, spelling: str, shards: int) -> None:
    case = fixture(NAME)
    weights = case.weights if spelling == "plt_gate" else old_spelling(case.weights)
    folder = write(tmp_path, case.config, weights, shards)
    check_weights(folder)
    assert_close(logits_of(folder), Reference(case.config, case.weights).run(case.ids).logits)


def test_the_older_spelling_is_saved_in_the_present_one(tmp_path: Path) -> None:
    case = fixture(NAME)
    model = load_model(write(tmp_path / "old", case.config, old_spelling(case.weights)))
    model.save_pretrained(tmp_path / "new")
    assert set(load_file(tmp_path / "new" / "model.safetensors")) == set(case.weights)
    assert_same_state(state(load_model(tmp_path / "new")), case.weights)


def test_bf16_shards_keep_their_type_and_bits(tmp_path: Path) -> None:
    case = fixture(NAME)
    weights = {name: w.bfloat16() for name, w in case.weights.items()}
    folder = write(tmp_path, {**case.config, "torch_dtype": "bfloat16"}, weights, 3)
    assert_same_state(state(load_model(folder)), weights)
    wide = load_model(folder, dtype=torch.float32)
    assert_same_state(state(wide), {name: w.float() for name, w in weights.items()})
    expected = Reference(case.config, weights).run(case.ids).logits
    assert_close(logits_of(folder), expected)


@pytest.mark.parametrize("name", ["a_r2_w4", "e_r2_nonorm_noscale"])
def test_saving_keeps_every_bit_and_every_key(tmp_path: Path, name: str) -> None:
    case = fixture(name)
    model = load_model(FIXTURES / name)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert_same_state(state(again), state(model))
    saved = json.loads((tmp_path / "config.json").read_text())
    for key in case.config:
        if key.startswith("plt_") or key in ("model_type", "rope_theta", "head_dim", "rms_norm_eps", "vocab_size"):
            assert saved[key] == case.config[key], key
    kept = [key for key in model.config.to_dict() if key not in ("_name_or_path", "architectures")]
    assert {key: again.config.to_dict()[key] for key in kept} == {key: model.config.to_dict()[key] for key in kept}


def test_saving_keeps_what_is_not_the_default(tmp_path: Path) -> None:
    settings = tiny(
        rope_theta=777.0,
        plt_num_loops=4,
        plt_window_size=[7, 0],
        plt_normalize_per_loop=False,
        plt_emb_scale=None,
        plt_hidden_scale=0.25,
        plt_gate_use_hidden_states=False,
        plt_clp_shift=False,
        plt_gswa=False,
        plt_loop_mode="sequential",
        tie_word_embeddings=True,
    )
    model = build(settings)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved[key] for key in settings if key != "eos_token_id"} == {
        key: value for key, value in settings.items() if key != "eos_token_id"
    }
    again = load_model(tmp_path)
    with torch.no_grad():
        assert_close(again(row(tokens(9))).logits, model(row(tokens(9))).logits)


def test_shards_of_save_pretrained(tmp_path: Path) -> None:
    model = load_model(FIXTURES / NAME)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_state(state(load_model(tmp_path)), state(model))


@pytest.mark.parametrize("theta", [500, 10000.0, 1e6], ids=str)
def test_the_rope_base_of_the_file_counts(tmp_path: Path, theta: float) -> None:
    case = fixture(NAME)
    config = {**case.config, "rope_theta": theta}
    folder = write(tmp_path / "first", config, case.weights)
    expected = Reference(config, case.weights).run(case.ids).logits
    assert_close(logits_of(folder), expected)
    load_model(folder).save_pretrained(tmp_path / "second")
    assert_close(logits_of(tmp_path / "second"), expected)


def test_defaults_of_keys_that_are_missing(tmp_path: Path) -> None:
    case = fixture(NAME)
    config = {key: value for key, value in case.config.items() if not key.startswith("plt_")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 76800, "eos_token_id": None}))
    read = read_config(tmp_path)
    assert (read.plt_num_loops, read.plt_window_size, read.plt_normalize_per_loop) == (2, [64, 0], True)
    assert (read.plt_emb_scale, read.plt_hidden_scale, read.plt_gate_use_hidden_states) == (None, None, False)
    assert (read.plt_loop_mode, read.plt_clp_shift, read.plt_gswa) == ("plt", True, True)
    assert read.eos_token_id == [2, 75864, 75869]
    assert PLTConfig().plt_num_loops == 2


# --- loop counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loops", [1, 3, 4], ids="R{}".format)
def test_another_loop_count_warns_and_runs(loops: int) -> None:
    case = fixture(NAME)
    with pytest.warns(UserWarning, match=f"{loops} loops.*made for 2"):
        model = load_model(case.folder, loops=loops, dtype=torch.float64)
    expected = Reference({**case.config, "plt_num_loops": loops}, case.weights).run(case.ids).logits
    with torch.no_grad():
        assert_close(model(row(case.ids)).logits[0], expected)


def test_the_checkpoints_own_loop_count_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(FIXTURES / NAME)
        assert load_model(FIXTURES / NAME, loops=2).config.plt_num_loops == 2


@pytest.mark.parametrize("loops", [0, -1])
def test_less_than_one_loop_is_refused(loops: int) -> None:
    with pytest.raises(ValueError, match=f"loops is {loops}.*at least 1"):
        load_model(FIXTURES / NAME, loops=loops)
    with pytest.raises(ValueError, match=f"loops is {loops}.*at least 1"):
        PLTForCausalLM.from_pretrained(FIXTURES / NAME, loops=loops)


def test_loop_mode_at_load_time() -> None:
    case = fixture(NAME)
    expected = Reference({**case.config, "plt_loop_mode": "sequential"}, case.weights).run(case.ids).logits
    assert_close(logits_of(case.folder, loop_mode="sequential"), expected)
    with pytest.raises(ValueError, match=r"loop_mode is 'spiral'.*sequential"):
        load_model(case.folder, loop_mode="spiral")


@pytest.fixture
def gateless(tmp_path: Path) -> Path:
    """A checkpoint of one loop, which has no use for gate tensors."""
    case = fixture("f_r1")
    weights = {name: w for name, w in case.weights.items() if ".plt_gate." not in name}
    assert len(weights) < len(case.weights)
    return write(tmp_path / "gateless", case.config, weights)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers logs meanwhile (its logger does not reach pytest's own fixture)."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


def test_one_loop_without_gates_loads_silently(gateless: Path, said: list[str]) -> None:
    case = fixture("f_r1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_model(gateless, dtype=torch.float32)
    with torch.no_grad():
        assert_close(model(row(case.ids)).logits[0], case.expected["logits"], 5e-5)
    assert not [text for text in said if "plt_gate" in text], "a report about gates that one loop does not use"


def test_two_loops_without_gates_warn_and_blend_evenly(gateless: Path) -> None:
    with pytest.warns(UserWarning, match=r"no gate tensors.*g = 0\.5"), pytest.warns(UserWarning, match="2 loops"):
        model = load_model(gateless, loops=2)
    with torch.no_grad():
        out = model(row(tokens(9)), output_loop_states=True)
    assert (out.loop_gates[0] == 0.5).all()


@pytest.mark.parametrize("change", [{"plt_gswa": False}, {"plt_loop_mode": "sequential"}], ids=str)
def test_no_gates_where_none_are_used(gateless: Path, change: dict[str, Any]) -> None:
    config = json.loads((gateless / "config.json").read_text())
    (gateless / "config.json").write_text(json.dumps({**config, "plt_num_loops": 2, **change}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_model(gateless)


# --- through transformers' own names -------------------------------------------------------------------

AUTO = """
import sys, torch, plt_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
assert type(config) is plt_model.PLTConfig, type(config)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
assert type(model) is plt_model.PLTForCausalLM, type(model)
fresh = AutoModelForCausalLM.from_config(config)
assert type(fresh) is plt_model.PLTForCausalLM
with torch.no_grad():
    print(model(torch.tensor([[1, 5, 9, 40]])).logits[0, -1].argmax().item())
print(AutoModelForCausalLM.from_pretrained(folder, loops=3).config.plt_num_loops)
"""


def test_auto_classes_in_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AUTO, str(FIXTURES / NAME)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = load_model(FIXTURES / NAME)(row([1, 5, 9, 40])).logits[0, -1].argmax().item()
    assert done.stdout.split() == [str(expected), "3"]


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    case = fixture(NAME)
    one = write(tmp_path / "one", case.config, case.weights)
    assert weights_hash(one) == hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest()
    many = write(tmp_path / "many", case.config, case.weights, 3)
    files = sorted(many.glob("*.safetensors"))
    assert weights_hash(many) == hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    data = bytearray(files[1].read_bytes())
    data[-1] ^= 1
    before = weights_hash(many)
    files[1].write_bytes(data)
    assert weights_hash(many) != before


# --- what is wrong, in one line ------------------------------------------------------------------------

Break = Callable[[Path], str]


def config_becomes(text: str) -> Break:
    def apply(folder: Path) -> str:
        (folder / "config.json").write_text(text)
        return "config.json"

    return apply


def config_says(**changes: Any) -> Break:
    def apply(folder: Path) -> str:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return "config.json"

    return apply


def removed(name: str) -> Break:
    def apply(folder: Path) -> str:
        (folder / name).unlink()
        return name

    return apply


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Break:
    def apply(folder: Path) -> str:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return name

    return apply


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Break:
    def apply(folder: Path) -> str:
        file = next(f for f in sorted(folder.glob("*.safetensors")) if NORM in load_file(f))
        held = load_file(file)
        change(held)
        save_file(held, file, metadata={"format": "pt"})
        return str(folder)

    return apply


def no_folder(folder: Path) -> str:
    folder.rename(folder.with_name("elsewhere"))
    return str(folder)


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
BROKEN: dict[str, tuple[Break, str]] = {
    "no folder": (no_folder, "no such model folder"),
    "no config": (removed("config.json"), "config.json"),
    "config is not JSON": (config_becomes('{"model_type": '), "not valid JSON"),
    "config is not an object": (config_becomes("[1]"), "model_type"),
    "config is not text": (bytes_of("config.json", lambda b: b"\xff\xfe" + b), "not valid JSON"),
    "another model": (config_says(model_type="llama"), "'llama'.*'iquestpltcoder'"),
    "negative window": (config_says(plt_window_size=[-1, 0]), r"plt_window_size is \[-1, 0\]"),
    "window to the right": (config_says(plt_window_size=[4, 1]), r"plt_window_size is \[4, 1\]"),
    "window is a number": (config_says(plt_window_size=64), "plt_window_size"),
    "no loops": (config_says(plt_num_loops=0), "plt_num_loops is 0"),
    "loops is a word": (config_says(plt_num_loops="two"), "plt_num_loops"),
    "a width is a word": (config_says(hidden_size="wide"), "hidden_size"),
    "a switch is a word": (config_says(plt_normalize_per_loop="no"), "plt_normalize_per_loop"),
    "a scale is a word": (config_says(plt_emb_scale="big"), "plt_emb_scale"),
    "no layers": (config_says(num_hidden_layers=0), "num_hidden_layers is 0"),
    "fewer layers than saved": (config_says(num_hidden_layers=2), r"model\.layers\.2\."),
    "no key heads": (config_says(num_key_value_heads=0), "num_key_value_heads"),
    "unknown activation": (config_says(hidden_act="nope"), "hidden_act"),
    "unknown scaling": (config_says(rope_scaling={"rope_type": "zigzag"}), "zigzag"),
    "base is a word": (config_says(rope_theta="big"), "rope_theta"),
    "base is zero": (config_says(rope_theta=0), "rope_theta"),
    "unknown type": (config_says(torch_dtype="float99"), "float99"),
    "padding outside": (config_says(pad_token_id=5000), "pad_token_id"),
    "half a position": (config_says(plt_window_size=[4.5, 0]), "plt_window_size"),
    "unknown mode": (config_says(plt_loop_mode="spiral"), "plt_loop_mode"),
    "heads do not divide": (config_says(num_key_value_heads=3), "num_key_value_heads"),
    "no weights": (removed(INDEX), "neither model.safetensors nor"),
    "index is not JSON": (bytes_of(INDEX, lambda b: b[:40]), "not a valid index"),
    "index has no map": (bytes_of(INDEX, lambda _: b"{}"), "not a valid index"),
    "index has an empty map": (bytes_of(INDEX, lambda _: b'{"weight_map": {}}'), "not a valid index"),
    "index maps to numbers": (bytes_of(INDEX, lambda _: b'{"weight_map": {"lm_head.weight": 3}}'), "not a valid index"),
    "missing shard": (removed(SHARD), "missing"),
    "shard cut short": (bytes_of(SHARD, lambda b: b[:-100]), "corrupt or cut short"),
    "shard's header cut": (bytes_of(SHARD, lambda b: b[:20]), "corrupt or cut short"),
    "shard is empty": (bytes_of(SHARD, lambda _: b""), "corrupt or cut short"),
    "shard is something else": (bytes_of(SHARD, lambda b: b"x" * len(b)), "corrupt or cut short"),
    "another width": (config_says(intermediate_size=128), r"do not fit.*_proj\.weight"),
    "another vocabulary": (config_says(vocab_size=300), r"do not fit.*embed_tokens|do not fit.*lm_head"),
    "a tensor of another shape": (
        tensors(lambda w: w.update({"model.norm.weight": torch.ones(9)})),
        "do not fit|shape",
    ),
    "a tensor too many": (tensors(lambda w: w.update({"model.extra.weight": torch.ones(9)})), r"model\.extra\.weight"),
    "a tensor is missing": (tensors(lambda w: w.pop("model.norm.weight")), r"missing.*model\.norm\.weight"),
    "a layer is missing": (config_says(num_hidden_layers=4), r"missing.*model\.layers\.3\."),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_line(tmp_path: Path, what: str) -> None:
    case = fixture(NAME)
    folder = write(tmp_path / "model", case.config, case.weights, 3)
    breaking, message = BROKEN[what]
    named = breaking(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert named in text or str(folder) in text
    assert str(folder) in text


@pytest.mark.parametrize("what", [w for w in BROKEN if "shard" in w])
def test_check_weights_names_the_shard(tmp_path: Path, what: str) -> None:
    case = fixture(NAME)
    folder = write(tmp_path / "model", case.config, case.weights, 3)
    BROKEN[what][0](folder)
    with pytest.raises(CheckpointError, match=SHARD):
        check_weights(folder)


def test_a_sound_checkpoint_passes(tmp_path: Path) -> None:
    """Control: what the broken ones are made from."""
    case = fixture(NAME)
    folder = write(tmp_path / "model", case.config, case.weights, 3)
    check_weights(folder)
    assert_same_state(state(load_model(folder)), case.weights)
