"""lm-evaluation-harness on our engines: its numbers, its own command, our store."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bad_server import Server, good, send, status
from lm_eval_parts import CONTEXT, TEMPLATE, Command, Ended, copy_tasks, engine, llama, plt

from plt_eval.cli.main import main
from plt_eval.errors import UserError
from plt_eval.lm_harness.answers import FILE_NAME, Answers, request_keys
from plt_eval.lm_harness.models import EndpointLM, ModelLM, PltLM, wanted
from plt_eval.lm_harness.official import MODEL, STARTUP, TARGET, register, run_official
from plt_eval.lm_harness.results import is_share
from plt_eval.lm_harness.tasks import hub_source
from plt_eval.records import MetricRecord
from plt_eval.report.tables import _metric_rows
from plt_eval.store import open_run
from plt_eval.tables import interval

DATA = os.environ.get("PLT_EVAL_DATA")
real = pytest.mark.skipif(DATA is None, reason="PLT_EVAL_DATA is not set")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plt(tmp_path_factory.mktemp("plt"))


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plt(tmp_path_factory.mktemp("chat"), TEMPLATE)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tasks: Path, tmp_path: Path) -> Command:
    return Command(capsys, tasks, tmp_path / "runs")


@pytest.fixture(autouse=True)
def logs_end_with_a_test() -> Iterator[None]:
    """lm-eval's own command logs to the stream that is standard error while it runs."""
    logger = logging.getLogger("lm_eval")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def asked(*arguments: Any) -> Any:
    """A request as lm-eval makes them."""
    return SimpleNamespace(args=arguments)


# --- the model: what lm-eval's own HFLM says ----------------------------------------------------------

PAIRS = [
    ("The sky is", " blue"),
    ("The sky is", " green."),
    ("The sky is ", "blue"),
    ("A line\n\n", "and another"),
    ("", "no context"),
    ("", "<s>with its first token"),
    ("<s>begins itself", " and ends"),
    ("x" * 200, " too long for the context"),
    ("é ü", " ñ"),
    ("short", "y" * (CONTEXT - 1)),
]
TEXTS = ["a", "", "short text.", "exactly " * 12, "x y z " * 50, "Größe, naïve café"]


@pytest.fixture(scope="session")
def official_lm(plain: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(plain), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="session")
def own_lm(plain: Path) -> ModelLM:
    return ModelLM(engine(plain, batch_size=4))


def test_loglikelihoods_are_those_of_lm_evals_own_model(official_lm: Any, own_lm: ModelLM) -> None:
    requests = [asked(*pair) for pair in PAIRS]
    for pair, own, there in zip(
        PAIRS, own_lm.loglikelihood(requests), official_lm.loglikelihood(requests), strict=True
    ):
        assert own[0] == pytest.approx(there[0], abs=2e-4), pair
        assert own[1] is there[1], pair


def test_loglikelihoods_are_those_of_transformers(plain: Path, own_lm: ModelLM) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain).eval()
    context, continuation = "Two and two", " are four"
    ids = own_lm.tok_encode(context + continuation)
    start = len(own_lm.tok_encode(context))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    total = sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
    ((found, _),) = own_lm.loglikelihood([asked(context, continuation)])
    assert found == pytest.approx(total, abs=1e-4)


def test_rolling_likelihoods_are_those_of_lm_evals_own_model(official_lm: Any, own_lm: ModelLM) -> None:
    requests = [asked(text) for text in TEXTS]
    assert max(len(own_lm.tok_encode(text)) for text in TEXTS) > 2 * CONTEXT
    own, there = own_lm.loglikelihood_rolling(requests), official_lm.loglikelihood_rolling(requests)
    assert own == pytest.approx(there, abs=2e-3)


def test_greedy_texts_are_those_of_lm_evals_own_model(official_lm: Any, own_lm: ModelLM) -> None:
    options = [
        {"until": ["\n"], "max_gen_toks": 20},
        {"until": ["a", "e", "o"], "max_gen_toks": 30, "do_sample": False, "temperature": 0.7},
        {"until": "z", "max_new_tokens": 10, "top_k": 3, "top_p": 0.5, "do_sample": False},
        {"max_tokens": 5},
    ]
    requests = [asked(text[:400], dict(own)) for own in options for text in ("def f(x):", "é ü", "x y z " * 50)]
    own, there = own_lm.generate_until(requests), official_lm.generate_until(requests)
    assert own == there
    assert len(set(own)) > 4
    assert not any("a" in text or "e" in text or "o" in text for text in own[3:6])


def test_a_looped_models_likelihoods_are_those_of_one_pass(looped: Path) -> None:
    lm = ModelLM(engine(looped, loops=3))
    requests = [asked("A question with", choice) for choice in (" one", " two words", " three more words")]
    requests += [asked("Another", " one")]
    for request, (found, greedy) in zip(requests, lm.loglikelihood(requests), strict=True):
        before, after = lm._border(*request.args)
        with torch.no_grad():
            logits = lm.engine.model(torch.tensor([before + after])).logits[0]
        rows = logits[len(before) - 1 : -1].log_softmax(-1)
        total = sum(float(rows[i, token]) for i, token in enumerate(after))
        assert found == pytest.approx(total, abs=2e-4)
        assert greedy is bool((rows.argmax(-1) == torch.tensor(after)).all())


def test_sampled_texts_depend_on_the_seed_and_the_request_alone(looped: Path) -> None:
    options = {"until": ["\n\n\n"], "max_gen_toks": 16, "do_sample": True}
    requests = [asked("Once", dict(options)) for _ in range(3)] + [asked("Twice", dict(options))]

    def texts(seed: int, order: list[int]) -> list[str]:
        lm = ModelLM(engine(looped), seed=seed)
        found = lm.generate_until([requests[i] for i in order])
        return [found[order.index(i)] for i in range(4)]

    first = texts(0, [0, 1, 2, 3])
    assert len(set(first)) == 4, "equal requests are drawn apart"
    assert texts(0, [3, 0, 1, 2]) == first
    assert texts(1, [0, 1, 2, 3]) != first


def test_a_context_without_room_for_the_answer_is_refused(own_lm: ModelLM) -> None:
    with pytest.raises(UserError, match=f"up to {CONTEXT} new tokens, but the model's context holds {CONTEXT}"):
        own_lm.generate_until([asked("a", {"until": [], "max_gen_toks": CONTEXT})])


def test_what_is_answered_is_not_asked_again(own_lm: ModelLM) -> None:
    lm = ModelLM(own_lm.engine)
    heard: list[str] = []
    lm.answers = Answers(lambda record: heard.append(record.request))
    lm.loglikelihood([asked("a", " b"), asked("a", " b"), asked("a", " c")])
    lm.loglikelihood([asked("a", " c"), asked("a", " d")])
    assert len(heard) == len(set(heard)) == 3


def test_keys_tell_kinds_arguments_and_drawn_texts_apart() -> None:
    greedy, warm = {"until": ["x"]}, {"until": ["x"], "do_sample": True}
    keys = [
        *request_keys("loglikelihood", [("a", "b"), ("a", "b"), ("ab", "")]),
        *request_keys("generate_until", [("a", greedy), ("a", greedy), ("a", warm), ("a", warm)]),
        *request_keys("loglikelihood_rolling", [("a",)]),
    ]
    assert keys[0] == keys[1]
    assert keys[3] == keys[4]
    assert len(set(keys)) == 6


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ((), 256, 0.0, 1.0)),
        ({"until": ["a", "", "a"], "max_gen_toks": 3}, (("a",), 3, 0.0, 1.0)),
        ({"do_sample": True}, ((), 256, 1.0, 1.0)),
        ({"do_sample": True, "temperature": 0.0}, ((), 256, 0.0, 1.0)),
        ({"temperature": 0.5, "top_p": 0.9}, ((), 256, 0.5, 0.9)),
        ({"do_sample": False, "temperature": 0.5, "top_p": 0.9, "top_k": 9}, ((), 256, 0.0, 1.0)),
        ({"do_sample": True, "top_k": 0, "num_beams": 1}, ((), 256, 1.0, 1.0)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_generation_options(options: dict[str, Any], found: tuple[Any, ...]) -> None:
    one = wanted(options)
    assert (one.stops, one.limit, one.temperature, one.top_p) == found


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 5}, {"num_beams": 4}, {"max_length": 50}])
def test_generation_options_that_no_engine_has(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"text with {list(options)[-1]}="):
        wanted(options)


# --- lm-eval's own command ----------------------------------------------------------------------------


def official(capsys: pytest.CaptureFixture[str], out: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The results of lm-eval's own command, in this process."""
    monkeypatch.setattr(sys, "argv", ["plt-eval"])
    run_official(["run", "--model", "plt", "--device", "cpu", "--output_path", str(out), *arguments])
    capsys.readouterr()
    (path,) = out.rglob("results_*.json")
    return json.loads(path.read_text())


def flat(results: Any) -> dict[str, float]:
    """Task.metric,filter -> value, of lm-eval's results."""
    rows = results["results"].items()
    return {f"{task}.{key}": value for task, row in rows for key, value in row.items() if "," in key}


def test_the_official_command_and_ours_agree_exactly(
    run: Command, looped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["own_sums", "own_texts", "own_endings", "own_copies", "own_votes"]
    there = official(
        run.capsys, tmp_path / "official", monkeypatch, "--tasks", ",".join(names), "--include_path", str(run.tasks),
        "--model_args", f"pretrained={looped},loops=3,compile=off", "--batch_size", "auto",
    )  # fmt: skip
    runs = run(f"lm-eval:{','.join(names)}", "--model", looped, "--loops", "3", "--compile", "off")
    assert [found["suite"] for found in runs] == [f"lm-eval:{name}" for name in names]
    for found, name in zip(runs, names, strict=True):
        own = json.loads((Path(found["path"]) / "lm_eval.json").read_text())
        assert own["results"][name] == there["results"][name]
        assert own["versions"][name] == there["versions"][name]
        for key, metric in found["metrics"].items():
            metric_name, _, filtered = key.removeprefix(f"lm-eval:{name}.").partition(",")
            filtered = filtered or "none"
            assert metric["value"] == there["results"][name][f"{metric_name},{filtered}"]
            stderr = there["results"][name][f"{metric_name}_stderr,{filtered}"]
            assert metric["stderr"] == (None if stderr == "N/A" else stderr)
            assert 0 <= metric["low"] <= metric["value"] <= metric["high"]
            assert metric["low"] < metric["high"], "an interval even where the standard error is 0"
        assert metric["n"] == there["n-samples"][name]["effective"]
    shares = {key: metric["share"] for found in runs for key, metric in found["metrics"].items()}
    assert shares["lm-eval:own_sums.acc"] is True
    assert shares["lm-eval:own_texts.bits_per_byte"] is False
    assert shares["lm-eval:own_endings.perplexity"] is False


def test_the_chat_template_as_the_official_command_applies_it(
    run: Command, chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = official(
        run.capsys, tmp_path / "official", monkeypatch, "--tasks", "own_sums,own_copies", "--num_fewshot", "2",
        "--include_path", str(run.tasks), "--apply_chat_template", "--batch_size", "auto",
        "--model_args", f"pretrained={chatty},max_length=400,compile=off",
    )  # fmt: skip
    config = json.loads((chatty / "config.json").read_text())
    longer = tmp_path / "longer"
    longer.mkdir()
    for path in chatty.iterdir():
        (longer / path.name).write_bytes(path.read_bytes())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 400}))
    flags = ("--model", longer, "--num-fewshot", "2", "--compile", "off")
    runs = run("lm-eval:own_sums,own_copies", *flags)
    assert "as with lm-eval's --apply_chat_template" in run.err
    own = {}
    for found in runs:
        own |= flat(json.loads((Path(found["path"]) / "lm_eval.json").read_text()))
    assert own == flat(there)
    (first, *_) = open_run(Path(runs[0]["path"])).completions()
    assert first.chat
    assert first.prompt_tail.startswith("<s><user>")
    assert first.prompt_tail.count("<user>") == 3, "examples are turns of their own"
    assert first.prompt_tail.endswith("<assistant>")
    without = run("lm-eval:own_sums", *flags, "--chat-template", "off")
    assert without[0]["run_id"] != runs[0]["run_id"]
    (first, *_) = open_run(Path(without[0]["path"])).completions()
    assert "<user>" not in first.prompt_tail


def test_lm_eval_knows_the_model_by_name_and_its_own_too() -> None:
    register()
    register()
    from lm_eval.api.registry import get_model, model_registry

    assert get_model(MODEL) is PltLM
    assert "hf" in model_registry
    assert "vllm" in model_registry


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained is missing"),
        ({"pretrained": "no/such/folder"}, "no such model folder"),
        ({"pretrained": "plt-tiny"}, "family of"),
        ({"pretrained": "plt-tiny:r2", "loops": "x"}, "loops=x: expected a number"),
        ({"pretrained": "plt-tiny:r2", "nonsense": 1}, "nonsense: with --model plt"),
        ({"pretrained": "plt-tiny:r2", "max_batch_size": 4}, "--max_batch_size has no effect"),
        ({"pretrained": "plt-tiny:r2", "device": "mps"}, "--device mps: expected cpu or cuda"),
        ({"pretrained": "plt-tiny:r2", "decoder": "foo"}, "decoder=foo: expected auto, session, generate"),
        ({"pretrained": "plt-tiny:r2", "dtype": "foo"}, "dtype=foo: expected auto, float32"),
        ({"pretrained": "plt-tiny:r2", "compile": "bogus"}, "compile=bogus: expected auto, on, off"),
        ({"pretrained": "plt-tiny:r2", "seed": "abc"}, "seed=abc: expected a number from 0"),
        ({"engine": "openai", "endpoint": "x", "api_model": "m", "api": "chatt"}, "api=chatt: expected chat"),
        ({"engine": "openai", "endpoint": "x", "api_model": "m", "concurrency": 0}, "concurrency=0: expected a number"),
        ({"engine": "openai", "endpoint": "x", "api_model": "m", "retries": -1}, "retries=-1: expected a number"),
        ({"engine": "openai", "endpoint": "x", "api_model": "m", "request_timeout": "abc"}, "expected a number of sec"),
        ({"engine": "sglang"}, "engine=sglang: expected hf, vllm, openai"),
        ({"engine": "openai"}, "needs endpoint and api_model"),
        ({"engine": "openai", "pretrained": "x"}, "pretrained: with --model plt and engine=openai"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_model_arguments_that_are_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PltLM(**arguments)


def test_model_arguments_make_the_engines(server: Server) -> None:
    lm = PltLM.create_from_arg_string(
        "pretrained=plt-tiny:r2,loops=3,max_length=77", {"device": "cpu", "batch_size": 2}
    )
    assert isinstance(lm, ModelLM)
    assert (lm.engine.identity()["loops"], lm.max_length, lm.engine.batch.size) == (3, 77, 2)
    lm = PltLM(engine="openai", endpoint=server.url, api_model="m", batch_size=1, device="cuda:0")
    assert isinstance(lm, EndpointLM)
    assert lm.chat
    lm = PltLM(engine="openai", endpoint=f"{server.url}+http://h:1/v1+2", api_model="m")
    assert lm.engine.identity()["endpoint"] == f"{server.url} http://h:1/v1+2", "several, with + between them"


def test_the_official_command_itself_by_pythonpath(tasks: Path, tmp_path: Path) -> None:
    """The one that lm-eval installs, with nothing but our folder on PYTHONPATH, from another folder."""
    hook = subprocess.run(
        [Path(sys.executable).with_name("plt-eval"), "lm-eval", "--hook"], capture_output=True, text=True, check=True
    )
    assert Path(hook.stdout.strip()) == STARTUP
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nprint('the hidden one ran', file=sys.stderr)\n")
    line = [str(Path(sys.executable).with_name("lm-eval")), "run", "--model", "plt", "--tasks", "own_sums"]
    line += ["--model_args", "pretrained=plt-tiny:r2,loops=2", "--include_path", str(tasks), "--device", "cpu"]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=400,
        env=os.environ | {"PYTHONPATH": f"{STARTUP}:{hidden}"},
    )
    assert done.returncode == 0, done.stderr
    assert "own_sums" in done.stdout
    assert "acc_norm" in done.stdout
    assert "the hidden one ran" in done.stderr


def test_the_hook_names_what_we_register() -> None:
    text = (STARTUP / "sitecustomize.py").read_text()
    assert f'"{MODEL}", "{TARGET}"' in text


def test_help_is_the_official_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plt-eval"])
    with pytest.raises(SystemExit):
        main(["lm-eval", "--help"])
    assert "Language Model Evaluation Harness" in capsys.readouterr().out


# --- our store ----------------------------------------------------------------------------------------


def test_a_run_holds_what_every_run_holds(run: Command, looped: Path) -> None:
    runs = run("lm-eval:own_sums", "--model", looped, "--loops", "1,2", "--limit", "4", "--num-fewshot", "1")
    assert [found["loops"] for found in runs] == [1, 2]
    assert {(found["state"], found["done"], found["missing"]) for found in runs} == {("complete", 4, 0)}
    stored = open_run(Path(runs[1]["path"]))
    identity = stored.manifest.identity
    assert (identity.suite, identity.problems, identity.n_samples) == ("lm-eval:own_sums", 4, 1)
    assert identity.suite_version.startswith("lm-eval 0.4.13, version 1.0, configuration ")
    assert stored.manifest.data_source.endswith("sums.jsonl'}")
    assert stored.manifest.sessions[0].packages["lm-eval"] == "0.4.13"
    samples, completions = list(stored.samples()), list(stored.completions())
    assert [sample.sample_id for sample in samples] == [f"own_sums/{i}" for i in range(4)]
    assert [one.sample_id for one in completions] == [f"own_sums/{i}" for i in range(4)]
    metrics = runs[1]["metrics"]
    assert metrics["lm-eval:own_sums.acc"]["value"] == sum(s.values["acc"] is True for s in samples) / 4
    assert "1-shot" in metrics["lm-eval:own_sums.acc"]["definition"]
    assert completions[0].prompt_tail.count(" is") == 2
    best = max(range(3), key=lambda i: samples[0].detail["log_likelihoods"][i])
    assert samples[0].values["acc"] is (best == samples[0].detail["target"])

    again = run("lm-eval:own_sums", "--model", looped, "--loops", "1,2", "--limit", "4", "--num-fewshot", "1")
    assert again == runs
    assert run.err.count("complete already") == 2
    for arguments, shown in (
        (["ls", "--results", str(run.results)], "lm-eval:own_sums"),
        (["show", runs[0]["path"]], "as lm-eval 0.4.13 computes it"),
        (["show", runs[0]["path"], "--sample", "own_sums/2"], "log_likelihoods"),
    ):
        main_quietly(arguments)
        assert shown in run.capsys.readouterr().out


def main_quietly(arguments: list[str]) -> None:
    """A command that goes well, for what it prints."""
    with Ended():
        main(arguments)


def test_numbers_that_are_no_shares_are_not_shown_in_percent(run: Command, looped: Path) -> None:
    (found,) = run("lm-eval:own_texts", "--model", looped, "--limit", "3")
    value = found["metrics"]["lm-eval:own_texts.bits_per_byte"]["value"]
    main_quietly(run.line("lm-eval:own_texts", "--model", looped, "--limit", "3"))
    out = run.capsys.readouterr().out
    assert f"{value:.4g}" in out
    assert "%" not in out.partition("values with 95% intervals")[0]
    stored = open_run(Path(found["path"]))
    assert list(_metric_rows(stored, "model")) == [], "table 2 is in percent"


def test_texts_and_their_filters(run: Command, looped: Path) -> None:
    (found,) = run("lm-eval:own_copies", "--model", looped, "--max-new-tokens", "5")
    assert set(found["metrics"]) == {"lm-eval:own_copies.exact_match", "lm-eval:own_copies.exact_match,first-letters"}
    stored = open_run(Path(found["path"]))
    for completion, sample in zip(stored.completions(), stored.samples(), strict=True):
        assert completion.text in sample.detail["filtered"]["none"]
        assert set(sample.values) == {"exact_match", "exact_match,first-letters"}
        assert "e" not in completion.text
        assert completion.completion_tokens is not None
        assert completion.completion_tokens <= 5


def test_a_text_drawn_several_times(run: Command, looped: Path) -> None:
    (found,) = run("lm-eval:own_votes", "--model", looped, "--limit", "2")
    (first, _) = open_run(Path(found["path"])).completions()
    assert len(first.detail["texts"]) == 3
    (warm,) = run("lm-eval:own_votes", "--model", looped, "--limit", "2", "--temperature", "1.5", "--seed", "3")
    assert warm["run_id"] != found["run_id"]
    (second, _) = open_run(Path(warm["path"])).completions()
    assert second.detail["texts"] != first.detail["texts"]


def test_greedy_and_another_seed_instead_of_what_a_task_draws(run: Command, looped: Path) -> None:
    asked = ("lm-eval:own_votes", "--model", looped, "--limit", "2")
    (drawn,), (greedy,), (other,) = (run(*asked, *more) for more in ((), ("--temperature", "0"), ("--seed", "3")))
    assert len({found["run_id"] for found in (drawn, greedy, other)}) == 3
    texts = [
        [completion.detail["texts"] for completion in open_run(Path(found["path"])).completions()]
        for found in (drawn, greedy, other)
    ]
    assert all(len(set(each)) == 1 for each in texts[1])
    assert texts[0] != texts[2]


def test_a_task_with_functions_is_the_same_run_in_every_process(run: Command, looped: Path) -> None:
    """Its functions stand in a file, and some are partial ones, which Python shows by their address."""
    (run.tasks / "helpers.py").write_text(
        "from functools import partial\n\n\ndef asked(doc, ending):\n    return said(doc) + ending\n\n\n"
        "def said(doc):\n    return doc['question']\n\n\ntext = partial(asked, ending=' ')\n"
    )
    task = "include: own_sums.yaml\ntask: own_partial\ntag: null\ndoc_to_text: !function helpers.text\n"
    (run.tasks / "own_partial.yaml").write_text(task)
    line = [sys.executable, "-m", "plt_eval", *run.line("lm-eval:own_partial", "--model", looped, "--limit", "1")]

    def runs() -> set[str]:
        subprocess.run(line, check=True, capture_output=True)
        return {folder.name for folder in run.results.iterdir()}

    first = runs()
    assert runs() == first
    helpers = run.tasks / "helpers.py"
    helpers.write_text(helpers.read_text().replace("doc['question']", "doc['question'] + ''"))
    assert len(runs()) == 2


def test_groups_and_tags(run: Command, looped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plt_eval.lm_harness.command.BOOTSTRAPS", 2000)  # perplexity's standard error takes most of it
    group, tag = run("lm-eval:own_group,own_tag", "--model", looped)
    name = "lm-eval:own_group"
    assert next(iter(group["metrics"])) == f"{name}.acc"
    acc = {part: group["metrics"][f"{name}.acc{part}"] for part in ("", "/own_sums", "/own_endings")}
    weighted = (10 * acc["/own_sums"]["value"] + 5 * acc["/own_endings"]["value"]) / 15
    assert acc[""]["value"] == pytest.approx(weighted)
    assert [acc[part]["n"] for part in acc] == [15, 10, 5]
    assert f"{name}.perplexity/own_endings" in group["metrics"]
    assert "group own_group (version 3.0" in acc[""]["definition"]
    assert (group["total"], tag["total"]) == (15, 16)
    assert "lm-eval:own_tag.acc/own_sums" in tag["metrics"]
    assert "lm-eval:own_tag.exact_match/own_copies" in tag["metrics"]


def test_interrupted_and_gone_on_with(run: Command, looped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--model", looped, "--batch-size", "1")
    (whole,) = run("lm-eval:own_copies", *flags, "--run-id", "whole")
    add, counts = Answers.add, {"added": 0}

    def stopping(self: Answers, record: Any) -> None:
        if counts["added"] == 4:
            raise KeyboardInterrupt
        add(self, record)
        counts["added"] += 1

    monkeypatch.setattr(Answers, "add", stopping)
    run.capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(run.line("lm-eval:own_copies", *flags, "--run-id", "part"))
    assert ended.value.code == 130
    assert "requests answered; run the same command again to go on" in run.capsys.readouterr().err
    folder = run.results / "part"
    assert open_run(folder).state() == "incomplete"
    first = (folder / FILE_NAME).read_text()
    monkeypatch.setattr(Answers, "add", add)
    (part,) = run("lm-eval:own_copies", *flags, "--run-id", "part")
    assert part["metrics"] == whole["metrics"]
    assert open_run(folder).manifest.resumed == 1
    after = (folder / FILE_NAME).read_text()
    assert after.startswith(first)
    keys = [json.loads(line)["request"] for line in after.splitlines()]
    assert len(keys) == len(set(keys)) == 6


def test_killed_and_gone_on_with(run: Command, server: Server) -> None:
    """kill -9 while an endpoint is being asked: what it answered is not asked again."""
    flags = ["--engine", "openai", "--endpoint", server.url, "--api-model", "m", "--concurrency", "1"]
    server.always = good("two", slow_s=1.0)
    line = [str(Path(sys.executable).with_name("plt-eval")), *run.line("lm-eval:own_copies", *flags)]
    working = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(server.asked) < 4:
        assert working.poll() is None, working.stderr and working.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    working.send_signal(signal.SIGKILL)
    working.communicate()
    (folder,) = run.results.iterdir()
    assert open_run(folder).state() == "killed"
    answered = len((folder / FILE_NAME).read_text().splitlines())
    assert answered >= 3
    server.asked.clear()
    server.always = good("two")
    (found,) = run("lm-eval:own_copies", *flags)
    assert len(server.asked) == 6 - answered
    assert found["metrics"]["lm-eval:own_copies.exact_match"]["value"] == pytest.approx(1 / 6)


# --- endpoints ----------------------------------------------------------------------------------------


def test_a_chat_service_gets_turns(run: Command, server: Server) -> None:
    flags = ("--engine", "openai", "--endpoint", server.url, "--api-model", "m", "--num-fewshot", "1")
    server.always = good("six\nand more")
    (found,) = run("lm-eval:own_copies", *flags)
    assert found["metrics"]["lm-eval:own_copies.exact_match"]["value"] == pytest.approx(1 / 6)
    assert [turn["role"] for turn in server.asked[0]["messages"]] == ["user", "assistant", "user"]
    assert server.asked[0]["stop"] == ["\n", "e"]
    assert server.asked[0]["max_tokens"] == 12
    assert server.paths[0].endswith("/chat/completions")


def test_a_completions_service_gets_text(run: Command, server: Server) -> None:
    flags = ("--engine", "openai", "--endpoint", server.url, "--api-model", "m", "--api", "completions")
    server.always = good("one")
    (found,) = run("lm-eval:own_copies", *flags)
    assert found["metrics"]["lm-eval:own_copies.exact_match"]["value"] == pytest.approx(0.0), "cut at its e: on"
    assert server.asked[0]["prompt"].startswith("Write ")


def test_likelihoods_of_a_completions_service(run: Command, server: Server) -> None:
    """A server that echoes: each character is a token, and digits are the less likely the larger they are."""

    def echo(handler: Any, body: dict[str, Any]) -> None:
        tokens = list(body["prompt"])
        logprobs = [None] + [-float(ord(token)) for token in tokens[1:]]
        tops = [None] + [{token: value} for token, value in zip(tokens[1:], logprobs[1:], strict=True)]
        told = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops}
        answer = {"choices": [{"text": body["prompt"], "logprobs": told, "finish_reason": "length"}]}
        send(handler, 200, json.dumps(answer).encode())

    server.always = echo
    flags = ("--engine", "openai", "--endpoint", server.url, "--api-model", "m", "--api", "completions")
    (found,) = run("lm-eval:own_sums", *flags)
    for completion, sample in zip(
        open_run(Path(found["path"])).completions(), open_run(Path(found["path"])).samples(), strict=True
    ):
        choices = [line.split(" ", 1)[1] for line in completion.text.splitlines()]
        expected = [-float(sum(map(ord, choice.removesuffix(" (greedy)").strip("'")))) for choice in choices]
        assert sample.detail["log_likelihoods"] == expected
    assert "needs the likelihood of a text's first token" in run.error("lm-eval:own_texts", *flags)


def test_what_a_chat_service_cannot_do(run: Command, server: Server) -> None:
    flags = ("--engine", "openai", "--endpoint", server.url, "--api-model", "m")
    for task in ("own_sums", "own_texts"):
        assert "needs log-likelihoods, which a chat service does not tell" in run.error(f"lm-eval:{task}", *flags)
    assert not server.asked


def test_an_endpoint_that_gives_up_leaves_a_run_to_go_on_with(run: Command, server: Server) -> None:
    flags = ("--engine", "openai", "--endpoint", server.url, "--api-model", "m", "--retries", "0", "--concurrency", "1")
    server.plan = [good("three"), status(500, "melted"), good("three"), good("three"), good("three"), good("three")]
    (found,) = run("lm-eval:own_copies", *flags, code=1)
    assert "1 of 6 requests got no answer; first: HTTP 500: melted" in run.err
    assert (found["state"], found["missing"], found["metrics"]) == ("incomplete", 6, {})
    server.asked.clear()
    server.always = good("three")
    (found,) = run("lm-eval:own_copies", *flags)
    assert len(server.asked) == 1
    assert (found["state"], found["missing"]) == ("complete", 0)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("lm-eval", "names no task: expected lm-eval:TASK,..., as lm-eval:gsm8k,hellaswag"),
        ("lm-eval:", "expected a selection after the colon, found none"),
        ("lm-eval:mmlu_*", r"'mmlu_\*' is no name of a task; patterns are not expanded"),
        ("lm-eval:own_sum", "no such task, group or tag of lm-eval, nor of .* did you mean own_sums"),
        ("lm-eval:gsm8", "did you mean gsm8k"),
        ("lm-eval:humaneval", "outside of the sandbox; use --suite humaneval"),
        ("lm-eval:humaneval_plus", "outside of the sandbox; use --suite humaneval"),
        ("lm-eval:mbpp_plus_instruct", "outside of the sandbox; use --suite mbpp"),
        ("lm-eval:cruxeval_output", "misreads answers .*; use --suite cruxeval"),
        ("lm-eval:own_sums,own_unsafe", "own_unsafe is not run: .* there is no suite of plt-eval's own for it"),
    ],
)
def test_names_that_are_refused(run: Command, looped: Path, suite: str, message: str) -> None:
    line = run.error(suite, "--model", looped)
    assert re.search(message, line), line
    assert not run.results.exists()


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("own_sums", ("--n-samples", "2", "--temperature", "1"), "--n-samples has no effect on suite lm-eval"),
        ("own_sums", ("--data", "x.jsonl"), "--data has no effect on suite lm-eval: give tasks of your own"),
        ("own_sums", ("--scoring-workers", "2"), "--scoring-workers has no effect on suite lm-eval"),
        ("own_sums", ("--temperature", "1"), "--temperature has no effect on lm-eval:own_sums: the model writes no"),
        ("own_sums", ("--temperature", "0"), "--temperature has no effect on lm-eval:own_sums: the model writes no"),
        ("own_sums", ("--seed", "3"), "--seed has no effect on lm-eval:own_sums: nothing is drawn there"),
        ("own_sums", ("--max-new-tokens", "9"), "--max-new-tokens has no effect on lm-eval:own_sums"),
        ("own_votes", ("--num-fewshot", "2"), "--num-fewshot 2 has no effect on lm-eval:own_votes: the task itself"),
        ("own_top_k", (), "asks for text with top_k=5, which plt-eval's engines do not have"),
        ("own_copies", ("--max-new-tokens", "96"), "up to 96 new tokens, but the model's context holds 96"),
        ("own_sums", ("--gold",), "--gold has no effect on suite"),
        ("own_sums", ("--release", "v6"), "--release has no effect on suite lm-eval"),
    ],
)
def test_options_that_are_refused(run: Command, looped: Path, task: str, flags: tuple[str, ...], message: str) -> None:
    assert message in run.error(f"lm-eval:{task}", "--model", looped, *flags)


def test_without_lm_eval_or_with_another_version(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real_version = metadata.version

    def other(name: str) -> str:
        return "0.4.9" if name == "lm_eval" else real_version(name)

    def none(name: str) -> str:
        if name == "lm_eval":
            raise metadata.PackageNotFoundError(name)
        return real_version(name)

    monkeypatch.setattr(metadata, "version", other)
    assert "needs lm-eval 0.4.13, found 0.4.9: pip install 'plt-eval[lm-eval]'" in run.error("lm-eval:gsm8k")
    monkeypatch.setattr(metadata, "version", none)
    assert "needs lm-eval, which is not installed: pip install 'plt-eval[lm-eval]'" in run.error("lm-eval:gsm8k")


def test_replay_is_refused(run: Command) -> None:
    assert "--engine replay has no effect on suite lm-eval" in run.error(
        "lm-eval:own_sums", "--engine", "replay", "--completions", "gold"
    )


def test_a_folder_of_tasks_that_is_none(run: Command, tmp_path: Path) -> None:
    run.tasks = tmp_path / "none"
    assert "expected a folder with task files (.yaml), found none" in run.error("lm-eval:own_sums")


def test_a_task_whose_data_is_not_there(run: Command, looped: Path, tmp_path: Path) -> None:
    folder = copy_tasks_without_data(run.tasks, tmp_path / "tasks")
    run.tasks = folder
    line = run.error("lm-eval:own_sums", "--model", looped)
    assert "lm-eval:own_sums cannot be loaded: FileNotFoundError" in line


def copy_tasks_without_data(source: Path, folder: Path) -> Path:
    folder.mkdir()
    text = (source / "own_sums.yaml").read_text().replace(str(source), str(folder))
    (folder / "own_sums.yaml").write_text(text)
    return folder


def test_the_hub_is_not_waited_for(run: Command, looped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run.error("lm-eval:own_hub", "--model", looped)  # the index of all tasks is made once
    started = time.monotonic()
    line = run.error("lm-eval:own_hub", "--model", looped)
    assert "takes its data from the Hugging Face hub (nobody-of-this-name/nothing-of-this-name)" in line
    assert "HF_HUB_OFFLINE is set" in line
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    line = run.error("lm-eval:own_hub", "--model", looped)
    assert "http://127.0.0.1:9 cannot be reached (ConnectError)" in line
    assert time.monotonic() - started < 30, "something waits for a name to resolve"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"dataset_path": "openai/gsm8k"}, "openai/gsm8k"),
        ({"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "a.jsonl"}}}, None),
        (
            {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "https://x.org/a.jsonl"}}},
            "https://x.org/a.jsonl",
        ),
        (
            {"dataset_path": "json", "dataset_kwargs": {"data_files": ["hf://datasets/a/b.csv"]}},
            "hf://datasets/a/b.csv",
        ),
        ({"dataset_path": "/"}, None),
        ({}, None),
        ({"dataset_path": "x", "custom_dataset": print}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_where_data_comes_from(config: dict[str, Any], found: str | None) -> None:
    assert hub_source(config) == found


def test_which_metrics_are_shares() -> None:
    def named(name: str) -> Any:
        def how(items: Any) -> float:
            return float(len(items))

        how.__name__ = name
        return SimpleNamespace(aggregation=lambda: {"m": how})

    assert is_share(named("mean"), "m", [0, 1.0, True])
    assert not is_share(named("mean"), "m", [0.5, 12.0])
    assert not is_share(named("weighted_perplexity"), "m", [(0.1, 2)])
    assert is_share(named("f1_score"), "m", [(1, 1)])
    assert not is_share(named("matthews_corrcoef"), "m", [(1, 1)])


def test_a_metric_without_an_interval_shows_none() -> None:
    record = MetricRecord(value=0.5, n=2, low=0.5, high=0.5, definition="", has_interval=False)
    assert interval(record) == "-"
    assert interval(record.model_copy(update={"has_interval": True})) == "[50.0, 50.0]"


def test_the_listing_has_a_line_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    main_quietly(["suites", "--json"])
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["suite"].startswith("lm-eval")]
    assert row["suite"] == "lm-eval:TASK,..."
    assert row["extra"] == "lm-eval: installed"
    assert row["problems"] is None


# --- real data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lm-eval's gsm8k on the file of problems; its examples are from that file too."""
    import lm_eval.tasks

    assert DATA is not None
    path = Path(DATA) / "gsm8k" / "test.jsonl"
    bundled = Path(str(lm_eval.tasks.__file__)).parent / "gsm8k" / "gsm8k.yaml"
    folder = tmp_path_factory.mktemp("gsm8k")
    (folder / "gsm8k.yaml").write_text(
        f"include: {bundled}\ntask: gsm8k_file\ndataset_path: json\ndataset_name: null\ntag: null\n"
        f"dataset_kwargs: {{data_files: {{train: {path}, test: {path}}}}}\n"
    )
    return folder


@real
@pytest.mark.parametrize(
    ("how", "score"), [("gold", 1.0), ("wrong", 0.0), ("empty", 0.0)], ids=["gold", "wrong", "empty"]
)
def test_gsm8k_of_gold_wrong_and_empty_answers(
    run: Command, gsm8k: Path, server: Server, how: str, score: float
) -> None:
    run.tasks = gsm8k
    assert DATA is not None
    rows = [json.loads(line) for line in (Path(DATA) / "gsm8k" / "test.jsonl").read_text().splitlines()]
    answers = {row["question"]: row["answer"] for row in rows}

    def reply(handler: Any, body: dict[str, Any]) -> None:
        question = body["messages"][-1]["content"].rpartition("Question: ")[2].removesuffix("\nAnswer:")
        text = {"gold": answers[question], "wrong": "I guess.\n#### -123456", "empty": ""}[how]
        good(text)(handler, body)

    server.always = reply
    flags = ("--engine", "openai", "--endpoint", server.url, "--api-model", "m", "--limit", "40")
    (found,) = run("lm-eval:gsm8k_file", *flags)
    name = "lm-eval:gsm8k_file.exact_match"
    assert found["metrics"][f"{name},strict-match"]["value"] == score
    assert found["metrics"][f"{name},flexible-extract"]["value"] == score
    assert len(server.asked[0]["messages"]) == 11, "five examples, and the question"


@real
def test_gsm8k_on_a_bundled_model(run: Command, gsm8k: Path) -> None:
    run.tasks = gsm8k
    (found,) = run("lm-eval:gsm8k_file", "--model", "plt-tiny:r2", "--limit", "2", "--max-new-tokens", "8")
    assert (found["state"], found["done"]) == ("complete", 2)
    assert math.isfinite(found["metrics"]["lm-eval:gsm8k_file.exact_match,strict-match"]["value"])
