"""LiveCodeBench: data, windows, prompts, judging, what the official package says, and what hostile programs try.

The data has no solutions and, here, public tests of code generation alone: solutions were written for some problems,
and rows in the official format for the other two tasks.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from lcb_programs import (
    ANSWER,
    DIFFERENT,
    EQUAL,
    METHOD,
    PRINTING,
    READING,
    RETURNING,
    SHIFTED,
    SOLUTIONS,
    SUMS,
    case,
    fenced,
)

import plt_benchmarks.livecodebench.judge as judging
from plt_benchmarks.livecodebench import releases
from plt_benchmarks.livecodebench.cases import Cases, read_cases
from plt_benchmarks.livecodebench.generation import LcbGenerationSuite, code_in
from plt_benchmarks.livecodebench.judge import Verdict, judge, same_lines
from plt_benchmarks.livecodebench.prediction import (
    LcbExecutionSuite,
    LcbTestOutputSuite,
    asserted_output,
    executed_output,
)
from plt_benchmarks.livecodebench.releases import HubFile, LiteFile, LiteRelease, release
from plt_benchmarks.livecodebench.suites import LCB_OFFICIAL
from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import Answer, Sample, Sandbox, Score, Suite, SuiteData, SuiteError
from plt_benchmarks.registry import get_suite

EXECUTED = {
    "question_id": "9002",
    "contest_id": "made",
    "contest_date": "2024-01-06T00:00:00",
    "difficulty": "easy",
    "function_name": "twice",
    "code": "def twice(a):\n    return a * 2",
    "input": "twice(a = [1, 'x'])",
    "output": "[1, 'x', 1, 'x']",
    "id": "sample_0",
    "problem_id": "0",
    "numsteps": 3,
}
TESTED = {
    "question_title": "Twice",
    "question_content": "Return a, twice.\n\n",
    "question_id": "9003",
    "contest_id": "made",
    "contest_date": "2024-02-06T00:00:00",
    "difficulty": "easy",
    "test": json.dumps([case("[1, 2]\n2", "[1, 2, 1, 2]", "functional")]),
    "starter_code": "def twice(a: List[int], n: int) -> List[int]:\n    pass",
    "function_name": "twice",
    "test_id": 0,
}
official = pytest.mark.skipif(not LCB_OFFICIAL.present, reason="its own scorer is not installed: plt-eval install lcb")


def written(path: Path, *rows: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generation(**options: Any) -> LcbGenerationSuite:
    [suite] = get_suite("lcb-generation", SuiteOptions(**options))
    assert isinstance(suite, LcbGenerationSuite)
    return suite


def verdicts(sandbox: Sandbox, row: Mapping[str, Any], codes: Sequence[str]) -> list[Verdict]:
    cases = read_cases("row", row)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda code: judge(sandbox, code, cases), codes))


def ask(request: Mapping[str, Any]) -> Any:
    script = Path(__file__).with_name("official_lcb.py")
    command = [str(LCB_OFFICIAL.python), str(script)]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def officially(pairs: Sequence[tuple[Mapping[str, Any], str]], timeout: int = 2) -> list[bool]:
    answers = []
    for row, code in pairs:
        cases = read_cases("row", row)
        tests = {"inputs": cases.inputs, "outputs": cases.outputs, "fn_name": cases.function}
        answers.append([json.dumps(tests), code])
    found: list[bool] = ask({"what": "generation", "answers": answers, "timeout": timeout})
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "LIMIT_S", 2)


@pytest.fixture(scope="session")
def problems(data_folder: Path) -> SuiteData:
    return LcbGenerationSuite(release("release_v1")).load(data_folder)


# --- names and options --------------------------------------------------------------------------------


def names(key: str, **options: Any) -> list[str]:
    return [suite.name for suite in get_suite(key, SuiteOptions(**options))]


def test_names() -> None:
    every = ["lcb-generation", "lcb-execution", "lcb-execution-cot", "lcb-test-output"]
    crux = ["cruxeval-i", "cruxeval-o", "cruxeval-i-cot", "cruxeval-o-cot"]
    assert names("lcb") == every
    assert names("Reasoning") == crux + every
    assert [names(name) for name in every] == [[name] for name in every]


def test_releases_are_cumulative_and_single_versions_are_not() -> None:
    counts = {f"release_v{n}": count for n, count in enumerate((400, 511, 612, 713, 880, 1055), 1)}
    assert {tag: release(tag).problems for tag in counts} == counts
    assert [file.name for file in release("v4_v6").files] == ["test4.jsonl", "test5.jsonl", "test6.jsonl"]
    assert release("v1").problems == 400
    assert generation().problems == 1055


def test_release_and_window_are_part_of_the_version() -> None:
    versions = {
        generation().version,
        generation(release="release_v5").version,
        generation(release="release_v5", since=date(2024, 8, 1)).version,
        generation(release="release_v5", until=date(2024, 8, 1)).version,
        generation(release="v5", since=date(2024, 8, 1), until=date(2025, 1, 1)).version,
    }
    assert len(versions) == 5
    assert "release_v5+since-2024-08-01+judge-1" in versions
    assert get_suite("lcb-execution")[0].version != get_suite("lcb-execution", SuiteOptions(since=date.min))[0].version


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("lcb", {"release": "release_v7"}, "--release release_v7: expected release_v1 to release_v6"),
        ("lcb", {"release": "v3_v2"}, "--release v3_v2: expected"),
        ("lcb", {"num_fewshot": 1}, "--num-fewshot has no effect on suite lcb"),
        ("lcb-execution", {"release": "release_v5"}, "--release has no effect on suite lcb-execution"),
        ("cruxeval", {"since": date(2024, 1, 1)}, "--since has no effect on suite cruxeval"),
        ("lcb", {"since": date(2024, 2, 2), "until": date(2024, 1, 1)}, "--since 2024-02-02 --until 2024-01-01: exp"),
        ("lcb:x", {}, "--suite lcb:x: lcb has no parts to choose from"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(key: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        get_suite(key, SuiteOptions(**options))


# --- data ---------------------------------------------------------------------------------------------


def test_a_window_and_the_official_order(tmp_path: Path) -> None:
    rows = [{**SUMS, "question_id": f"q{n}", "contest_date": f"2024-0{n}-06T00:00:00"} for n in (3, 1, 2)]
    path = written(tmp_path / "problems.jsonl", *rows)
    assert [sample.id for sample in generation().load(path).samples] == ["q1", "q2", "q3"]
    data = generation(since=date(2024, 2, 6), until=date(2024, 2, 6)).load(path)
    assert [sample.id for sample in data.samples] == ["q2"]
    assert data.left_out == {"q1", "q3"}
    assert data.revision == "local:problems.jsonl"
    assert "1 problem of contests from 2024-02-06 to 2024-02-06" in data.notes[0]
    assert "before the end of its training data" in data.notes[0]
    assert "1 of 1 problems come with public tests alone" in data.notes[1]
    with pytest.raises(SuiteError, match=r"--since 2025-01-01: no problem of these dates among 3"):
        generation(since=date(2025, 1, 1)).load(path)


def test_metrics_say_the_dates_and_count_by_difficulty(tmp_path: Path) -> None:
    suite = generation()
    suite.load(written(tmp_path / "problems.jsonl", SUMS, SHIFTED))
    scores = {
        "a": [Score({"right": True}, detail={"difficulty": "easy"})],
        "b": [Score({"right": False}, detail={"difficulty": "hard"})],
        "c": [Score(error="broken")],
    }
    metrics = suite.metrics(scores)
    assert {name: (found.value, found.n) for name, found in metrics.items()} == {
        "lcb-generation.pass@1": (0.5, 2),
        "lcb-generation/easy.pass@1": (1.0, 1),
        "lcb-generation/hard.pass@1": (0.0, 1),
    }
    definition = metrics["lcb-generation.pass@1"].definition
    assert "contests from 2024-01-06 to 2024-01-06" in definition
    assert "may have seen" in definition


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contest_date": "soon"}, "line 1: expected 'contest_date' to be a date, found 'soon'"),
        ({"contest_date": None}, "expected 'contest_date' to be a date"),
        ({"starter_code": None}, "line 1: expected 'starter_code' to be a string, found NoneType"),
        ({"metadata": "["}, "line 1: expected 'metadata' to be a JSON object"),
        ({"metadata": '{"func_name": "1"}'}, "expected 'func_name' to be a function's name"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        generation().load(written(tmp_path / "rows.jsonl", {**SUMS, **change}))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no such file or folder"):
        generation().load(tmp_path / "missing")
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(SuiteError, match="line 1: expected a JSON object, found broken JSON"):
        generation().load(tmp_path / "broken.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SuiteError, match="expected problems, found none"):
        generation().load(tmp_path / "empty.jsonl")
    twice = written(tmp_path / "twice.jsonl", SUMS, SUMS)
    with pytest.raises(SuiteError, match="line 2: problem made_a is there for the second time"):
        generation().load(twice)
    with pytest.raises(SuiteError, match=r"--release release_v6 has no effect on --data .*: it is a single file"):
        generation(release="release_v6").load(twice)
    (tmp_path / "packed.jsonl.gz").write_bytes(b"")
    with pytest.raises(SuiteError, match="unpack it first"):
        generation().load(tmp_path / "packed.jsonl.gz")


def test_a_folder_needs_all_files_of_the_release(tmp_path: Path) -> None:
    (tmp_path / "livecodebench").mkdir()
    (tmp_path / "gsm8k").mkdir()
    written(tmp_path / "gsm8k" / "test.jsonl", {"question": "of another data set"})
    with pytest.raises(
        SuiteError, match=r"expected test.jsonl, .*, or lcb\*.jsonl, in it or in a folder livecodebench"
    ):
        generation().load(tmp_path)
    written(tmp_path / "livecodebench" / "test.jsonl", SUMS)
    with pytest.raises(SuiteError, match=r"release_v2 is test.jsonl, test2.jsonl, and test2.jsonl is missing"):
        generation(release="release_v2").load(tmp_path)
    written(tmp_path / "livecodebench" / "test2.jsonl", SHIFTED)
    data = generation(release="release_v2").load(tmp_path)
    assert [sample.id for sample in data.samples] == ["9001", "made_a"]
    assert len(data.sha256) == 64
    assert data.sha256 != generation(release="release_v1").load(tmp_path).sha256


def packed(tests: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(tests))).decode()


def test_hidden_tests_follow_the_public_ones_packed_or_not() -> None:
    hidden = json.dumps([case("1\n2 2\n", "4")])
    for text in (hidden, packed(hidden)):
        cases = read_cases("row", {**SUMS, "private_test_cases": text})
        assert cases == Cases(None, ("2\n1 2\n3 4\n", "1\n5 5", "1\n2 2\n"), ("3\n7\n", "10", "4"), 2)
    assert read_cases("row", {**SHIFTED, "private_test_cases": "[]"}).function == "shifted"


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("/tmp/pickle-was-run",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (packed(Evil()), "names posix.mkdir, where text alone is expected"),
        (packed(["a"]), "expected pickled text in 'private_test_cases', found list"),
        (packed("[1]"), "a JSON list of tests with input and output"),
        ("not base64!", "cannot be unpacked"),
        (base64.b64encode(b"no zlib").decode(), "cannot be unpacked"),
        (base64.b64encode(zlib.compress(b"no pickle")).decode(), "private_test_cases"),
        (packed("[]")[:-12] + packed("[]")[-12:-8], "private_test_cases"),
    ],
)
def test_hidden_tests_that_are_none(text: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        read_cases("row", {**SUMS, "private_test_cases": text})
    assert not Path("/tmp/pickle-was-run").exists()


def test_hidden_tests_may_not_unpack_to_more_than_memory_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plt_benchmarks.livecodebench.cases.MOST_BYTES", 1000)
    with pytest.raises(SuiteError, match="unpack to more than"):
        read_cases("row", {**SUMS, "private_test_cases": packed("a" * 10_000)})


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path, sandbox: Sandbox) -> None:
    path = written(tmp_path / "problems.jsonl", SUMS)
    suite = generation()
    [sample] = suite.load(path).samples
    written(path, {**SUMS, "question_id": "made_b"})
    with pytest.raises(SuiteError, match="expected problem made_a; the file has changed"):
        suite.scorer(sandbox).score(sample, Answer(ANSWER, solution=True))
    path.unlink()
    with pytest.raises(SuiteError, match="cannot be read any more"):
        suite.scorer(sandbox).score(sample, Answer(ANSWER, solution=True))


# --- fetching -----------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `content` by path, from where it is asked to, and breaks off after `most` bytes."""

    content: Mapping[str, bytes] = {}
    most: int | None = None
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Range")))
        found = self.content.get(self.path)
        if found is None:
            self.send_error(404)
            return
        if "/resolve/" in self.path and "gzip" in self.headers.get("Accept-Encoding", ""):
            self.send_error(400, "what is packed on the way cannot be checked")
            return
        begin = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(found) - begin))
        self.end_headers()
        self.wfile.write(found[begin : None if self.most is None else begin + self.most])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Hub.content, Hub.most, Hub.asked = {}, None, []
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_release_is_fetched_in_parts_once_and_checked(hub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    content = (json.dumps(SUMS) + "\n").encode()
    digest = hashlib.sha256(content).hexdigest()
    small = LiteRelease("release_v1", (LiteFile("test.jsonl", 1, len(content), digest),))
    path = f"/datasets/livecodebench/code_generation_lite/resolve/{releases.REVISION}/test.jsonl"
    suite = LcbGenerationSuite(small)
    assert not small.present
    with pytest.raises(SuiteError, match=r"cannot fetch http.*: HTTP 404; pass --data PATH"):
        suite.load(None)
    hub.content, hub.most = {path: content}, 100
    with pytest.raises(SuiteError, match="cannot fetch"):
        suite.load(None)
    hub.most = None
    data = suite.load(None)
    assert hub.asked[-1] == (path, "bytes=100-")
    assert (data.sha256, data.revision) == (digest, f"code_generation_lite-{releases.REVISION[:12]}-release_v1")
    assert small.present
    count = len(hub.asked)
    assert suite.load(None) == data
    assert len(hub.asked) == count
    assert "fetching test.jsonl: 100%" in capsys.readouterr().err


def test_a_fetched_file_that_is_another_is_refused(hub: type[Hub]) -> None:
    file = LiteFile("test.jsonl", 1, 4, "0" * 64)
    hub.content = {f"/datasets/livecodebench/code_generation_lite/resolve/{releases.REVISION}/test.jsonl": b"abcd"}
    with pytest.raises(SuiteError, match="expected content of SHA-256 000000"):
        LiteRelease("v1", (file,)).fetch()
    assert not file.present


def test_a_small_data_set_is_found_by_the_list_of_its_files(hub: type[Hub]) -> None:
    suite = LcbExecutionSuite()
    suite.release = HubFile("livecodebench/execution-v2", "main", 1)
    suite.problems = 1
    with pytest.raises(SuiteError, match=r"cannot fetch .*/api/datasets/livecodebench/execution-v2/tree/main"):
        suite.load(None)
    listing = [{"type": "file", "path": "README.md"}, {"type": "file", "path": "data/test-0.jsonl"}]
    hub.content = {
        "/api/datasets/livecodebench/execution-v2/tree/main?recursive=true": json.dumps(listing).encode(),
        "/datasets/livecodebench/execution-v2/resolve/main/data/test-0.jsonl": json.dumps(EXECUTED).encode(),
    }
    assert [sample.id for sample in suite.load(None).samples] == ["sample_0"]
    assert suite.release.present
    suite.problems = 2
    with pytest.raises(SuiteError, match="expected 2 problems, found 1: the data has changed"):
        suite.load(None)


def test_too_little_room(monkeypatch: pytest.MonkeyPatch, hub: type[Hub]) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(SuiteError, match=r"the data needs 4.5 GB, and 1.0 GB are free"):
        release("release_v6").fetch()
    assert hub.asked == []


# --- answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```", "a"),
        ("```python\na\n```\ntext\n```\nb\nc\n```\n", "b\nc"),
        ("```python\na\n```\nso ```b```", ""),
        ("```python\na", ""),
        ("a", ""),
        ("", ""),
    ],
)
def test_the_code_of_a_chat_model(text: str, code: str) -> None:
    assert code_in(Answer(text, chat=True)) == code


def test_the_code_of_others() -> None:
    assert code_in(Answer("\n```python\na\n", chat=False)) == "```python\na"
    assert code_in(Answer(" a\n", solution=True)) == " a\n"


def test_answers_without_a_program_are_wrong(tmp_path: Path, sandbox: Sandbox) -> None:
    suite = generation()
    [sample] = suite.load(written(tmp_path / "problems.jsonl", SUMS)).samples
    scorer = suite.scorer(sandbox)
    for answer in (Answer(""), Answer("none", chat=True), Answer("a" * 2_000_000)):
        score = scorer.score(sample, answer)
        assert (score.values, score.error) == ({"right": False}, None)
    right = scorer.score(sample, Answer(fenced(ANSWER), chat=True))
    assert right.values == {"right": True}
    assert right.detail == {
        "platform": "atcoder", "difficulty": "easy", "contest_date": "2024-01-06", "tests": 2, "public": 2, "passed": 2,
    }  # fmt: skip


# --- judging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("3\n7\n", "3\n7", True),
        ("  3 \n\t7", "3\n7\n\n", True),
        ("3\n\n7", "3\n7", False),
        ("0.50", "0.5", True),
        ("1e1 2", "10 2.0", True),
        ("0.1", "0.10000000000000001", False),
        ("50000000000000000", "50000000000000001", False),
        ("nan", "nan", True),
        ("nan 1", "nan 1.0", False),
        ("Yes", "YES", False),
        ("", "", True),
    ],
)
def test_lines(found: str, expected: str, same: bool) -> None:
    assert same_lines(found, expected) is same


def test_many_tests_are_begun_by_few(sandbox: Sandbox) -> None:
    cases = Cases(None, tuple(map(str, range(20))), tuple(map(str, range(20))), 3)
    assert judge(sandbox, "print(input())", cases) == Verdict(True, 20)
    assert judge(sandbox, "print(min(12, int(input())))", cases) == Verdict(False, 13, "test 13: wrong answer")
    begun: list[bytes] = []

    class Watched:
        name = "watched"

        def run(self, job: Any) -> Any:
            begun.append(job.stdin)
            return sandbox.run(job)

    assert judge(Watched(), "print(1)", cases) == Verdict(False, 0, "test 0: wrong answer")
    assert [len(json.loads(plan)["inputs"]) for plan in begun] == [3]


def test_a_sandbox_that_does_not_work_is_an_error(tmp_path: Path, sandbox: Sandbox) -> None:
    class Broken:
        name = "broken"

        def run(self, job: Any) -> Any:
            return sandbox.run(type(job)("raise SystemExit('no room')"))

    suite = generation()
    path = written(tmp_path / "rows.jsonl", SUMS, {**SHIFTED, "public_test_cases": json.dumps([case("1\n2", "[")])})
    bad, good = suite.load(path).samples
    score = suite.scorer(Broken()).score(good, Answer(ANSWER, solution=True))
    assert score.error == "the driver did not come to run the program in the sandbox (exit code 1: no room)"
    score = suite.scorer(sandbox).score(bad, Answer(METHOD, solution=True))
    assert score.error == "the data's own output is no JSON: '['"


@official
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("row", "programs"),
    [(SUMS, READING), (SUMS, PRINTING), (SHIFTED, RETURNING)],
    ids=["reading", "printing", "returning"],
)
def test_the_official_package_says_the_same(row: dict[str, str], programs: dict[str, str], sandbox: Sandbox) -> None:
    ours = verdicts(sandbox, row, list(programs.values()))
    theirs = officially([(row, code) for code in programs.values()])
    # Its limits are of the clock: what it alone does not find right it is asked again, with time for a busy machine.
    codes = list(programs.values())
    alone = [i for i, mine in enumerate(ours) if mine.right and not theirs[i]]
    for i, again in zip(alone, officially([(row, codes[i]) for i in alone], timeout=20) if alone else [], strict=True):
        theirs[i] = again
    differ = [name for name, mine, other in zip(programs, ours, theirs, strict=True) if mine.right is not other]
    assert differ == []
    assert 5 < sum(theirs) < len(theirs) - 5


@official
@pytest.mark.usefixtures("quick")
def test_where_the_official_package_differs(sandbox: Sandbox) -> None:
    theirs = officially([(row, code) for row, code, *_ in DIFFERENT.values()])
    ours = [verdicts(sandbox, row, [code])[0].right for row, code, *_ in DIFFERENT.values()]
    found = {name: (other, mine) for name, other, mine in zip(DIFFERENT, theirs, ours, strict=True)}
    assert found == {name: known[2:] for name, known in DIFFERENT.items()}


def test_the_right_and_the_wrong_of_them(sandbox: Sandbox) -> None:
    right = [*map(READING.get, ("input", "readline from", "guarded", "in a thread")), PRINTING["3.0"]]
    wrong = [*map(PRINTING.get, ("raises", "too little", "os._exit", "the first test alone"))]
    found = verdicts(sandbox, SUMS, [*right, *wrong])
    assert [verdict.right for verdict in found] == [True] * 5 + [False] * 4
    assert [verdict.why for verdict in found[5:]] == [
        "test 0: ValueError", "test 0: wrong answer", "test 0: the program ended its process", "test 1: wrong answer",
    ]  # fmt: skip


def test_limits(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "LIMIT_S", 1)
    monkeypatch.setattr(judging, "EXTRA_S", 0)
    assert verdicts(sandbox, SUMS, ["while True: pass"]) == [Verdict(False, 0, "test 0: timeout")]
    stubborn = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert verdicts(sandbox, SUMS, [stubborn])[0].why == "test 0: cpu limit"
    assert verdicts(sandbox, SUMS, ["a = [0] * 10**10"])[0].right is False


def test_programs_may_read_bytes_as_in_later_versions_of_the_official_checker(sandbox: Sandbox) -> None:
    row, code, *_ = DIFFERENT["reads bytes"]
    assert verdicts(sandbox, row, [code]) == [Verdict(True, 2)]


EVERYTHING = """
import gc, glob, sys
found, frame = [], sys._getframe()
while frame:
    found.append(repr(frame.f_locals))
    frame = frame.f_back
found += [repr(held)[:10**6] for held in gc.get_objects() if isinstance(held, (dict, list, tuple))]
places = ["/proc/self/environ", "/proc/self/cmdline", PLACE]
for path in [*places, *glob.glob("/sandbox/**", recursive=True), *glob.glob("/tmp/**", recursive=True)]:
    try:
        with open(path) as file:
            found.append(file.read())
    except Exception:
        pass
print("".join(found))
"""
FORGED = """
import os, json
for fd in range(3, 64):
    for told in ({"right": True}, {"test": 0, "right": True}, {"test": 0, "printed": None}, {"test": 0, "returned": None}):
        try: os.write(fd, json.dumps(told).encode() + b"\\n")
        except OSError: pass
os._exit(0)
"""  # noqa: E501


def test_a_program_finds_no_expected_output_anywhere(tmp_path: Path, sandbox: Sandbox) -> None:
    secret = {**SUMS, "public_test_cases": json.dumps([case("31415", "42424242")])}
    path = written(tmp_path / "problems.jsonl", secret)
    code = EVERYTHING.replace("PLACE", repr(str(path)))
    outcome = sandbox.run(judging._job(code, read_cases("row", secret), 1))
    assert b"31415" in outcome.stdout
    assert b"printed" in outcome.stdout
    assert b"42424242" not in outcome.stdout


def test_hostile_programs(sandbox: Sandbox) -> None:
    ready = FORGED.replace('{"right": True}', '{"ready": True}')
    for code in (FORGED, ready, FORGED.replace("os._exit(0)", ANSWER.replace("print", "id"))):
        assert verdicts(sandbox, SUMS, [code])[0].right is False
    every = [EQUAL.replace("BASE", base) for base in ("object", "list", "tuple", "int", "dict", "str")]
    assert [verdict.right for verdict in verdicts(sandbox, SHIFTED, every)] == [False] * 6


@pytest.mark.parametrize(
    "returned",
    [
        '{"ratio": ["1e999999999"]}', '{"ratio": [1, 0]}', '{"ratio": 1}', '{"items": [[[], 1]]}', '{"items": 3}', "{}",
        '{"other": 1}', "[" * 5000 + "]" * 5000, '{"ratio": ["1e999999999", 1]}',
    ],
)  # fmt: skip
def test_what_a_hostile_program_sends_is_no_value(returned: str, sandbox: Sandbox) -> None:
    code = (
        "import os\nfor fd in range(3, 9):\n    try: os.write(fd, {}.encode())\n    except OSError: pass\nos._exit(0)"
    )
    sent = f'{{"test": 0, "returned": {returned}}}\n'
    [verdict] = verdicts(sandbox, SHIFTED, [code.replace("{}", repr(sent))])
    assert verdict.right is False


# --- the real problems --------------------------------------------------------------------------------


def test_the_third_partys_file(problems: SuiteData) -> None:
    assert len(problems.samples) == 400
    assert problems.revision.startswith("local:")
    assert "400 problems of contests from 2023-05-07 to 2024-03-02" in problems.notes[0]
    assert "400 of 400 problems come with public tests alone" in problems.notes[1]


def rows_of(data: SuiteData) -> dict[str, dict[str, Any]]:
    return {sample.id: sample.data["place"].read() for sample in data.samples}


def test_solutions_of_real_problems_pass_and_those_of_others_do_not(problems: SuiteData, sandbox: Sandbox) -> None:
    scorer = LcbGenerationSuite(release("release_v1")).scorer(sandbox)
    samples = [sample for sample in problems.samples if sample.id in SOLUTIONS]
    assert {bool(sample.data["starter_code"]) for sample in samples} == {True, False}
    assert len(samples) == len(SOLUTIONS) > 10

    def right(pair: tuple[Sample, str]) -> bool:
        score = scorer.score(pair[0], Answer(fenced(pair[1]), chat=True))
        assert score.error is None
        return bool(score.values["right"])

    codes = [SOLUTIONS[sample.id] for sample in samples]
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(right, zip(samples, codes, strict=True)))
        assert not any(pool.map(right, zip(samples, codes[1:] + codes[:1], strict=True)))


def knowing(row: Mapping[str, Any], wrong_from: int) -> str:
    """A program that knows the tests, and gives what another one expects from test `wrong_from` on."""
    cases = read_cases("row", row)
    given = {asked: gives if number < wrong_from else "7,7" for number, (asked, gives) in
             enumerate(zip(cases.inputs, cases.outputs, strict=True))}  # fmt: skip
    if cases.function is None:
        return f"import sys\nprint({given!r}[sys.stdin.read()])"
    answers = {repr([json.loads(line) for line in asked.split("\n")]): gives for asked, gives in given.items()}
    head = f"import json\nclass Solution:\n    def {cases.function}(self, *a):\n        "
    head += f"told = {answers!r}[repr(list(a))]\n"
    return head + "        return None if told == '7,7' else json.loads(told)"


@official
@pytest.mark.slow
def test_all_problems_as_the_official_package_says(problems: SuiteData, sandbox: Sandbox) -> None:
    rows = rows_of(problems)
    every = [(row, knowing(row, 99)) for row in rows.values()]
    every += [(row, knowing(row, len(json.loads(row["public_test_cases"])) - 1)) for row in rows.values()]
    every += [(rows[name], code) for name, code in SOLUTIONS.items()]
    every += [(rows[name], "pass") for name in SOLUTIONS]
    every += [(rows[name], code) for name, code in zip(SOLUTIONS, reversed(SOLUTIONS.values()), strict=True)]
    with ThreadPoolExecutor(2) as pool:
        ours = list(pool.map(lambda pair: judge(sandbox, pair[1], read_cases("row", pair[0])).right, every))
    assert ours[:400] == [True] * 400
    assert ours[400:800] == [False] * 400
    assert ours == officially(every, timeout=6)


# --- code execution and test-output prediction ----------------------------------------------------------


def sample_of(suite: Suite, tmp_path: Path, row: Mapping[str, Any]) -> Sample:
    [sample] = suite.load(written(tmp_path / "rows.jsonl", row)).samples
    return sample


EXECUTION_ANSWERS = {
    "assert twice(a = [1, 'x']) == [1, 'x', 1, 'x']\n[/ANSWER]": True,
    "[1, 'x', 1, 'x']": True,
    '[1, "x", 1, "x"]\n\nThat is all': True,
    "[1.0, 'x', True, 'x']": True,
    "assert twice(a = [1, 'x']) == [1, 'x',\n 1, 'x'][/ANSWER]": True,
    "assert twice(a = [1, 'x']) == [1, 'x',\n 1, 'x']": False,
    "": False,
    "[/ANSWER]": False,
    "[1, 'x']": False,
    "(1, 'x', 1, 'x')": False,
    "assert twice(a = [1, 'x']) == twice(a = [1, 'x'])": False,
    "nothing": False,
    "(" * 3000: False,
}


@pytest.mark.parametrize("text", EXECUTION_ANSWERS, ids=lambda text: text[:20])
def test_outputs(text: str, tmp_path: Path, sandbox: Sandbox) -> None:
    suite = LcbExecutionSuite()
    score = suite.scorer(sandbox).score(sample_of(suite, tmp_path, EXECUTED), Answer(text))
    assert (score.values, score.error) == ({"right": EXECUTION_ANSWERS[text]}, None)


HOSTILE_OUTPUTS = ["None or True", "[1, 'x'] * 2", "[1, 'x', 1, 'x'] # twice", "__import__('os').getcwd() or 1"]


def test_outputs_that_the_official_script_takes_and_should_not(tmp_path: Path, sandbox: Sandbox) -> None:
    suite = LcbExecutionSuite()
    scorer, sample = suite.scorer(sandbox), sample_of(suite, tmp_path, EXECUTED)
    assert [scorer.score(sample, Answer(text)).values["right"] for text in HOSTILE_OUTPUTS] == [
        False,
        False,
        True,
        False,
    ]


def test_outputs_that_are_no_literals_in_the_data(tmp_path: Path, sandbox: Sandbox) -> None:
    suite = LcbExecutionSuite()
    sample = sample_of(suite, tmp_path, {**EXECUTED, "output": "inf"})
    scorer = suite.scorer(sandbox)
    assert [scorer.score(sample, Answer(text)).values["right"] for text in ("inf", " inf\n", "-inf", "1", "nan")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_a_chain_of_thought_is_read_from_its_answer() -> None:
    text = "so 1 == 2\n[/THOUGHT]\n[ANSWER]\nassert f(1) == 3\n[/ANSWER]\n\n[PYTHON]"
    assert executed_output(text, thinks=True) == "3"
    assert executed_output(text, thinks=False) == "2"


TESTED_ANSWERS = {
    "assert twice([1, 2], 2) == [1, 2, 1, 2]": True,
    "```python\nassert twice([1, 2], 2) == [1, 2, 1, 2]\n```": True,
    "assert twice([1], 2) == [1]\nSo:\nassert twice([1, 2], 2) == [1, 2, 1, 2]": True,
    "```\n[1, 2, 1, 2]\n```": True,
    "text\n```text\n5\n```\n```python\n[1, 2, 1, 2]\n```": True,
    "assert twice([1, 2], 2) == [1, 2] * 2": True,
    "assert twice([1, 2], 2) == sorted([2, 1]) + [True, 2.0]": True,
    "assert twice([1, 2], 2) == [1, 2, 1, 2] # as asked": True,
    "assert [1, 2, 1, 2] == twice([1, 2], 2)": False,
    "assert twice([1, 2], 2) == (1, 2, 1, 2)": False,
    "assert twice([1, 2], 2) == [1, 2]": False,
    "assert twice([1, 2], 2)": False,
    "assert True": False,
    "[1, 2, 1, 2]": False,
    "": False,
    "```\n```": False,
    "assert twice([1, 2], 2) == twice([1, 2], 2)": False,
    "assert x == 1 / 0": False,
    "assert x == [1, 2, 1, 2": False,
    "```\n# assert nothing\n```": False,
    "assert x == " + "1+" * 900 + "1": False,
}
HOSTILE_TESTS = [
    "assert x == json.loads(expected_output)",
    "assert x == type('E', (), {'__eq__': lambda *_: True})()",
    "assert x == __import__('os')._exit(0)",
    "assert x == print('\"[1, 2, 1, 2]\"')",
]


@pytest.mark.parametrize("text", TESTED_ANSWERS, ids=lambda text: text[:40])
def test_assertions(text: str, tmp_path: Path, sandbox: Sandbox) -> None:
    suite = LcbTestOutputSuite()
    score = suite.scorer(sandbox).score(sample_of(suite, tmp_path, TESTED), Answer(text))
    assert (score.values, score.error) == ({"right": TESTED_ANSWERS[text]}, None)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@hypothesis.given(st.text(st.sampled_from("assert =()[]'\"#\n`python12,x\\\0\ud800"), max_size=80))
@hypothesis.settings(max_examples=300)
def test_any_text_can_be_read(text: str) -> None:
    for answer in (text, f"assert x == {text}", f"```\n{text}\n```"):
        found = asserted_output(answer)
        assert found is None or isinstance(found, str)
        sample = Sample("s", EXECUTED)
        for thinks in (False, True):
            score = LcbExecutionSuite(thinks=thinks).scorer(None).score(sample, Answer(answer))  # type: ignore[arg-type]
            assert score.error is None


def test_hostile_assertions(tmp_path: Path, sandbox: Sandbox) -> None:
    suite = LcbTestOutputSuite()
    scorer, sample = suite.scorer(sandbox), sample_of(suite, tmp_path, TESTED)
    for text in HOSTILE_TESTS:
        assert scorer.score(sample, Answer(text)).values == {"right": False}, text


def test_gold_is_right(tmp_path: Path, sandbox: Sandbox) -> None:
    suites: list[tuple[Suite, Mapping[str, Any]]] = [
        (LcbExecutionSuite(), EXECUTED), (LcbExecutionSuite(thinks=True), EXECUTED), (LcbTestOutputSuite(), TESTED),
    ]  # fmt: skip
    for suite, row in suites:
        sample = sample_of(suite, tmp_path, row)
        gold = suite.gold(sample)
        assert gold is not None
        assert suite.scorer(sandbox).score(sample, gold).values == {"right": True}
    assert generation().gold(sample) is None


@official
def test_the_official_scripts_say_the_same_of_outputs() -> None:
    row = {key: EXECUTED[key] for key in ("code", "input", "output")}
    for thinks in (False, True):
        answers = [f"[ANSWER]{text}" if thinks else text for text in EXECUTION_ANSWERS]
        found = ask({"what": "execution", "row": row, "thinks": thinks, "answers": answers})
        assert dict(zip(answers, found, strict=True)) == dict(zip(answers, EXECUTION_ANSWERS.values(), strict=True))
    taken = ask({"what": "execution", "row": row, "thinks": False, "answers": HOSTILE_OUTPUTS})
    assert taken == [True, True, True, False]
    output = json.loads(TESTED["test"])[0]["output"]  # type: ignore[arg-type]
    found = ask({"what": "test_output", "output": output, "answers": list(TESTED_ANSWERS)})
    assert dict(zip(TESTED_ANSWERS, found, strict=True)) == TESTED_ANSWERS
    assert ask({"what": "test_output", "output": output, "answers": HOSTILE_TESTS[:2]}) == [True, True]


@official
def test_prompts_and_code_are_the_official_ones(tmp_path: Path) -> None:
    answers = ["```python\na\n```\nb\n```\nc\n```", "```\na", "", "x ```y``` z\n```\n", " print(1)\n"]
    request = {"generation": [SUMS, SHIFTED], "execution": EXECUTED, "test_output": TESTED, "answers": answers}
    theirs = ask({"what": "prompts", **request})
    suite = generation()
    samples = {s.id: s for s in suite.load(written(tmp_path / "problems.jsonl", SUMS, SHIFTED)).samples}
    asked = [suite.prompt(samples[str(row["question_id"])]) for row in (SUMS, SHIFTED)]
    chat = [[{"role": turn.role, "content": turn.content} for turn in prompt.messages] for prompt in asked]
    assert chat == theirs["chat"]
    assert [prompt.text for prompt in asked] == theirs["base"]
    assert [code_in(Answer(text, chat=True)) for text in answers] == theirs["code"]
    assert [code_in(Answer(text)) for text in answers] == theirs["base_code"]
    others: list[tuple[Suite, Mapping[str, Any], str]] = [
        (LcbExecutionSuite(), EXECUTED, "execution"),
        (LcbExecutionSuite(thinks=True), EXECUTED, "execution_cot"),
        (LcbTestOutputSuite(), TESTED, "test_output"),
    ]
    for other, row, key in others:
        messages = other.prompt(sample_of(other, tmp_path, row)).messages
        assert [{"role": turn.role, "content": turn.content} for turn in messages] == theirs[key]


def test_predictions_order_rows_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{**EXECUTED, "id": f"sample_{number}", "contest_date": 1704499200000} for number in (10, 9, 1)]
    path = written(tmp_path / "execution-v2.jsonl", *rows)
    ids = [sample.id for sample in LcbExecutionSuite().load(tmp_path).samples]
    assert ids == ["sample_1", "sample_9", "sample_10"]
    path.unlink()
    from datetime import datetime

    table = pyarrow.Table.from_pylist([{**row, "contest_date": datetime(2024, 1, 6)} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "execution-v2.parquet")
    data = LcbExecutionSuite().load(tmp_path)
    assert [sample.id for sample in data.samples] == ids
    assert data.samples[0].data["contest_date"] == "2024-01-06"
    (tmp_path / "execution-v2.parquet").write_bytes(b"no parquet")
    with pytest.raises(SuiteError, match="cannot be read"):
        LcbExecutionSuite().load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": "[]"}, "expected 'test' to be a JSON list with a test"),
        ({"test": json.dumps([case("1", "'a'")])}, "its output being JSON"),
        ({"test_id": "0"}, "expected 'test_id' to be a number"),
        ({"starter_code": "x = 1"}, "expected 'starter_code' with one function"),
    ],
)
def test_rows_of_tests_that_are_none(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=message):
        LcbTestOutputSuite().load(written(tmp_path / "rows.jsonl", {**TESTED, **change}))
    assert asserted_output("assert f() == 1") == "1"


# --- the command --------------------------------------------------------------------------------------


def test_the_command_judges_stored_answers_and_reads_them_again(tmp_path: Path) -> None:
    path = written(tmp_path / "problems.jsonl", SUMS, SHIFTED)
    answers = written(
        tmp_path / "answers.jsonl",
        {"task_id": "made_a", "solution": ANSWER},
        {"task_id": "9001", "solution": METHOD + "return a"},
    )
    command = [
        sys.executable, "-m", "plt_eval", "run", "--suite", "lcb-generation", "--data", str(path), "--engine", "replay",
        "--completions", str(answers), "--results", str(tmp_path / "runs"), "--json",
    ]  # fmt: skip
    for said in ("2 of 2 samples judged", "complete already"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
        assert "may have seen problems" in done.stderr
        [result] = json.loads(done.stdout)
        assert result["metrics"]["lcb-generation.pass@1"]["value"] == 0.5
    written(path, SUMS, {**SHIFTED, "contest_date": "2024-02-06T00:00:00"})
    done = subprocess.run([*command, "--since", "2024-02-01"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    [result] = json.loads(done.stdout)
    assert result["metrics"]["lcb-generation.pass@1"]["n"] == 1
    done = subprocess.run([*command, "--since", "2030-01-01"], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "--since 2030-01-01: no problem of these dates" in done.stderr
