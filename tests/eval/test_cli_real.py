"""The installed command on real problems and a real checkpoint: nothing here is a toy."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plt_eval.store import COMPLETIONS, SAMPLES, open_run

PLT_EVAL = Path(sys.executable).with_name("plt-eval")
CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "plt" / "a_r2_w4"
HF = ("--model", CHECKPOINT, "--tokenizer", "bytes", "--max-new-tokens", "8", "--limit", "2")

needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="needs bubblewrap (apt-get install bubblewrap)"
)


def command(*arguments: str | Path, code: int = 0, env: dict[str, str] | None = None) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with `code`."""
    line = [str(PLT_EVAL), *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "200"} | (env or {})
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def error(*arguments: str | Path) -> str:
    """The one line of a command that must fail."""
    out, err = command(*arguments, code=2)
    assert out == ""
    *notes, line = err.splitlines()
    assert all(note.startswith("note: ") for note in notes), err
    assert line.startswith("plt-eval: error: ")
    return line


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twelve HumanEval+ problems, in a file of their own."""
    root = os.environ.get("PLT_EVAL_DATA")
    if root is None:
        pytest.skip("PLT_EVAL_DATA names no folder of benchmark data")
    source = Path(root) / "humanevalplus" / "HumanEvalPlus.jsonl.gz"
    if not source.exists():
        pytest.skip(f"{source} does not exist")
    path = tmp_path_factory.mktemp("data") / "HumanEvalPlus.jsonl"
    with gzip.open(source, "rt") as stream:
        path.write_text("".join(line for line, _ in zip(stream, range(12), strict=False)))
    return path


@pytest.fixture(scope="module")
def answers(problems: Path) -> Path:
    """A solution for each, every third one wrong: returns None, raises, is no Python, ends early."""
    wrong = iter(["    return None\n", "    raise KeyError\n", "    def (:\n", ""])
    rows = []
    for number, line in enumerate(problems.read_text().splitlines()):
        row = json.loads(line)
        ending = next(wrong) if number % 3 == 0 else row["canonical_solution"]
        rows.append({"task_id": row["task_id"], "solution": row["prompt"] + ending})
    path = problems.with_name("answers.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def replay(answers: Path, problems: Path, results: Path) -> tuple[str | Path, ...]:
    base = ("run", "--suite", "humaneval", "--engine", "replay", "--completions", answers)
    return (*base, "--data", problems, "--results", results)


@needs_sandbox
def test_run_ls_show_export_and_the_official_command_agree(tmp_path: Path, problems: Path, answers: Path) -> None:
    results, out = tmp_path / "runs", tmp_path / "samples.jsonl"
    stdout, _ = command(*replay(answers, problems, results), "--json")
    (row,) = json.loads(stdout)
    values = {name.partition(".")[2]: metric["value"] for name, metric in row["metrics"].items()}
    assert values["base.pass@1"] == values["plus.pass@1"] == pytest.approx(8 / 12)

    listing, _ = command("ls", "--results", results)
    assert f"{row['run_id']}" in listing
    assert "12/12" in listing
    shown, _ = command("show", row["run_id"][:12], "--results", results)
    assert "complete, 12 of 12 samples done" in shown
    one, _ = command("show", row["run_id"], "--sample", "HumanEval/0", "--results", results)
    assert "return None" in one
    failed, _ = command("show", row["run_id"], "--failed", "--results", results)
    assert "4 of 12 judged samples did not pass" in failed

    command("export", row["run_id"], "--format", "evalplus", "--out", out, "--results", results)
    environment = os.environ | {"HUMANEVAL_OVERRIDE_PATH": str(problems), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    official = [sys.executable, "-m", "evalplus.evaluate", "--dataset", "humaneval", "--samples", str(out)]
    said = subprocess.run(official, capture_output=True, text=True, timeout=300, check=True, env=environment).stdout
    assert [float(value) for value in re.findall(r"pass@1:\s+([\d.]+)", said)] == [
        pytest.approx(values["base.pass@1"], abs=5e-4),
        pytest.approx(values["plus.pass@1"], abs=5e-4),
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, problems: Path, answers: Path) -> object:
    """The metrics of a run that nobody stopped."""
    out, _ = command(*replay(answers, problems, tmp_path_factory.mktemp("whole")), "--json")
    return json.loads(out)[0]["metrics"]


@needs_sandbox
@pytest.mark.parametrize(
    ("file", "lines", "by"),
    [
        (COMPLETIONS, 3, signal.SIGKILL),
        (SAMPLES, 9, signal.SIGKILL),
        # As a terminal does it: everything in the foreground gets the signal, and nothing may be judged wrong by it.
        (SAMPLES, 2, signal.SIGINT),
    ],
)
def test_a_stopped_command_resumes_to_the_same_metrics(
    tmp_path: Path,
    problems: Path,
    answers: Path,
    uninterrupted: object,
    file: str,
    lines: int,
    by: signal.Signals,
) -> None:
    results = tmp_path / "runs"
    line = [str(PLT_EVAL), *map(str, replay(answers, problems, results)), "--scoring-workers", "1"]
    with subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while sum(path.read_bytes().count(b"\n") for path in results.glob(f"*/{file}")) < lines:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, by)
    (folder,) = results.iterdir()
    state = "killed" if by is signal.SIGKILL else "incomplete"
    assert open_run(folder).state() == state
    assert state in command("ls", "--results", results)[0]
    assert process.returncode == (130 if by is signal.SIGINT else -by)
    with (folder / SAMPLES).open("ab") as stream:
        stream.write(b'{"sample_id": "HumanEval/1')
    resumed, err = command(*replay(answers, problems, results), "--json")
    assert "12 of 12 samples judged" in err
    assert json.loads(resumed)[0]["metrics"] == uninterrupted
    assert open_run(folder).manifest.resumed == 1


@needs_sandbox
def test_a_checkpoint_at_two_loop_counts(tmp_path: Path, problems: Path) -> None:
    base = ("run", "--suite", "humaneval", *HF, "--loops", "1-2", "--data", problems, "--results", tmp_path)
    out, err = command(*base)
    rows = [re.split(r"\s*[│┃|]\s*", line)[1:5] for line in out.splitlines() if "humaneval" in line]
    assert rows == [["humaneval", "a_r2_w4", "1", "2"], ["humaneval", "a_r2_w4", "2", "2"]]
    again, err = command(*base)
    assert again == out
    assert err.count("complete already") == 2


def test_suites() -> None:
    out, _ = command("suites")
    assert "humaneval" in out
    assert "mbpp" in out
    assert "there: extra code" in out


def test_error_lines(tmp_path: Path, problems: Path) -> None:
    data = ("--data", problems, "--results", tmp_path / "runs")
    assert "unknown suite 'humanevl' (did you mean" in error("run", "--suite", "humanevl", *HF)
    assert "/no/such/model" in error("run", "--suite", "humaneval", "--model", "/no/such/model", *data)
    broken = tmp_path / "HumanEvalPlus.jsonl"
    lines = problems.read_text().splitlines()
    broken.write_text("\n".join([lines[0], lines[1][:50], lines[2]]) + "\n")
    assert f"{broken}, line 2: " in error("run", "--suite", "humaneval", *HF, "--data", broken)
    assert "--loops '1,,2'" in error("run", "--suite", "humaneval", *HF, "--loops", "1,,2", *data)
    assert "--endpoint has no effect" in error("run", "--suite", "humaneval", *HF, "--endpoint", "http://h/v1", *data)
    corrupt = tmp_path / "model"
    shutil.copytree(CHECKPOINT, corrupt)
    weights = corrupt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors" in error("run", "--suite", "humaneval", "--model", corrupt, *HF[2:], *data)
    assert not (tmp_path / "runs").exists()


def test_export_for_transformers(tmp_path: Path) -> None:
    out, _ = command("export", CHECKPOINT, "--format", "transformers", "--out", tmp_path / "stock")
    assert "trust_remote_code=True" in out
    assert (tmp_path / "stock" / "config.json").exists()
    assert "not an empty folder" in error("export", CHECKPOINT, "--format", "transformers", "--out", tmp_path / "stock")
    assert "no effect with --format transformers" in error(
        "export", CHECKPOINT, "--format", "transformers", "--out", tmp_path / "x", "--partial"
    )
