"""The parts behind a verdict when they break: the judging process, the kept outputs, the sandbox."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from evalplus_parts import gold, own_problem

from plt_benchmarks.evalplus_judge.candidate import JudgingError
from plt_benchmarks.evalplus_judge.check import Request, write_expected
from plt_benchmarks.evalplus_judge.encoding import encode
from plt_benchmarks.evalplus_judge.oracle import Oracle
from plt_benchmarks.evalplus_judge.pool import JudgePool
from plt_benchmarks.evalplus_judge.problem import Problem
from plt_benchmarks.evalplus_judge.scorer import EvalPlusScorer
from plt_benchmarks.protocols import Answer, Sandbox, SandboxError, SandboxJob, SandboxLimits, SandboxOutcome

SAMPLE = own_problem("    return x + 1", [[1], [2]], task_id="Own/machinery")


class Watched:
    """A sandbox that counts its jobs, and may change them or what comes of them."""

    name = "watched"

    def __init__(self, inner: Sandbox) -> None:
        self.inner = inner
        self.jobs: list[SandboxJob] = []

    def run(self, job: SandboxJob) -> SandboxOutcome:
        self.jobs.append(job)
        return self.inner.run(job)


@pytest.fixture
def pool() -> Iterator[JudgePool]:
    found = JudgePool()
    yield found
    found.close()


def request_for(folder: Path, expected: list[object], outputs: list[object], **changes: object) -> Request:
    path = folder / "expected"
    values = [encode(value) for value in expected]
    write_expected(path, values, [0.0] * len(expected))
    inputs: list[list[object]] = [[i] for i in range(len(expected))]
    found = [encode(value) for value in outputs]
    return Request("humaneval", "f", 0, path, sum(map(len, values)), inputs, found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("expected", "outputs", "status"),
    [
        ([1, [2]], [1, [2]], "pass"),
        ([1, [2]], [True, [2.0]], "pass"),
        ([1, 2], [1, 3], "fail"),
        ([1, 2], [1], "fail"),
        ([1.0], [1.0 + 9e-7], "pass"),
        ([1.0], [1.0 + 2e-6], "fail"),
        ([[1.0]], [(1.0 + 1e-9,)], "fail"),
        ([(1, 2)], [[1, 2]], "fail"),
        ([None], [object()], "fail"),
        ([float("nan")], [float("nan")], "fail"),
        ([{"a": {1, 2}}], [{"a": {2, 1}}], "pass"),
        (["a"], ["b"], "fail"),
        ([[[]], [[], []], []], [[[]], [[], []], []], "pass"),
        ([[[], [1]]], [[[], [1]]], "pass"),
        ([[[1]], [()]], [[[]], [()]], "fail"),
        ([["", "a"]], [["", "a"]], "pass"),
    ],
)
def test_comparisons(
    expected: list[object], outputs: list[object], status: str, pool: JudgePool, tmp_path: Path
) -> None:
    assert pool.check(request_for(tmp_path, expected, outputs)) == status


def test_bytes_that_are_no_output_fail(pool: JudgePool, tmp_path: Path) -> None:
    request = request_for(tmp_path, [1], [1])
    for junk in (b"", b"junk", bytes(1000), encode(1) + b"x"):
        assert pool.check(Request(**{**vars(request), "outputs": [junk]})) == "fail"


def test_a_judge_that_dies_is_one_error_and_is_replaced(pool: JudgePool, tmp_path: Path) -> None:
    request = request_for(tmp_path, [1], [1])
    assert pool.check(request) == "pass"
    os.kill(pool.idle_pids()[0], signal.SIGKILL)
    with pytest.raises(JudgingError, match="the judge died"):
        pool.check(request)
    assert pool.check(request) == "pass"


def test_judges_are_reused_and_as_many_as_needed(pool: JudgePool, tmp_path: Path) -> None:
    request = request_for(tmp_path, [1], [1])
    for _ in range(5):
        assert pool.check(request) == "pass"
    assert len(pool.idle_pids()) == 1
    with ThreadPoolExecutor(3) as threads:
        assert set(threads.map(lambda _: pool.check(request), range(9))) == {"pass"}
    assert 1 <= len(pool.idle_pids()) <= 3


def test_closing_ends_the_judges(tmp_path: Path) -> None:
    pool = JudgePool()
    assert pool.check(request_for(tmp_path, [1], [1])) == "pass"
    (pid,) = pool.idle_pids()
    pool.close()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(JudgingError, match="closed"):
        pool.check(request_for(tmp_path, [1], [1]))


def test_a_judge_ends_with_its_harness() -> None:
    """However the harness ends."""
    program = (
        "import os, sys; from plt_benchmarks.evalplus_judge.pool import Judge\n"
        "print(Judge().pid, flush=True); os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    pid = int(found.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_missing_file_of_expected_outputs_is_an_error(pool: JudgePool, tmp_path: Path) -> None:
    request = request_for(tmp_path, [1], [1])
    request.expected.unlink()
    with pytest.raises(JudgingError, match="could not compare: FileNotFoundError"):
        pool.check(request)


class TestKeptOutputs:
    def test_they_are_computed_once_and_kept(self, sandbox: Sandbox, tmp_path: Path) -> None:
        problem = Problem.from_row("humaneval", SAMPLE.data)
        first = Watched(sandbox)
        with ThreadPoolExecutor(4) as threads:
            oracle = Oracle(first, tmp_path)
            found = list(threads.map(lambda _: oracle.expected(problem), range(4)))
        assert len(first.jobs) == 2  # one asks for the Python version inside
        assert all(expected == found[0] for expected in found)
        second = Watched(sandbox)
        again = Oracle(second, tmp_path).expected(problem)
        assert len(second.jobs) == 1
        assert again == found[0]
        assert found[0]["base"].path.exists()

    def test_another_problem_of_that_name_has_others(self, sandbox: Sandbox, tmp_path: Path) -> None:
        oracle = Oracle(sandbox, tmp_path)
        other = own_problem("    return x + 2", [[1], [2]], task_id="Own/machinery")
        paths = {oracle.expected(Problem.from_row("humaneval", s.data))["base"].path for s in (SAMPLE, other)}
        assert len(paths) == 2

    DAMAGE = {  # noqa: RUF012
        "half": b"",
        "json": b"{}",
        "junk": b"junk\n",
        "hash": b'{"sizes": [1], "times": [0], "sha256": ""}\n',
    }

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_a_damaged_file_is_computed_again(self, damage: bytes, sandbox: Sandbox, tmp_path: Path) -> None:
        problem = Problem.from_row("humaneval", SAMPLE.data)
        path = Oracle(sandbox, tmp_path).expected(problem)["plus"].path
        whole = path.read_bytes()
        path.write_bytes(damage or whole[: len(whole) // 2])
        scorer = EvalPlusScorer("humaneval", sandbox, Oracle(sandbox, tmp_path))
        assert all(scorer.score(SAMPLE, gold(SAMPLE)).values.values())
        sizes = [json.loads(content.partition(b"\n")[0])["sizes"] for content in (path.read_bytes(), whole)]
        assert sizes[0] == sizes[1]
        path.write_bytes(b"damaged while in use")
        assert "could not compare" in (scorer.score(SAMPLE, gold(SAMPLE)).error or "")
        assert all(scorer.score(SAMPLE, gold(SAMPLE)).values.values())
        scorer.close()

    def test_without_a_place_to_keep_them(self, sandbox: Sandbox, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        scorer = EvalPlusScorer("humaneval", sandbox, Oracle(sandbox, blocked / "folder"))
        assert all(scorer.score(SAMPLE, gold(SAMPLE)).values.values())
        scorer.close()

    def test_they_are_where_caches_belong(
        self, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        path = Oracle(sandbox).expected(Problem.from_row("humaneval", SAMPLE.data))["base"].path
        assert path.is_relative_to(tmp_path / "plt-eval")


class Broken(Watched):
    """A sandbox that does not run jobs, but what `outcome` says."""

    def __init__(self, inner: Sandbox, outcome: SandboxOutcome | SandboxError) -> None:
        super().__init__(inner)
        self.outcome = outcome

    def run(self, _: SandboxJob) -> SandboxOutcome:
        if isinstance(self.outcome, SandboxError):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (SandboxError("bwrap is gone"), "sandbox watched: bwrap is gone"),
        (SandboxOutcome("exited", 1, b"", b"No module named 'x'\n", 0.1), "(exit code 1): No module named 'x'"),
        (SandboxOutcome("wall_limit", None, b"", b"", 9.9), "(wall_limit): it said nothing"),
        (SandboxOutcome("exited", 0, b"pass\n" * 100, b"", 9.9), "did not come to run the program"),
    ],
)
def test_a_broken_sandbox_is_an_error_and_no_verdict(
    outcome: SandboxOutcome | SandboxError, message: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    good = EvalPlusScorer("humaneval", sandbox, Oracle(sandbox, tmp_path))
    assert all(good.score(SAMPLE, gold(SAMPLE)).values.values())
    good.close()
    scorer = EvalPlusScorer("humaneval", Broken(sandbox, outcome), Oracle(sandbox, tmp_path))
    score = scorer.score(SAMPLE, gold(SAMPLE))
    scorer.close()
    assert message in (score.error or "")
    assert "\n" not in (score.error or "")
    assert score.values == {}


class WithoutParser(Watched):
    """A sandbox whose Python lacks tree_sitter, as a bare container image does."""

    def run(self, job: SandboxJob) -> SandboxOutcome:
        hide = "import importlib.util as u\nfind = u.find_spec\n"
        hide += "u.find_spec = lambda name: None if 'tree' in name else find(name)\n"
        first = "from __future__ import annotations\n"
        return self.inner.run(SandboxJob(job.program.replace(first, first + hide), job.stdin, job.files, job.limits))


def test_without_the_parser_texts_are_an_error_and_solutions_are_judged(sandbox: Sandbox, tmp_path: Path) -> None:
    scorer = EvalPlusScorer("humaneval", WithoutParser(sandbox), Oracle(sandbox, tmp_path))
    assert all(scorer.score(SAMPLE, gold(SAMPLE)).values.values())
    score = scorer.score(SAMPLE, Answer("    return x + 1\n"))
    scorer.close()
    assert "in the sandbox has no tree_sitter, which evalplus.sanitize needs" in (score.error or "")


def test_evalplus_need_not_be_inside(sandbox: Sandbox, tmp_path: Path) -> None:
    """What is needed of it travels with the job."""

    class Without(Watched):
        def run(self, job: SandboxJob) -> SandboxOutcome:
            first = "from __future__ import annotations\n"
            program = job.program.replace(first, first + "import sys\nsys.modules['evalplus'] = None\n")
            return self.inner.run(SandboxJob(program, job.stdin, job.files, job.limits))

    scorer = EvalPlusScorer("humaneval", Without(sandbox), Oracle(sandbox, tmp_path))
    for answer in (gold(SAMPLE), Answer("    return x + 1\n")):
        assert all(scorer.score(SAMPLE, answer).values.values())
    scorer.close()


def test_a_low_hard_limit_on_the_stack_fails_nobody(sandbox: Sandbox, tmp_path: Path) -> None:
    """Under one, the official command scores every right answer as a timeout."""
    program = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, 64 << 20))
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from evalplus_parts import gold, own_problem
from plt_benchmarks.evalplus_judge.oracle import Oracle
from plt_benchmarks.evalplus_judge.scorer import EvalPlusScorer
from plt_eval.sandbox import open_sandbox
sandbox = open_sandbox({sandbox.name!r})
scorer = EvalPlusScorer("humaneval", sandbox, Oracle(sandbox, Path({str(tmp_path)!r})))
sample = own_problem("    return x + 1", [[1]])
score = scorer.score(sample, gold(sample))
scorer.close()
print(score.error, all(score.values.values()))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["None", "True"], found.stderr


def test_the_limits_of_a_job_follow_from_its_tests(sandbox: Sandbox, tmp_path: Path) -> None:
    watched = Watched(sandbox)
    scorer = EvalPlusScorer("humaneval", watched, Oracle(sandbox, tmp_path))
    scorer.score(SAMPLE, gold(SAMPLE))
    scorer.close()
    (job,) = watched.jobs
    assert job.limits.cpu_s >= 2 * 4.0
    assert job.limits.wall_s > job.limits.cpu_s
    assert job.limits.output_bytes < 1 << 25
    assert job.limits.address_space is SandboxLimits().address_space is None
    assert b"return x + 1" in job.stdin
    assert encode(2) not in job.stdin


def test_a_score_can_be_asked_for_while_others_are(sandbox: Sandbox, tmp_path: Path) -> None:
    """A slow sample holds nobody up."""
    scorer = EvalPlusScorer("humaneval", sandbox, Oracle(sandbox, tmp_path))
    scorer.score(SAMPLE, gold(SAMPLE))
    endless = Answer("def f(x):\n    while True: pass", solution=True)
    slow = threading.Thread(target=scorer.score, args=(SAMPLE, endless))
    slow.start()
    assert all(scorer.score(SAMPLE, gold(SAMPLE)).values.values())
    assert slow.is_alive()
    slow.join()
    scorer.close()
