"""`plt-eval diagnose` as a user types it, and what `ls`, `show` and `export` make of its runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plt_eval.cli.main import main
from plt_eval.diagnosis.store import list_diagnoses
from plt_eval.store import SAMPLES, list_runs

PLT_EVAL = Path(sys.executable).with_name("plt-eval")
CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "plt" / "a_r2_w4"


class Cli:
    """main() in this process: (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return int(caught.value.code or 0), out, err

    def error(self, *arguments: object) -> str:
        """The last line of a command that must fail."""
        code, out, err = self(*arguments)
        assert (code, out) == (2, ""), err
        line = err.splitlines()[-1]
        assert line.startswith("plt-eval: error: ")
        return line.removeprefix("plt-eval: error: ")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(capsys)


SMALL = ("--samples", "9", "--sequence-length", "20", "--device", "cpu")
MEASURE = ("--measure", "step_size,output_shift")


def test_a_family_gives_a_row_for_every_loop_of_every_member(cli: Cli) -> None:
    code, out, err = cli("diagnose", "--loops", "1-3", *SMALL, *MEASURE)
    assert code == 0, err
    assert "note: no --model: opening the bundled family plt-tiny" in err
    assert "note: no --data: reading the set trace" in err
    rows = [line.split("│")[1:4] for line in out.splitlines() if line.count("│") > 3]
    loops = [(int(r), int(loop)) for r, loop, _ in rows if r.strip()]
    assert loops == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)] * 2, "of states, and of outputs"
    assert "States of plt-tiny" in out
    assert "9 samples, 180 tokens, at most 20 each, of 600 texts of trace" in out
    assert "step size: raw state (before the final norm)" in out
    found = list_diagnoses(Path("results/runs"))
    assert [(one.manifest.model.label, one.manifest.loops) for one in found] == [
        (f"plt-tiny:r{loops}", loops) for loops in (1, 2, 3)
    ]
    first = {tuple(sample.sha256 for sample in one.samples()) for one in found}
    assert len(first) == 1, "all meet the same samples"
    code, again, err = cli("diagnose", "--loops", "1-3", *SMALL, *MEASURE)
    assert (code, again) == (0, out), "and asked again, all is read"
    assert err.count("complete already") == 3


def test_json_is_what_is_stored(cli: Cli) -> None:
    code, out, err = cli(
        "diagnose", "--model", CHECKPOINT, "--tokenizer", "bytes", *SMALL, *MEASURE, "--json", "--run-id", "mine"
    )  # fmt: skip
    assert code == 0, err
    (found,) = json.loads(out)
    (stored,) = list_diagnoses(Path("results/runs"))
    metrics = stored.metrics()
    assert metrics is not None
    assert found["rows"] == metrics.model_dump(mode="json")["rows"]
    assert (found["run_id"], found["kind"], found["state"]) == ("mine", "diagnosis", "complete")
    assert (found["loops"], found["done"], found["total"]) == (2, 9, 9)
    assert stored.manifest.sessions[0].command[0] == "plt-eval"


def test_options_reach_the_run(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"code": f"x = {i}" * 9}) + "\n" for i in range(20)))
    options = ["--data", "rows.jsonl", "--field", "code", "--windows", "--seed", "5", "--dtype", "bfloat16"]
    options += ["--batch-size", "2", "--loop-mode", "sequential", "--loops", "3", "--results", "here"]
    code, out, err = cli("diagnose", "--model", CHECKPOINT, "--tokenizer", "bytes", *SMALL, *MEASURE, *options)
    assert code == 0, err
    (one,) = list_diagnoses(Path("here"))
    manifest = one.manifest
    assert (manifest.loops, manifest.loop_mode, manifest.adapter) == (3, "sequential", "plt-sequential")
    assert (manifest.dtype, manifest.device, manifest.batch_size, manifest.seed) == ("bfloat16", "cpu", 2, 5)
    assert (manifest.data.name, manifest.data.windows, manifest.data.tokenizer) == ("rows", True, "bytes")
    assert "note: " in err
    assert "9 samples" in out


def test_ls_and_show_know_both_kinds(cli: Cli) -> None:
    cli("diagnose", "--model", "plt-tiny:r2", *SMALL, *MEASURE)
    code, _, err = cli("run", "--suite", "trace", "--model", "plt-tiny:r1", "--limit", "2", "--device", "cpu")
    assert code == 0, err
    code, out, err = cli("ls")
    assert (code, err) == (0, "")
    assert "(diagnosis on trace)" in out
    assert "output_shift of loop 2" in out
    assert "2/2" in out
    kinds = [row["kind"] for row in json.loads(cli("ls", "--json")[1])]
    assert kinds == ["diagnosis", "evaluation"]
    assert len(list_runs(Path("results/runs"))) == 1
    code, out, err = cli("show", "diagnosis")
    assert (code, err) == (0, "")
    assert "plt-tiny:r2" in out
    assert "delta(r)" in out, "with the equations"
    assert "States of plt-tiny" in out
    shown = json.loads(cli("show", "diagnosis", "--json")[1])
    assert shown["manifest"]["kind"] == "diagnosis"
    assert len(shown["metrics"]["rows"]) == 5
    assert "is a diagnosis, which judges no samples" in cli.error("show", "diagnosis", "--failed")
    assert "is a diagnosis" in cli.error("export", "diagnosis", "--format", "evalplus", "--out", "x")
    assert cli("show", "trace")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "plt-tny"), "--model plt-tny: no such model folder, nor a bundled model (did you mean plt-tiny?)"),
        (("--model", "plt-tiny:r9"), "no such member of the family"),
        (("--loops", "0"), "--loops '0'"),
        (("--data", "humanevl"), "--data humanevl: no such file or folder, nor a set (did you mean humaneval?)"),
        (("--measure", "stepsize"), "'stepsize' is no measurement (did you mean step_size?)"),
        (("--measure", ","), "--measure ',': expected names with commas between them"),
        (("--batch-size", "0"), "--batch-size '0': expected \"auto\" or a number from 1"),
        (("--field", "text"), "--field has no effect with --data trace"),
        (("--model", CHECKPOINT), "no tokenizer in it; pass --tokenizer FOLDER, or --tokenizer bytes"),
        (("--tokenizer", "nowhere"), "--tokenizer nowhere: expected"),
        (("--run-id", "../x"), "--run-id '../x"),
        (("--run-id", ""), "--run-id '': expected letters, digits"),
        (("--run-id", "", "--model", "plt-tiny:r2"), "--run-id '': expected letters, digits"),
        (("--data", ""), "--data '': empty; expected a file, a folder or a set"),
    ],
)
def test_a_mistake_is_one_line(cli: Cli, options: tuple[object, ...], message: str) -> None:
    assert message in cli.error("diagnose", *SMALL, *options)
    assert not list_diagnoses(Path("results/runs"))


def test_few_samples_are_said_to_have_no_interval(cli: Cli) -> None:
    few = ("--samples", "7", "--sequence-length", "20", "--device", "cpu")
    _, out, _ = cli("diagnose", "--model", "plt-tiny:r2", *few, *MEASURE)
    assert "without intervals: they take 8 samples; 7 samples" in out
    _, out, _ = cli("diagnose", "--model", "plt-tiny:r2", *SMALL, *MEASURE)
    assert "with 95% intervals (bootstrap over samples); 9 samples" in out


def test_one_text_is_no_texts(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a text", encoding="utf-8")
    code, out, err = cli("diagnose", "--model", "plt-tiny:r2", "--data", "one.txt", "--no-windows", *SMALL, *MEASURE)
    assert code == 0, err
    assert "note: one has 1 text, fewer than --samples 9: every one is read" in err
    assert "; 1 sample, 8 tokens, at most 20 each, of 1 text of one" in out


def test_damage_is_named_and_says_what_helps(cli: Cli) -> None:
    command = ("diagnose", "--model", "plt-tiny:r2", *SMALL, *MEASURE, "--run-id", "x")
    assert cli(*command)[0] == 0
    folder = Path("results/runs/x")
    (folder / "summary.parquet").write_text("torn", encoding="utf-8")
    for again in (("report", "x"), command):
        assert "summary.parquet: damaged, no Parquet file; delete the folder" in cli.error(*again)
    (folder / "summary.parquet").unlink()
    assert "summary.parquet: missing, though the diagnosis is complete" in cli.error("report", "x")
    assert cli("diagnose", "--model", "plt-tiny:r1", *SMALL, *MEASURE)[0] == 0
    (folder / "metrics.json").write_text("torn", encoding="utf-8")
    code, out, err = cli("ls")
    assert (code, "plt-tiny:r1" in out, "plt-tiny:r2" in out) == (0, True, False)
    assert "warning: results/runs/x/metrics.json: damaged" in err
    (folder / "manifest.json").write_text("torn", encoding="utf-8")
    code, out, err = cli("report")
    assert (code, "x/manifest.json: damaged" in err) == (0, True)
    assert cli.error(*command).startswith("results/runs/x/manifest.json: damaged")


def test_the_command_stopped_by_a_signal_goes_on(tmp_path: Path) -> None:
    command = [PLT_EVAL, "diagnose", "--model", "plt-tiny:r4", "--samples", "300", "--batch-size", "1"]
    command += ["--results", tmp_path, "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size for path in tmp_path.glob(f"*/{SAMPLES}")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, ""), err
    assert "run the same command again to go on" in err
    (left,) = list_diagnoses(tmp_path)
    assert left.state() == "incomplete"
    assert 0 < left.manifest.done < 300


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from plt_eval.cli.main import main\n"
        "try: main(['diagnose', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
