"""`plt-eval train` and `plt-eval sft` as a user types them: from text to models, and what goes wrong in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from plt_eval.cli.main import main
from plt_model.loading import load_model
from plt_model.tokenizer import byte_tokenizer
from plt_model.training import checkpoints

FIELDS: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "vocab_size": 259,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "plt_window_size": [4, 0],
    },
    "data": [{"name": "trace", "source": {"kind": "trace", "seed": 0, "programs": 20}}],
    "sequence_length": 16,
    "tokens": 256,
    "batch_tokens": 64,
    "optimizer": {"lr": 0.01},
    "checkpoint": {"every": 2},
}
TUNING: dict[str, Any] = {"name": "polish", "batch": 2, "max_length": 256, "optimizer": {"lr": 0.001}}


def write(path: Path, fields: dict[str, Any], **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**fields, **changes}))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """-> exit code, standard output, standard error."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as done:
        code = int(done.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a mistake."""
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("plt-eval: error: ")
    return lines[0].removeprefix("plt-eval: error: ")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for the data; the first command that needs them builds them."""
    return tmp_path_factory.mktemp("data") / "data"


def test_from_text_to_models(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two loop counts, then both fine-tunings; the same command again trains nothing."""
    recipe, out = write(tmp_path / "tiny.yaml", FIELDS), tmp_path / "out"
    command = ("train", "--recipe", recipe, "--loops", "1,2", "--data", data, "--out", out, "--device", "cpu")
    code, table, err = call(capsys, *command)
    assert code == 0, err
    assert (data / "trace" / "manifest.json").exists()
    for loops in (1, 2):
        folder = out / f"r{loops}"
        result = json.loads((folder / "result.json").read_text())
        assert (result["loops"], result["tokens"]) == (loops, 256)
        assert load_model(folder / "model").config.plt_num_loops == loops
        assert f"{result['loss']:.4f}" in table
    assert "256" in table
    assert "Traceback" not in err

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert call(capsys, *command)[:2] == (0, table)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    chat = tmp_path / "chat.jsonl"
    chat.write_text(
        '{"prompt": "a", "completion": "b"}\n'
        '{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}\n'
    )
    polish = write(tmp_path / "polish.yaml", TUNING)
    tuned = tmp_path / "tuned"
    command = ("sft", "--recipe", polish, "--model", out / "r2" / "model", "--data", chat, "--out", tuned)
    code, table, err = call(capsys, *command, "--device", "cpu")
    assert code == 0, err
    assert load_model(tuned / "model").config.plt_num_loops == 2
    assert AutoTokenizer.from_pretrained(tuned / "model").chat_template is not None
    assert str(json.loads((tuned / "result.json").read_text())["tokens"]) in table


def test_one_loop_count_needs_no_folder_of_its_own(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path / "tiny.yaml", FIELDS, tokens=64)
    command = ("train", "--recipe", recipe, "--loops", "2", "--data", data, "--out", tmp_path / "out")
    assert call(capsys, *command, "--seed", 3, "--device", "cpu")[0] == 0
    assert (tmp_path / "out" / "model" / "config.json").exists()
    assert json.loads((tmp_path / "out" / "result.json").read_text())["seed"] == 3


MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no such recipe": ({}, ["--recipe", "quik"], r"--recipe quik: no such file .*did you mean quick\?"),
    "unknown field": ({"tokenz": 3}, [], r"tiny.yaml: tokenz: no such field \(did you mean tokens\?\)"),
    "bad model": ({"model": {**FIELDS["model"], "head_dim": 3}}, [], "recipe tiny: model: .*head_dim is 3"),
    "loops in words": ({}, ["--loops", "two"], "--loops 'two': 'two' is no loop count"),
    "loops 0": ({}, ["--loops", "0"], "--loops '0': '0' is not within 1 to"),
    "no tokenizer": ({"tokenizer": "nowhere"}, [], "nowhere"),
    "bad source": ({"data": [{"name": "a", "source": {"kind": "trase"}}]}, [], "data entry a.*trase"),
    "data that are not there": ({"data": [{"name": "a"}]}, [], "data entry a has no source, and .*no token data"),
    "unknown reporter": ({}, ["--report-to", "wandbb"], "--report-to wandbb: expected one of trackio, wandb"),
    "sharding alone": ({}, ["--fsdp"], "--fsdp shards over processes: start it with torchrun"),
}


@pytest.mark.parametrize(("change", "options", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(
    tmp_path: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    recipe = write(tmp_path / "tiny.yaml", FIELDS, **change)
    given: dict[str, object] = {"--recipe": recipe, "--loops": "2", "--data": data, "--out": tmp_path / "out"}
    given |= dict(zip(options[::2], options[1::2], strict=False))
    flags = [option for option in options if option == "--fsdp"]
    found = refusal(capsys, "train", *[part for pair in given.items() for part in pair], *flags)
    assert re.search(message, found), found
    assert not (tmp_path / "out").exists()


def test_data_of_another_tokenizer_are_refused(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the recipe says how to build them, or takes what is there."""
    build = write(tmp_path / "tiny.yaml", FIELDS)
    assert call(capsys, "data", "build", "--recipe", build, "--out", data)[0] == 0
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = {"tokenizer": str(tmp_path / "tokenizer"), "model": {**FIELDS["model"], "vocab_size": 300}}
    for entry in (FIELDS["data"][0], {"name": "trace"}):
        recipe = write(tmp_path / "other.yaml", FIELDS, **other, data=[entry])
        message = refusal(capsys, "train", "--recipe", recipe, "--loops", 2, "--data", data, "--out", tmp_path / "out")
        assert "tokenizer" in message
        assert str(data / "trace") in message
    assert not (tmp_path / "out").exists()


def test_another_training_s_folder(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = write(tmp_path / "tiny.yaml", FIELDS, tokens=64), tmp_path / "out"
    command = ("train", "--recipe", recipe, "--data", data, "--out", out, "--device", "cpu")
    assert call(capsys, *command, "--loops", 1)[0] == 0
    expected = f"--out {out} holds another training (loops is 1 there, 2 here): choose a new folder"
    assert refusal(capsys, *command, "--loops", 2) == expected


def test_mistakes_of_fine_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, chat = write(tmp_path / "polish.yaml", TUNING), tmp_path / "chat.jsonl"
    chat.write_text('{"prompt": "a"}\n')
    command = ("sft", "--recipe", recipe, "--data", chat, "--out", tmp_path / "out")
    assert "nowhere" in refusal(capsys, *command, "--model", tmp_path / "nowhere")
    code, _, err = call(capsys, *command[:3], "--data", tmp_path / "none.jsonl", "--out", "x", "--model", "y")
    assert code == 2
    assert "none.jsonl" in err
    assert "Traceback" not in err
    bad = write(tmp_path / "bad.yaml", TUNING, epoch=2)
    found = refusal(capsys, "sft", "--recipe", bad, *command[3:], "--model", tmp_path)
    assert "epoch: no such field (did you mean epochs?)" in found


def command_line(*arguments: object, log: Path, launcher: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """The command as a process of its own; what it says goes to `log`."""
    line = [sys.executable, *(launcher or ("-m", "plt_eval.cli.main")), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as stream:
        return subprocess.Popen(line, stdout=stream, stderr=stream, env=environment)


def test_ctrl_c_saves_and_the_same_command_goes_on(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 130 and one line; then the curve of a training that nobody stopped."""
    recipe = write(tmp_path / "long.yaml", FIELDS, tokens=64 * 300, checkpoint={"every": 1000})
    stopped, through, log = tmp_path / "stopped", tmp_path / "through", tmp_path / "log"
    arguments = ("train", "--recipe", recipe, "--loops", 2, "--data", data, "--device", "cpu", "--out")
    assert call(capsys, "data", "build", "--recipe", recipe, "--out", data)[0] == 0
    process = command_line(*arguments, stopped, log=log)
    while process.poll() is None and lines(stopped) < 3:
        try:
            process.wait(0.005)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, log.read_text()
    ((step, folder),) = checkpoints.checkpoints(stopped)
    last = log.read_text().splitlines()[-1]
    expected = f"stopped at step {step} of 300, saved {folder}; the same command goes on from there"
    assert last == f"plt-eval: interrupted: {expected}"
    assert "Traceback" not in log.read_text()

    assert call(capsys, *arguments, stopped)[0] == 0
    assert call(capsys, *arguments, through)[0] == 0
    assert curve(stopped) == curve(through)
    weights = "checkpoint-300/model.safetensors"
    assert (stopped / weights).read_bytes() == (through / weights).read_bytes()


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def curve(out: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["learning_rate"], row["tokens"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [True, False], ids=["fsdp", "ddp"])
def test_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str], fsdp: bool) -> None:
    """Two processes that torchrun starts: one builds the data, both train two loop counts, one prints the table."""
    recipe, log, data = write(tmp_path / "tiny.yaml", FIELDS), tmp_path / "log", tmp_path / "data"
    arguments = ("train", "--recipe", recipe, "--loops", "1,2", "--device", "cpu", "--data", data, "--out")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "plt_eval.cli.main")
    both = (*arguments, tmp_path / "two", *(["--fsdp"] if fsdp else []))
    process = command_line(*both, log=log, launcher=launcher)
    assert process.wait(300) == 0, log.read_text()
    assert log.read_text().count("peak memory") == 1
    assert call(capsys, *arguments, tmp_path / "one")[0] == 0
    for name in ("r1", "r2"):
        two, one = (curve(tmp_path / count / name) for count in ("two", "one"))
        assert [row[1] for row in two] == pytest.approx([row[1] for row in one], rel=1e-5)
        assert load_model(tmp_path / "two" / name / "model").config.plt_num_loops == int(name[1])
    process = command_line(*both, log=log, launcher=launcher)
    assert process.wait(300) == 0, "complete, it says so again"


def test_help_is_light() -> None:
    """Neither torch nor transformers is imported to print the options."""
    code = (
        "import sys; from plt_eval.cli.main import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--loops" in done.stdout
