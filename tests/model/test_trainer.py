"""Training: models that differ in their loop count alone, whoever shares the work, and runs that end when they must."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from training_parts import (
    BATCH,
    LENGTH,
    SHAPE,
    STEPS,
    assert_same_run,
    close,
    curve,
    in_two,
    last_weights,
    logged,
    losses,
    quiet,
    recorded,
    run,
    said,
    small,
    train_and_record,
    train_here,
    write_data,
    write_source,
)

from plt_model.loading import load_model
from plt_model.tokenizer import byte_tokenizer
from plt_model.training import checkpoints
from plt_model.training.packing import Ingredient, WindowDataset
from plt_model.training.recipe import Recipe, RecipeError
from plt_model.training.run import TrainResult, initial_model, load_tokenizer, train
from plt_model.training.shards import ShardError, TokenData
from plt_model.training.trainer import PLTTrainer, TrainingError

LOOPS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, tuple[Path, list[list[int]]]]:
    """By loop count: the training's folder, and every window that the model was given."""
    folder, made = tmp_path_factory.mktemp("family"), {}
    for loops in LOOPS:
        with recorded() as seen:
            run(small(), data, folder / str(loops), loops)
        made[loops] = (folder / str(loops), seen)
    return made


def windows(data: Path, recipe: Recipe) -> list[list[int]]:
    """The windows that the recipe's order names, read from the data."""
    mix = [Ingredient(e.name, TokenData.open(data / e.name, "train"), e.weight) for e in recipe.data]
    rows = WindowDataset(mix, length=recipe.sequence_length, size=recipe.steps * recipe.batch, seed=recipe.seed)
    return [rows[i]["input_ids"].tolist() for i in range(len(rows))]


def sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


# --- matched ------------------------------------------------------------------------------------------


def test_initial_weights_do_not_depend_on_the_loops() -> None:
    first, *others = [dict(initial_model(small().config(loops), 5).named_parameters()) for loops in LOOPS]
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    another = dict(initial_model(small().config(2), 6).named_parameters())
    assert not torch.equal(another["lm_head.weight"], first["lm_head.weight"])
    assert all(weight.dtype == torch.float32 for weight in first.values())


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "query"])
def test_the_gates_begin_even(hidden: bool) -> None:
    recipe = small(model={**SHAPE, "plt_gate_use_hidden_states": hidden})
    model = initial_model(recipe.config(3), 0)
    out = model(torch.arange(3, 23)[None], output_loop_states=True)
    assert len(out.loop_gates) == 2
    assert all((gate == 0.5).all() for gate in out.loop_gates)


def test_initial_weights_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    initial_model(small().config(2), 7)
    assert torch.equal(torch.rand(4), expected)


def test_all_loop_counts_see_the_same_windows(family: dict[int, tuple[Path, list[list[int]]]], data: Path) -> None:
    """The very windows of the recipe's order, each once, and the labels of all are the tokens."""
    expected = windows(data, small())
    assert len(expected) == BATCH * STEPS
    for loops in LOOPS:
        assert family[loops][1] == expected


def test_all_loop_counts_have_the_same_rates_and_tokens(family: dict[int, tuple[Path, list[list[int]]]]) -> None:
    recipe = small()
    rates = [recipe.optimizer.lr * recipe.schedule.factor(step, STEPS) for step in range(STEPS)]
    for out, _ in family.values():
        rows = curve(out)
        assert [row["learning_rate"] for row in rows] == pytest.approx(rates, rel=1e-12)
        assert [row["tokens"] for row in rows] == [LENGTH * BATCH * (step + 1) for step in range(STEPS)]
    assert len({tuple(losses(out)) for out, _ in family.values()}) == len(LOOPS), "but they are not the same model"


def test_the_first_loss_is_the_model_s(family: dict[int, tuple[Path, list[list[int]]]]) -> None:
    """Computed again, position by position, from the initial weights and the first batch."""
    for loops, (out, seen) in family.items():
        model = initial_model(small().config(loops), 0)
        ids = torch.tensor(seen[:BATCH])
        logp = model(ids).logits[:, :-1].double().log_softmax(-1)
        expected = -logp.gather(-1, ids[:, 1:, None]).mean().detach()
        assert losses(out)[0] == pytest.approx(float(expected), rel=1e-6)


def test_the_steps_are_adamw_s(tmp_path: Path, data: Path) -> None:
    """Against torch's own AdamW in a plain loop: clipping, schedule, and no decay of norms and biases."""
    recipe = small(optimizer={"lr": 3e-2, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.5, "clip": 0.7})
    run(recipe, data, tmp_path / "out")
    model = initial_model(recipe.config(2), 0, byte_tokenizer())
    named = list(model.named_parameters())
    plain = [p for n, p in named if "norm" in n or n.endswith("bias")]
    other = [p for n, p in named if not ("norm" in n or n.endswith("bias"))]
    optimizer = torch.optim.AdamW(
        [{"params": other, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    order = windows(data, recipe)
    for step in range(STEPS):
        ids = torch.tensor(order[step * BATCH : (step + 1) * BATCH])
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * recipe.schedule.factor(step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    found = last_weights(tmp_path / "out")
    for name, parameter in named:
        torch.testing.assert_close(found[name], parameter.detach(), rtol=2e-4, atol=2e-5, msg=name)


def test_a_seed_is_another_training(tmp_path: Path, data: Path) -> None:
    with recorded() as one:
        result = run(small(tokens=128), data, tmp_path / "a", seed=7)
    with recorded() as other:
        run(small(tokens=128, seed=7), data, tmp_path / "b")
    assert one == other == windows(data, small(tokens=128, seed=7)) != windows(data, small(tokens=128))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert result.seed == 7


def test_checkpoints_do_not_grow_with_the_loops(family: dict[int, tuple[Path, list[list[int]]]]) -> None:
    """To the byte, but for the words of the JSON files; R = 1 has no moments for gates that it does not use."""
    found = {loops: sizes(checkpoints.checkpoints(out)[-1][1]) for loops, (out, _) in family.items()}
    heavy = {
        loops: {name: size for name, size in files.items() if not name.endswith(".json")}
        for loops, files in found.items()
    }
    assert heavy[2].keys() >= {"model.safetensors", "scheduler.pt"}
    assert heavy[2]["model.safetensors"] == heavy[3]["model.safetensors"] == heavy[4]["model.safetensors"]
    assert heavy[1]["model.safetensors"] == heavy[2]["model.safetensors"]
    total = {loops: sum(files.values()) for loops, files in found.items()}
    assert max(abs(total[loops] - total[2]) for loops in (3, 4)) < 200
    assert total[1] <= total[2] + 200
    parameters = sum(p.numel() for p in initial_model(small().config(2), 0).parameters())
    optimizer = sum(size for name, size in heavy[2].items() if name.startswith("optimizer"))
    assert optimizer > 8 * parameters, "two float32 moments a parameter"


def test_the_model_to_ship(family: dict[int, tuple[Path, list[list[int]]]]) -> None:
    """Loads as a model with its tokenizer, at the loop count that it was trained at, in the type that was asked for."""
    out, seen = family[3]
    model = load_model(out / "model")
    assert model.config.plt_num_loops == 3
    for name, weight in last_weights(out).items():
        assert torch.equal(dict(model.named_parameters())[name].float(), weight.bfloat16().float())
    with safe_open(out / "model" / "model.safetensors", framework="pt") as opened:
        assert {str(opened.get_slice(key).get_dtype()) for key in opened.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = load_tokenizer(str(out / "model"))
    assert tokenizer.decode(tokenizer("def f():")["input_ids"], skip_special_tokens=True) == "def f():"
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)
    loss = float(model.float()(torch.tensor(seen[:4]), labels=torch.tensor(seen[:4])).loss.detach())
    assert loss < losses(out)[0]


def test_the_result(family: dict[int, tuple[Path, list[list[int]]]]) -> None:
    out, _ = family[4]
    result = TrainResult.model_validate_json((out / "result.json").read_text())
    assert (result.loops, result.steps, result.tokens) == (4, STEPS, STEPS * BATCH * LENGTH)
    assert result.loss == pytest.approx(sum(losses(out)) / STEPS)
    assert result.parameters == sum(weight.numel() for weight in last_weights(out).values())
    assert result.model == Path("model"), "the folder can be moved"
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert 0 < result.step_seconds < result.seconds
    assert 50 * 2**20 < result.peak_memory_bytes < 2**35


# --- what does not matter -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"micro_batch": 1}, {"micro_batch": 2}, {"gradient_checkpointing": True}],
    ids=["micro 1", "micro 2", "checkpointing"],
)
def test_how_it_is_computed_does_not_matter(
    tmp_path: Path, data: Path, family: dict[int, tuple[Path, list[list[int]]]], change: dict[str, Any]
) -> None:
    through, order = family[2]
    with recorded() as seen:
        run(small(**change), data, tmp_path / "out")
    assert seen == order
    close(losses(tmp_path / "out"), losses(through))
    assert [row["tokens"] for row in curve(tmp_path / "out")] == [row["tokens"] for row in curve(through)]


@pytest.mark.parametrize("loops", [1, 4])
def test_bf16(tmp_path: Path, data: Path, family: dict[int, tuple[Path, list[list[int]]]], loops: int) -> None:
    """Weights and moments stay float32; the losses are near, and not the same."""
    run(small(precision="bf16", gradient_checkpointing=True), data, tmp_path / "out", loops)
    close(losses(tmp_path / "out"), losses(family[loops][0]), rel=0.01)
    assert losses(tmp_path / "out") != losses(family[loops][0])
    assert {weight.dtype for weight in last_weights(tmp_path / "out").values()} == {torch.float32}


def test_float32_may_be_shipped(tmp_path: Path, data: Path) -> None:
    run(small(save_dtype="float32", tokens=128), data, tmp_path / "out")
    model = dict(load_model(tmp_path / "out" / "model", dtype=torch.float32).named_parameters())
    assert all(torch.equal(model[name], weight) for name, weight in last_weights(tmp_path / "out").items())


# --- two processes ------------------------------------------------------------------------------------

SHARED = {"float32": {}, "checkpointing": {"gradient_checkpointing": True}}


@pytest.mark.parametrize("fsdp", [True, False], ids=["fsdp", "ddp"])
@pytest.mark.parametrize("change", SHARED.values(), ids=SHARED.keys())
def test_two_processes_train_the_same_model(
    tmp_path: Path,
    data: Path,
    family: dict[int, tuple[Path, list[list[int]]]],
    change: dict[str, Any],
    fsdp: bool,
) -> None:
    """Step by step the same windows, half each, and the same curve; the result is a model like any other."""
    through, order = family[2]
    out, log = tmp_path / "out", tmp_path / "log"
    in_two(train_and_record, small(**change), data, out, tmp_path / "seen", 2, fsdp, log=log)
    close(losses(out), losses(through))
    close([row["grad_norm"] for row in curve(out)], [row["grad_norm"] for row in curve(through)], rel=1e-4)
    assert [row["tokens"] for row in curve(out)] == [row["tokens"] for row in curve(through)]
    halves = [json.loads(Path(f"{tmp_path / 'seen'}.{rank}").read_text()) for rank in (0, 1)]
    share = BATCH // 2
    for step in range(STEPS):
        together = [row for half in halves for row in half[step * share : (step + 1) * share]]
        assert sorted(together) == sorted(order[step * BATCH : (step + 1) * BATCH])
    expected = last_weights(through)
    for name, weight in last_weights(out).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    model = load_model(out / "model")
    assert sum(p.numel() for p in model.parameters()) == json.loads((out / "result.json").read_text())["parameters"]


def stop_at(step: int, recipe: Recipe, data: Path, out: Path, fsdp: bool) -> None:
    """The target of a process that dies after the checkpoint of `step`, in the step after."""
    training_step = PLTTrainer.training_step

    def dying(self: PLTTrainer, *arguments: Any) -> Tensor:
        if self.state.global_step > step:
            raise SystemExit(0)
        return training_step(self, *arguments)

    PLTTrainer.training_step = dying  # type: ignore[method-assign]
    train_here(recipe, data, out, 2, fsdp)


def test_a_checkpoint_goes_on_with_any_number_of_processes(
    tmp_path: Path, data: Path, family: dict[int, tuple[Path, list[list[int]]]]
) -> None:
    """Sharded over two up to step 4, by one up to 6, then by two again."""
    through, _ = family[2]
    recipe, out, log = small(), tmp_path / "out", tmp_path / "log"
    in_two(stop_at, 4, recipe, data, out, True, log=log)
    assert [step for step, _ in checkpoints.checkpoints(out)] == [2, 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLTTrainer, "training_step", PLTTrainer.training_step)
        with pytest.raises(SystemExit):
            stop_at(6, recipe, data, out, False)
    assert [step for step, _ in checkpoints.checkpoints(out)] == [4, 6]
    in_two(train_here, recipe, data, out, 2, True, log=log)
    close(losses(out), losses(through))
    assert [row["step"] for row in curve(out)] == list(range(1, STEPS + 1))


def test_muon_goes_on_bitwise_and_in_two_processes(tmp_path: Path, data: Path) -> None:
    recipe = small(optimizer={"kind": "muon", "lr": 1e-2})
    run(recipe, data, tmp_path / "through")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLTTrainer, "training_step", PLTTrainer.training_step)
        with pytest.raises(SystemExit):
            stop_at(4, recipe, data, tmp_path / "out", False)
    run(recipe, data, tmp_path / "out")
    assert_same_run(tmp_path / "out", tmp_path / "through")
    in_two(train_here, recipe, data, tmp_path / "two", 2, False, log=tmp_path / "log")
    close(losses(tmp_path / "two"), losses(tmp_path / "through"), rel=1e-4)


# --- not a number -------------------------------------------------------------------------------------


def refused(recipe: Recipe, data: Path, out: Path, **options: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        run(recipe, data, out, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def named_windows(data: Path, recipe: Recipe, step: int) -> list[str]:
    mix = [Ingredient(e.name, TokenData.open(data / e.name, "train"), e.weight) for e in recipe.data]
    rows = WindowDataset(mix, length=LENGTH, size=BATCH * STEPS, seed=recipe.seed)
    return [rows.describe(i) for i in range((step - 1) * BATCH, step * BATCH)]


def all_finite(out: Path) -> bool:
    for _, folder in checkpoints.checkpoints(out):
        assert checkpoints.fault(folder) is None
    weights = [w for _, f in checkpoints.checkpoints(out) for w in _weights(f).values()]
    return all(torch.isfinite(weight).all() for weight in weights)


def _weights(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def poison(patch: pytest.MonkeyPatch, step: int, do: Callable[[Any], None]) -> None:
    """`do(model)` before the pass of `step`, counted from 1."""
    training_step = PLTTrainer.training_step

    def poisoned(self: PLTTrainer, model: Any, *arguments: Any) -> Tensor:
        if self.state.global_step == step - 1:
            do(model)
        return training_step(self, model, *arguments)

    patch.setattr(PLTTrainer, "training_step", poisoned)


def set_nan(model: Any) -> None:
    model.lm_head.weight.data[7, 3] = math.nan


def inflate_gradient(model: Any) -> None:
    model.lm_head.weight.register_hook(lambda grad: grad + math.inf)


@pytest.mark.parametrize(
    ("do", "what"), [(set_nan, "the loss is nan"), (inflate_gradient, "the gradient's norm is inf")], ids=["nan", "inf"]
)
@pytest.mark.parametrize("micro", [None, 2], ids=["whole", "micro 2"])
def test_a_number_that_is_none_ends_it(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    do: Callable[[Any], None],
    what: str,
    micro: int | None,
) -> None:
    poison(monkeypatch, 6, do)
    recipe, out = small(micro_batch=micro), tmp_path / "out"
    message = refused(recipe, data, out)
    assert message.startswith(f"{what} at step 6, on ")
    assert f"; the last good checkpoint is {out / 'checkpoint-4'}" in message
    names = named_windows(data, recipe, 6)
    listed = message.split(", on ")[1].split(";")[0].split(", ")
    assert listed == (names[:2] if micro and do is set_nan else names)
    assert logged(out) == 5
    assert all_finite(out)


def test_before_any_checkpoint_it_says_so(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1, set_nan)
    assert refused(small(), data, tmp_path / "out").endswith("; there is no checkpoint yet")


def test_a_huge_rate_ends_it(tmp_path: Path, data: Path) -> None:
    recipe = small(optimizer={"lr": 1e5}, schedule={"decay": "constant", "warmup": 0}, checkpoint={"every": 1})
    out = tmp_path / "out"
    message = refused(recipe, data, out)
    step = logged(out) + 1
    assert f" is nan at step {step}, on {', '.join(named_windows(data, recipe, step))}; the last good" in message
    assert message.endswith(f"checkpoint is {out / f'checkpoint-{step - 1}'}")
    assert all_finite(out)


@pytest.fixture
def _reckless_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every optimizer step ends with a weight that overflowed."""
    step = torch.optim.AdamW.step

    def reckless(self: Any, *arguments: Any) -> Any:
        done = step(self, *arguments)
        self.param_groups[0]["params"][0].data.view(-1)[5] = -math.inf
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", reckless)


@pytest.mark.usefixtures("_reckless_steps")
@pytest.mark.parametrize(("every", "steps", "fails"), [(1, STEPS, 1), (2, STEPS, 2), (100, 1, 1)])
def test_a_step_that_throws_the_weights_away(tmp_path: Path, data: Path, every: int, steps: int, fails: int) -> None:
    """No checkpoint holds them, though no loss has seen them yet; after the last step as well."""
    recipe, out = small(tokens=LENGTH * BATCH * steps, checkpoint={"every": every}), tmp_path / "out"
    message = refused(recipe, data, out)
    assert f"at step {fails}, on {', '.join(named_windows(data, recipe, fails))}" in message
    assert message.endswith("; there is no checkpoint yet")
    assert "-inf" in message or "nan" in message
    assert checkpoints.checkpoints(out) == []
    assert not (out / "model").exists()


# --- the folder ---------------------------------------------------------------------------------------


def test_what_is_complete_is_not_trained_again(
    data: Path, family: dict[int, tuple[Path, list[list[int]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = family[2]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def never(*_: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(PLTTrainer, "training_step", never)
    result = run(small(description="other words"), data, out)
    assert result.model == out / "model"
    assert result.loss == pytest.approx(sum(losses(out)) / STEPS)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "options", "difference"),
    [
        ({}, {"loops": 3}, "loops is 2 there, 3 here"),
        ({}, {"seed": 4}, "recipe.seed is 0 there, 4 here"),
        ({"optimizer": {"lr": 0.5}}, {}, "recipe.optimizer.lr is 0.01 there, 0.5 here"),
        ({"model": {**SHAPE, "rope_theta": 7}}, {}, "recipe.model.rope_theta is null there, 7 here"),
        ({"tokens": 6400}, {}, "recipe.tokens is 576 there, 6400 here"),
    ],
    ids=["loops", "seed", "optimizer", "model", "tokens"],
)
def test_another_training_s_folder_is_refused(
    data: Path,
    family: dict[int, tuple[Path, list[list[int]]]],
    change: dict[str, Any],
    options: dict[str, Any],
    difference: str,
) -> None:
    out, _ = family[2]
    expected = f"--out {out} holds another training ({difference}): choose a new folder"
    assert refused(small(**change), data, out, **options) == expected


def test_other_data_are_another_training(
    tmp_path: Path, data: Path, family: dict[int, tuple[Path, list[list[int]]]]
) -> None:
    other = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(other / "b")
    write_source(other / "b", 2005, seed=9)
    assert "holds another training (data.b" in refused(small(), other, family[2][0])


def test_a_foreign_folder_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    message = refused(small(), data, tmp_path)
    assert message == f"--out {tmp_path}: not empty, and no training is in it: choose a new folder"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_out_that_is_a_file_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises((TrainingError, OSError), match="out"):
        run(small(), data, tmp_path / "out")


def test_a_damaged_request_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    assert refused(small(), data, tmp_path).startswith(f"{tmp_path / 'run.json'}: damaged")


# --- mistakes -----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown reporter": ({}, {"report_to": ["wandbb"]}, "--report-to wandbb: expected one of trackio, wandb, tensorb"),
    "one process sharded": ({}, {"fsdp": True}, "--fsdp shards over processes: start it with torchrun"),
    "micro batch": ({"micro_batch": 3}, {}, "micro_batch is 3: expected a divisor of the 4 sequences"),
    "small vocabulary": ({"model": {**SHAPE, "vocab_size": 258}}, {}, "model.vocab_size is 258: expected at least"),
    "no tokenizer": ({"tokenizer": "nowhere"}, {}, "tokenizer nowhere: no such folder"),
    "long windows": (
        {"sequence_length": 160, "batch_tokens": 160, "model": {**SHAPE, "max_position_embeddings": 160}},
        {},
        "data a: found 301 training tokens, expected at least 320 (two windows)",
    ),
    "beyond the positions": (
        {"sequence_length": 128, "batch_tokens": 128},
        {},
        "sequence_length is 128: expected at most model.max_position_embeddings (64)",
    ),
}


@pytest.mark.parametrize(("change", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_mistake_is_one_line(
    tmp_path: Path, data: Path, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TrainingError, RecipeError)) as caught:
        run(small(**change), data, tmp_path / "out", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "a refused training leaves nothing"


def test_a_reporter_that_is_not_installed(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = refused(small(), data, tmp_path / "out", report_to=["wandb"])
    assert message == "--report-to wandb: the package is not installed: pip install wandb"


def test_data_of_another_tokenizer_are_refused(tmp_path: Path, data: Path) -> None:
    """Though every id has an embedding."""
    shutil.copytree(data / "a", tmp_path / "a")
    write_source(tmp_path / "b", 400, vocab=258)
    message = refused(small(), tmp_path, tmp_path / "out")
    assert message == (
        f"{tmp_path / 'b'}: made with another tokenizer, of 258 ids (beginning 1, end 2); "
        "the recipe's has 259 ids (beginning 1, end 2)"
    )


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=f"{tmp_path / 'a'} holds no token data"):
        run(small(), tmp_path, tmp_path / "out")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, data: Path, family: dict[int, tuple[Path, list[list[int]]]]) -> None:
    result = train(small(), loops=2, data=data, out=tmp_path / "out", device="cuda", console=quiet())
    close(losses(tmp_path / "out"), losses(family[2][0]), rel=1e-3)
    assert result.device != "cpu"


def test_no_cuda_is_said(tmp_path: Path, data: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(TrainingError, match=r"^--device cuda: torch finds no CUDA device here$"):
        train(small(), loops=2, data=data, out=tmp_path / "out", device="cuda", console=quiet())


def test_tensorboard(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run(small(tokens=128), data, tmp_path / "out", report_to=["tensorboard"])
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_it_says_how_far_it_is(tmp_path: Path, data: Path) -> None:
    console = quiet()
    run(small(tokens=128), data, tmp_path / "out", console=console)
    assert said(console).startswith("small, 2 loops: step 1/2, loss 5.")
    assert said(console).count("\n") == 1, "a line now and then, not one a step"
