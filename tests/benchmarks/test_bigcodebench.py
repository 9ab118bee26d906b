"""BigCodeBench: prompts, data and its corrections, verdicts in an environment of its own, and what cannot pass."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from plt_benchmarks.bigcodebench.environments import FULL, ONLY_FULL, SMALL, environment, has_nltk_data
from plt_benchmarks.bigcodebench.judge import BigCodeBenchScorer, number_of_tests
from plt_benchmarks.bigcodebench.suites import (
    BIGCODEBENCH,
    BIGCODEBENCH_HARD,
    BIGCODEBENCH_INSTRUCT,
    BigCodeBenchSuite,
    modules,
    unsolvable,
)
from plt_benchmarks.protocols import (
    Answer,
    Sample,
    Sandbox,
    SandboxError,
    SandboxJob,
    SandboxOutcome,
    Score,
    SuiteData,
    SuiteError,
)
from plt_eval.cli.main import main
from plt_eval.sandbox import open_sandbox

OFFICIAL = Path(__file__).with_name("official_bigcodebench.py")
ROW = {
    "task_id": "BigCodeBench/toy",
    "complete_prompt": 'import math\n\ndef task_func(x):\n    """\n    The square root of x, rounded down.\n    """\n',
    "instruct_prompt": "The square root of x, rounded down.\nYou should write self-contained code starting with:\n"
    "```\nimport math\ndef task_func(x):\n```",
    "canonical_solution": "    return int(math.sqrt(x))",
    "code_prompt": "import math\ndef task_func(x):\n",
    "test": "import unittest\nclass TestCases(unittest.TestCase):\n"
    "    def test_four(self):\n        self.assertEqual(task_func(4), 2)\n"
    "    def test_ten(self):\n        self.assertIsInstance(task_func(10), int)\n"
    "        self.assertEqual(task_func(10), 3)\n",
    "entry_point": "task_func",
    "libs": "['math']",
}
TOY = Sample(ROW["task_id"], ROW)
DATA = os.environ.get("PLT_EVAL_DATA")
real = pytest.mark.skipif(DATA is None, reason="PLT_EVAL_DATA is not set")
installed = pytest.mark.skipif(
    not (SMALL.present or FULL.present),
    reason="no environment for BigCodeBench: plt-eval install bigcodebench-small (or bigcodebench)",
)
FEW = [3, 7, 10, 21, 53, 100, 126, 150, 200, 297, 355, 399, 480, 640, 700, 900, 1000, 1100]
"""Numbers of problems that the small environment can run, for the default tests."""


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return open_sandbox("bubblewrap")


@pytest.fixture(scope="module")
def scorer(sandbox: Sandbox) -> BigCodeBenchScorer:
    return BigCodeBenchScorer(environment(), sandbox, timeout_s=20)


@pytest.fixture(scope="module")
def problems() -> SuiteData:
    assert DATA is not None
    return BIGCODEBENCH.load(Path(DATA))


def judged(scorer: BigCodeBenchScorer, pairs: Sequence[tuple[Sample, Answer]]) -> list[Score]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda pair: scorer.score(*pair), pairs))


# --- prompts and data ---------------------------------------------------------------------------------


def test_prompts() -> None:
    asked = BIGCODEBENCH.prompt(TOY)
    assert asked.text == ROW["complete_prompt"]
    assert "\nclass " in asked.stop
    assert "\nclass " not in asked.chat_stop
    begins = (
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    )
    assert asked.messages[0].content == f"{begins}```\n{ROW['complete_prompt'].strip()}\n```\n"
    assert asked.prefill.endswith("passes corresponding tests:\n```python\n")
    told = BIGCODEBENCH_INSTRUCT.prompt(TOY)
    assert told.messages[0].content == f"{begins}{ROW['instruct_prompt']}\n"
    assert told.text == told.messages[0].content + told.prefill


def test_rows_and_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "BigCodeBench.jsonl"
    for row, message in (
        ({**ROW, "test": 3}, "line 1: expected 'test' to be a string, found int"),
        ({"task_id": "x"}, "line 1: expected 'complete_prompt' to be a string, found the keys task_id"),
        ({**ROW, "test": "def ("}, "line 1: expected 'test' to be a Python program"),
        ({**ROW, "test": "class Other: pass"}, "line 1: expected 'test' to define the class TestCases"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(SuiteError, match=message):
            BIGCODEBENCH.load(tmp_path)
    path.write_text((json.dumps(ROW) + "\n") * 2)
    with pytest.raises(SuiteError, match="line 2: task_id BigCodeBench/toy is there for the second time"):
        BIGCODEBENCH.load(path)
    with pytest.raises(SuiteError, match=r"expected \*BigCodeBench-Hard\*.jsonl\[.gz\] in it"):
        BIGCODEBENCH_HARD.load(tmp_path)
    with pytest.raises(SuiteError, match="bigcodebench-hard has no file of its own to fetch: pass --data"):
        BIGCODEBENCH_HARD.load(None)
    (tmp_path / "BigCodeBench-Hard.jsonl").write_text(json.dumps(ROW) + "\n")
    hard = BIGCODEBENCH_HARD.load(tmp_path)
    assert (hard.revision, len(hard.samples)) == ("local:BigCodeBench-Hard.jsonl", 1)
    assert "expected 148 problems" in hard.notes[0]


def test_what_a_problem_imports() -> None:
    row = {**ROW, "test": "import os.path\nfrom django.http import X\nimport turtle", "libs": "['regex']"}
    assert modules(row) == {"math", "os", "django", "turtle", "tkinter", "regex"}
    assert number_of_tests(ROW["test"]) == 2


def test_without_an_environment_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    monkeypatch.setenv("PLT_EVAL_ENVIRONMENTS", str(tmp_path))
    assert environment() is FULL
    with pytest.raises(SuiteError, match="BigCodeBench needs an environment of its own: plt-eval install bigcodebench"):
        BigCodeBenchSuite("full", "complete").scorer(sandbox)
    assert [need.mend for need in BigCodeBenchSuite("full", "complete").needs()] == ["plt-eval install bigcodebench"]
    both = [need.mend for need in BigCodeBenchSuite("full", "complete", SMALL).needs()]
    assert both == ["plt-eval install bigcodebench-small", "plt-eval install bigcodebench"]


def test_problems_that_cannot_be_solved_are_named_and_in_one_metric_only() -> None:
    without, known = unsolvable(nltk_data=False), unsolvable(nltk_data=True)
    assert (len(without), len(known)) == (27, 10)
    assert "no network" in known["BigCodeBench/101"]
    scores = {"BigCodeBench/101": [Score({"right": False})], "BigCodeBench/3": [Score({"right": True})]}
    found = BIGCODEBENCH.metrics(scores)
    assert {name: metric.value for name, metric in found.items()} == {
        "bigcodebench.pass@1": 0.5,
        "bigcodebench.solvable.pass@1": 1.0,
    }


def test_the_small_environment_is_a_part_of_the_full_one() -> None:
    assert set(SMALL.requirements) < set(FULL.requirements)
    assert len(SMALL.requirements) == 31
    assert all("==" in line for line in FULL.requirements)


@real
def test_the_data_is_the_release_of_the_official_package(problems: SuiteData) -> None:
    assert problems.revision == "BigCodeBench-v0.1.4"
    if not SMALL.present or FULL.present:
        assert len(problems.samples) == 1140
        rows = json.dumps([sample.data for sample in problems.samples], sort_keys=True).encode()
        # Of the first release after the four corrections that the official package's tools/ make.
        assert hashlib.sha256(rows).hexdigest() == "c27b6676ddf0fe7eb5b4da32803fd76c12543e8f26dc62b58e72b602b3ebaaac"
    rows_by_id = {sample.id: sample.data for sample in problems.samples}
    assert rows_by_id["BigCodeBench/37"]["code_prompt"].startswith("import pandas as pd\nfrom sklearn")
    assert "mock_response.status_code = 200" in rows_by_id["BigCodeBench/211"]["test"]
    assert DATA is not None
    (file,) = (Path(DATA) / "bigcodebench").iterdir()
    with pytest.raises(SuiteError, match="expected the problems of BigCodeBench-Hard, found all of BigCodeBench"):
        BIGCODEBENCH_HARD.load(file)


@real
@pytest.mark.skipif(not SMALL.present, reason="no small environment: plt-eval install bigcodebench-small")
def test_problems_whose_libraries_are_missing_are_left_out_and_named() -> None:
    assert DATA is not None
    data = BigCodeBenchSuite("full", "complete", SMALL).load(Path(DATA))
    (note,) = data.notes
    assert f"{1140 - len(data.samples)} of 1140 problems are left out" in note
    assert "environment bigcodebench-small lacks" in note
    assert "1 (" not in note.partition("26 (cryptography)")[0]
    assert len(data.samples) >= 1030
    assert not {sample.id for sample in data.samples} & {"BigCodeBench/26", "BigCodeBench/418"}


# --- verdicts -----------------------------------------------------------------------------------------

RIGHT = [
    Answer(ROW["complete_prompt"] + ROW["canonical_solution"], solution=True),
    Answer("    return int(math.sqrt(x))\n"),
    Answer("\treturn math.isqrt(x)\n\ndef unfinished("),
    Answer("Here it is:\n```python\nimport math\n\ndef task_func(x):\n    return math.isqrt(x)\n```\nDone.", chat=True),
    # Calibration: what the code to complete imports is there.
    Answer("def task_func(x):\n    return math.isqrt(x)\n", chat=True),
]
WRONG = [
    Answer("", solution=True),
    Answer(""),
    Answer("", chat=True),
    Answer("    return 2\n"),
    Answer("def task_func(x:\n", solution=True),
    Answer("    return math.sqrt(x)\n"),
    Answer("x" * 300_000),
    Answer("def task_func(x):\n    return [0] * 10**13", solution=True),
    Answer("def task_func(x):\n    return task_func(x)", solution=True),
]
HOSTILE = {
    "exit at load": """
import os
os._exit(0)
""",
    "exit politely at load": """
raise SystemExit(0)
""",
    "exit in a test": """
import os
def task_func(x):
    os._exit(0)
""",
    "skip": """
import unittest
def task_func(x):
    raise unittest.SkipTest("no")
""",
    "another assertEqual": """
import unittest
unittest.TestCase.assertEqual = lambda *_: None
def task_func(x):
    return 1
""",
    "another run": """
import unittest
unittest.TestCase.run = lambda *_: None
def task_func(x):
    return 1
""",
    "failures are not recorded": """
import unittest
unittest.TestResult.addFailure = unittest.TestResult.addError = lambda *_: None
def task_func(x):
    return 1
""",
    "another isinstance": """
import builtins
builtins.isinstance = lambda *_: True
def task_func(x):
    return float(int(x ** 0.5))
""",
    "its own assertEqual": """
import sys
def task_func(x):
    test = sys._getframe(1).f_locals["self"]
    test.assertEqual = test.assertIsInstance = lambda *_: None
    return 1
""",
    "the next test is another": """
import sys
def task_func(x):
    type(sys._getframe(1).f_locals["self"]).test_ten = lambda self: None
    return 2
""",
    "failures are forgotten": """
import sys, unittest
def task_func(x):
    result = sys._getframe(1).f_locals["self"]._outcome.result
    type(sys._getframe(1).f_locals["self"]).doCleanups = lambda self: (result.failures.clear(), True)[1]
    return 2
""",
    "a report of its own": """
import json, os
def task_func(x):
    said = json.dumps({"stat": 0, "details": {}, "secret": ""}).encode()
    for fd in range(3, 60):
        try:
            os.write(fd, b"%d\\n" % len(said) + said)
        except OSError:
            pass
    os._exit(0)
""",
    "around the report that is sent": """
import json, os, time
open_fds = [fd for fd in os.listdir("/proc/self/fd") if os.path.islink("/proc/self/fd/" + fd)]
pipes = sorted(int(fd) for fd in open_fds if os.readlink("/proc/self/fd/" + fd).startswith("pipe:"))
report = {"stat": 0, "details": {"the last test, which has to fail": "x"}, "changed": [], "weak": [], "loaded": TESTS,
          "ran": TESTS + 1, "bad": 1, "skipped": 0}
told = {"program": "forged", "post_processing": "none", "ended": "done", "report": report}
parent = os.getpid()
if pipes and os.fork() == 0:
    os.setsid()
    os.write(pipes[0], (json.dumps(told)[:-1] + ', "x": ').encode())
    while os.getppid() == parent:
        time.sleep(0.0005)
    time.sleep(0.003)
    os.write(pipes[0], b"}")
    os._exit(0)
time.sleep(0.3)
def task_func(x):
    return 0
""",
    "the judge is killed": """
import ctypes, os
def task_func(x):
    ctypes.CDLL(None).kill(os.getppid(), 9)
    return 1
""",
    "the judge is written to": """
import os
def task_func(x):
    with open(f"/proc/{os.getppid()}/fd/1", "w") as out:
        out.write("{}")
    return 1
""",
    "tests of its own": """
import unittest
class Own(unittest.TestCase):
    def test(self):
        pass
unittest.TestLoader.loadTestsFromTestCase = lambda *_: unittest.TestSuite([Own("test")])
""",
}


@installed
def test_right_answers(scorer: BigCodeBenchScorer) -> None:
    for answer, score in zip(RIGHT, judged(scorer, [(TOY, answer) for answer in RIGHT]), strict=True):
        assert (score.values, score.error) == ({"right": True}, None), (answer, score)
    assert [judged(scorer, [(TOY, RIGHT[3])])[0].detail["post_processing"]] == ["sanitized"]


@installed
def test_wrong_answers(scorer: BigCodeBenchScorer) -> None:
    for answer, score in zip(WRONG, judged(scorer, [(TOY, answer) for answer in WRONG]), strict=True):
        assert (score.values, score.error) == ({"right": False}, None), (answer, score)
        assert score.detail["why"]


@installed
def test_hostile_answers_do_not_pass(scorer: BigCodeBenchScorer) -> None:
    tests = str(number_of_tests(ROW["test"]))
    answers = [(TOY, Answer(text.replace("TESTS", tests), solution=True)) for text in HOSTILE.values()]
    for name, score in zip(HOSTILE, judged(scorer, answers), strict=True):
        assert (score.values, score.error) == ({"right": False}, None), (name, score)
        assert score.detail["why"], name


@installed
def test_a_sandbox_that_cannot_see_the_environment_is_refused_before_a_model_is_asked() -> None:
    class Blind:
        name = "blind"

        def run(self, job: SandboxJob) -> SandboxOutcome:
            assert job.environment is not None
            raise SandboxError("an image cannot see it")

    with pytest.raises(SandboxError, match="an image cannot see it"):
        BIGCODEBENCH.scorer(Blind())


@installed
def test_what_equals_everything_passes_here_and_there(scorer: BigCodeBenchScorer) -> None:
    """The tests compare in the answer's own process: no scorer that runs them as they are can tell."""
    text = "class Equal(int):\n    __eq__ = lambda *_: True\ndef task_func(x):\n    return Equal(0)\n"
    assert judged(scorer, [(TOY, Answer(text, solution=True))])[0].values == {"right": True}
    assert official([(TOY, text)]) == ["pass"]


@installed
def test_an_answer_that_does_not_end(sandbox: Sandbox) -> None:
    scorer = BigCodeBenchScorer(environment(), sandbox, timeout_s=3)
    (score,) = judged(scorer, [(TOY, Answer("    while True:\n        pass\n"))])
    assert score.values == {"right": False}
    assert "Timed out" in json.dumps(score.detail) or score.detail["why"] == "time limit"


@installed
def test_a_broken_environment_is_an_error_and_no_verdict(
    tmp_path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLT_EVAL_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bare = replace(SMALL, name="bare", requirements=())
    venv.create(bare.folder, symlinks=True)
    (bare.folder / "plt-eval.json").write_text("{}")
    assert bare.present
    score = BigCodeBenchScorer(bare, sandbox).score(TOY, RIGHT[0])
    assert score.values == {}
    assert "No module named 'matplotlib'" in (score.error or "")


@pytest.mark.skipif(not SMALL.present, reason="no small environment: plt-eval install bigcodebench-small")
def test_what_only_the_full_environment_has_is_no_failure_of_the_answer(sandbox: Sandbox) -> None:
    scorer = BigCodeBenchScorer(SMALL, sandbox)
    score, other = judged(
        scorer, [(TOY, Answer(f"import {name}\n{RIGHT[0].text}", solution=True)) for name in ("sympy", "nowhere")]
    )
    assert "sympy" in ONLY_FULL
    assert score.error == "it imports sympy: plt-eval install bigcodebench"
    assert other.values == {"right": False}


# --- the real data ------------------------------------------------------------------------------------


def official(pairs: Sequence[tuple[Sample, str]]) -> list[str]:
    """The official status of programs, calibrated as the official command does."""
    rows = [
        {"code": f"{sample.data['code_prompt']}\n    pass\n{text}", "test": sample.data["test"]}
        for sample, text in pairs
    ]
    done = subprocess.run(
        [str(environment().python), str(OFFICIAL)],
        input="".join(json.dumps(row) + "\n" for row in rows),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    )
    return done.stdout.split()


@real
@installed
def test_gold_wrong_and_empty_answers_as_by_the_official_check(scorer: BigCodeBenchScorer, problems: SuiteData) -> None:
    by_id = {sample.id: sample for sample in problems.samples}
    samples = [by_id[f"BigCodeBench/{number}"] for number in FEW]
    golds = [answer.text for sample in samples if (answer := BIGCODEBENCH.gold(sample)) is not None]
    others = [f"{s.data['complete_prompt']}\n{o.data['canonical_solution']}" for s, o in pairwise(samples)]
    pairs = [*zip(samples, golds, strict=True), *zip(samples[:5], others[:5], strict=True), (samples[0], "")]
    ours = [score.values for score in judged(scorer, [(s, Answer(text, solution=True)) for s, text in pairs])]
    assert ours[: len(FEW)] == [{"right": True}] * len(FEW)
    assert ours[len(FEW) :] == [{"right": False}] * 6
    assert [value == {"right": True} for value in ours] == [status == "pass" for status in official(pairs)]


@installed
def test_the_installed_command_judges_gold(tmp_path: Path) -> None:
    data = tmp_path / "BigCodeBench.jsonl"
    data.write_text("".join(json.dumps({**ROW, "task_id": f"BigCodeBench/{number}"}) + "\n" for number in range(2)))
    command = ["run", "--suite", "bigcodebench", "--engine", "replay", "--completions", "gold", "--data", str(data)]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--results", str(tmp_path / "runs")])
    assert not caught.value.code
    (metrics,) = (tmp_path / "runs").glob("*/metrics.json")
    found: dict[str, Any] = json.loads(metrics.read_text())["metrics"]
    assert found["bigcodebench.pass@1"]["value"] == found["bigcodebench.solvable.pass@1"]["value"] == 1.0
    assert found["bigcodebench.pass@1"]["n"] == 2


@real
@pytest.mark.slow
@pytest.mark.skipif(not FULL.present, reason="no full environment: plt-eval install bigcodebench")
def test_all_gold_answers_are_right_but_for_those_named(sandbox: Sandbox) -> None:
    assert DATA is not None
    suite = BigCodeBenchSuite("full", "complete", FULL)
    data = suite.load(Path(DATA))
    answers = [answer for sample in data.samples if (answer := suite.gold(sample)) is not None]
    scores = judged(BigCodeBenchScorer(FULL, sandbox), list(zip(data.samples, answers, strict=True)))
    assert [score.error for score in scores if score.error] == []
    wrong = {sample.id for sample, score in zip(data.samples, scores, strict=True) if not score.values["right"]}
    assert wrong == set(unsolvable(nltk_data=has_nltk_data(FULL)))
