"""Judging over machines: the same metrics as here, whatever dies meanwhile, and one line where it cannot be."""

from __future__ import annotations

import http.server
import io
import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from lcb_programs import ANSWER, SUMS
from ray_nodes import added
from rich.console import Console
from toy_cluster import SMALL, ToyRecipe
from toy_parts import NoSandbox, SumEngine, SumSuite

import plt_eval.cli.evaluate as commands
import plt_eval.cluster.connection as connecting
import plt_eval.cluster.patches as patches
import plt_eval.cluster.scorer as scoring
from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import Sample, Suite
from plt_benchmarks.registry import get_suite
from plt_eval.cli.options import RunOptions, check_lm_eval, check_swe
from plt_eval.cluster.connection import check_address
from plt_eval.cluster.machines import Needs
from plt_eval.cluster.opening import open_scorer, recipe_of
from plt_eval.cluster.orders import differences
from plt_eval.errors import MissingExtra, UserError
from plt_eval.runner import Result, Settings, run
from plt_eval.store import list_runs
from plt_eval.swe.command import SweOptions

pytestmark = pytest.mark.usefixtures("only_judges")
SLEEPER = "import time\n\ndef {name}(*_):\n    time.sleep(600)\n"


@pytest.fixture
def connected(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The cluster's address, for commands in this process; it stays connected."""
    monkeypatch.setattr(commands, "_connections", {cluster.address: cluster.connection})
    return str(cluster.address)


def evaluated(results: Path, suite: str, completions: Path, **options: Any) -> tuple[Result, str]:
    """One run of stored completions, and what was said."""
    said = io.StringIO()
    asked = RunOptions(suite, engine="replay", completions=(str(completions),), results=results, **options)
    (result,) = commands.evaluate(asked, Console(file=said, width=500))
    return result, said.getvalue()


def verdicts(result: Result) -> dict[str, Any]:
    """All of the verdicts, without who gave them."""
    told = {}
    for sample in result.run.samples():
        detail = {name: value for name, value in sample.detail.items() if name != "judged_on"}
        told[sample.sample_id] = (sample.values, sample.judged, detail, sample.error)
    return told


def numbers(result: Result) -> dict[str, Any]:
    return {**result.metrics.model_dump(), "run_id": None}


def mixed_answers(path: Path, suite: Suite, data: Path | None, limit: int) -> Path:
    """The data's own answers, every third one spoilt."""
    rows = []
    for number, sample in enumerate(suite.load(data).samples[:limit]):
        gold = suite.gold(sample)
        assert gold is not None
        rows.append({"task_id": sample.id, "solution": gold.text if number % 3 else f"{gold.text[:-9]} nonsense("})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judged_on(result: Result) -> set[str]:
    return {sample.detail["judged_on"] for sample in result.run.samples()}


# --- the same metrics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "limit"),
    [
        ("demo", None, 8),
        ("trace", None, 30),
        pytest.param("humaneval", "humanevalplus", 12, marks=pytest.mark.slow),
        pytest.param("mbpp", "mbppplus", 12, marks=pytest.mark.slow),
        pytest.param("cruxeval-o", "cruxeval", 30, marks=pytest.mark.slow),
        pytest.param("cruxeval-i", "cruxeval", 30, marks=pytest.mark.slow),
        pytest.param("tools:simple", None, 12, marks=pytest.mark.slow),
    ],
)
def test_metrics_and_verdicts_are_those_of_a_local_run(
    connected: str, tmp_path: Path, name: str, folder: str | None, limit: int
) -> None:
    root = os.environ.get("PLT_EVAL_DATA")
    if folder is not None and root is None:
        pytest.skip("needs PLT_EVAL_DATA, a folder with benchmark data")
    (suite,) = get_suite(name)
    if not all(need.present for need in suite.needs()):
        pytest.skip(f"needs {suite.needs()[0].what}: {suite.needs()[0].mend}")
    data = Path(root) / folder if root and folder else None
    answers = mixed_answers(tmp_path / "answers.jsonl", suite, data, limit)
    here, _ = evaluated(tmp_path / "here", name, answers, data=data, limit=limit)
    there, said = evaluated(tmp_path / "there", name, answers, data=data, limit=limit, ray=connected)
    assert 0 < next(iter(there.metrics.metrics.values())).value < 1
    assert numbers(there) == numbers(here)
    assert verdicts(there) == verdicts(here)
    assert said.count("judges, 1 at a time") == 2
    assert len(judged_on(there)) == 2, "both machines judged"
    judges = there.run.manifest.sessions[-1].judges
    assert {judge.machine for judge in judges} == judged_on(there)
    assert sum(judge.judged for judge in judges) == limit
    assert all(judge.packages["plt-eval"] and judge.hardware for judge in judges)
    assert here.run.manifest.sessions[-1].judges == ()


def test_tests_travel_with_their_problem(connected: str, tmp_path: Path) -> None:
    """Of LiveCodeBench, whose samples otherwise say where in a file the tests are."""
    (tmp_path / "lcb.jsonl").write_text(json.dumps({**SUMS, "contest_date": "2024-01-02"}) + "\n")
    (tmp_path / "answers.jsonl").write_text(json.dumps({"task_id": SUMS["question_id"], "solution": ANSWER}) + "\n")
    result, _ = evaluated(
        tmp_path / "runs", "lcb-generation", tmp_path / "answers.jsonl", data=tmp_path / "lcb.jsonl", ray=connected
    )
    assert result.metrics.metrics["lcb-generation.pass@1"].value == 1.0
    (suite,) = get_suite("lcb-generation", SuiteOptions())
    (sample,) = suite.load(tmp_path / "lcb.jsonl").samples
    carried = suite.carried(sample)  # type: ignore[attr-defined]
    (tmp_path / "lcb.jsonl").unlink()
    assert str(tmp_path) not in repr(carried)


def test_a_run_begun_here_goes_on_there(connected: str, tmp_path: Path) -> None:
    (suite,) = get_suite("trace")
    answers = mixed_answers(tmp_path / "answers.jsonl", suite, None, 20)
    whole, _ = evaluated(tmp_path / "whole", "trace", answers, limit=20)
    begun, _ = evaluated(tmp_path / "runs", "trace", answers, limit=20)
    journal = begun.run.path / "samples.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:7]))
    there, _ = evaluated(tmp_path / "runs", "trace", answers, limit=20, ray=connected)
    assert numbers(there) == numbers(whole)
    assert sum(judge.judged for judge in there.run.manifest.sessions[-1].judges) == 13


# --- what dies ------------------------------------------------------------------------------------------


def toy_run(cluster: Any, results: Path, recipe: ToyRecipe, said: Callable[[str], None] = print) -> Result:
    """The toy suite on the cluster."""

    def elsewhere(suite: Suite) -> scoring.ClusterScorer:
        return open_scorer(cluster.connection, suite, recipe, "bubblewrap", None, said)  # type: ignore[arg-type]

    suite = SumSuite(recipe.problems)
    settings = Settings(results, elsewhere=elsewhere)
    return run(suite, suite.load(None), SumEngine(), NoSandbox, settings, console=Console(file=io.StringIO()))


def at_work(name: str = "ray::judge") -> list[psutil.Process]:
    """The processes of the cluster that judge now."""
    found = []
    for process in psutil.process_iter():
        try:
            if " ".join(process.cmdline()).startswith(name):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Meanwhile:
    """Calls `act` with the run's folder once `lines` verdicts are stored and `ready` says so."""

    def __init__(self, results: Path, lines: int, act: Callable[[Path], bool]) -> None:
        self.acted = False
        self._thread = threading.Thread(target=self._wait, args=(results, lines, act), daemon=True)
        self._thread.start()

    def _wait(self, results: Path, lines: int, act: Callable[[Path], bool]) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not self.acted:
            for path in results.glob("*/samples.jsonl"):
                if path.read_bytes().count(b"\n") >= lines:
                    self.acted = act(path.parent)
            time.sleep(0.02)

    def has_acted(self) -> bool:
        """When it is done: what it does may outlast the run."""
        self._thread.join()
        return self.acted


def assert_whole(result: Result, problems: int, tmp_path: Path) -> None:
    """Nothing is lost, no verdict is there twice, and the metrics are those of an undisturbed run."""
    keys = [json.loads(line)["sample_id"] for line in (result.run.path / "samples.jsonl").open()]
    assert sorted(keys) == sorted(f"Sum/{i}" for i in range(problems))
    suite = SumSuite(problems)
    undisturbed = run(suite, suite.load(None), SumEngine(), NoSandbox, Settings(tmp_path / "undisturbed"))
    assert numbers(result) == numbers(undisturbed)


def test_a_judge_that_is_killed_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    def kill(_: Path) -> bool:
        judges = at_work()
        if judges:
            judges[0].kill()
        return bool(judges)

    meanwhile = Meanwhile(tmp_path / "runs", 3, kill)
    result = toy_run(cluster, tmp_path / "runs", ToyRecipe(16, score_s=0.3))
    assert meanwhile.has_acted()
    assert_whole(result, 16, tmp_path)


def test_a_machine_that_dies_loses_nothing(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PAUSES_S", (0.5, 5.0, 20.0))
    mortal = added(cluster, {**SMALL, "num_cpus": 2})
    name = f"/{mortal.node_id[:6]}"

    def kill(folder: Path) -> bool:
        if name not in (folder / "samples.jsonl").read_text():
            return False
        cluster.remove_node(mortal, allow_graceful=False)
        return True

    meanwhile = Meanwhile(tmp_path / "runs", 3, kill)
    result = toy_run(cluster, tmp_path / "runs", ToyRecipe(24, score_s=0.4))
    assert meanwhile.has_acted()
    assert_whole(result, 24, tmp_path)
    assert len(judged_on(result)) == 3, "the dead one had judged, too"


def test_what_kills_its_judge_each_time_does_not_go_on_for_ever(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PAUSES_S", (0.0, 0.0, 0.0))
    result = toy_run(cluster, tmp_path / "runs", ToyRecipe(6, deadly="Sum/3"))
    assert result.metrics.missing == 1
    (missing,) = result.run.manifest.missing_examples
    assert missing.startswith("Sum/3#0: its judge died 4 times; the last time: WorkerCrashedError")
    again = toy_run(cluster, tmp_path / "runs", ToyRecipe(6))
    assert (again.metrics.missing, again.metrics.done) == (0, 6)


def sandboxes() -> list[psutil.Process]:
    return [process for judge in at_work() for process in judge.children(recursive=True) if "bwrap" in process.name()]


def wait_until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_killed_judge_leaves_no_sandbox_and_ctrl_c_ends_all(cluster: Any, tmp_path: Path) -> None:
    """By the command itself, with programs that sleep: what is judged is ended, and the results' stream stays clean."""
    (suite,) = get_suite("demo")
    names = {sample.id: sample.data["entry_point"] for sample in suite.load(None).samples[:2]}
    rows = [{"task_id": task, "solution": SLEEPER.format(name=name)} for task, name in names.items()]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "plt_eval", "run", "--suite", "demo", "--engine", "replay", "--limit", "2"]
    command += ["--completions", "answers.jsonl", "--ray", cluster.address, "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as told:
        before = wait_until(sandboxes)
        judge = next(judge for judge in at_work() if before[0] in judge.children(recursive=True))
        inside = judge.children(recursive=True)
        judge.kill()
        wait_until(lambda: not any(process.is_running() and process.status() != "zombie" for process in inside), 15)
        wait_until(sandboxes)
        told.send_signal(signal.SIGINT)
        out, err = told.communicate(timeout=60)
    assert told.returncode == 130, err
    assert out == ""
    assert "stopped with 0 of 2 samples done; run the same command again to go on" in err
    assert "Traceback" not in err
    wait_until(lambda: not sandboxes(), 15)


@pytest.mark.slow
def test_a_machine_that_comes_later_gets_work(cluster: Any, tmp_path: Path) -> None:
    """It is started here: Ray takes signals in the main thread alone, and a node dies with the thread it comes from."""
    begun = threading.Event()

    def begin(_: Path) -> bool:
        begun.set()
        return True

    with ThreadPoolExecutor(1) as threads:
        Meanwhile(tmp_path / "runs", 1, begin)
        running = threads.submit(toy_run, cluster, tmp_path / "runs", ToyRecipe(120, score_s=0.5))
        assert begun.wait(60)
        added = cluster.add_node(**SMALL)
        try:
            result = running.result(200)
        finally:
            cluster.remove_node(added)
    assert_whole(result, 120, tmp_path)
    assert any(name.endswith(f"/{added.node_id[:6]}") for name in judged_on(result))


# --- machines that cannot judge -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_machine_without_a_sandbox_or_with_other_code_is_left_out(cluster: Any, tmp_path: Path) -> None:
    import plt_benchmarks
    import plt_eval

    other = tmp_path / "other"
    for package in (plt_eval, plt_benchmarks):
        shutil.copytree(
            Path(package.__file__).parent, other / package.__name__, ignore=shutil.ignore_patterns("bundled")
        )
    (other / "plt_benchmarks" / "cruxeval.py").open("a").write("# changed since\n")
    path = SMALL["env_vars"]["PYTHONPATH"]
    bare = cluster.add_node(**{**SMALL, "env_vars": {"PYTHONPATH": path, "PATH": "/nowhere"}})
    changed = cluster.add_node(**{**SMALL, "env_vars": {"PYTHONPATH": f"{other}:{path}"}})
    said: list[str] = []
    try:
        result = toy_run(cluster, tmp_path / "runs", ToyRecipe(8, score_s=0.1), said.append)
    finally:
        cluster.remove_node(bare)
        cluster.remove_node(changed)
    assert_whole(result, 8, tmp_path)
    judges = result.run.manifest.sessions[-1].judges
    left_out = {judge.machine: judge.left_out for judge in judges if judge.left_out}
    assert len(left_out) == 2
    assert "bubblewrap is not installed" in left_out[_named(said, bare.node_id)]
    assert "it would not judge alike (plt-eval's own code: " in left_out[_named(said, changed.node_id)]
    assert not judged_on(result) & set(left_out)


def _named(said: list[str], node: str) -> str:
    (line,) = [line for line in said if f"/{node[:6]} is left out: " in line]
    return line.partition(" ")[0]


def test_ray_takes_sigterm_only_while_connected() -> None:
    """In a process of its own: Ray allows one connection, and the cluster's is open in this one."""
    program = (
        "import signal; from plt_eval.cluster.connection import connect\n"
        "told = lambda: signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "before = told(); connection = connect('local', at_once=1); during = told(); connection.close()\n"
        "print(before, during, told())\n"
    )
    command = [sys.executable, "-c", program]
    asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=200)
    assert asked.stdout.split() == ["True", "False", "True"]


def test_where_nobody_can_judge_one_line_says_so_at_once(connected: str, tmp_path: Path) -> None:
    """Patches need Docker, which no machine of this cluster declares."""
    row = {
        "repo": "mini/calc", "instance_id": "mini__calc-1", "base_commit": "0", "patch": "-", "test_patch": "",
        "problem_statement": "?", "version": "1", "FAIL_TO_PASS": "[]", "PASS_TO_PASS": "[]", "image": "mini:latest",
        "eval_script": "true", "log_parser": "parse_log_pytest", "eval_type": "pass_and_fail",
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = RunOptions(
        "swe", data=tmp_path / "rows.jsonl", results=tmp_path / "runs", ray=connected, swe=SweOptions(gold=True)
    )
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no machine can judge suite swe: \S+, \S+: it declares no Docker") as refused:
        commands.evaluate(options, Console(file=io.StringIO()))
    assert "\n" not in str(refused.value)
    assert time.monotonic() - began < 20
    (stored,) = list_runs(tmp_path / "runs")
    assert stored.state() == "incomplete"


def test_needs_are_counted_as_ray_does() -> None:
    needs = Needs(cpus=2, memory=1 << 30, docker=1)
    assert needs.slots({"CPU": 8.0, "memory": 6.0 * (1 << 30), "docker": 5.0}) == 4
    assert needs.slots({"CPU": 8.0, "memory": 2.5 * (1 << 30), "docker": 5.0}) == 2
    assert needs.slots({"CPU": 8.0, "memory": 6.0 * (1 << 30)}) == 0
    assert needs.lacking({"CPU": 1.0, "memory": 6.0 * (1 << 30), "docker": 5.0}) == "it has fewer than 2 CPUs for Ray"
    assert Needs().lacking({"CPU": 1.0, "memory": 2.0 * (1 << 30)}) == ""


def test_versions_that_differ_are_named() -> None:
    assert differences({"evalplus": "0.3.1", "code": "a"}, {"evalplus": "0.3.0", "code": "a"}) == [
        "evalplus: 0.3.0 there, 0.3.1 here"
    ]


# --- files of the harness -------------------------------------------------------------------------------


def test_files_come_back_and_the_largest_stay_where_all_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "MOST_IN_ALL", 100_000)
    (tmp_path / "judged" / "a").mkdir(parents=True)
    for name, size in (("a.log", 60_000), ("a/b.log", 50_000), ("report.json", 9)):
        (tmp_path / "judged" / name).write_bytes(b"x" * size)
    patches.unpack(patches.packed(tmp_path / "judged"), tmp_path / "back")
    there = {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*") if path.is_file()}
    assert there == {"a/b.log", "report.json"}


def test_of_what_another_machine_sends_only_files_are_kept_and_not_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tar(*members: tuple[str, bytes, int]) -> bytes:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            for name, kind, size in members:
                member = tarfile.TarInfo(name)
                member.type, member.size, member.linkname = kind, size, "report.json"
                archive.addfile(member, io.BytesIO(b"x" * size))
        return content.getvalue()

    links = [("link", tarfile.SYMTYPE, 0), ("hard", tarfile.LNKTYPE, 0), ("folder", tarfile.DIRTYPE, 0)]
    patches.unpack(tar(("report.json", tarfile.REGTYPE, 9), *links, ("pipe", tarfile.FIFOTYPE, 0)), tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.json"]
    with pytest.raises(tarfile.TarError):
        patches.unpack(tar(("../outside", tarfile.REGTYPE, 9)), tmp_path / "b")
    monkeypatch.setattr(patches, "MOST_IN_ALL", 1 << 20)
    with pytest.raises(OSError, match="more than 2 MiB"):
        patches.unpack(tar(("large", tarfile.REGTYPE, 3 << 20)), tmp_path / "b")
    assert not (tmp_path / "outside").exists()
    assert not list(tmp_path.glob("b/*"))


# --- addresses and options ------------------------------------------------------------------------------


@pytest.fixture
def web_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("address", ["here", "ray://", "host", "host:99999", "http://host:80/x"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UserError, match=r"expected local, auto, HOST:PORT or ray://HOST:PORT$"):
        check_address(address)


def test_an_address_where_no_ray_is_fails_within_seconds(web_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    began = time.monotonic()
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(UserError, match=r"^--ray \S+: nothing answers at \S+ \(Connection refused\)"):
            check_address(address)
    with pytest.raises(UserError, match=r"is no Ray$"):
        check_address(web_server)
    monkeypatch.setenv("RAY_ADDRESS", web_server)
    with pytest.raises(UserError, match=rf"^--ray auto: what answers at {web_server} is no Ray$"):
        check_address("auto")
    assert time.monotonic() - began < 12


def test_a_cluster_with_tls_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing to whoever comes without a certificate."""
    pytest.importorskip("ray")

    class Silent(socketserver.BaseRequestHandler):
        """Ends the connection when anything comes."""

        def handle(self) -> None:
            self.request.recv(1)

    with socketserver.TCPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        with pytest.raises(UserError, match=r"no Ray|nothing answers"):
            check_address(address)
        monkeypatch.setenv("RAY_USE_TLS", "1")
        check_address(address)
        server.shutdown()
    with pytest.raises(UserError, match="nothing answers"):
        check_address("127.0.0.1:1")


def test_a_cluster_that_may_want_a_token_is_told_of_in_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says no more than that it cannot connect."""
    ray = pytest.importorskip("ray")

    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(connecting, "check_address", lambda _: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(
        UserError, match=r"does not connect \(Failed .*\); where the cluster has a token, set RAY_AUTH_MODE"
    ):
        connecting.connect("10.0.0.1:6379", at_once=1)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UserError, match=r"does not connect \(Failed to connect to Ray cluster\)$"):
        connecting.connect("10.0.0.1:6379", at_once=1)


def test_without_ray_installed_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'plt-eval\[ray\]'$"):
        check_address("local")


def test_suites_that_others_judge_refuse_it() -> None:
    with pytest.raises(UserError, match=r"--ray has no effect on suite lm-eval: lm-eval scores all answers together"):
        check_lm_eval(RunOptions("lm-eval:gsm8k", ray="local"))
    terminal = RunOptions("terminal", engine="openai", endpoint=("http://x/v1",), api_model="m", ray="local")
    with pytest.raises(UserError, match=r"--ray has no effect on suite terminal: the official runner"):
        commands.evaluate(terminal, Console(file=io.StringIO()))
    check_swe("swe", RunOptions("swe", ray="local", scoring_workers=3), SweOptions(gold=True))
    with pytest.raises(UserError, match="--scoring-workers has no effect on suite swe"):
        check_swe("swe", RunOptions("swe", scoring_workers=3), SweOptions(gold=True))


def test_other_machines_make_the_suite_that_is_meant() -> None:
    for key in ("code", "reasoning", "tools:simple", "multilingual:js,java", "trace"):
        for suite in get_suite(key):
            made = recipe_of(suite, key, None).make()
            assert (made.name, made.version) == (suite.name, suite.version)
    (here,) = get_suite("multilingual")
    made = recipe_of(here, "multilingual", None).make()
    assert made.judged == here.judged == made.chosen  # type: ignore[attr-defined]
    assert made.version == here.version


def test_samples_are_held_once_and_no_longer_than_needed() -> None:
    put: list[Any] = []

    def store(value: Any) -> Any:
        put.append(value)
        return len(put)

    samples = scoring._Samples(store)
    sample = Sample("a", {})
    with samples.sent(sample, lambda it: it) as first, samples.sent(sample, lambda it: it) as second:
        assert first == second == 1
    with samples.sent(sample, lambda it: it) as third:
        assert third == 2
