"""The command line: its commands, its error lines and its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bad_server import Server, good, status
from toy_parts import LoopEngine, NoSandbox, SumEngine, SumSuite

from plt_benchmarks.protocols import Sample
from plt_eval.cli.main import main
from plt_eval.cli.options import ONLY_WITH, RunOptions, parse_loops
from plt_eval.cli.suites import missing_packages, needs
from plt_eval.engines import ENGINES
from plt_eval.engines.checkpoint import Checkpoint
from plt_eval.errors import UserError
from plt_eval.runner import Settings
from plt_eval.runner import run as run_suite
from plt_eval.store import SAMPLES, list_runs

PLT_EVAL = Path(sys.executable).with_name("plt-eval")


def command(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    line = [str(PLT_EVAL), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **options)


class Cli:
    """main() in this process: (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str], results: Path) -> None:
        self.capsys = capsys
        self.results = results

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        return int(caught.value.code or 0), out, err

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        return self("run", "--suite", "sums", "--results", self.results, *arguments)

    def error(self, *arguments: str | Path) -> str:
        """The one line of a command that must fail."""
        code, out, err = self(*arguments) if arguments[0] != "run" else self.run(*arguments[1:])
        assert (code, out) == (2, ""), err
        *notes, line = err.splitlines()
        assert all(note.startswith("note: ") for note in notes), err
        assert line.startswith("plt-eval: error: ")
        return line.removeprefix("plt-eval: error: ")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The command line with the toy suite in the registry, and the toy engine as the in-process one."""

    def get_suite(name: str, options: object = None) -> list[SumSuite]:  # noqa: ARG001
        suites = {"sums": [SumSuite()], "both": [SumSuite(), _Products()]}
        return suites[name]

    monkeypatch.setattr("plt_benchmarks.registry.get_suite", get_suite)
    monkeypatch.setattr("plt_eval.sandbox.open_sandbox", lambda *_, **__: NoSandbox())
    monkeypatch.setitem(ENGINES, "hf", ("toy_parts", "LoopEngine"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    LoopEngine.made.clear()
    return Cli(capsys, tmp_path / "runs")


class _Products(SumSuite):
    name = "products"

    def load(self, source: Path | None) -> Any:
        data = super().load(source)
        samples = tuple(Sample(s.id.replace("Sum", "Product"), s.data) for s in data.samples)
        return type(data)(samples, data.revision, "p" * 64, data.source)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Two runs of the toy suite: one complete, one with a sample missing. Returns where they are."""
    results = tmp_path / "runs"
    suite = SumSuite(12)
    engine = SumEngine()
    run_suite(suite, suite.load(None), engine, NoSandbox, Settings(results, run_id="good-one"))
    lossy = SumEngine(fail=["Sum/3#0"], loops=3)
    run_suite(suite, suite.load(None), lossy, NoSandbox, Settings(results, run_id="good-two"))
    return results


# --- start-up -----------------------------------------------------------------------------------------


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "pydantic", "pandas", "numpy", "evalplus", "docker", "httpx", "rich.progress")
    code = (
        "import sys\n"
        "from plt_eval.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "run" in done.stdout
    best = min(_seconds("--help") for _ in range(5))
    assert best < 0.5


def _seconds(*arguments: str) -> float:
    began = time.perf_counter()
    assert command(*arguments).returncode == 0
    return time.perf_counter() - began


@pytest.mark.parametrize(
    "name", ["demo", "run", "study", "train", "sft", "data", "ls", "show", "export", "suites", "serve"]
)
def test_every_command_has_help(name: str) -> None:
    done = command(name, "--help")
    assert done.returncode == 0
    assert f"plt-eval {name}" in done.stdout


def test_version_and_unknown_commands() -> None:
    done = command("--version")
    assert re.fullmatch(r"plt-eval \d+\.\d+\.\d+\n", done.stdout)
    assert command("rnu").returncode == 2
    assert command("run").returncode == 2


# --- run ----------------------------------------------------------------------------------------------


def test_all_loop_counts_in_one_table(cli: Cli) -> None:
    code, out, err = cli.run("--model", "some/adder", "--loops", "1,3-4")
    assert code == 0, err
    rows = [line for line in out.splitlines() if "sums" in line]
    assert [re.split(r"\s*[│┃|]\s*", row)[3] for row in rows] == ["1", "3", "4"]
    assert out.count("95% intervals") == 1
    assert [engine.loops for engine in LoopEngine.made] == [1, 3, 4]
    assert all(engine.closed for engine in LoopEngine.made)
    assert [run.manifest.identity.loops for run in list_runs(cli.results)] == [1, 3, 4]
    assert "note: loaded some/adder" in err
    assert "20 of 20 samples judged" in err
    code, again, err = cli.run("--model", "some/adder", "--loops", "1,3-4")
    assert (code, again) == (0, out)
    assert err.count("complete already") == 3


def test_json_for_programs(cli: Cli) -> None:
    _, out, _ = cli.run("--model", "adder", "--loops", "2", "--json", "--limit", "5")
    (row,) = json.loads(out)
    assert (row["suite"], row["model"], row["loops"], row["state"]) == ("sums", "adder", 2, "complete")
    assert (row["total"], row["done"], row["missing"]) == (5, 5, 0)
    metric = row["metrics"]["right"]
    assert metric["n"] == 5
    assert metric["low"] <= metric["value"] <= metric["high"]
    assert metric["definition"]


def test_options_reach_the_engine_and_the_record(cli: Cli) -> None:
    options = ["--loop-mode", "sequential", "--dtype", "bfloat16", "--device", "cpu", "--batch-size", "3"]
    options += ["--chat-template", "off", "--tokenizer", "bytes", "--temperature", "0.8", "--top-p", "0.9"]
    options += ["--seed", "5", "--n-samples", "2", "--max-new-tokens", "7", "--scoring-workers", "3"]
    code, _, err = cli.run("--model", "m", *options)
    assert code == 0, err
    assert LoopEngine.made[0].options == {
        "model": "m",
        "loop_mode": "sequential",
        "dtype": "bfloat16",
        "device": "cpu",
        "batch_size": 3,
        "chat_template": "off",
        "tokenizer": "bytes",
    }
    (run,) = list_runs(cli.results)
    assert run.manifest.identity.decoding.model_dump() == {
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 5,
        "max_new_tokens": 7,
    }
    assert (run.manifest.identity.n_samples, run.manifest.identity.loops) == (2, 4)
    assert run.manifest.sessions[0].sandbox == "bubblewrap"


def test_run_id_names_one_run_or_begins_the_names_of_several(cli: Cli) -> None:
    assert cli.run("--model", "m", "--run-id", "mine")[0] == 0
    assert cli.run("--model", "m", "--run-id", "many", "--loops", "1-2")[0] == 0
    assert {run.path.name for run in list_runs(cli.results)} == {"mine", "many-sums-r1", "many-sums-r2"}
    line = cli.error("run", "--model", "m", "--run-id", "mine", "--limit", "3")
    assert "mine holds another run; what differs: problems: 20 -> 3; prompts_sha256:" in line
    assert "--run-id '../x'" in cli.error("run", "--model", "m", "--run-id", "../x")


def test_a_suite_of_two_makes_two_runs_and_one_table(cli: Cli) -> None:
    code, out, _ = cli("run", "--suite", "both", "--model", "m", "--loops", "1,2", "--results", cli.results)
    assert code == 0
    rows = [re.split(r"\s*[│┃|]\s*", line)[1:4:2] for line in out.splitlines() if re.search("sums|products", line)]
    assert rows == [["sums", "1"], ["sums", "2"], ["products", "1"], ["products", "2"]]
    assert len(list_runs(cli.results)) == 4


def test_missing_samples_are_flagged_and_the_exit_code_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LoopEngine.generate
    monkeypatch.setattr(
        LoopEngine, "generate", lambda self, requests: (self.fail.add("Sum/3#0"), plain(self, requests))[1]
    )
    code, out, err = cli.run("--model", "m")
    assert code == 1
    assert "missing" in out
    assert "1/20" in out
    assert "warning: 1 of 20 samples are missing and not counted" in err
    monkeypatch.undo()


# --- run: replay --------------------------------------------------------------------------------------


def write_completions(path: Path, count: int, **fields: str) -> Path:
    rows = [{"task_id": f"Sum/{i}", "completion": str(8 * i), **fields} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gold_and_files_are_replayed(cli: Cli, tmp_path: Path) -> None:
    _, out, _ = cli.run("--engine", "replay", "--completions", "gold", "--json")
    assert json.loads(out)[0]["metrics"]["right"]["value"] == 1.0
    path = write_completions(tmp_path / "mine.jsonl", 20)
    _, out, _ = cli.run("--engine", "replay", "--completions", path, "--completions", path, "--json")
    (row,) = json.loads(out)
    assert (row["total"], row["metrics"]["right"]["value"]) == (40, 1.0)
    assert row["run_id"].startswith("sums-mine+mine-")


def test_one_file_serves_several_suites(cli: Cli, tmp_path: Path) -> None:
    path = write_completions(tmp_path / "c.jsonl", 20)
    text = path.read_text()
    line = cli.error("run", "--engine", "replay", "--completions", path, "--suite", "both")
    assert "20 of 40 problems have fewer than 1 completions, first 'Product/0' with 0" in line
    path.write_text(text + text.replace("Sum", "Product"))
    arguments = ("run", "--suite", "both", "--engine", "replay", "--completions", path, "--results", cli.results)
    assert cli(*arguments)[0] == 0
    path.write_text(text.replace('"8"', '"9"') + text.replace("Sum", "Product"))
    _, _, err = cli(*arguments)
    assert re.search(r"products-c-.*complete already", err), "its own answers did not change"
    assert re.search(r"sums-c-.*20 of 20 samples judged", err)


def test_replay_error_lines(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    replay = ("run", "--engine", "replay", "--completions", path)
    assert "c.jsonl: No such file or directory" in cli.error(*replay)
    path.write_text('{"task_id": "Sum/0", "completion": "1"}\n{"task_id": "Sum/1", "compl\n')
    assert f"{path}:2: broken line, not JSON" in cli.error(*replay)
    write_completions(path, 3)
    assert "17 of 20 problems have fewer than 1 completions, first 'Sum/3' with 0" in cli.error(*replay)
    assert cli.run(*replay[1:], "--limit", "3")[0] == 0
    write_completions(path, 25)
    assert "5 of 25 task ids are not in the data, first 'Sum/20'" in cli.error(*replay)
    assert "gold stands alone" in cli.error(*replay, "--completions", "gold")


# --- run: error lines -----------------------------------------------------------------------------------

VALUES = {"loops": "2", "concurrency": "2", "retries": "1", "request_timeout": "3", "top_p": "0.5", "seed": "1"}
VALUES |= {"temperature": "0.5", "max_new_tokens": "5", "dtype": "float32", "device": "cpu", "api": "chat"}
VALUES |= {"decoder": "session", "attention": "sdpa", "compile": "on"}
VALUES |= {"loop_mode": "plt", "chat_template": "on", "batch_size": "2", "endpoint": "http://h/v1"}
VALUES |= {"tensor_parallel": "2", "max_model_len": "64", "gpu_memory_utilization": "0.5"}


@pytest.mark.parametrize(
    ("engine", "name"),
    [(engine, name) for name, engines in ONLY_WITH.items() for engine in ENGINES if engine not in engines],
)
def test_an_option_without_effect_is_an_error_that_names_it(cli: Cli, engine: str, name: str) -> None:
    flag = "--" + name.replace("_", "-")
    line = cli.error("run", "--engine", engine, flag, VALUES.get(name, "x"))
    assert line.startswith(f"{flag} has no effect with --engine {engine}: it belongs to --engine ")


def test_every_option_is_for_all_engines_or_listed() -> None:
    common = {"suite", "engine", "data", "limit", "n_samples", "results", "run_id", "sandbox"}
    common |= {"sandbox_image", "scoring_workers", "swe", "chosen", "ray"}
    assert set(RunOptions.__dataclass_fields__) == common | set(ONLY_WITH)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "openai", "--endpoint", "http://h/v1"], "--engine openai needs --api-model"),
        (["--engine", "replay"], "--engine replay needs --completions"),
        (["--model", "m", "--loops", "1,x"], "--loops '1,x': 'x' is no loop count"),
        (["--model", "m", "--loops", "0"], "--loops '0': '0' is not within 1 to 64"),
        (["--model", "m", "--loops", "3-1"], "--loops '3-1': '3-1' is not within 1 to 64, rising"),
        (["--model", "m", "--loops", ""], "--loops '': '' is no loop count"),
        (["--model", "m", "--n-samples", "2"], "--n-samples 2 at temperature 0"),
        (["--model", "m", "--seed", "2"], "--seed has no effect at temperature 0"),
        (["--model", "m", "--top-p", "0.5"], "--top-p has no effect at temperature 0"),
        (["--model", "m", "--temperature", "inf"], "--temperature inf: expected a finite number"),
        (["--model", "m", "--temperature", "1", "--top-p", "0"], "--top-p 0.0: expected a number above 0"),
        (["--model", "m", "--batch-size", "0"], "--batch-size '0': expected"),
        (["--model", "m", "--sandbox-image", "x"], "--sandbox-image has no effect with --sandbox bubblewrap"),
        (["--model", "m", "--data", "/nowhere/at/all"], "/nowhere/at/all: no such file"),
        (
            ["--engine", "openai", "--endpoint", "h", "--api-model", "m"],
            "--endpoint 'h': expected an address like http://127.0.0.1:8000/v1",
        ),
        (
            ["--engine", "openai", "--endpoint", "http://h/v1", "--api-model", "m", "--api-key-env", "NO_SUCH_KEY"],
            "--api-key-env NO_SUCH_KEY: no such environment variable",
        ),
        (
            ["--engine", "openai", "--endpoint", "http://h/v1", "--api-model", "m", "--request-timeout", "0"],
            "--request-timeout 0.0: expected a number of seconds above 0",
        ),
    ],
)
def test_mistakes_are_one_line(cli: Cli, arguments: list[str], message: str) -> None:
    assert message in cli.error("run", *arguments)
    assert not cli.results.exists(), "and nothing was begun"


@pytest.mark.parametrize(
    ("text", "counts"),
    [("2", [2]), ("1,2,4", [1, 2, 4]), ("1-4", [1, 2, 3, 4]), ("4, 1-2 ,1", [4, 1, 2]), ("64", [64])],
)
def test_loop_counts(text: str, counts: list[int]) -> None:
    assert parse_loops(text) == counts


@pytest.mark.parametrize("text", ["", ",", "1,", "-1", "1-", "1.5", "two", "1--2", "65", "0-2", "1-99999", "٢x"])
def test_bad_loop_counts(text: str) -> None:
    with pytest.raises(UserError, match="--loops"):
        parse_loops(text)


def test_a_damaged_run_names_file_and_line(cli: Cli) -> None:
    assert cli.run("--model", "m")[0] == 0
    (run,) = list_runs(cli.results)
    path = run.path / SAMPLES
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3][:20] + "\n", *lines[4:]]))
    assert f"{path}:4: damaged line" in cli.error("run", "--model", "m")


def test_results_that_cannot_be_written_are_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = cli.error("run", "--model", "m", "--results", tmp_path / "file")
    assert line == f"{tmp_path / 'file'}/{line.split('/')[-1].partition(':')[0]}: Not a directory"


def test_a_full_disk_is_one_line(cli: Cli, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 48_000)
    line = cli.error("run", "--model", "m", "--results", small_disk / "runs")
    assert re.search(r"disk full while writing .*; nothing lost, free space and run the same command again", line)


@pytest.mark.usefixtures("cli")
def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLT_EVAL_DEBUG", "1")
    with pytest.raises(UserError):
        main(["run", "--suite", "sums", "--loops", "x"])


@pytest.mark.usefixtures("cli")
def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("plt_benchmarks.registry.get_suite", fault)
    with pytest.raises(ZeroDivisionError):
        main(["run", "--suite", "sums", "--model", "m"])


# --- run: endpoints -------------------------------------------------------------------------------------


def endpoint(server: Server, *arguments: str) -> tuple[str, ...]:
    base = ("--engine", "openai", "--endpoint", server.url, "--api-model", "m", "--retries", "0")
    return ("run", *base, "--concurrency", "2", *arguments)


def test_an_endpoint_is_evaluated_and_the_key_stays_out_of_the_record(
    cli: Cli, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server.always = good("8\nand more")
    code, out, err = cli.run(*endpoint(server, "--api-key-env", "MY_KEY", "--api", "completions", "--json")[1:])
    assert code == 0, err
    assert json.loads(out)[0]["metrics"]["right"]["value"] == pytest.approx(1 / 20), "only 1 + 7 is 8"
    assert server.headers_seen[0]["Authorization"] == "Bearer sk-secret"
    files = [path for path in cli.results.rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert not any(b"secret" in path.read_bytes() for path in files)


def test_an_endpoint_that_answers_500_now_and_then_leaves_samples_missing(cli: Cli, server: Server) -> None:
    server.plan = [good("8"), status(500, "GPU on fire"), good("8")]
    code, out, err = cli.run(*endpoint(server, "--limit", "5")[1:])
    assert code == 1
    assert "1/5" in out
    assert "warning: 1 of 5 samples are missing" in err
    assert "HTTP 500: GPU on fire" in err
    asked = len(server.asked)
    code, out, _ = cli.run(*endpoint(server, "--limit", "5")[1:])
    assert (code, len(server.asked)) == (0, asked + 1), "only the missing one is asked for again"
    assert "missing" not in out


def test_what_an_endpoint_serves_is_recorded_as_of_an_engine_of_ours(cli: Cli, server: Server) -> None:
    """Reports know runs by weights and loops. A server of ours says its loops, any other one is believed."""
    server.always = good("8")
    own = Checkpoint("plt_eval/bundled/plt-tiny/r2", label="plt-tiny:r2", loops=3, loop_mode=None)
    expected = {"model": "plt-tiny:r2", "weights_sha256": own.weights_sha256, "loops": 3, "loop_mode": "plt"}
    for told in (None, "3"):
        server.loops = told
        more = () if told is None else ("--served-as", "another")
        code, _, err = cli.run(*endpoint(server, "--model", "plt-tiny:r2", "--loops", "3", *more)[1:])
        assert (code, "R=3" in err) == (0, False)
    for run in list_runs(cli.results):
        found = run.manifest.identity.engine_identity
        assert found == expected | {"api_model": "m", "endpoint": found["endpoint"], "api": "chat"}
        assert run.manifest.run_id.startswith("sums-plt-tiny-r2-r3-")


@pytest.mark.parametrize(
    ("told", "options", "message"),
    [
        (
            "2",
            ("--model", "plt-tiny:r2", "--loops", "3"),
            " runs R=2, expected R=3: --loops says so, or the checkpoint",
        ),
        ("3", ("--model", "plt-tiny:r2"), " runs R=3, expected R=2: --loops says so, or the checkpoint"),
        ("2", ("--loops", "2"), "--loops has no effect with --engine openai without --model"),
        ("2", ("--model", "plt-tiny", "--loops", "1,2"), "--loops 1,2: with --engine openai expected one"),
        ("2", ("--model", "plt-tiny"), "--model plt-tiny is 4 checkpoints, of which one is served: add --loops"),
        ("2", ("--model", "no/such"), "--model no/such: no such model folder"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_an_endpoint_that_serves_something_else_is_one_line(
    cli: Cli, server: Server, told: str, options: tuple[str, ...], message: str, several: bool
) -> None:
    server.loops, server.models = told, ["m"]
    more = ("--endpoint", server.url.replace("127.0.0.1", "localhost")) if several else ()
    assert message in cli.error(*endpoint(server, *options, *more))


def test_a_server_that_tells_its_loops_says_how_to_record_them(cli: Cli, server: Server) -> None:
    server.loops, server.always = "2", good("8")
    code, _, err = cli.run(*endpoint(server)[1:])
    assert (code, err.count(f"{server.url} runs R=2: `plt-eval run --model FOLDER --loops 2` records")) == (0, 1)
    (run,) = list_runs(cli.results)
    assert run.manifest.identity.loops is None


def test_an_endpoint_that_always_answers_500_is_one_line(cli: Cli, server: Server) -> None:
    server.always = status(500, "GPU on fire")
    line = cli.error(*endpoint(server))
    assert line.startswith(f"{server.url}: 16 requests in a row failed for good, the last with: HTTP 500: GPU on fire")


def test_an_endpoint_that_refuses_is_one_line(cli: Cli, server: Server) -> None:
    server.always = status(401, "wrong key")
    assert cli.error(*endpoint(server)) == f"{server.url}/chat/completions refused: HTTP 401: wrong key"
    (run,) = list_runs(cli.results)
    assert run.state() == "incomplete"


def test_a_suite_that_runs_no_code_runs_where_no_sandbox_can_be_opened(tmp_path: Path) -> None:
    nothing_installed = os.environ | {"PATH": str(tmp_path), "COLUMNS": "200"}
    replay = ("run", "--engine", "replay", "--completions", "gold", "--limit", "15", "--results", tmp_path / "runs")
    done = command(*replay, "--suite", "trace", env=nothing_installed)
    assert done.returncode == 0, done.stderr
    assert "100.0%" in done.stdout
    (stored,) = list_runs(tmp_path / "runs")
    assert stored.manifest.sessions[-1].sandbox == ""
    refused = command(*replay, "--suite", "demo", env=nothing_installed)
    assert refused.returncode == 2
    assert "bubblewrap is not installed" in refused.stderr


# --- ls, show, export, suites ---------------------------------------------------------------------------


def test_ls(stored: Path) -> None:
    done = command("ls", "--results", stored)
    assert done.returncode == 0
    rows = [re.split(r"\s*[│┃|]\s*", line)[1:-1] for line in done.stdout.splitlines() if "good-" in line]
    assert [row[:6] for row in rows] == [
        ["good-one", "sums", "adder", "2", "complete", "12/12"],
        ["good-two", "sums", "adder", "3", "incomplete", "11/12"],
    ]
    assert re.fullmatch(r"right \d+\.\d% \(n=12\)", rows[0][6])
    assert re.fullmatch(r"right \d+\.\d% \(n=11, 1 missing\)", rows[1][6])
    listed = json.loads(command("ls", "--results", stored, "--json").stdout)
    assert [row["run_id"] for row in listed] == ["good-one", "good-two"]
    assert "no runs in" in command("ls", "--results", stored / "none").stdout


def test_ls_lists_the_others_when_one_is_broken(stored: Path) -> None:
    (stored / "good-one" / "manifest.json").write_text("{")
    done = command("ls", "--results", stored)
    assert done.returncode == 0
    assert "good-two" in done.stdout
    assert "good-one/manifest.json: damaged" in done.stderr


def test_show_a_run(stored: Path) -> None:
    done = command("show", "good-o", "--results", stored)
    assert done.returncode == 0
    for text in ("complete, 12 of 12 samples done", "sums-1", "weights_sha256", "greedy", "share of right sums"):
        assert text in done.stdout
    assert "1 of 12 samples are missing" in command("show", stored / "good-two").stdout
    both = json.loads(command("show", "good-one", "--results", stored, "--json").stdout)
    assert both["manifest"]["run_id"] == both["metrics"]["run_id"] == "good-one"


def test_show_a_sample_and_the_failed_ones(cli: Cli, stored: Path) -> None:
    judged = {s.sample_id: s for s in list_runs(stored)[0].samples()}
    wrong = next(s for s in judged.values() if s.failed())
    _, out, _ = cli("show", "good-one", "--sample", wrong.sample_id, "--results", stored)
    for text in (f"{wrong.sample_id}#0", "prompt (text, its end)", "completion (stop, 1 tokens)", "right: fail"):
        assert text in out
    assert f'"expected": {wrong.detail["expected"]}' in out
    _, out, _ = cli("show", "good-one", "--failed", "--results", stored)
    count = sum(s.failed() for s in judged.values())
    assert 0 < count < 12
    assert f"{count} of 12 judged samples did not pass" in out
    assert all(f"{s.sample_id}#0 " in out for s in judged.values() if s.failed())
    _, out, _ = cli("show", "good-two", "--sample", "Sum/3#0", "--results", stored)
    assert "the toy engine was told to fail" in out
    assert "not judged yet" in out


def test_a_models_output_cannot_steer_the_terminal(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"task_id": "Sum/0", "completion": "\x1b[2Jé\r\x9b\ttab"}) + "\n")
    assert cli.run("--engine", "replay", "--completions", path, "--limit", "1")[0] == 0
    (run,) = list_runs(cli.results)
    _, out, _ = cli("show", run.path, "--sample", "Sum/0")
    assert "\\x1b[2Jé\\r\\x9b\ttab" in out
    assert not set("\x1b\r\x9b") & set(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good"], "'good' is the beginning of 2 runs: good-one, good-two"),
        (["god-one"], "no run 'god-one' in .*; did you mean good-one?"),
        (["zzz"], "no run 'zzz' in .* (it holds 2 runs)"),
        (["good-one", "--sample", "Sum/99"], "--sample Sum/99: no such sample in good-one; did you mean Sum/9?"),
        (["good-one", "--sample", "Sum/1", "--failed"], "exclude each other"),
    ],
)
def test_show_error_lines(cli: Cli, stored: Path, arguments: list[str], message: str) -> None:
    line = cli.error("show", *arguments, "--results", stored)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), line)


def test_export_evalplus(stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "samples.jsonl"
    done = command("export", "good-one", "--format", "evalplus", "--out", out, "--results", stored)
    assert (done.returncode, done.stdout) == (0, f"{out}: 12 samples\n")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["task_id"] for row in rows] == [f"Sum/{i}" for i in range(12)], "in natural order"
    judged = {s.sample_id: s.judged for s in list_runs(stored)[0].samples()}
    assert {row["task_id"]: row["solution"] for row in rows} == judged
    assert all(set(row) == {"task_id", "solution"} for row in rows)


def test_export_refuses_incomplete_runs_unless_told(cli: Cli, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    arguments = ("export", "good-two", "--format", "evalplus", "--out", out, "--results", stored)
    assert "good-two has 11 of 12 samples; complete it, or pass --partial" in cli.error(*arguments)
    assert not out.exists()
    assert cli(*arguments, "--partial")[0] == 0
    assert len(out.read_text().splitlines()) == 11


def test_extras() -> None:
    assert missing_packages("no-such-extra") == []
    assert needs(None) == "nothing"
    assert "evalplus" in str(_requirements())
    assert needs("code") in ("code: installed", "code: missing evalplus (pip install 'plt-eval[code]')")


def _requirements() -> list[str]:
    from importlib.metadata import requires

    return requires("plt-eval") or []


# --- signals ------------------------------------------------------------------------------------------

SLOW = """
import sys
sys.path.insert(0, sys.argv[1])
import plt_benchmarks.registry as registry
import plt_eval.sandbox as sandbox
from plt_eval.engines import ENGINES
from toy_parts import NoSandbox, SumSuite
sandbox.open_sandbox = lambda name, image=None: NoSandbox()
registry.get_suite = lambda name, options=None: [SumSuite(200, score_s=0.05)]
ENGINES["hf"] = ("toy_parts", "LoopEngine")
from plt_eval.cli.main import main
main(["run", "--suite", "sums", "--model", "m", "--results", sys.argv[2]])
"""


def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    line = [sys.executable, "-c", SLOW, str(Path(__file__).parent), str(tmp_path / "runs")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size for p in tmp_path.glob(f"runs/*/{SAMPLES}")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    last = err.splitlines()[-1]
    assert last.startswith("plt-eval: interrupted: ")
    assert "run the same command again to go on" in last
    assert "Traceback" not in err
