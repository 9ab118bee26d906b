"""Suites terminal and terminal-2: the official runners' command line and files, resume, and what is refused.

The records in tests/fixtures/terminal were written by terminal-bench 0.2.18 and harbor 0.26.0 on tasks of two lines;
the runs here are made with a stand-in that takes the same command line and leaves files of the same form.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from bad_server import Server
from official_runner import harbor_row, tb_row, write_task

from plt_benchmarks.protocols import SuiteError
from plt_benchmarks.terminal import HARBOR, TB, TERMINAL, TERMINAL_2, UnreadableTrial, _harbor_trial, _tb_trial
from plt_eval.cli.main import main
from plt_eval.store import list_runs

RECORDS = Path(__file__).parents[1] / "fixtures" / "terminal"
ENDPOINT = ("--engine", "openai", "--endpoint", "http://127.0.0.1:9/v1", "--api-model", "some/model")


# --- the official files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "outcome", "error"),
    [
        ("tb_resolved", "resolved", None),
        ("tb_unresolved", "unresolved", None),
        ("tb_agent_broke", "", "the official runner broke off: unknown_agent_error"),
        ("harbor_resolved", "resolved", None),
        ("harbor_unresolved", "unresolved", None),
        ("harbor_endpoint_down", "", "no valid reward (InternalServerError"),
    ],
)
def test_records_that_the_official_runners_wrote(name: str, outcome: str, error: str | None) -> None:
    row = json.loads((RECORDS / f"{name}.json").read_text())
    trial = (_tb_trial if name.startswith("tb") else _harbor_trial)(name, row)
    assert (trial.task, trial.outcome) == ("say-bye", outcome)
    assert (trial.error is None) == (error is None)
    if error is not None:
        assert error in str(trial.error)
    assert trial.detail["started"] < trial.detail["ended"]


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"is_resolved": True, "failure_mode": "agent_timeout"}, "resolved"),
        ({"is_resolved": True, "failure_mode": "unknown_agent_error"}, "resolved"),
        ({"is_resolved": False, "failure_mode": "agent_timeout"}, "agent_timeout"),
        ({"is_resolved": None, "failure_mode": "test_timeout"}, "test_timeout"),
        ({"is_resolved": None, "failure_mode": "parse_error"}, "parse_error"),
        ({"is_resolved": False, "failure_mode": "context_length_exceeded"}, "context_length_exceeded"),
        ({"is_resolved": False, "failure_mode": "agent_installation_failed"}, ""),
        ({"is_resolved": None, "failure_mode": "unset"}, ""),
        ({"is_resolved": None, "failure_mode": "something new"}, ""),
    ],
)
def test_what_became_of_a_task_of_the_first(change: dict[str, Any], outcome: str) -> None:
    trial = _tb_trial("x", {**tb_row("task", "task.1-of-1.x", "resolved"), **change})
    assert trial.outcome == outcome
    assert (trial.error is None) == bool(outcome)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"exception_info": {"exception_type": "AgentTimeoutError"}}, "resolved"),
        (
            {"exception_info": {"exception_type": "AgentTimeoutError"}, "verifier_result": {"rewards": {"reward": 0}}},
            "agent_timeout",
        ),
        ({"verifier_result": {"rewards": {"reward": 0.5}}}, "unresolved"),
        ({"verifier_result": {"rewards": {"other": 1}}}, ""),
        ({"verifier_result": None, "reward_valid": False}, ""),
        ({"reward_valid": False}, ""),
    ],
)
def test_what_became_of_a_task_of_the_second(change: dict[str, Any], outcome: str) -> None:
    trial = _harbor_trial("x", {**harbor_row(Path("/t/task"), "task__x", "resolved"), **change})
    assert trial.outcome == outcome
    assert (trial.error is None) == bool(outcome)


@pytest.mark.parametrize(
    ("read", "change", "message"),
    [
        (_tb_trial, {"is_resolved": 1}, "expected 'is_resolved' to be bool, found 1"),
        (_tb_trial, {"task_id": None}, "expected 'task_id' to be str, found None"),
        (_tb_trial, {"total_input_tokens": True}, "expected 'total_input_tokens' to be int, found True"),
        (_harbor_trial, {"reward_valid": "yes"}, "expected 'reward_valid' to be bool, found 'yes'"),
        (_harbor_trial, {"finished_at": None}, "the trial was cut short"),
        (_harbor_trial, {"verifier_result": {"rewards": {"reward": "1"}}}, "expected 'reward' to be number, found '1'"),
        (_harbor_trial, {"task_id": "x"}, "expected 'task_id' to be dict, found 'x'"),
    ],
)
def test_records_that_are_not_in_the_official_form(read: Any, change: dict[str, Any], message: str) -> None:
    row = tb_row("t", "n", "resolved") if read is _tb_trial else harbor_row(Path("/t"), "n", "resolved")
    with pytest.raises(UnreadableTrial) as caught:
        read("the file", {**row, **change})
    assert str(caught.value).startswith("the file")
    assert message in str(caught.value)
    with pytest.raises(UnreadableTrial, match="expected an object, found list"):
        read("the file", [])


def test_a_file_that_is_being_written_is_no_trial_yet(tmp_path: Path) -> None:
    place = tmp_path / "task" / "task.1-of-1.x"
    place.mkdir(parents=True)
    (place / "results.json").write_text('{"task_id": "ta')
    assert list(TB.trials(tmp_path, ended=False)) == []
    [trial] = TB.trials(tmp_path, ended=True)
    assert trial.task == "task"
    assert "cannot be read" in str(trial.error)
    assert TB.projects(tmp_path) == ["task-1-of-1-x"]
    (tmp_path / "Task__AbC").mkdir()
    assert HARBOR.projects(tmp_path) == ["task__abc__env", "task__env"]


# --- tasks ----------------------------------------------------------------------------------------------------


def test_tasks_of_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_task(tmp_path / "deep" / "er", name, "task.yaml")
    data = TERMINAL.load(tmp_path)
    assert [sample.id for sample in data.samples] == ["a", "b"]
    assert TERMINAL.prompt(data.samples[0]).text == "Do a."
    assert data.notes == (f"{tmp_path / 'deep' / 'er'} has 2 tasks; terminal-bench-core==0.1.1 has 80",)
    (tmp_path / "deep" / "er" / "a" / "tests").mkdir()
    (tmp_path / "deep" / "er" / "a" / "tests" / "test.py").write_text("assert True\n")
    assert TERMINAL.load(tmp_path).sha256 != data.sha256


def test_folders_that_hold_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"expected folders with a task\.toml each, found none"):
        TERMINAL_2.load(tmp_path)
    with pytest.raises(SuiteError, match="expected a folder of tasks, found none"):
        TERMINAL.load(tmp_path / "nowhere")
    for part in ("one", "two"):
        write_task(tmp_path / part, "a", "task.toml")
    with pytest.raises(SuiteError, match="tasks in several folders"):
        TERMINAL_2.load(tmp_path)
    write_task(tmp_path / "odd", "a b", "task.toml")
    with pytest.raises(SuiteError, match="task 'a b': expected letters"):
        TERMINAL_2.load(tmp_path / "odd")
    write_task(tmp_path / "yaml", "a", "task.yaml")
    (tmp_path / "yaml" / "a" / "task.yaml").write_text("instruction: [\n")
    with pytest.raises(SuiteError, match="cannot be read"):
        TERMINAL.load(tmp_path / "yaml")
    (tmp_path / "yaml" / "a" / "task.yaml").write_text("instruction: 3\n")
    with pytest.raises(SuiteError, match="expected 'instruction' to be text, found 3"):
        TERMINAL.load(tmp_path / "yaml")


# --- runs -----------------------------------------------------------------------------------------------------


class Machine:
    """A machine with stand-ins for the runners and for Docker."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.programs, self.tasks = root, root / "bin", root / "tasks"
        self.programs.mkdir()
        self._capsys = capsys
        for name in ("tb", "harbor"):
            self.program(name, Path(__file__).with_name("official_runner.py").read_text())
        self.program(
            "docker", f"import sys\nopen({str(root / 'docker.log')!r}, 'a').write(repr(sys.argv[1:]) + '\\n')\n"
        )
        monkeypatch.setenv("PATH", f"{self.programs}:{os.environ['PATH']}")
        monkeypatch.setenv("PLT_EVAL_ENVIRONMENTS", str(root / "environments"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere")
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(f"#!{sys.executable}\n{text}")
        (self.programs / name).chmod(0o755)

    def plan(self, **plan: str) -> None:
        """What tasks come to; the tasks themselves are made, too."""
        (self.programs / "plan.json").write_text(json.dumps(plan))
        for name in plan:
            for mark in ("task.yaml", "task.toml"):
                write_task(self.tasks, name, mark)

    def calls(self) -> list[dict[str, Any]]:
        log = self.programs / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def asked(self) -> list[list[str]]:
        """The tasks that each call was for."""
        flags = ("--task-id", "--include-task-name")
        return [[v for k, v in zip(c["argv"], c["argv"][1:], strict=False) if k in flags] for c in self.calls()]

    def command(self, suite: str, *more: str) -> list[str]:
        place = ["--data", str(self.tasks), "--results", str(self.root / "runs")]
        return ["run", "--suite", suite, *ENDPOINT, *place, "--workers", "2", *more]

    def run(self, suite: str, *more: str) -> tuple[int, str, str]:
        return self.plt_eval(*self.command(suite, *more))

    def plt_eval(self, *arguments: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = self._capsys.readouterr()
        return int(caught.value.code or 0), out, err

    @property
    def folder(self) -> Path:
        [folder] = (self.root / "runs").iterdir()
        return folder

    def start(self, suite: str) -> subprocess.Popen[bytes]:
        """The command as a process, once the runner hangs."""
        command = [sys.executable, "-m", "plt_eval", *self.command(suite)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (self.programs / "hangs").exists() or not self._drawn():
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    def _drawn(self) -> bool:
        return any(path.read_text().count("\n") for path in self.root.glob("runs/*/samples.jsonl"))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("suite", ["terminal", "terminal-2"])
def test_what_is_served_is_recorded_and_checked(machine: Machine, server: Server, suite: str) -> None:
    machine.plan(one="resolved", two="resolved", three="resolved")
    command = machine.command(suite, "--model", "plt-tiny:r2", "--loops", "3", "--json")
    command[command.index("http://127.0.0.1:9/v1")] = server.url
    server.models, server.loops = ["some/model"], "2"
    code, _, err = machine.plt_eval(*command)
    assert (code, f"{server.url} runs R=2, expected R=3" in err, machine.calls()) == (2, True, [])
    server.loops = "3"
    code, _, err = machine.plt_eval(*command)
    assert code == 0, err
    (run,) = list_runs(machine.root / "runs")
    identity = run.manifest.identity.engine_identity
    told = {name: identity[name] for name in ("model", "api_model", "loops")}
    assert told == {"model": "plt-tiny:r2", "api_model": "some/model", "loops": 3}


@pytest.mark.parametrize("suite", ["terminal", "terminal-2"])
def test_the_runner_is_asked_once_and_its_verdicts_are_stored(machine: Machine, suite: str) -> None:
    late = "agent_timeout" if suite == "terminal" else "AgentTimeoutError"
    machine.plan(one="resolved", two="unresolved", three=late)
    code, out, err = machine.run(suite, "--json", "--agent-steps", "7", "--temperature", "0.5")
    assert code == 0, err
    [told] = json.loads(out)
    metrics = told["metrics"]
    assert metrics[f"{suite}.resolved"]["value"] == pytest.approx(1 / 3)
    assert metrics[f"{suite}.outcome/agent_timeout"]["n"] == 3
    [call] = machine.calls()
    program = {"terminal": "tb", "terminal-2": "harbor"}[suite]
    assert call["argv"][:2] == [program, "run"]
    pairs = list(zip(call["argv"], call["argv"][1:], strict=False))
    steps = "max_episodes=7" if suite == "terminal" else "max_turns=7"
    for pair in (
        ("--agent", "terminus-2"),
        ("--model", "openai/some/model"),
        ("--n-concurrent", "2"),
        ("--agent-kwarg", "api_base=http://127.0.0.1:9/v1"),
        ("--agent-kwarg", "temperature=0.5"),
        ("--agent-kwarg", steps),
    ):
        assert pair in pairs, pair
    assert call["env"] == {
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": None,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    assert [sorted(tasks) for tasks in machine.asked()] == [["one", "three", "two"]]
    assert machine.run(suite, "--agent-steps", "7", "--temperature", "0.5")[0] == 0
    assert len(machine.calls()) == 1
    code, out, _ = machine.plt_eval("ls", "--results", str(machine.root / "runs"))
    assert f"{suite}.resolved 33.3% (n=3)" in out
    code, out, _ = machine.plt_eval("show", str(machine.folder), "--sample", "two")
    assert '"outcome": "unresolved"' in out
    assert '"files": "official/001/plt-' in out
    assert "Do two." in out


def test_the_key_goes_through_the_environment_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-thing")
    machine.plan(one="resolved")
    assert machine.run("terminal", "--api-key-env", "MY_KEY")[0] == 0
    [call] = machine.calls()
    assert call["env"]["OPENAI_API_KEY"] == "secret-thing"
    assert "secret-thing" not in json.dumps(call["argv"])
    stored = [path.read_text() for path in machine.folder.rglob("*.json*")]
    assert not any("secret-thing" in text for text in stored)


@pytest.mark.parametrize(
    ("suite", "broken"), [("terminal", "broke"), ("terminal", "unknown_agent_error"), ("terminal-2", "RuntimeError")]
)
def test_what_the_infrastructure_broke_is_missing_and_done_again(machine: Machine, suite: str, broken: str) -> None:
    machine.plan(one="resolved", two=broken)
    code, out, err = machine.run(suite, "--json")
    assert code == 1
    [told] = json.loads(out)
    assert told["metrics"][f"{suite}.resolved"] == told["metrics"][f"{suite}.resolved"] | {"value": 1.0, "n": 1}
    assert "1 of 2 samples are missing and not counted" in err
    assert "two#0: infrastructure: " in err
    machine.plan(one="unresolved", two="unresolved")  # the first is not asked about again
    code, out, err = machine.run(suite, "--json")
    assert code == 0, err
    assert json.loads(out)[0]["metrics"][f"{suite}.resolved"]["value"] == 0.5
    assert [sorted(tasks) for tasks in machine.asked()] == [["one", "two"], ["two"]]


def test_a_runner_that_ends_early_says_why(machine: Machine) -> None:
    machine.plan(one="resolved")
    machine.program("tb", "import sys\nprint('Error: the runner has a bad day')\nsys.exit(3)\n")
    code, _, err = machine.run("terminal")
    assert code == 1
    assert "one#0: infrastructure: the official runner ended with exit code 3: Error: the runner has a bad day" in err


@pytest.mark.parametrize("suite", ["terminal", "terminal-2"])
def test_killed_it_goes_on_with_what_was_not_judged(machine: Machine, suite: str) -> None:
    machine.plan(one="resolved", two="hang", three="unresolved")
    process = machine.start(suite)
    process.kill()
    process.wait()
    runner = machine.calls()[0]["pid"]
    deadline = time.monotonic() + 20
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(runner).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the runner outlives us"
            time.sleep(0.05)
    machine.plan(one="unresolved", two="resolved", three="unresolved")
    code, out, err = machine.run(suite, "--json")
    assert code == 0, err
    assert json.loads(out)[0]["metrics"][f"{suite}.resolved"]["value"] == pytest.approx(2 / 3)
    assert machine.asked()[1] == [name for name in machine.asked()[0] if name not in _before(machine.asked()[0], "two")]
    assert "com.docker.compose.project" in (machine.root / "docker.log").read_text()


def _before(names: list[str], name: str) -> list[str]:
    return names[: names.index(name)]


def test_a_verdict_that_was_not_recorded_is_taken_from_the_session_that_was_killed(machine: Machine) -> None:
    machine.plan(one="resolved", two="hang")
    process = machine.start("terminal")
    process.kill()
    process.wait()
    for name in ("samples.jsonl", "completions.jsonl"):
        (machine.folder / name).unlink()
    machine.plan(one="unresolved", two="unresolved")
    assert machine.run("terminal")[0] == 0
    assert machine.asked()[1] == ["two"]


def test_interrupted_it_ends_the_runner(machine: Machine) -> None:
    machine.plan(one="resolved", two="hang")
    process = machine.start("terminal")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"stopped with 1 of 2 samples done; run the same command again to go on" in err
    assert not Path(f"/proc/{machine.calls()[0]['pid']}").exists()


@pytest.mark.parametrize("suite", ["terminal", "terminal-2"])
def test_the_tasks_are_fetched_by_the_official_runner_and_kept(machine: Machine, suite: str) -> None:
    machine.plan(one="resolved")
    command = ["run", "--suite", suite, *ENDPOINT, "--results", str(machine.root / "runs")]
    assert machine.plt_eval(*command)[0] == 0
    assert machine.plt_eval(*command)[0] == 0
    assert [call["argv"][1:3] for call in machine.calls() if "download" in call["argv"]] == [
        ["datasets" if suite == "terminal" else "dataset", "download"]
    ]
    shutil.rmtree(machine.root / "cache")
    machine.plan(one="resolved", offline="x")
    code, _, err = machine.plt_eval(*command)
    assert code == 2
    assert "cannot be reached; pass --data FOLDER, the folder of its tasks" in err.splitlines()[-1]
    assert not list((machine.root / "cache").rglob("terminal-bench*"))


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "more", "message"),
    [
        ("terminal", ("--n-samples", "2", "--temperature", "1"), "--n-samples has no effect on suite terminal"),
        ("terminal", ("--concurrency", "3"), "--concurrency has no effect on suite terminal: use --workers"),
        (
            "terminal",
            ("--seed", "1", "--temperature", "1"),
            "--seed has no effect on suite terminal: the official agent",
        ),
        ("terminal", ("--max-new-tokens", "9"), "--max-new-tokens has no effect on suite terminal"),
        ("terminal", ("--api", "completions"), "--api completions has no effect on suite terminal"),
        ("terminal", ("--gold",), "--gold has no effect on suite terminal"),
        ("terminal", ("--keep-images", "none"), "--keep-images has no effect on suite terminal"),
        ("terminal-2", ("--agent-wall-time", "9"), "--agent-wall-time has no effect on suite terminal-2"),
        ("terminal-2", ("--test-timeout", "9"), "--test-timeout has no effect on suite terminal-2"),
        ("terminal", ("--instances", "on"), "--instances: no instance 'on'"),
        ("terminal", ("--endpoint", "http://h/v1?a=b"), "takes no address with '=' in it"),
        ("terminal", ("--endpoint", "http://h/v1"), "suite terminal takes one --endpoint: the official runner"),
        ("terminal", ("--model", "m"), "--model m: no such model folder"),
        ("terminal", ("--num-fewshot", "1"), "--num-fewshot has no effect on suite terminal"),
    ],
)
def test_options_without_an_effect(machine: Machine, suite: str, more: tuple[str, ...], message: str) -> None:
    machine.plan(one="resolved")
    code, out, err = machine.run(suite, *more)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert machine.calls() == []


def test_other_engines_are_refused_in_one_line(machine: Machine) -> None:
    code, _, err = machine.plt_eval("run", "--suite", "terminal", "--model", "plt-tiny:r2")
    assert code == 2
    assert "suite terminal needs --engine openai, found --engine hf" in err.splitlines()[-1]


def test_what_is_not_installed_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.plan(one="resolved")
    broken = "import sys\nsys.exit(sys.argv[1] == 'compose' and 'unknown command: docker compose')\n"
    machine.program("docker", broken)
    code, _, err = machine.run("terminal")
    assert code == 2
    assert "needs Docker Compose 2 (`docker compose`; Docker's package docker-compose-plugin): unknown command" in err
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    if shutil.which("tb") is None:
        code, _, err = machine.run("terminal")
        assert code == 2
        assert "needs the official runner 'tb': plt-eval install terminal, or put it on PATH" in err.splitlines()[-1]


def test_the_version_of_the_installation_names_the_run(machine: Machine) -> None:
    venv = machine.root / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "lib" / "python3.12" / "site-packages" / "terminal_bench-9.8.7.dist-info").mkdir(parents=True)
    shutil.move(machine.programs / "tb", venv / "bin" / "tb")
    (machine.programs / "tb").symlink_to(venv / "bin" / "tb")
    assert TB.version(TB.executable()) == "9.8.7"
    assert HARBOR.version(HARBOR.executable()) == "unknown"


def test_mind2web_says_why_it_cannot_run(machine: Machine) -> None:
    code, out, err = machine.plt_eval("run", "--suite", "mind2web", "--model", "plt-tiny:r2")
    assert (code, out) == (2, "")
    assert "suite mind2web cannot run: its official evaluation is no installable package" in err.splitlines()[-1]
