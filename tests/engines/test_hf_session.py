"""The session decoder: the default where it can run, the text of generate(), each completion when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_parts import PROMPTS, SHAPE, requests, save, texts_of
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from plt_benchmarks.protocols import Message, Prompt, Sandbox
from plt_benchmarks.registry import get_suite
from plt_eval.engines import hf_session
from plt_eval.engines.base import Completion, Decoding, GenerationRequest
from plt_eval.engines.hf import HFEngine
from plt_eval.errors import UserError
from plt_eval.runner import RunInterrupted, Settings, run
from plt_eval.store import Run, list_runs
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.decode.session import DecodeSession
from plt_model.decode.step import DecodeStep

GREEDY, HOT = Decoding(), Decoding(temperature=1.3, top_p=0.8, seed=7)
QUIET = Console(quiet=True)
OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


def mixed(decoding: Decoding, stops: tuple[str, ...] = (), *, chat: bool = False) -> list[GenerationRequest]:
    """Limits and stop strings differ from request to request."""
    made = []
    for i, text in enumerate([*PROMPTS, "the same", "the same"]):
        prompt = Prompt(
            text,
            messages=(Message("user", text),) if chat else (),
            prefill="```\n" if chat and i % 2 else "",
            stop=stops if i % 2 and not chat else (),
            chat_stop=stops if i % 2 else (),
            max_new_tokens=3 + 7 * i,
        )
        made.append(GenerationRequest(f"p/{i}#0", prompt, decoding))
    return made


def drawn(engine: HFEngine, wanted: list[GenerationRequest]) -> dict[str, tuple[object, ...]]:
    return {
        c.request_id: (c.text, c.finish_reason, c.chat, c.prompt_tokens, c.completion_tokens)
        for c in engine.generate(wanted)
    }


@pytest.mark.parametrize("decoding", [GREEDY, HOT], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
@pytest.mark.parametrize("loops", [1, 2, 3])
def test_the_text_is_that_of_generate(
    chat_folder: Path, open_engine: Callable[..., HFEngine], loops: int, chat: bool, decoding: Decoding
) -> None:
    options: dict[str, Any] = {"loops": loops, "batch_size": 3}
    session = open_engine(chat_folder, **options)
    generate = open_engine(chat_folder, **options, decoder="generate")
    assert (session.facts()["decoder"], generate.facts()["decoder"]) == ("session", "generate")
    for engine in (session, generate):
        engine.prompts.eos = tuple(range(2, 259, 12))  # some rows are to end by themselves
    whole = drawn(generate, mixed(decoding, chat=chat))
    assert {reason for _, reason, *_ in whole.values()} == {"stop", "length"}
    assert drawn(session, mixed(decoding, chat=chat)) == whole
    texts = [str(whole[f"p/{i}#0"][0]) for i in (3, 5, 7)]
    stops = tuple(text[len(text) // 2 :][:2] for text in texts if text)
    cut = drawn(generate, mixed(decoding, stops, chat=chat))
    assert cut != whole
    assert drawn(session, mixed(decoding, stops, chat=chat)) == cut


def test_the_session_is_what_runs_by_default(
    folder: Path, open_engine: Callable[..., HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("generate() was called")

    said: list[str] = []
    monkeypatch.setattr(PLTForCausalLM, "generate", refuse)
    engine = open_engine(folder, notify=said.append)
    assert said == []
    first = texts_of(engine, requests(PROMPTS))
    assert texts_of(engine, requests(PROMPTS)) == first
    assert said == [f"decoder: session ({engine.decoder.session.about}); attention: sdpa"]
    assert "eager" in said[0]
    with pytest.raises(AssertionError, match="was called"):
        texts_of(open_engine(folder, decoder="generate"), requests(PROMPTS))


def test_an_empty_prompt_is_the_beginning_of_a_text(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(folder)
    engine.tokenizer.add_bos_token = False
    (job,) = map(engine.prompts.job, requests([""]))
    assert job.ids == [1]
    assert drawn(engine, requests([""])) == drawn(open_engine(folder, decoder="generate"), requests([""]))


@pytest.mark.parametrize(
    ("change", "found"),
    [({"plt_loop_mode": "sequential"}, "--loop-mode sequential"), ({"plt_clp_shift": False}, "shift")],
)
def test_what_takes_several_trips_is_generated(
    tmp_path: Path, open_engine: Callable[..., HFEngine], change: dict[str, object], found: str
) -> None:
    model = save(tmp_path / "plt", PLTForCausalLM(PLTConfig(**SHAPE, plt_num_loops=2, **change)))
    engine = open_engine(model)
    assert engine.facts()["decoder"] == "generate"
    assert len(texts_of(engine, requests(PROMPTS))) == len(PROMPTS)
    with pytest.raises(UserError, match=f"--decoder session: .*{found}.*use --decoder generate"):
        open_engine(model, decoder="session")
    with pytest.raises(UserError, match="--compile on has no effect with decoder generate"):
        open_engine(model, compile="on")


def test_other_architectures_are_generated(tmp_path: Path, open_engine: Callable[..., HFEngine]) -> None:
    model = save(tmp_path / "llama", LlamaForCausalLM(LlamaConfig(**SHAPE)))
    assert open_engine(model).facts()["decoder"] == "generate"
    with pytest.raises(UserError, match=r"--decoder session: .*llama is no PLT checkpoint"):
        open_engine(model, decoder="session")


@pytest.mark.parametrize("compile", ["auto", "on", "off"])
def test_compile_is_the_sessions(
    folder: Path, open_engine: Callable[..., HFEngine], monkeypatch: pytest.MonkeyPatch, compile: str
) -> None:
    made: list[dict[str, object]] = []

    def session(model: Any, **options: Any) -> DecodeSession:
        made.append(options)
        return DecodeSession(model, **options | {"compile": "off"})

    monkeypatch.setattr(hf_session, "DecodeSession", session)
    texts_of(open_engine(folder, compile=compile), requests(PROMPTS))
    assert [options["compile"] for options in made] == [compile]


def test_what_the_session_decides_is_said_and_what_it_refuses_is_one_line(
    folder: Path, open_engine: Callable[..., HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        about = "eager"

        def __init__(self, _: object, *, notify: Callable[[str], None], **__: object) -> None:
            self.notify = notify

        def run(self, _: object) -> object:
            self.notify("decoding with a cache of 1 slots of 64 tokens (0.01 GB)")
            self.notify("no compiler here")
            raise ValueError("the step cannot be compiled")

    said: list[str] = []
    monkeypatch.setattr(hf_session, "DecodeSession", Session)
    with pytest.raises(UserError, match=r"^--compile on: the step cannot be compiled$"):
        texts_of(open_engine(folder, compile="on", notify=said.append), requests(PROMPTS))
    assert said == ["decoder: session (eager); attention: sdpa", "no compiler here"]
    with pytest.raises(ValueError, match=r"^the step"):
        texts_of(open_engine(folder), requests(PROMPTS))


@pytest.mark.parametrize("kind", ["plt", "llama"])
def test_attention_is_the_models(tmp_path: Path, open_engine: Callable[..., HFEngine], kind: str) -> None:
    model = PLTForCausalLM(PLTConfig(**SHAPE)) if kind == "plt" else LlamaForCausalLM(LlamaConfig(**SHAPE))
    folder = save(tmp_path / kind, model)
    eager, auto = open_engine(folder, attention="eager"), open_engine(folder)
    assert (eager.facts()["attention"], auto.facts()["attention"]) == ("eager", "sdpa")
    assert texts_of(eager, requests(PROMPTS)) == texts_of(auto, requests(PROMPTS))
    with pytest.raises(UserError, match=r"^--attention nonsense: ") as caught:
        open_engine(folder, attention="nonsense")
    assert "\n" not in str(caught.value)


def test_decoders_do_not_decide_the_identity(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    plain = open_engine(folder).identity()
    assert open_engine(folder, decoder="generate", attention="eager").identity() == plain
    assert "decoder" not in plain


# --- one at a time ------------------------------------------------------------------------------------


def test_completions_come_as_they_end(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    """A short one does not wait for a long one that began with it, and gives its slot to the next."""
    engine = open_engine(folder, batch_size=2)
    limits = {"a long": 60, "b short": 4, "c later": 4}
    wanted = [GenerationRequest(name, Prompt("x" * 9, max_new_tokens=limit), GREEDY) for name, limit in limits.items()]
    steps = _steps_of(engine)
    seen = {c.request_id: len(steps) for c in engine.generate(wanted)}
    assert list(seen)[-1] == "a long"
    assert seen["b short"] < seen["c later"] <= 8


def _steps_of(engine: HFEngine) -> list[int]:
    """Grows by the number of slots at every step of the engine's session."""
    steps: list[int] = []
    engine.decoder.session.fast.step.register_forward_pre_hook(lambda _, args: steps.append(len(args[1])))
    return steps


def test_the_batch_size_is_the_number_of_slots(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    for batch_size, most in ((1, 1), (3, 3), ("auto", 6)):
        engine = open_engine(folder, batch_size=batch_size, compile="off")
        steps = _steps_of(engine)
        texts_of(engine, requests(PROMPTS))
        assert max(steps) == most


def test_slots_that_would_not_fit_are_not_tried(
    folder: Path, open_engine: Callable[..., HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_engine(folder).model.config
    slot = hf_session.StaticCache(config, slots=1, capacity=500, dtype=torch.float32, device="cpu").nbytes()

    class Memory:
        available = 2 * 3 * sum(slot.values()) + 10  # half of it is for slots

    monkeypatch.setattr(hf_session.psutil, "virtual_memory", lambda: Memory)
    device = torch.device("cpu")
    assert hf_session.slots_that_fit(config, 500, torch.float32, device) == 3
    assert hf_session.slots_that_fit(config, 500, torch.bfloat16, device) == 6
    assert hf_session.slots_that_fit(config, 10**9, torch.float32, device) == 1


# --- when it ends early -------------------------------------------------------------------------------


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Memory for three slots; with more of them it lasts some steps. Holds the slots of every step."""
    steps: list[int] = []
    real = DecodeStep.forward

    def forward(self: DecodeStep, cache: Any, tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        steps.append(len(tokens))
        if len(tokens) > 3 and len(steps) > 6:
            raise RuntimeError(OUT_OF_MEMORY)
        return real(self, cache, tokens, *args)

    monkeypatch.setattr(DecodeStep, "forward", forward)
    return steps


@pytest.mark.parametrize("decoding", [GREEDY, HOT], ids=["greedy", "sampled"])
def test_slots_halve_when_memory_runs_out(
    folder: Path, open_engine: Callable[..., HFEngine], small_machine: list[int], decoding: Decoding
) -> None:
    """What had ended is not drawn again, and what had not draws the same again."""
    wanted = mixed(decoding)
    expected = drawn(open_engine(folder, decoder="generate"), wanted)
    said: list[str] = []
    engine = open_engine(folder, compile="off", notify=said.append)
    found = list(engine.generate(wanted))
    assert len(found) == len(wanted)
    assert {c.request_id: c.text for c in found} == {name: text for name, (text, *_) in expected.items()}
    at = [i for i, line in enumerate(said) if line == "out of memory at batch size 8: going on with 4"]
    assert at, said
    assert engine.batch.size == 2
    assert len(small_machine) > 6


def test_a_batch_size_that_was_asked_for_is_kept(
    folder: Path, open_engine: Callable[..., HFEngine], small_machine: list[int]
) -> None:
    engine = open_engine(folder, compile="off", batch_size=4)
    done: list[Completion] = []
    with pytest.raises(UserError, match="out of memory at batch size 4 on cpu; try --batch-size auto"):
        done.extend(engine.generate(mixed(GREEDY)))
    assert small_machine


def test_any_other_error_is_not_taken_for_memory(
    folder: Path, open_engine: Callable[..., HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(DecodeStep, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        texts_of(open_engine(folder, compile="off"), requests(PROMPTS))


def test_interrupted_what_had_ended_is_there(folder: Path, open_engine: Callable[..., HFEngine]) -> None:
    engine = open_engine(folder)
    expected = drawn(engine, mixed(HOT))
    stream = engine.generate(mixed(HOT))
    early = [next(stream) for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    rest = [r for r in mixed(HOT) if r.id not in {c.request_id for c in early}]
    assert len(rest) == len(expected) - 3
    again = {c.request_id: c.text for c in [*early, *engine.generate(rest)]}
    assert again == {name: text for name, (text, *_) in expected.items()}


def test_a_stopped_run_keeps_what_had_ended_and_ends_alike(
    folder: Path, tmp_path: Path, open_engine: Callable[..., HFEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    (suite,) = get_suite("trace")
    data = suite.load(None)

    def evaluate(results: Path) -> Run:
        settings = Settings(results, decoding=Decoding(1.0, 0.95, 3, 9), limit=10, scoring_workers=1)
        return run(suite, data, open_engine(folder, batch_size=4), _no_sandbox, settings, console=QUIET).run

    whole = evaluate(tmp_path / "whole")
    real = HFEngine.generate

    def stopped(self: HFEngine, wanted: list[GenerationRequest]) -> Iterator[Completion]:
        yield from islice(real(self, wanted), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HFEngine, "generate", stopped)
        with pytest.raises(RunInterrupted):
            evaluate(tmp_path / "cut")
    (early,) = list_runs(tmp_path / "cut")
    assert len(list(early.completions())) == 3
    cut = evaluate(tmp_path / "cut")
    assert cut.metrics() == whole.metrics()
    assert _texts(cut) == _texts(whole)
    assert _texts(early).items() <= _texts(whole).items()
    assert len(set(_texts(whole).values())) > 5
    assert [session.engine_facts for session in cut.manifest.sessions] == [
        {"decoder": "session", "attention": "sdpa"}
    ] * 2


def _texts(stored: Run) -> dict[str, str]:
    return {record.sample_id: record.text for record in stored.completions()}


def _no_sandbox() -> Sandbox:
    raise AssertionError("this suite runs no code")
