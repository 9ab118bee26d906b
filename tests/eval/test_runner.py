"""The runner: what it draws, what it judges, and what survives kills, Ctrl-C, faults and full disks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from toy_parts import NoSandbox, SumEngine, SumSuite

from plt_benchmarks.protocols import Sample, Sandbox, SandboxError, SandboxJob, Scorer
from plt_eval.engines.base import Decoding
from plt_eval.engines.replay import ReplayEngine
from plt_eval.errors import UserError
from plt_eval.journal import DiskFull
from plt_eval.runner import Result, RunInterrupted, Settings, run
from plt_eval.store import COMPLETIONS, METRICS, SAMPLES, list_runs, open_run

HERE = Path(__file__).parent


def evaluate(
    results: Path, suite: SumSuite | None = None, engine: SumEngine | None = None, **options: object
) -> Result:
    suite, engine = suite or SumSuite(), engine or SumEngine()
    settings = Settings(results, **options)  # type: ignore[arg-type]
    return run(suite, suite.load(None), engine, NoSandbox, settings, console=Console(file=io.StringIO()))


def numbers(result: Result) -> dict[str, object]:
    """All that must not depend on how a run came about."""
    return {**result.metrics.model_dump(), "run_id": None}


def keys(path: Path) -> list[tuple[str, int]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(row["sample_id"], row["index"]) for row in rows]


# --- plain runs -----------------------------------------------------------------------------------------


def test_every_sample_is_drawn_judged_and_counted(tmp_path: Path) -> None:
    suite, engine = SumSuite(20), SumEngine()
    result = evaluate(tmp_path, suite, engine, decoding=Decoding(temperature=0.5), n_samples=3)
    wanted = {(f"Sum/{i}", k) for i in range(20) for k in range(3)}
    assert sorted(keys(result.run.path / COMPLETIONS)) == sorted(keys(result.run.path / SAMPLES)) == sorted(wanted)
    assert len(engine.drawn) == len(suite.judged) == 60
    right = [sample.values["right"] for sample in result.run.samples()]
    assert 0 < sum(right) < 60, "the toy engine errs now and then"
    metric = result.metrics.metrics["right"]
    assert metric.value == pytest.approx(sum(right) / 60)
    assert (metric.n, result.metrics.problems, result.metrics.missing) == (20, 20, 0)
    assert result.run.manifest.status == "complete"
    assert result.run.manifest.run_id.startswith("sums-adder-r2-")
    first = next(result.run.completions())
    assert first.prompt_tail.endswith("= ")


def test_a_complete_run_is_read_not_repeated(tmp_path: Path) -> None:
    first = evaluate(tmp_path)
    suite, engine = SumSuite(), SumEngine()
    again = evaluate(tmp_path, suite, engine)
    assert again.reused
    assert not first.reused
    assert engine.drawn == suite.judged == []
    assert numbers(again) == numbers(first)
    assert again.run.manifest == first.run.manifest


def test_metrics_are_made_again_from_samples_alone(tmp_path: Path) -> None:
    first = evaluate(tmp_path)
    (first.run.path / METRICS).unlink()
    engine = SumEngine()
    again = evaluate(tmp_path, engine=engine)
    assert engine.drawn == []
    assert numbers(again) == numbers(first)


def test_the_order_of_completions_does_not_matter(tmp_path: Path) -> None:
    one = evaluate(tmp_path / "a", engine=SumEngine(), scoring_workers=1)
    two = evaluate(tmp_path / "b", engine=SumEngine(reverse=True), scoring_workers=7)
    assert keys(one.run.path / COMPLETIONS) == keys(two.run.path / COMPLETIONS)[::-1]
    assert numbers(one) == numbers(two)


def test_limit_takes_the_first_problems(tmp_path: Path) -> None:
    result = evaluate(tmp_path, limit=7)
    assert sorted(keys(result.run.path / SAMPLES)) == sorted((f"Sum/{i}", 0) for i in range(7))
    assert result.metrics.problems == 7
    assert evaluate(tmp_path, limit=100).run.path == evaluate(tmp_path).run.path, "a limit above all is none"
    assert len(list_runs(tmp_path)) == 2


@pytest.mark.parametrize(
    "options",
    [{"n_samples": 2}, {"decoding": Decoding(seed=3, temperature=1.0)}, {"limit": 5}],
    ids=["n_samples", "decoding", "limit"],
)
def test_other_settings_never_touch_a_stored_run(tmp_path: Path, options: dict[str, object]) -> None:
    first = evaluate(tmp_path)
    engine = SumEngine()
    other = evaluate(tmp_path, engine=engine, **options)
    assert other.run.path != first.run.path
    assert len(engine.drawn) == other.run.manifest.total


def test_a_changed_prompt_is_another_run_even_with_the_same_version(tmp_path: Path) -> None:
    class Politer(SumSuite):
        def prompt(self, sample: Sample):  # type: ignore[no-untyped-def]
            prompt = super().prompt(sample)
            return type(prompt)(prompt.text + " ", stop=prompt.stop)

    assert evaluate(tmp_path).run.path != evaluate(tmp_path, Politer()).run.path


def test_run_id_names_the_directory_and_says_what_differs(tmp_path: Path) -> None:
    assert evaluate(tmp_path, run_id="mine").run.path == tmp_path / "mine"
    assert evaluate(tmp_path, run_id="mine").reused
    with pytest.raises(UserError, match=r"mine holds another run; what differs: engine_identity\.loops: 2 -> 3"):
        evaluate(tmp_path, engine=SumEngine(loops=3), run_id="mine")


def test_two_problems_with_one_id_are_refused(tmp_path: Path) -> None:
    suite = SumSuite(2)
    data = suite.load(None)
    doubled = type(data)(data.samples + data.samples[:1], data.revision, data.sha256, data.source)
    with pytest.raises(UserError, match="two problems with one id"):
        run(suite, doubled, SumEngine(), NoSandbox, Settings(tmp_path))


def test_text_that_no_file_can_hold_is_mended(tmp_path: Path) -> None:
    suite = SumSuite(1)
    engine = ReplayEngine.gold([(suite, suite.load(None))])
    broken = ReplayEngine({"Sum/0": [type(engine._answers["Sum/0"][0])("0 \ud800 \U0001f600", False)]}, label="x")
    result = run(suite, suite.load(None), broken, NoSandbox, Settings(tmp_path))
    assert [c.text for c in result.run.completions()] == ["0 � \U0001f600"]


def test_generation_does_not_run_far_ahead_of_judging(tmp_path: Path) -> None:
    engine = SumEngine()
    ahead = []

    def before(_: Sample) -> None:
        time.sleep(0.005)
        ahead.append(len(engine.drawn) - len(ahead))

    evaluate(tmp_path, SumSuite(60, before=before), engine, scoring_workers=1)
    assert max(ahead) <= 8, "one judged, four waiting, one drawn, and the append in between"


# --- faults -------------------------------------------------------------------------------------------


def test_what_the_engine_gave_up_on_is_missing_not_wrong_and_tried_again(tmp_path: Path) -> None:
    whole = evaluate(tmp_path / "whole")
    lossy = SumEngine(fail=["Sum/3#0", "Sum/4#0"])
    out = io.StringIO()
    suite = SumSuite()
    part = run(
        suite, suite.load(None), lossy, NoSandbox, Settings(tmp_path / "b"), console=Console(file=out, width=300)
    )
    assert (part.metrics.missing, part.metrics.problems, part.metrics.metrics["right"].n) == (2, 18, 18)
    manifest = part.run.manifest
    assert (manifest.status, manifest.missing, manifest.done) == ("incomplete", 2, 18)
    assert manifest.missing_examples[0] == "Sum/3#0: the toy engine was told to fail"
    assert "warning: 2 of 20 samples are missing and not counted" in out.getvalue()
    engine = SumEngine()
    mended = evaluate(tmp_path / "b", engine=engine)
    assert engine.drawn == ["Sum/3#0", "Sum/4#0"]
    assert numbers(mended) == numbers(whole)
    assert mended.run.manifest.status == "complete"


def test_a_problem_with_a_missing_sample_is_left_out_of_the_metrics(tmp_path: Path) -> None:
    part = evaluate(tmp_path, engine=SumEngine(fail=["Sum/3#1"]), n_samples=2)
    assert (part.metrics.done, part.metrics.problems, part.metrics.metrics["right"].n) == (39, 19, 19)


def test_nothing_but_errors_gives_no_metrics(tmp_path: Path) -> None:
    part = evaluate(tmp_path, SumSuite(2), SumEngine(fail=["Sum/0#0", "Sum/1#0"]))
    assert part.metrics.metrics == {}
    assert part.metrics.missing == 2


def test_a_fault_of_the_judge_is_missing_not_wrong_and_judged_again(tmp_path: Path) -> None:
    whole = evaluate(tmp_path / "whole")

    def stumble(sample: Sample) -> None:
        if sample.id == "Sum/5":
            raise RuntimeError("the judge fell over")

    part = evaluate(tmp_path / "b", SumSuite(before=stumble))
    assert part.metrics.missing == 1
    assert part.run.manifest.missing_examples == ("Sum/5#0: judging raised RuntimeError: the judge fell over",)
    suite, engine = SumSuite(), SumEngine()
    mended = evaluate(tmp_path / "b", suite, engine)
    assert engine.drawn == [], "the completion was kept"
    assert suite.judged == ["Sum/5"]
    assert numbers(mended) == numbers(whole)


def test_a_broken_sandbox_ends_the_run_and_keeps_what_is_there(tmp_path: Path) -> None:
    def collapse(sample: Sample) -> None:
        if sample.id == "Sum/5":
            raise SandboxError("bubblewrap is gone")

    with pytest.raises(SandboxError, match="bubblewrap is gone"):
        evaluate(tmp_path, SumSuite(before=collapse), scoring_workers=1)
    (stored,) = list_runs(tmp_path)
    assert stored.state() == "incomplete"
    assert stored.metrics() is None
    assert stored.manifest.done == stored.done() > 0
    engine = SumEngine()
    again = evaluate(tmp_path, engine=engine)
    assert again.metrics.missing == 0
    assert len(engine.drawn) < 20
    assert numbers(again) == numbers(evaluate(tmp_path / "whole"))


class _TextSuite(SumSuite):
    """Says that it runs no code; keeps the sandbox that it is given, and gives it a program if told to."""

    runs_code = False

    def __init__(self, *, lies: bool = False) -> None:
        super().__init__(before=self._try if lies else None)
        self.sandbox: Sandbox | None = None

    def scorer(self, sandbox: Sandbox) -> Scorer:
        self.sandbox = sandbox
        return super().scorer(sandbox)

    def _try(self, _: Sample) -> None:
        assert self.sandbox is not None
        self.sandbox.run(SandboxJob("print()"))


def no_sandbox_here() -> Sandbox:
    raise SandboxError("nothing to run code in on this machine")


def run_without_sandbox(results: Path, suite: SumSuite) -> Result:
    settings = Settings(results, sandbox="bubblewrap", scoring_workers=1)
    return run(suite, suite.load(None), SumEngine(), no_sandbox_here, settings, console=Console(file=io.StringIO()))


def test_a_suite_that_runs_no_code_needs_no_sandbox(tmp_path: Path) -> None:
    result = run_without_sandbox(tmp_path / "text", _TextSuite())
    assert result.metrics.missing == 0
    assert [session.sandbox for session in result.run.manifest.sessions] == [""]
    with pytest.raises(SandboxError, match="nothing to run code in"):
        run_without_sandbox(tmp_path / "code", SumSuite())


def test_a_suite_that_runs_code_though_it_says_no_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match=r"^suite sums says that it runs no code, and gave the sandbox a program"):
        run_without_sandbox(tmp_path, _TextSuite(lies=True))


class _OddSuite(SumSuite):
    def scorer(self, sandbox):  # type: ignore[no-untyped-def]
        inner = super().scorer(sandbox)
        plain = inner.score

        def score(sample, answer):  # type: ignore[no-untyped-def]
            verdict = plain(sample, answer)
            if sample.id == "Sum/1":
                return type(verdict)({"right": True}, detail={"x": object()})
            if sample.id == "Sum/2":
                return type(verdict)({"right": float("inf")})
            return verdict

        inner.score = score
        return inner


def test_a_verdict_that_cannot_be_stored_is_that_samples_error(tmp_path: Path) -> None:
    part = evaluate(tmp_path, _OddSuite(4))
    assert part.metrics.missing == 2
    assert [text.partition(":")[0] for text in part.run.manifest.missing_examples] == ["Sum/1#0", "Sum/2#0"]


def test_an_engines_user_error_comes_through_and_the_run_goes_on_later(tmp_path: Path) -> None:
    class Refused(SumEngine):
        def generate(self, requests):  # type: ignore[no-untyped-def]
            for number, completion in enumerate(super().generate(requests)):
                if number == 6:
                    raise UserError("the endpoint refused")
                yield completion

    with pytest.raises(UserError, match="the endpoint refused"):
        evaluate(tmp_path, engine=Refused())
    engine = SumEngine()
    assert numbers(evaluate(tmp_path, engine=engine)) == numbers(evaluate(tmp_path / "whole"))
    assert len(engine.drawn) == 14


def test_what_is_judged_while_the_run_is_being_stopped_does_not_count(tmp_path: Path) -> None:
    # The signal that stops the run may have hit the judged program too, and made a right answer fail.
    began = threading.Event()

    class Stopped(SumEngine):
        def generate(self, requests):  # type: ignore[no-untyped-def]
            yield next(iter(super().generate(requests)))
            assert began.wait(10)
            raise KeyboardInterrupt

    suite = SumSuite(score_s=0.3, before=lambda _: began.set())
    with pytest.raises(RunInterrupted, match="stopped with 0 of 20 samples done"):
        evaluate(tmp_path, suite, Stopped())
    assert suite.judged == ["Sum/0"], "it was judged within the time that is given"
    (stored,) = list_runs(tmp_path)
    assert list(stored.samples()) == []
    assert len(list(stored.completions())) == 1


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 28_000)
    with pytest.raises(DiskFull, match=r"disk full while writing .*; nothing lost, free space"):
        evaluate(small_disk, SumSuite(400))
    (stored,) = list_runs(small_disk)
    kept = {c.key for c in stored.completions()}
    assert 0 < len(kept) < 400
    ballast.unlink()
    engine = SumEngine()
    with pytest.raises(DiskFull):
        evaluate(small_disk, SumSuite(400), engine)
    assert not kept & {(name[:-2], 0) for name in engine.drawn}, "nothing is drawn twice"
    assert {c.key for c in stored.completions()} > kept


# --- kills --------------------------------------------------------------------------------------------


def start(results: Path, log: Path, *, problems: int = 40, n_samples: int = 2, draw_s: float, score_s: float):  # type: ignore[no-untyped-def]
    command = [sys.executable, str(HERE / "toy_run.py"), str(results), str(log)]
    command += [str(problems), str(n_samples), str(draw_s), str(score_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_lines(process: subprocess.Popen[str], results: Path, name: str, count: int) -> Path:
    """Until some run's file has `count` lines; returns the run's directory."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in results.glob(f"*/{name}"):
            if path.read_bytes().count(b"\n") >= count:
                return path.parent
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    raise AssertionError(f"{name} never had {count} lines")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    suite = SumSuite(40)
    settings = Settings(tmp_path_factory.mktemp("whole"), Decoding(temperature=0.5), n_samples=2)
    return numbers(run(suite, suite.load(None), SumEngine(), NoSandbox, settings))


@pytest.mark.parametrize(
    ("name", "lines", "draw_s", "score_s"),
    [
        (COMPLETIONS, 1, 0.01, 0.05),  # judging lags: completions wait
        (COMPLETIONS, 30, 0.01, 0.05),
        (SAMPLES, 20, 0.02, 0.001),
        (SAMPLES, 79, 0.005, 0.001),  # right at the end
    ],
    ids=["first", "judging-lags", "middle", "end"],
)
@pytest.mark.parametrize("torn", [False, True], ids=["clean", "torn"])
def test_kill_9_at_any_moment_costs_only_what_was_in_flight(
    tmp_path: Path,
    uninterrupted: dict[str, object],
    name: str,
    lines: int,
    draw_s: float,
    score_s: float,
    torn: bool,
) -> None:
    results, log = tmp_path / "runs", tmp_path / "log"
    with start(results, log, draw_s=draw_s, score_s=score_s) as process:
        folder = wait_for_lines(process, results, name, lines)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode in (-signal.SIGKILL, 0), "at the last lines it may just have ended"
    drawn_before = log.read_text().splitlines()
    if torn:
        for journal in (COMPLETIONS, SAMPLES):
            with (folder / journal).open("ab") as stream:
                stream.write(b'{"sample_id": "Sum/39", "ind')
    kept = len(list(open_run(folder).completions()))
    with start(results, log, draw_s=0, score_s=0) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert folder.name in out
    again = log.read_text().splitlines()[len(drawn_before) :]
    assert len(again) == 80 - kept, "nothing that was stored is drawn again"
    assert len(drawn_before) - kept <= 1, "only the one in flight was lost"
    stored = open_run(folder)
    metrics = stored.metrics()
    assert metrics is not None
    assert {**metrics.model_dump(), "run_id": None} == uninterrupted
    assert stored.manifest.status == "complete"
    assert len(list(stored.samples())) == 80


def test_many_kills_in_a_row_still_end_with_the_same_metrics(tmp_path: Path, uninterrupted: dict[str, object]) -> None:
    results, log = tmp_path / "runs", tmp_path / "log"
    for number in range(6):
        with start(results, log, draw_s=0.02, score_s=0.01) as process:
            wait_for_lines(process, results, SAMPLES, 9 * (number + 1))
            os.killpg(process.pid, signal.SIGKILL)
    with start(results, log, draw_s=0, score_s=0) as process:
        process.communicate(timeout=60)
    (stored,) = list_runs(results)
    metrics = stored.metrics()
    assert metrics is not None
    assert {**metrics.model_dump(), "run_id": None} == uninterrupted
    assert stored.manifest.resumed == 6


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path: Path, uninterrupted: dict[str, object]) -> None:
    results, log = tmp_path / "runs", tmp_path / "log"
    with start(results, log, draw_s=0.05, score_s=0.01) as process:
        folder = wait_for_lines(process, results, SAMPLES, 5)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "run the same command again to go on" in err
    stored = open_run(folder)
    assert stored.state() == "incomplete"
    assert f"{stored.manifest.done} of 80 samples done" in err
    with start(results, log, draw_s=0, score_s=0) as process:
        process.communicate(timeout=60)
    metrics = open_run(folder).metrics()
    assert metrics is not None
    assert {**metrics.model_dump(), "run_id": None} == uninterrupted


def test_ctrl_c_does_not_wait_for_a_judgement_that_takes_minutes(tmp_path: Path) -> None:
    results, log = tmp_path / "runs", tmp_path / "log"
    with start(results, log, draw_s=0.001, score_s=300) as process:
        wait_for_lines(process, results, COMPLETIONS, 5)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 15


def test_two_processes_never_write_one_run(tmp_path: Path) -> None:
    results, log = tmp_path / "runs", tmp_path / "log"
    with start(results, log, draw_s=0.2, score_s=0.01) as first:
        folder = wait_for_lines(first, results, COMPLETIONS, 1)
        with start(results, log, draw_s=0, score_s=0) as second:
            _, err = second.communicate(timeout=30)
        assert second.returncode == 2
        assert err.count("\n") == 1
        assert str(folder) in err
        assert f"pid {first.pid}" in err
        os.killpg(first.pid, signal.SIGKILL)


def test_samples_are_appended_while_the_engine_is_still_busy(tmp_path: Path) -> None:
    results, log = tmp_path / "runs", tmp_path / "log"
    with start(results, log, draw_s=0.1, score_s=0.0) as process:
        folder = wait_for_lines(process, results, SAMPLES, 3)
        assert 3 <= len(keys(folder / COMPLETIONS)) < 20
        os.killpg(process.pid, signal.SIGKILL)


def test_no_thread_outlives_a_run(tmp_path: Path) -> None:
    before = threading.active_count()
    for number in range(3):
        evaluate(tmp_path, run_id=f"r{number}")
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
