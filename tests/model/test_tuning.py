"""Fine-tuning: loss on the answers alone, the loop count and the chat template stay, and a kill costs only time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from training_parts import SHAPE, assert_same_run, close, curve, in_two, losses, quiet, recorded, said
from transformers import AutoTokenizer

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines.base import Decoding, GenerationRequest
from plt_eval.engines.hf import HFEngine
from plt_model import PLTConfig
from plt_model.loading import CheckpointError, load_model
from plt_model.tokenizer import byte_tokenizer
from plt_model.training import checkpoints
from plt_model.training.instructions import CHAT_TEMPLATE, InstructionError
from plt_model.training.recipe import RecipeError, TuningRecipe, load_tuning_recipe
from plt_model.training.run import TrainResult, initial_model
from plt_model.training.trainer import PLTTrainer, TrainingError
from plt_model.training.tuning import tune

FIELDS: dict[str, Any] = {
    "name": "polish",
    "epochs": 2,
    "batch": 3,
    "max_length": 256,
    "optimizer": {"lr": 5e-3, "weight_decay": 0.0},
    "checkpoint": {"every": 2},
}
RECORDS: list[dict[str, Any]] = [
    {"prompt": "two and two: ", "completion": "four"},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]},
    {"prompt": "x", "completion": "a rather longer answer, of many bytes"},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "who?"},
            {"role": "assistant", "content": "me"},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "you"},
        ]
    },
    {"prompt": "the end of a long and winding question is ", "completion": "!"},
]
END = "</s>"
"""What ends an assistant's turn."""

STEPS = 4
"""2 passes over 5 records, 3 a step."""


def polish(**changes: Any) -> TuningRecipe:
    return TuningRecipe.model_validate({**FIELDS, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh model of three loops with its tokenizer, which has no chat template."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shape = {**SHAPE, "max_position_embeddings": 512}
    initial_model(PLTConfig(**shape, plt_num_loops=3), 0, byte_tokenizer()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def run(recipe: TuningRecipe, model: Path, data: Path, out: Path, **options: Any) -> TrainResult:
    return tune(recipe, model=model, data=[data], out=out, device="cpu", **{"console": quiet(), **options})


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> tuple[Path, list[list[int]]]:
    """A finished fine-tuning, and the rows that its model was given, padded as they came."""
    out = tmp_path_factory.mktemp("through") / "out"
    with recorded() as seen:
        run(polish(), model, data, out)
    return out, seen


def spelled(record: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """A record's tokens, and which of them are an answer's: put together piece by piece."""
    ids: list[int] = []
    answer: list[bool] = []

    def add(text: str, learn: bool) -> None:
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(new)
        answer.extend([learn] * len(new))

    if "prompt" in record:
        ids, answer = [tokenizer.bos_token_id], [False]
        add(record["prompt"], False)
        add(record["completion"], True)
        return [*ids, tokenizer.eos_token_id], [*answer, True]

    def rendered(turns: list[dict[str, str]], **options: bool) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options) if turns else ""

    turns = record["messages"]
    for i, turn in enumerate(turns):
        new = rendered(turns[: i + 1]).removeprefix(rendered(turns[:i]))
        if turn["role"] != "assistant":
            add(new, False)
            continue
        header = rendered(turns[:i], add_generation_prompt=True).removeprefix(rendered(turns[:i]))
        answered, rest = new.removeprefix(header).split(turn["content"])
        assert answered == ""
        add(header, False)
        add(turn["content"] + END, True)
        add(rest.removeprefix(END), False)
    return ids, answer


def unpadded(row: list[int]) -> list[int]:
    while row[-1] == 0:
        row = row[:-1]
    return row


def test_every_record_is_seen_once_a_pass(through: tuple[Path, list[list[int]]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(through[0] / "model")
    expected = sorted(spelled(record, tokenizer)[0] for record in RECORDS)
    rows = [unpadded(row) for row in through[1]]
    assert len(rows) == 3 * STEPS
    assert sorted(rows[:5]) == expected
    assert sorted(rows[5:10]) == expected
    assert rows[:5] != rows[5:10]


def test_the_loss_is_on_the_answers(through: tuple[Path, list[list[int]]], model: Path) -> None:
    """The first step's loss again: the mean over all answer tokens of its three records, each run by itself."""
    out, seen = through
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    by_ids = {tuple(ids): answer for ids, answer in (spelled(record, tokenizer) for record in RECORDS)}
    start = load_model(model, dtype=torch.float32)
    total, count = 0.0, 0
    for row in map(unpadded, seen[:3]):
        logits = start(torch.tensor([row])).logits[0].detach()
        for at, learn in enumerate(by_ids[tuple(row)]):
            if learn:
                total += float(cross_entropy(logits[at - 1], torch.tensor(row[at])))
                count += 1
    assert losses(out)[0] == pytest.approx(total / count, rel=1e-5)


def test_tokens_are_those_that_are_not_padding(through: tuple[Path, list[list[int]]]) -> None:
    out, seen = through
    lengths = [len(unpadded(row)) for row in seen]
    assert [row["tokens"] for row in curve(out)] == [sum(lengths[: 3 * (step + 1)]) for step in range(STEPS)]


def test_it_learns_and_keeps_its_loops(through: tuple[Path, list[list[int]]], model: Path) -> None:
    out, _ = through
    result = TrainResult.model_validate_json((out / "result.json").read_text())
    assert result.loops == 3
    assert load_model(out / "model").config.plt_num_loops == 3
    assert losses(out)[-1] < losses(out)[0]
    assert not torch.equal(
        load_model(out / "model", dtype=torch.float32).lm_head.weight,
        load_model(model, dtype=torch.float32).lm_head.weight,
    )


def test_the_chat_template_goes_with_it(through: tuple[Path, list[list[int]]], model: Path) -> None:
    """An engine given the folder alone renders a conversation as the training did."""
    folder = through[0] / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(model).chat_template is None
    assert tokenizer.chat_template == CHAT_TEMPLATE
    engine = HFEngine(folder, device="cpu")
    prompt = Prompt(text="", messages=(Message(role="user", content="hello"),))
    (completion,) = engine.generate([GenerationRequest("a", prompt, Decoding(max_new_tokens=4))])
    header = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_dict=False
    )
    assert completion.chat
    assert completion.prompt_tokens == len(header)
    assert spelled(RECORDS[1], tokenizer)[0][: len(header)] == header


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_weigh_every_answer_token_alike(
    tmp_path: Path, through: tuple[Path, list[list[int]]], model: Path, data: Path, micro: int
) -> None:
    """Records of different lengths: a mean of means would show."""
    if micro == 2:
        with pytest.raises(TrainingError, match="micro_batch is 2: expected a divisor of the 3 sequences"):
            run(polish(micro_batch=micro), model, data, tmp_path / "out")
        return
    run(polish(micro_batch=micro), model, data, tmp_path / "out")
    close(losses(tmp_path / "out"), losses(through[0]))
    assert [row["tokens"] for row in curve(tmp_path / "out")] == [row["tokens"] for row in curve(through[0])]


def tune_here(recipe: TuningRecipe, model: Path, data: Path, out: Path) -> None:
    tune(recipe, model=model, data=[data], out=out, device="cpu")


def test_two_processes_weigh_every_answer_token_alike(tmp_path: Path, model: Path, data: Path) -> None:
    """And count the tokens of both."""
    recipe = polish(batch=4, epochs=3)
    run(recipe, model, data, tmp_path / "one")
    in_two(tune_here, recipe, model, data, tmp_path / "two", log=tmp_path / "log")
    close(losses(tmp_path / "two"), losses(tmp_path / "one"), rel=1e-4)
    assert [row["tokens"] for row in curve(tmp_path / "two")] == [row["tokens"] for row in curve(tmp_path / "one")]


def test_stopped_and_gone_on(
    tmp_path: Path, through: tuple[Path, list[list[int]]], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        step = PLTTrainer.training_step

        def dying(self: PLTTrainer, *arguments: Any) -> Any:
            if self.state.global_step == 3:
                raise RuntimeError("pulled the plug")
            return step(self, *arguments)

        patch.setattr(PLTTrainer, "training_step", dying)
        with pytest.raises(RuntimeError, match="pulled"):
            run(polish(), model, data, out)
    assert [step for step, _ in checkpoints.checkpoints(out)] == [2]
    run(polish(), model, data, out)
    assert_same_run(out, through[0])


def test_what_is_complete_is_not_tuned_again(
    through: tuple[Path, list[list[int]]], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLTTrainer, "training_step", None)
    assert run(polish(), model, data, through[0]).model == through[0] / "model"
    with pytest.raises(TrainingError, match=r"holds another training \(recipe.batch is 3 there, 4 here\)"):
        run(polish(batch=4), model, data, through[0])
    with pytest.raises(TrainingError, match=r"holds another training \(recipe.seed is 0 there, 1 here\)"):
        run(polish(), model, data, through[0], seed=1)


def test_other_records_or_another_model_are_another_training(
    tmp_path: Path, through: tuple[Path, list[list[int]]], model: Path, data: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(RECORDS[0]))
    with pytest.raises(TrainingError, match=r"holds another training \(data is"):
        run(polish(), model, other, through[0])
    with pytest.raises(TrainingError, match=r"holds another training \((model|tokenizer) is"):
        run(polish(), through[0] / "model", data, through[0])


def test_a_loss_that_is_no_number_names_the_records(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PLTTrainer.training_step

    def poisoned(self: PLTTrainer, trained: Any, *arguments: Any) -> Any:
        if self.state.global_step == 2:
            trained.lm_head.weight.data[:] = torch.nan
        return step(self, trained, *arguments)

    monkeypatch.setattr(PLTTrainer, "training_step", poisoned)
    with pytest.raises(TrainingError) as caught:
        run(polish(), model, data, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("the loss is nan at step 3, on ")
    assert message.count(f"{data.name}:") == 3
    assert message.endswith(f"; the last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}")


def test_long_records_are_left_out_and_said(tmp_path: Path, model: Path, data: Path) -> None:
    console = quiet()
    run(polish(max_length=30), model, data, tmp_path / "out", console=console)
    assert "warning: records of more than 30 tokens, left out: " in said(console)


def test_a_tokenizer_of_too_many_tokens_is_refused(tmp_path: Path, model: Path, data: Path) -> None:
    """An id that the embedding does not have would end in a traceback, or worse."""
    folder = tmp_path / "tokenizer"
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(TrainingError, match=r"259.*260|260.*259"):
        run(polish(), model, data, tmp_path / "out", tokenizer=str(folder))
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(tmp_path: Path, model: Path, data: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare")
    for path in bare.glob("*token*"):
        path.unlink()
    with pytest.raises(TrainingError) as caught:
        run(polish(), bare, data, tmp_path / "out")
    assert str(caught.value).startswith(f"tokenizer {bare}: cannot be loaded")
    assert "\n" not in str(caught.value)
    result = run(polish(), bare, data, tmp_path / "out", tokenizer="bytes")
    assert AutoTokenizer.from_pretrained(result.model).chat_template == CHAT_TEMPLATE


def test_mistakes_are_one_line(tmp_path: Path, model: Path, data: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        run(polish(), tmp_path / "nowhere", data, tmp_path / "out")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    with pytest.raises(InstructionError, match=r"bad.jsonl:1"):
        run(polish(), model, bad, tmp_path / "out")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: a\noptimizer: {lr: 1}\nepoch: 3\n")
    with pytest.raises(RecipeError, match=r"epoch: no such field \(did you mean epochs\?\)"):
        load_tuning_recipe(recipe)


def test_plain_prompts_are_put_in_no_template(tmp_path: Path, model: Path) -> None:
    """A template that no record was put in would have the model asked as it was never trained."""
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(record) + "\n" for record in RECORDS if "prompt" in record))
    result = run(polish(), model, plain, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(result.model).chat_template is None
    with pytest.raises(TrainingError, match="recipe polish: chat_template has no effect: no record is a conversation"):
        run(polish(chat_template=CHAT_TEMPLATE), model, plain, tmp_path / "other")


def test_another_chat_template_is_another_training(tmp_path: Path, model: Path, data: Path) -> None:
    tokenizer = byte_tokenizer()
    for name, template in (
        ("one", CHAT_TEMPLATE),
        ("two", CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}:")),
    ):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    run(polish(), model, data, tmp_path / "out", tokenizer=str(tmp_path / "one"))
    with pytest.raises(TrainingError, match=r"holds another training \(tokenizer is"):
        run(polish(), model, data, tmp_path / "out", tokenizer=str(tmp_path / "two"))


def test_records_beyond_the_model_s_context_are_left_out_and_said(tmp_path: Path, model: Path) -> None:
    records = tmp_path / "long.jsonl"
    records.write_text("".join(json.dumps({"prompt": "x" * n, "completion": "y"}) + "\n" for n in (5, 600)))
    console = quiet()
    with recorded() as seen:
        run(polish(max_length=4096, batch=1), model, records, tmp_path / "out", console=console)
    assert max(map(len, seen)) < 600
    assert "max_length is 4096, but the model's context is 512 tokens" in said(console)
    assert "long.jsonl:2" in said(console)
