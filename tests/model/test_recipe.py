"""Recipes: what they hold, what they refuse and how, the schedule, and the paper's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from training_parts import BATCH, FIELDS, LENGTH, SHAPE, STEPS, small, write_recipe

from plt_model import PLTForCausalLM
from plt_model.training.recipe import (
    Recipe,
    RecipeError,
    Schedule,
    TuningRecipe,
    bundled_recipes,
    load_recipe,
    load_tuning_recipe,
)

PAPER = "loopcoder-v2-7b"


def refusal(path: Path) -> str:
    """The one line by which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path).config(2)
    message = str(caught.value)
    assert "\n" not in message
    assert "http" not in message
    return message


# --- mistakes -----------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown field": ({"token": 5}, ("token", "no such field", "did you mean tokens?")),
    "unknown field with no neighbour": ({"zzz": 5}, ("zzz", "no such field")),
    "unknown inner field": ({"optimizer": {"lr": 0.1, "weight_decy": 1}}, ("optimizer.weight_decy", "weight_decay?")),
    "unknown schedule field": ({"schedule": {"warm_up": 0.1}}, ("schedule.warm_up", "warmup?")),
    "unknown data field": ({"data": [{"name": "a", "wieght": 2}]}, ("data.0.wieght", "weight?")),
    "wrong type": ({"sequence_length": "long"}, ("sequence_length", "integer", "'long'")),
    "wrong inner type": ({"optimizer": {"lr": "fast"}}, ("optimizer.lr", "number", "'fast'")),
    "wrong choice": ({"precision": "fp8"}, ("precision", "'float32' or 'bf16'", "'fp8'")),
    "no data": ({"data": []}, ("data", "at least 1", "[]")),
    "same name twice": ({"data": [{"name": "a"}, {"name": "a"}]}, ("data", "same name", "a")),
    "a name that is a path": ({"data": [{"name": "../a"}]}, ("data.0.name", "'../a'")),
    "weight 0": ({"data": [{"name": "a", "weight": 0}]}, ("data.0.weight", "greater than 0", "found 0")),
    "weight nan": ({"data": [{"name": "a", "weight": math.nan}]}, ("data.0.weight", "nan")),
    "lr nan": ({"optimizer": {"lr": math.nan}}, ("optimizer.lr", "nan")),
    "eps inf": ({"optimizer": {"lr": 1, "eps": math.inf}}, ("optimizer.eps", "inf")),
    "clip nan": ({"optimizer": {"lr": 1, "clip": math.nan}}, ("optimizer.clip", "nan")),
    "beta 1": ({"optimizer": {"lr": 1, "betas": [0.9, 1.0]}}, ("optimizer.betas.1", "found 1.0")),
    "three betas": ({"optimizer": {"lr": 1, "betas": [0.9, 0.9, 0.9]}}, ("optimizer.betas",)),
    "fewer tokens than a batch": ({"tokens": 63}, ("tokens is 63", "at least batch_tokens (64)")),
    "crooked batch": ({"batch_tokens": 65}, ("batch_tokens is 65", "multiple of sequence_length (16)")),
    "loops": ({"model": {**SHAPE, "plt_num_loops": 2}}, ("model.plt_num_loops", "--loops")),
    "unknown model field": ({"model": {**SHAPE, "hiden_size": 2}}, ("model.hiden_size", "did you mean hidden_size?")),
    "bad model value": ({"model": {**SHAPE, "head_dim": 7}}, ("head_dim is 7", "even")),
    "bad model type": ({"model": {**SHAPE, "hidden_size": "x"}}, ("hidden_size", "int")),
    "bad theta": ({"model": {**SHAPE, "rope_theta": "high"}}, ("rope_theta", "high")),
    "logs that miss checkpoints": (
        {"log_every": 4, "checkpoint": {"every": 6}},
        ("checkpoint.every is 6", "multiple of log_every (4)"),
    ),
    "one checkpoint": ({"checkpoint": {"keep": 1}}, ("checkpoint.keep", "equal to 2", "found 1")),
    "negative seed": ({"seed": -1}, ("seed", "found -1")),
    "true for a number": ({"seed": True}, ("seed", "True")),
    "micro batch 0": ({"micro_batch": 0}, ("micro_batch", "found 0")),
}


@pytest.mark.parametrize(("change", "parts"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(tmp_path: Path, change: dict[str, Any], parts: tuple[str, ...]) -> None:
    path = write_recipe(tmp_path / "mine.yaml", **change)
    message = refusal(path)
    for part in parts:
        assert part in message
    if "model" not in change or "loops" in message:
        assert message.startswith(f"{path}: "), "the file is named"


@pytest.mark.parametrize("field", ["name", "model", "data", "sequence_length", "tokens", "batch_tokens", "optimizer"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in FIELDS.items() if key != field}))
    assert refusal(path) == f"{path}: {field}: missing"


@pytest.mark.parametrize(
    ("text", "part"),
    [("a: [", "not valid YAML"), ("- a", "found list"), ("", "found NoneType"), ("\x00", "not valid YAML")],
    ids=["broken", "a list", "empty", "binary"],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert part in refusal(path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff")
    assert "not valid YAML" in refusal(path)


def test_an_unknown_recipe_names_its_neighbour() -> None:
    with pytest.raises(RecipeError, match=r"--recipe quik: .*did you mean quick\?.*bundled: .*plt-tiny"):
        load_recipe("quik")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path)


def test_a_tuning_recipe_is_not_a_recipe_nor_the_other_way() -> None:
    with pytest.raises(RecipeError, match=r"^sft: "):
        load_recipe("sft")
    with pytest.raises(RecipeError, match=r"^quick: "):
        load_tuning_recipe("quick")


# --- what is there ------------------------------------------------------------------------------------


def test_the_numbers_of_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "mine.yaml"))
    assert (recipe.batch, recipe.steps) == (BATCH, STEPS)
    assert small(tokens=LENGTH * BATCH * STEPS + 63).steps == STEPS, "what does not fill a batch is left"
    assert recipe == small()
    assert recipe.digest() == small(description="other words").digest()
    assert recipe.digest() != small(seed=1).digest()


def test_floats_may_be_spelled_as_yaml_misreads_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 4e-4 as text."""
    path = write_recipe(tmp_path / "mine.yaml")
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 4e-4"))
    assert load_recipe(path).optimizer.lr == 4e-4


@pytest.mark.parametrize("loops", [1, 2, 3, 4])
@pytest.mark.parametrize("name", sorted(set(bundled_recipes()) - {"sft"}))
def test_every_bundled_recipe_builds(name: str, loops: int) -> None:
    recipe = load_recipe(name)
    config = recipe.config(loops)
    assert config.plt_num_loops == loops
    assert recipe.name == name
    for key, value in recipe.model.items():
        found = config.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(config, key)
        assert found == value, key
    assert config.max_position_embeddings >= recipe.sequence_length


def test_the_bundled_tuning_recipe() -> None:
    recipe = load_tuning_recipe("sft")
    assert isinstance(recipe, TuningRecipe)
    assert recipe.name == "sft"


def test_loops_are_all_that_differs() -> None:
    recipe = small()
    first, *others = [recipe.config(loops).to_dict() for loops in (1, 2, 3, 4)]
    for other in others:
        assert {key for key in first if first[key] != other[key]} == {"plt_num_loops"}


@pytest.mark.parametrize("loops", [0, -1])
def test_no_loops_are_refused(loops: int) -> None:
    with pytest.raises(RecipeError, match=rf"plt_num_loops.*{loops}"):
        small().config(loops)


# --- the paper's --------------------------------------------------------------------------------------


def test_the_paper_s_model() -> None:
    config = load_recipe(PAPER).config(2)
    stated = {
        "num_hidden_layers": 14,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 27648,
        "rms_norm_eps": 1e-5,
        "vocab_size": 76800,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "window": 64,
    }
    assert {key: getattr(config, key) for key in stated} == stated
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_the_paper_s_optimizer() -> None:
    recipe = load_recipe(PAPER)
    stated = {
        "kind": "adamw",
        "lr": 4e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-15,
        "weight_decay": 0.1,
        "clip": 1.0,
    }
    assert {key: getattr(recipe.optimizer, key) for key in stated} == stated
    assert recipe.schedule.model_dump() == {"warmup": 0.05, "decay": "cosine", "final": 0.0}
    assert recipe.precision == "bf16"
    assert recipe.gradient_checkpointing
    shares = {entry.name: entry.weight for entry in recipe.data}
    assert shares.keys() == {"text", "code"}
    assert shares["text"] == shares["code"]


@pytest.mark.parametrize("loops", [1, 2])
def test_the_paper_s_size(loops: int) -> None:
    with torch.device("meta"):
        model = PLTForCausalLM(load_recipe(PAPER).config(loops))
    hidden, wide, narrow, inner, layers = 5120, 40 * 128, 8 * 128, 27648, 14
    layer = hidden * (2 * wide + 2 * narrow + 3 * inner) + 2 * hidden
    gates = layers * (40 * hidden + 40 + hidden)
    expected = 2 * 76800 * hidden + layers * layer + hidden + gates
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == expected
    assert 7e9 < found < 8e9


# --- the schedule -------------------------------------------------------------------------------------


def expected_factor(step: int, steps: int, warmup: float, decay: str, final: float) -> float:
    """Written down again: up in a line to 1 at the last warm-up step, then down to `final` at `steps`."""
    warm = math.ceil(warmup * steps)
    if step + 1 <= warm:
        return (step + 1) / warm
    along = (step - warm) / (steps - warm)
    if decay == "constant":
        return 1.0
    if decay == "linear":
        return 1.0 + (final - 1.0) * along
    return final + (1.0 - final) * math.cos(math.pi * along / 2) ** 2


@given(
    steps=st.integers(1, 3000),
    warmup=st.floats(0, 1),
    decay=st.sampled_from(["cosine", "linear", "constant"]),
    final=st.floats(0, 1),
    data=st.data(),
)
def test_the_schedule(steps: int, warmup: float, decay: str, final: float, data: st.DataObject) -> None:
    schedule = Schedule(warmup=warmup, decay=decay, final=final)  # type: ignore[arg-type]
    step = data.draw(st.integers(0, steps - 1))
    found = schedule.factor(step, steps)
    assert found == pytest.approx(expected_factor(step, steps, warmup, decay, final), abs=1e-12)
    assert 0 < found <= 1 or (decay != "constant" and final == 0)
    # transformers asks once more after the last step.
    assert 0 <= schedule.factor(steps, steps) <= 1


def test_the_schedule_begins_and_ends_where_it_says() -> None:
    schedule = Schedule(warmup=0.1, decay="cosine", final=0.25)
    assert [schedule.factor(i, 100) for i in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert schedule.factor(100, 100) == pytest.approx(0.25)
    assert schedule.factor(55, 100) == pytest.approx((1 + 0.25) / 2)


def test_a_recipe_cannot_be_changed_by_mistake() -> None:
    recipe: Recipe = small()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
