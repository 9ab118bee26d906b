"""Scores in the real sandbox: what is right passes, what is wrong does not, whatever the machine is doing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from evalplus_parts import gold, own_problem

from plt_benchmarks.code import HUMANEVAL, MBPP, EvalPlusSuite
from plt_benchmarks.evalplus_judge import candidate as candidates
from plt_benchmarks.evalplus_judge.official import special_tasks
from plt_benchmarks.evalplus_judge.oracle import Oracle
from plt_benchmarks.evalplus_judge.scorer import EvalPlusScorer
from plt_benchmarks.protocols import Answer, Sample, Sandbox, Score

HUMANEVAL_TASKS = [0, 2, 8, 14, 21, 32, 38, 44, 50, 53, 71, 83, 99, 100, 115, 133, 151, 162, 163]
MBPP_SPECIAL = [2, 7, 111, 140, 232, 558, 579, 581, 737, 769, 787, 794]
MBPP_TASKS = [*MBPP_SPECIAL, 88, 124, 252, 392, 590, 630, 793]
ALL_PASS = dict.fromkeys(("base", "plus", "base_corrected", "plus_corrected"), True)


def assert_right(score: Score) -> None:
    assert score.error is None
    assert score.values == ALL_PASS, score.detail


def assert_wrong(score: Score) -> None:
    assert score.error is None
    assert not score.values["plus"], score.detail
    assert not score.values["plus_corrected"], score.detail


@pytest.mark.parametrize("task", HUMANEVAL_TASKS)
def test_humaneval_reference_solutions(
    task: int, humaneval: dict[str, Sample], humaneval_scorer: EvalPlusScorer
) -> None:
    sample = humaneval[f"HumanEval/{task}"]
    score = humaneval_scorer.score(sample, gold(sample))
    if task == 32:
        assert score.error is None
        assert score.values == {"base": False, "plus": False, "base_corrected": True, "plus_corrected": True}
        assert "official_fault" in score.detail
    else:
        assert_right(score)


@pytest.mark.parametrize("task", MBPP_TASKS)
def test_mbpp_reference_solutions(task: int, mbpp: dict[str, Sample], mbpp_scorer: EvalPlusScorer) -> None:
    sample = mbpp[f"Mbpp/{task}"]
    assert_right(mbpp_scorer.score(sample, gold(sample)))


def test_the_list_has_every_task_with_an_oracle_of_its_own(mbpp: dict[str, Sample]) -> None:
    special = special_tasks("MBPP_OUTPUT_NOT_NONE_TASKS") | special_tasks("MBPP_OUTPUT_SET_EQ_TASKS")
    special |= {"are_equivalent", "sum_div", "surface_Area", "digit_distance_nums"}
    known = {sample.data["entry_point"] for sample in mbpp.values()}
    assert special & known == {mbpp[f"Mbpp/{task}"].data["entry_point"] for task in MBPP_SPECIAL}


def test_the_task_of_a_gigabyte(mbpp: dict[str, Sample], mbpp_scorer: EvalPlusScorer) -> None:
    score = mbpp_scorer.score(mbpp["Mbpp/255"], gold(mbpp["Mbpp/255"]))
    assert score.error is None
    assert score.values == {"base": True, "plus": False, "base_corrected": True, "plus_corrected": True}


WRONG = {
    "empty": "",
    "blank": "\n \n",
    "no function": "x = 1",
    "stub": "def {entry}(*args):\n    pass",
    "raises": "def {entry}(*args):\n    raise ValueError",
    "no syntax": "def {entry}(",
    "null byte": "def {entry}(*args):\n    return '\0'",
    "surrogate": "x = '\ud800'",
    "constant": "def {entry}(*args):\n    return 12345",
    "class": "class {entry}:\n    def __init__(self, *args): pass",
    "generator": "def {entry}(*args):\n    yield 1",
    "not callable": "{entry} = 3",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("task", ["HumanEval/0", "HumanEval/32", "Mbpp/2", "Mbpp/581"])
def test_what_is_wrong_never_passes(
    name: str,
    task: str,
    humaneval: dict[str, Sample],
    mbpp: dict[str, Sample],
    humaneval_scorer: EvalPlusScorer,
    mbpp_scorer: EvalPlusScorer,
) -> None:
    sample = (humaneval | mbpp)[task]
    scorer = humaneval_scorer if task.startswith("HumanEval") else mbpp_scorer
    text = WRONG[name].replace("{entry}", sample.data["entry_point"])
    for answer in (Answer(text, solution=True), Answer(text, chat=True)):
        score = scorer.score(sample, answer)
        assert score.error is None
        assert not any(score.values.values()), score.detail


def test_an_empty_completion_never_passes(humaneval: dict[str, Sample], humaneval_scorer: EvalPlusScorer) -> None:
    for task in ("HumanEval/0", "HumanEval/53"):
        score = humaneval_scorer.score(humaneval[task], Answer(""))
        assert score.error is None
        assert not any(score.values.values())


def test_what_passes_base_alone_is_no_plus(mbpp: dict[str, Sample], mbpp_scorer: EvalPlusScorer) -> None:
    sample = mbpp["Mbpp/2"]
    text = f"""
known = {sample.data["base_input"]!r}
def similar_elements(a, b):
    assert [list(a), list(b)] in known
    return set(a) & set(b)
"""
    score = mbpp_scorer.score(sample, Answer(text, solution=True))
    assert score.values["base"] is True
    assert score.values["plus"] is False
    assert score.detail["why"]["plus"].endswith("AssertionError")


class TestOfficialTexts:
    """Model text becomes a program as the official command makes it."""

    COMPLETION = """\
    numbers = sorted(numbers)
    for a, b in zip(numbers, numbers[1:]):
        if b - a < threshold:
            return True
    return False
"""

    def test_completion(self, humaneval: dict[str, Sample], humaneval_scorer: EvalPlusScorer) -> None:
        from evalplus.sanitize import sanitize

        sample = humaneval["HumanEval/0"]
        text = self.COMPLETION + "\n\nThe function above sorts first.\n"
        score = humaneval_scorer.score(sample, Answer(text))
        assert_right(score)
        assert score.judged == sanitize(sample.data["prompt"].strip() + "\n" + text, "has_close_elements")
        assert score.detail["post_processing"] == "sanitized"

    def test_chat(self, humaneval: dict[str, Sample], humaneval_scorer: EvalPlusScorer) -> None:
        from evalplus.sanitize import sanitize

        sample = humaneval["HumanEval/0"]
        program = f"def unused():\n    return 1\n\n{sample.data['prompt'].strip()}\n{self.COMPLETION}"
        text = f"Sure!\n```python\n{program}\n```\nDone."
        score = humaneval_scorer.score(sample, Answer(text, chat=True))
        assert_right(score)
        assert score.judged == sanitize(text, "has_close_elements")
        assert "unused" not in score.judged

    def test_a_solution_is_left_alone(self, humaneval: dict[str, Sample], humaneval_scorer: EvalPlusScorer) -> None:
        answer = gold(humaneval["HumanEval/0"])
        score = humaneval_scorer.score(humaneval["HumanEval/0"], answer)
        assert score.judged == answer.text
        assert score.detail["post_processing"] == "none"

    def test_a_text_that_takes_too_long_is_judged_as_it_is(
        self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(candidates, "SANITIZE_CPU_S", 1)
        text = "def f(x):\n    return x\n" + "# a comment to make it long\n" * 3000
        tests = candidates.InputSet.official("base", [[1]], [0.0])
        found = candidates.run_candidate(sandbox, candidates.Candidate(text, "f", sanitize=True), [tests])
        assert found.post_processing == "timed out"
        assert found.program == text
        assert found.sets["base"].ended == "complete"

    def test_a_text_that_breaks_it_is_judged_as_it_is(self, sandbox: Sandbox) -> None:
        tests = candidates.InputSet.official("base", [[1]], [0.0])
        found = candidates.run_candidate(sandbox, candidates.Candidate("x = '\ud800'", "f", sanitize=True), [tests])
        assert found.post_processing == "failed"
        assert found.program == "x = '\ud800'"


class TestTheOfficialEnvironment:
    """A program finds what the official command lets it find, and nothing more."""

    @pytest.mark.parametrize(
        "body",
        [
            "    return open('/etc/hostname').read() and x",
            "    import os; os.system('true'); return x",
            "    import os; os.getcwd(); return x",
            "    import subprocess; subprocess.run(['true']); return x",
            "    import resource; return x",
            "    import psutil; return x",
            "    return input() or x",
            "    exit(); return x",
        ],
    )
    def test_what_the_official_guard_takes_away(self, body: str, humaneval_scorer: EvalPlusScorer) -> None:
        sample = own_problem("    return x", [[1]])
        assert_right(humaneval_scorer.score(sample, gold(sample)))
        assert_wrong(humaneval_scorer.score(sample, Answer("def f(x):\n" + body, solution=True)))

    @pytest.mark.parametrize(
        "body",
        [
            "    import numpy as np; return int(np.sum(np.array([x])))",
            "    import multiprocessing, concurrent.futures, asyncio; return x",
            "    import collections, heapq, itertools, re, math, random, datetime, decimal, statistics; return x",
            "    print('noise'); import sys; print('noise', file=sys.stderr); sys.stdout.flush(); return x",
            "    import os; os.write(1, b'noise'); os.write(2, b'noise'); return x",
            "    assert __name__ == 'builtins'; return x",
            "    import threading; t = threading.Thread(target=print); t.start(); t.join(); return x",
            "    import time; time.sleep(1.5); return x",
        ],
    )
    def test_what_stays(self, body: str, humaneval_scorer: EvalPlusScorer) -> None:
        sample = own_problem("    return x", [[1]])
        assert_right(humaneval_scorer.score(sample, Answer("def f(x):\n" + body, solution=True)))

    def test_every_set_begins_anew(self, humaneval_scorer: EvalPlusScorer) -> None:
        sample = own_problem("    return x", [[1], [1]])
        fresh = "calls = []\ndef f(x):\n    calls.append(x)\n    assert len(calls) <= 2\n    return x"
        assert_right(humaneval_scorer.score(sample, Answer(fresh, solution=True)))

    def test_sets_come_in_the_same_order_every_time(self, humaneval_scorer: EvalPlusScorer) -> None:
        sample = own_problem("    return ''.join(set('parallel loops'))", [[1]])
        verdicts = [humaneval_scorer.score(sample, gold(sample)).values for _ in range(3)]
        assert verdicts == [ALL_PASS] * 3

    def test_recursion_is_as_deep_as_officially(self, humaneval_scorer: EvalPlusScorer) -> None:
        """In the official command a call stands on 27 frames, of 1000."""
        deep = "def g(n):\n    return 0 if n == 0 else 1 + g(n - 1)\ndef f(x):\n    return g(x)"
        for depth, right in ((960, True), (985, False)):
            sample = own_problem("    return x", [[depth]])
            assert humaneval_scorer.score(sample, Answer(deep, solution=True)).values["plus"] is right

    def test_outputs_that_no_data_can_be(self, mbpp: dict[str, Sample], mbpp_scorer: EvalPlusScorer) -> None:
        """The official oracles take any iterable for the set tasks, and any object for those that ask for no None."""
        for task, text in {
            "Mbpp/2": "def similar_elements(a, b):\n    return (x for x in set(a) & set(b))",
            "Mbpp/737": "import re\ndef check_str(s):\n    return re.search('^[aeiouAEIOU][A-Za-z0-9_]*', s)",
        }.items():
            assert_right(mbpp_scorer.score(mbpp[task], Answer(text, solution=True)))


class TestTime:
    def test_an_endless_loop_ends_at_its_limit(self, humaneval_scorer: EvalPlusScorer) -> None:
        sample = own_problem("    return x", [[1]] * 3)
        score = humaneval_scorer.score(sample, Answer("def f(x):\n    while True: pass", solution=True))
        assert not any(score.values.values())
        assert score.detail["base"] == "timeout"
        assert score.detail["why"]["base"] == "call 0: time limit"

    def test_catching_the_limit_does_not_help(self, humaneval_scorer: EvalPlusScorer) -> None:
        sample = own_problem("    return x", [[1]])
        inner = "        try:\n            while True: pass\n        except BaseException: pass"
        text = f"def f(x):\n    while True:\n{inner}"
        score = humaneval_scorer.score(sample, Answer(text, solution=True))
        assert not any(score.values.values())
        assert score.detail["base"] == "timeout"

    def test_loading_forever_ends(self, humaneval_scorer: EvalPlusScorer) -> None:
        sample = own_problem("    return x", [[1]])
        score = humaneval_scorer.score(sample, Answer("while True: pass", solution=True))
        assert not any(score.values.values())
        assert score.detail["base"] == "timeout"

    def test_sleeping_ends_at_the_wide_limit(
        self, humaneval_scorer: EvalPlusScorer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(candidates, "CALL_WALL_EXTRA_S", 0.0)
        monkeypatch.setattr(candidates, "CALL_WALL_FACTOR", 2.0)
        sample = own_problem("    return x", [[1]])
        score = humaneval_scorer.score(sample, Answer("import time\ndef f(x):\n    time.sleep(60)", solution=True))
        assert score.detail["base"] == "timeout"

    def test_a_slow_reference_gets_its_time(
        self, humaneval_scorer: EvalPlusScorer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Four times what the reference takes, when that is more than the least that all get."""
        monkeypatch.setattr(candidates, "MIN_TIME_LIMIT_S", 0.05)
        body = "    total = 0\n    for i in range(x): total += i\n    return total"
        sample = own_problem(body, [[6_000_000]], task_id="Own/slow")
        assert_right(humaneval_scorer.score(sample, gold(sample)))
        loop = "    for i in range(x): total += i\n"
        for times, right in ((2, True), (20, False)):
            longer = f"def f(x):\n{body}".replace(loop, loop + loop.replace("+= i", "+= 0") * (times - 1))
            score = humaneval_scorer.score(sample, Answer(longer, solution=True))
            assert score.detail["base"] == ("pass" if right else "timeout"), score

    def test_a_busy_machine_fails_nobody(self, mbpp: dict[str, Sample], mbpp_scorer: EvalPlusScorer) -> None:
        """Tasks that take a good part of their second, while six programs never rest: three a core where two are."""
        tasks = [mbpp["Mbpp/392"], mbpp["Mbpp/630"], mbpp["Mbpp/123"]]
        for sample in tasks:
            assert_right(mbpp_scorer.score(sample, gold(sample)))
        with burners(min(6, 3 * (os.cpu_count() or 1))), ThreadPoolExecutor(2) as pool:
            for score in pool.map(lambda sample: mbpp_scorer.score(sample, gold(sample)), tasks):
                assert_right(score)


@contextmanager
def burners(count: int) -> Iterator[None]:
    """Processes that never rest."""
    found = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in found:
            process.kill()
            process.wait()


def test_samples_at_once_are_kept_apart(humaneval: dict[str, Sample], humaneval_scorer: EvalPlusScorer) -> None:
    tasks = ["HumanEval/0", "HumanEval/2", "HumanEval/53", "HumanEval/8"]
    jobs = [(task, right) for task in tasks for right in (True, False)] * 2

    def run(job: tuple[str, bool]) -> bool:
        sample = humaneval[job[0]]
        answer = gold(sample) if job[1] else Answer(gold(sample).text.replace("return", "return not"), solution=True)
        return bool(humaneval_scorer.score(sample, answer).values["plus"])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, jobs)) == [right for _, right in jobs]


def test_a_broken_reference_is_an_error_and_no_verdict(humaneval_scorer: EvalPlusScorer) -> None:
    sample = own_problem("    return y", [[1]])
    score = humaneval_scorer.score(sample, gold(sample))
    assert score.error == "Own/0: its reference solution does not run on base (call 0: NameError)"
    sample = own_problem("    return object()", [[1]])
    error = humaneval_scorer.score(sample, gold(sample)).error
    assert error == "Own/0: its reference solution returns builtins.object, which cannot be compared"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "faulty"), [(HUMANEVAL, "HumanEval/32"), (MBPP, "Mbpp/255")], ids=["humaneval", "mbpp"]
)
@pytest.mark.timeout(3600)
def test_every_reference_solution(
    code: EvalPlusSuite, faulty: str, sandbox: Sandbox, data_folder: Path, tmp_path: Path
) -> None:
    scorer = EvalPlusScorer(code.dataset, sandbox, Oracle(sandbox, tmp_path))
    samples = code.load(data_folder).samples
    with ThreadPoolExecutor(2) as pool:
        scores = dict(
            zip((s.id for s in samples), pool.map(lambda s: [scorer.score(s, gold(s))], samples), strict=True)
        )
    scorer.close()
    assert [task for task, (score,) in scores.items() if not score.values.get("plus_corrected")] == []
    assert [task for task, (score,) in scores.items() if not score.values.get("plus")] == [faulty]
    metrics = code.metrics(scores)
    assert metrics[f"{code.name}.plus_corrected.pass@1"].value == 1.0
    assert metrics[f"{code.name}.plus.pass@1"].value == (len(samples) - 1) / len(samples)


@pytest.mark.slow
@pytest.mark.parametrize("code", [HUMANEVAL, MBPP], ids=["humaneval", "mbpp"])
@pytest.mark.timeout(3600)
def test_no_empty_solution_passes(code: EvalPlusSuite, sandbox: Sandbox, data_folder: Path) -> None:
    """Neither nothing, nor what post-processing leaves of a prompt without an answer, has the function at all."""
    tests = candidates.InputSet.official("base", [[]], [0.0])
    for sample in code.load(data_folder).samples:
        for text, sanitize in (("", False), (sample.data["prompt"].strip() + "\n", True)):
            program = candidates.Candidate(text, sample.data["entry_point"], sanitize=sanitize)
            found = candidates.run_candidate(sandbox, program, [tests]).sets["base"]
            assert not found.outputs
            assert found.ended != "complete"
