"""The in-process engine on real (tiny, random) checkpoints: text, batching, sampling, log-likelihoods, mistakes."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines.base import Decoding, GenerationRequest, LoglikelihoodRequest
from plt_eval.engines.hf import HFEngine, _SeededSampling
from plt_eval.errors import UserError
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.tokenizer import byte_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save(folder: Path, model: torch.nn.Module, template: str | None = None) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = PLTConfig(**SHAPE, plt_num_loops=2, plt_window_size=[6, 0], plt_hidden_scale=0.3)
    return save(tmp_path_factory.mktemp("plt"), PLTForCausalLM(config))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("chat"), PLTForCausalLM(PLTConfig(**SHAPE)), TEMPLATE)


@pytest.fixture
def open_engine() -> Iterator[Callable[..., HFEngine]]:
    opened: list[HFEngine] = []

    def build(model: Path, **options: object) -> HFEngine:
        opened.append(HFEngine(str(model), **({"device": "cpu", "notify": lambda _: None} | options)))
        return opened[-1]

    yield build
    for engine in opened:
        engine.close()


def requests(texts: list[str], decoding: Decoding | None = None, stop: tuple[str, ...] = ()) -> list[GenerationRequest]:
    decoding = decoding or Decoding(max_new_tokens=12)
    return [GenerationRequest(f"t{i}", Prompt(text, stop=stop), decoding) for i, text in enumerate(texts)]


def texts_of(engine: HFEngine, wanted: list[GenerationRequest]) -> dict[str, str]:
    return {completion.request_id: completion.text for completion in engine.generate(wanted)}


PROMPTS = ["def f(x):", "a", "class Longer:\n    pass", "é ü", "1 + 1 =", "import os"]


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
    sampler = _SeededSampling([f"1:{i}" for i in range(count)])
    scores = wanted.log().expand(count, -1)
    drawn = Counter(sampler(torch.empty(0), scores).argmax(-1).tolist())
    assert drawn[1] == 0
    for token, probability in enumerate(wanted.tolist()):
        spread = 4.5 * (count * probability * (1 - probability)) ** 0.5
        assert abs(drawn[token] - count * probability) <= spread


def test_beginning_of_text_is_never_doubled(chat_folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(chat_folder)
    chat = engine._encode(Prompt("x", messages=(Message("user", "hello"),)))
    assert engine.tokenizer.decode(chat) == "<s><user>hello<assistant>"
    plain = open_engine(chat_folder, chat_template="off")
    assert plain.tokenizer.decode(plain._encode(Prompt("<s>x", messages=(Message("user", "hello"),)))) == "<s>x"
    assert plain.tokenizer.decode(plain._encode(Prompt("x"))) == "<s>x"


def test_the_answer_continues_the_prefill(chat_folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(chat_folder)
    prompt = Prompt("x", messages=(Message("user", "hello"),), prefill="Sure:\n```python\n")
    assert engine.tokenizer.decode(engine._encode(prompt)) == "<s><user>hello<assistant>Sure:\n```python\n"
    (completion,) = engine.generate([GenerationRequest("a", prompt, Decoding(max_new_tokens=3))])
    assert completion.chat


def test_chat_template_decides_the_identity(chat_folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    on, off = open_engine(chat_folder), open_engine(chat_folder, chat_template="off")
    assert on.identity()["chat_template_sha256"] is not None
    assert off.identity()["chat_template_sha256"] is None


def test_loglikelihood_is_the_plain_model_s(tmp_path: Path, open_engine: Callable[..., HFEngine]) -> None:
    folder = save(tmp_path / "llama", LlamaForCausalLM(LlamaConfig(**SHAPE)))
    pairs = [("two plus two is", " four"), ("x = ", "1"), ("", "start"), ("a longer context than the others", "!")]
    engine = open_engine(folder, batch_size=3)
    asked = [LoglikelihoodRequest(f"q{i}", *pair) for i, pair in enumerate(pairs)]
    got = {answer.request_id: answer for answer in engine.loglikelihood(asked)}
    for request in asked:
        ids = engine.tokenizer(request.context + request.continuation)["input_ids"]
        spaces = len(request.context) - len(request.context.rstrip())
        count = len((request.context[len(request.context) - spaces :] + request.continuation).encode())
        with torch.no_grad():
            logprobs = engine.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = sum(float(logprobs[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids)))
        assert got[request.id].tokens == count
        assert got[request.id].logprob == pytest.approx(expected, abs=1e-4)


def test_greedy_flag_of_loglikelihood(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(folder)
    ids = engine.tokenizer("hello")["input_ids"]
    with torch.no_grad():
        best = engine.model(torch.tensor([ids])).logits[0, -1, 3:131].argmax() + 3
        engine.model.lm_head.weight[best] *= 3  # an ASCII byte, so that the text says it exactly
    text = engine.tokenizer.decode([int(best)])
    ask = [LoglikelihoodRequest("own", "hello", text), LoglikelihoodRequest("other", "hello", "\x00\x01")]
    got = {answer.request_id: answer.greedy for answer in engine.loglikelihood(ask)}
    assert got == {"own": True, "other": False}


def test_batch_halves_when_memory_runs_out(folder: Path) -> None:
    said: list[str] = []
    engine = HFEngine(str(folder), device="cpu", notify=said.append)
    real = engine._generate_batch

    def small_machine(jobs: list) -> list:
        if len(jobs) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return real(jobs)

    engine._generate_batch = small_machine  # type: ignore[method-assign]
    assert len(texts_of(engine, requests(PROMPTS))) == len(PROMPTS)
    assert any("going on with 3" in line for line in said)
    engine.fixed_batch, engine.batch_size = True, 4
    with pytest.raises(UserError, match="batch size 4"):
        texts_of(engine, requests(PROMPTS))


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
