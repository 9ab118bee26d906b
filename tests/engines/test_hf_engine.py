"""The in-process engine on real (tiny, random) checkpoints: text, batching, sampling, prompts, identity, mistakes."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_parts import PROMPTS, SHAPE, requests, save, texts_of

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines.base import Decoding, GenerationRequest
from plt_eval.engines.hf import HFEngine
from plt_eval.engines.hf_generate import SeededSampling
from plt_eval.engines.hf_prompts import Job
from plt_eval.errors import UserError
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.tokenizer import byte_tokenizer


def test_greedy_text_does_not_depend_on_the_batch(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    alone = texts_of(open_engine(folder, batch_size=1), requests(PROMPTS))
    together = texts_of(open_engine(folder, batch_size=6), requests(PROMPTS))
    assert alone == together
    assert len(alone) == len(PROMPTS)
    assert any(alone.values())


def test_greedy_text_is_what_the_model_prefers(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(folder)
    ids = engine.tokenizer(PROMPTS[0])["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < 12:
            token = int(engine.model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            if token == 2:
                break
            new.append(token)
    assert texts_of(engine, requests(PROMPTS[:1]))["t0"] == engine.tokenizer.decode(new, skip_special_tokens=True)


def test_loop_count_changes_the_text_and_the_identity(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    said: list[str] = []
    three = open_engine(folder, loops=3, notify=said.append)
    assert any("running 3 loops on a checkpoint made for 2" in line for line in said)
    two = open_engine(folder)
    assert (two.identity()["loops"], three.identity()["loops"]) == (2, 3)
    assert two.identity()["config_sha256"] != three.identity()["config_sha256"]
    assert texts_of(two, requests(PROMPTS)) != texts_of(three, requests(PROMPTS))


def test_stop_strings_end_the_text_and_are_left_out(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(folder)
    whole = texts_of(engine, requests(PROMPTS[:1], Decoding(max_new_tokens=30)))["t0"]
    stop = whole[3:5]
    assert stop
    first = whole.index(stop)
    (cut,) = engine.generate(requests(PROMPTS[:1], Decoding(max_new_tokens=30), stop=(stop,)))
    assert (cut.text, cut.finish_reason) == (whole[:first], "stop")
    assert cut.completion_tokens is not None
    assert cut.completion_tokens < 30


def test_sampling_depends_on_seed_and_request_alone(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    hot = Decoding(temperature=1.0, top_p=0.9, seed=5, max_new_tokens=10)
    first = texts_of(open_engine(folder, batch_size=2), requests(PROMPTS, hot))
    backwards = texts_of(open_engine(folder, batch_size=3), list(reversed(requests(PROMPTS, hot))))
    other = texts_of(open_engine(folder), requests(PROMPTS, Decoding(1.0, 0.9, 6, 10)))
    assert first == backwards
    assert first != other


def test_seeded_sampling_follows_the_distribution() -> None:
    wanted = torch.tensor([0.5, 0.0, 0.2, 0.3])
    count = 4000
    hot = Decoding(temperature=1.0, seed=1)
    sampler = SeededSampling([Job(str(i), [1], 1, (), chat=False, decoding=hot) for i in range(count)])
    scores = wanted.log().expand(count, -1)
    drawn = Counter(sampler(torch.empty(0), scores).argmax(-1).tolist())
    assert drawn[1] == 0
    for token, probability in enumerate(wanted.tolist()):
        spread = 4.5 * (count * probability * (1 - probability)) ** 0.5
        assert abs(drawn[token] - count * probability) <= spread


def test_beginning_of_text_is_never_doubled(chat_folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(chat_folder)
    chat = engine.prompts.encode(Prompt("x", messages=(Message("user", "hello"),)))
    assert engine.tokenizer.decode(chat) == "<s><user>hello<assistant>"
    plain = open_engine(chat_folder, chat_template="off")
    assert plain.tokenizer.decode(plain.prompts.encode(Prompt("<s>x", messages=(Message("user", "hello"),)))) == "<s>x"
    assert plain.tokenizer.decode(plain.prompts.encode(Prompt("x"))) == "<s>x"


def test_the_answer_continues_the_prefill(chat_folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(chat_folder)
    prompt = Prompt("x", messages=(Message("user", "hello"),), prefill="Sure:\n```python\n")
    assert engine.tokenizer.decode(engine.prompts.encode(prompt)) == "<s><user>hello<assistant>Sure:\n```python\n"
    (completion,) = engine.generate([GenerationRequest("a", prompt, Decoding(max_new_tokens=3))])
    assert completion.chat


def test_chat_template_decides_the_identity(chat_folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    on, off = open_engine(chat_folder), open_engine(chat_folder, chat_template="off")
    assert on.identity()["chat_template_sha256"] is not None
    assert off.identity()["chat_template_sha256"] is None


def _break_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("place", "label"),
    [
        ("tiny/r2/model", "tiny-r2"),  # of a training of several loop counts
        ("tiny-r2/model", "tiny-r2"),
        ("run/model", "run"),
        ("models", "models"),
        ("model/r2", "r2"),
        ("tiny/r2", "r2"),
    ],
)
def test_a_model_is_called_by_its_folder_or_by_its_training(
    folder: Path, tmp_path: Path, open_engine: Callable[..., HFEngine], place: str, label: str
) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, tmp_path / place)
    identity = open_engine(tmp_path / place).identity()
    assert identity == open_engine(folder).identity() | {"model": label}


def test_a_label_goes_before_the_folder_s_name(
    folder: Path, tmp_path: Path, open_engine: Callable[..., HFEngine]
) -> None:
    shutil.copytree(folder, tmp_path / "run" / "model")
    assert open_engine(tmp_path / "run" / "model", label="mine").identity()["model"] == "mine"


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    config = PLTForCausalLM(PLTConfig(**SHAPE))
    window, cut, bare = (save(tmp_path / name, config) for name in ("window", "cut", "bare"))
    _break_config(window, plt_window_size=[-3, 0])
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for file in bare.glob("tokenizer*"):
        file.unlink()
    cases = [
        (tmp_path / "nowhere", {}, "no such model folder"),
        (window, {}, "plt_window_size"),
        (cut, {}, "model.safetensors: corrupt"),
        (bare, {}, "--tokenizer bytes"),
        (folder, {"chat_template": "on"}, "no chat template"),
    ]
    for model, options, expected in cases:
        with pytest.raises(UserError, match=expected) as caught:
            HFEngine(str(model), device="cpu", **options)
        assert "\n" not in str(caught.value)


def test_byte_tokenizer_stands_in_for_a_missing_one(tmp_path: Path, open_engine: Callable[..., HFEngine]) -> None:
    bare = save(tmp_path / "bare", PLTForCausalLM(PLTConfig(**(SHAPE | {"vocab_size": 199}))))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    engine = open_engine(bare, tokenizer="bytes")
    assert len(texts_of(engine, requests(PROMPTS))) == len(PROMPTS)


@pytest.mark.parametrize("text", ["plain", "tabs\tand\nlines ", "é → 🙂", "\x00\x7f"])
def test_byte_tokenizer_round_trips(text: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, *(3 + byte for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
