"""What of --engine vllm needs no vLLM: what it refuses, what becomes of vLLM's own errors, where stop strings begin."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from plt_eval.cli.main import main
from plt_eval.engines import vllm_start
from plt_eval.engines.hf_prompts import StopCheck
from plt_eval.engines.vllm import VLLMEngine
from plt_eval.engines.vllm_likelihood import _is_greedy
from plt_eval.models import resolve_model
from plt_model.tokenizer import byte_tokenizer


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """The one line on stderr of `plt-eval run --suite trace --engine vllm ...`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["run", "--suite", "trace", "--engine", "vllm", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert caught.value.code == 2
        assert out == ""
        (line,) = [line for line in err.splitlines() if not line.startswith("note:")]
        return line

    return run


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks installed; nothing here comes so far as to import it."""
    found = importlib.util.find_spec
    spec = found("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: spec if name == "vllm" else found(name, *a))
    monkeypatch.setattr(vllm_start, "installed_version", lambda: "0.32.0")


def test_without_vllm_the_line_names_what_to_install(refused, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a))
    line = refused("--model", "plt-tiny:r1")
    assert "pip install 'plt-eval[vllm]'" in line
    assert "scripts/make_vllm_env.sh" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu"], "--device has no effect with --engine vllm: it belongs to --engine hf"),
        (["--decoder", "session"], "--decoder has no effect with --engine vllm"),
        (["--attention", "eager"], "--attention has no effect with --engine vllm"),
        (["--endpoint", "http://x/v1"], "--endpoint has no effect with --engine vllm"),
        (["--gpu-memory-utilization", "0"], "--gpu-memory-utilization 0.0: expected a number above 0 and at most 1"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization 1.5: expected"),
        (["--model", "plt-tiny:r1", "--compile", "on"], "--compile on has no effect with --engine vllm"),
        (
            ["--model", "plt-tiny:r1", "--limit", "1", "--temperature", "0.005"],
            "--temperature 0.005: vLLM samples from 0.01 on",
        ),
        (["--loops", "0"], "--loops '0'"),
        (["--batch-size", "none"], "--batch-size 'none'"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "plt-tiny:r1", "--max-model-len", "99999"], "--max-model-len 99999: "),
        (["--model", "plt-tiny:r1", "--chat-template", "on"], "--chat-template on: the tokenizer has no chat template"),
    ],
)
@pytest.mark.usefixtures("pretended")
def test_bad_options_are_one_line(refused, arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)


@pytest.mark.usefixtures("pretended")
def test_a_model_that_transformers_does_not_know_is_one_line(refused, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    assert f"--model {folder}: The checkpoint you are trying to load has model type" in refused("--model", folder)


def test_another_minor_version_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: spec)
    for version, told in (("0.32.0", False), ("0.32", False), ("0.320.0", True), ("0.33.1", True)):
        monkeypatch.setattr(vllm_start, "installed_version", lambda version=version: version)
        said: list[str] = []
        vllm_start.check_installed(said.append)
        assert bool(said) == told, version


@pytest.mark.usefixtures("pretended")
def test_ranks_on_a_cpu_share_the_memory_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(vllm_start.psutil, "virtual_memory", lambda: SimpleNamespace(available=4 << 30))
    folder = str(resolve_model("plt-tiny:r1").folder)
    engine = VLLMEngine(folder, tensor_parallel=2, notify=lambda _: None)
    assert engine._options["kv_cache_memory_bytes"] == 1 << 30


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            "To serve at least one request with the model's max seq len (32768), (8.0 GiB KV cache is needed, which is "
            "larger than the available KV cache memory (4.0 GiB).",
            ("--gpu-memory-utilization", "--max-model-len", "32768"),
        ),
        (
            "Free memory on device cuda:0 (3.1/79 GiB) on startup is less than desired GPU memory utilization (0.92).",
            ("a smaller --gpu-memory-utilization", "3.1/79"),
        ),
        (
            "1 validation error for ModelConfig\n  Value error, User-specified max_model_len (4096) is greater than "
            "the derived max_model_len [type=value_error, input_value=ArgsKwargs((), {...})]",
            ("a smaller --max-model-len. vLLM says: User-specified max_model_len (4096)",),
        ),
        (
            "Total number of attention heads (3) must be divisible by tensor parallel size (2).",
            ("another --tensor-parallel", "heads (3)"),
        ),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", ("memory ran out", "--dtype")),
        ("something\nunheard of", ("vLLM does not start", "VLLM_LOGGING_LEVEL=INFO", "something unheard of")),
    ],
)
def test_errors_of_vllm_become_one_line_with_what_to_change(error: str, says: tuple[str, ...]) -> None:
    line = str(vllm_start.refusal(ValueError(error)))
    assert "\n" not in line
    assert "validation error" not in line
    for part in says:
        assert part in line


def test_a_stop_string_is_found_at_the_token_that_completes_it() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("é = 12\n\nprint(1)\n", add_special_tokens=False)["input_ids"]
    for stops, at in ((("\n\n",), 9), (("zz", "print"), 14), (("é",), 2), (("qq",), None), ((), None)):
        check = StopCheck(stops, tokenizer)
        for every in (1, 3, 8, 100):
            found, seen = None, 0
            while found is None and seen < len(ids):
                shown = ids[: seen + every]
                found, seen = check.first(shown, seen), len(shown)
            assert found == at, (stops, every)


@dataclass
class _Found:
    logprob: float


def test_of_tokens_that_are_equally_likely_greedy_takes_the_first() -> None:
    assert _is_greedy(5, {5: _Found(-1.0)})
    assert _is_greedy(5, {5: _Found(-1.0), 9: _Found(-1.0)})
    assert not _is_greedy(9, {5: _Found(-1.0), 9: _Found(-1.0)})
    assert not _is_greedy(5, {5: _Found(-1.1), 9: _Found(-1.0)})
