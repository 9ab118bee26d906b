"""MultiPL-E: reading rows, making programs of answers, judging them in each language, and the data itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from plt_benchmarks.multilingual.judge import FORGED, MultilingualScorer, job, run, verdict_on, version
from plt_benchmarks.multilingual.languages import LANGUAGES, PATH, Language, language
from plt_benchmarks.multilingual.programs import code_block, header, program, text_of, with_impossible_test
from plt_benchmarks.multilingual.rows import Hub
from plt_benchmarks.multilingual.suite import REVISION, MultilingualSuite, chosen_languages
from plt_benchmarks.options import SuiteOptions
from plt_benchmarks.protocols import (
    Answer,
    Sample,
    Sandbox,
    SandboxError,
    SandboxJob,
    SandboxOutcome,
    Score,
    SuiteError,
)
from plt_benchmarks.registry import get_suite
from plt_eval.sandbox import open_sandbox

DATA = os.environ.get("PLT_EVAL_DATA")
real = pytest.mark.skipif(DATA is None, reason="PLT_EVAL_DATA is not set")
FOLDER = Path(DATA or ".", "multipl-e")
SOLUTIONS: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).parents[1].joinpath("fixtures", "multilingual", "solutions.yaml").read_text()
)
COMPILED = ("ts", "java", "cpp", "go", "rs", "cs", "d", "rkt")
"""Languages of which one problem is enough outside of the slow tests: compiling takes long. Scala takes too long."""
CASES = [(key, name) for key, solved in SOLUTIONS.items() for name in solved]


def row(key: str, **other: Any) -> dict[str, Any]:
    """A problem of our own in the data's format: twice a number, by the name of `twice`."""
    return {"name": "HumanEval_0_twice", "language": key, "stop_tokens": ["\n}"], **PROBLEMS[key], **other}


PROBLEMS: dict[str, dict[str, Any]] = {
    "py": {
        "prompt": 'def twice(x: int) -> int:\n    """ Twice x. """\n',
        "tests": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(4) == 8\n\n"
        "def test_check():\n    check(twice)\n\ntest_check()\n",
        "stop_tokens": ["\ndef", "\n#", "\nif", "\nclass"],
    },
    "sh": {
        "prompt": "#!/bin/bash\n# Twice a number\ntwice() {\n",
        "tests": '}\n\ncandidate() {\n    twice "$@"\n}\n\nset -e\nrun_test() {\n    [[ $(candidate "1") = "2" ]]\n'
        '    [[ $(candidate "4") = "8" ]]\n}\n\nrun_test',
    },
    "cpp": {
        "prompt": "#include<assert.h>\n#include<bits/stdc++.h>\n// Twice x\nlong twice(long x) {\n",
        "tests": "}\nint main() {\n    auto candidate = twice;\n    assert(candidate((1)) == (2));\n}\n",
    },
    "java": {
        "prompt": "import java.util.*;\nimport org.javatuples.*;\nclass Problem {\n    // Twice x\n"
        "    public static long twice(long x) {\n",
        "tests": "    }\n    public static void main(String[] args) {\n    assert(twice((1l)) == (2l));\n    }\n\n}\n",
        "stop_tokens": ["\n    }\n"],
    },
    "go": {
        "prompt": 'package twice_test\n\nimport (\n    "testing"\n    "fmt"\n)\n\n'
        "// Twice x\nfunc twice(x int) int {\n",
        "tests": "func TestTwice(t *testing.T) {\n  candidate := twice\n\ttype test struct {\n"
        "\t\tactual   interface{}\n\t\texpected interface{}\n\t}\n   tests := []test{\n"
        "     { actual: candidate(1), expected: 2 },\n   }\n\n\tfor i, tc := range tests {\n"
        '\t\tt.Run(fmt.Sprintf("test num % d", i), func(t *testing.T) {\n'
        '\t\t\tif fmt.Sprintf("%v", tc.actual) != fmt.Sprintf("%v", tc.expected) {\n'
        "\t\t\t\tt.Errorf(\"expected '%s', got '%s'\", tc.expected, tc.actual)\n\t\t\t}\n\t\t})\n\t}\n}\n",
        "stop_tokens": ["\nfunc", "struct", "\n// "],
    },
    "js": {
        "prompt": "//Twice x\nfunction twice(x){\n",
        "tests": "const assert = require('node:assert');\n\n\nfunction test() {\n  let candidate = twice;\n"
        "  assert.deepEqual(candidate(1),2);\n}\n\ntest();",
        "stop_tokens": ["\nfunction ", "\n/*", "\n//", "\nconsole.log"],
    },
    "ts": {
        "prompt": "//Twice x\nfunction twice(x: number): number {\n",
        "tests": "declare var require: any;\nconst assert = require('node:assert');\n\n\nfunction test() {\n"
        "  let candidate = twice;\n  assert.deepEqual(candidate(1),2);\n}\n\ntest();",
    },
    "php": {
        "prompt": "<?php\n// Twice x\nfunction twice($x) {\n",
        "tests": "function candidate(...$args) {\n    return twice(...$args);\n}\n\nfunction test(): void {\n"
        '    if (candidate(1) !== 2) { throw new Exception("Test failed!"); }\n}\n\ntest();',
        "stop_tokens": ["\nfunction", "\n?>", "\n//", "\n#"],
    },
    "pl": {
        "prompt": "# Twice x\nsub twice {\n    my($x) = @_;\n",
        "tests": "use Test::Deep;\n\n\nsub testhumaneval {\n    my $candidate = \\&twice;\n"
        '        if(eq_deeply($candidate->(1),2)) {\n        print "ok!" }else{\n        exit 1;\n        }\n}\n\n'
        "testhumaneval();",
        "stop_tokens": ["\nsub", "\n#", "\n\n"],
    },
    "rb": {
        "prompt": "# Twice x\ndef twice(x)\n",
        "tests": "require 'test/unit'\nclass TestHumanEval < Test::Unit::TestCase\n  def test_twice\n"
        "    candidate = method(:twice)\n    assert_equal(2, candidate.call(1))\n  end\nend\n",
        "stop_tokens": ["\nclass", "\ndef", "\n#", "\n\n"],
    },
    "lua": {
        "prompt": "-- Twice x\nlocal function twice(x)\n",
        "tests": "lu = require('luaunit')\n\nfunction test_humaneval()\nlocal candidate = twice\n"
        "    lu.assertEquals(candidate(1), 2)\nend\n\nos.exit(lu.LuaUnit.run())",
        "stop_tokens": ["\nlocal", "\nfunction", "\n--", "\n\n"],
    },
}  # fmt: skip
"""Where CI has the toolchains and not the data."""


def needs(key: str) -> Language:
    """The language, if its toolchain is here. In CI those of every language that .ci/run installs must be."""
    found = language(key)
    if not found.present:
        pytest.skip(f"{found.title}'s toolchain is not installed: {found.mend}")
    return found


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return open_sandbox("bubblewrap")


@pytest.fixture(scope="module")
def scorer(sandbox: Sandbox) -> MultilingualScorer:
    return MultilingualScorer(sandbox, ())


def judged(scorer: MultilingualScorer, problem: dict[str, Any], answer: Answer) -> Score:
    return scorer.score(Sample(f"{problem['language']}/{problem['name']}", problem), answer)


# --- names and selections ---------------------------------------------------------------------------------


def test_a_selection_makes_a_suite_of_its_own_in_one_order() -> None:
    (one,), (other,) = get_suite("multilingual:java,js"), get_suite("Multilingual:JS, java")
    assert one.name == other.name == "multilingual-js-java"
    assert one.problems == 161 + 158
    assert [need.what for need in one.needs()] == ["JavaScript (js)", "Java (java)"]
    assert get_suite("multilingual-mbpp:rs")[0].problems == 354
    official = [each for each in LANGUAGES if each.key != "py"]
    assert get_suite("multilingual")[0].problems == sum(each.counts[0] for each in official)


@pytest.mark.parametrize(
    ("name", "selection", "message"),
    [
        (
            "multilingual",
            "js,klingon",
            "--suite multilingual:js,klingon: unknown language 'klingon'; known: py, js",
        ),
        ("multilingual", "js,", "--suite multilingual:js,: unknown language ''"),
        ("multilingual-mbpp", "py", "--suite multilingual-mbpp:py: MBPP itself is in Python: --suite mbpp"),
    ],
)
def test_selections_that_cannot_be(name: str, selection: str, message: str) -> None:
    with pytest.raises(SuiteError, match=f"^{re.escape(message)}"):
        chosen_languages(name, selection, SuiteOptions())


def test_options_that_have_no_effect_are_refused() -> None:
    with pytest.raises(SuiteError, match="--num-fewshot has no effect on suite multilingual"):
        get_suite("multilingual", SuiteOptions(num_fewshot=1))


# --- rows -------------------------------------------------------------------------------------------------


def write(folder: Path, key: str, *found: dict[str, Any]) -> Path:
    file = folder / f"humaneval-{key}.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in found))
    return file


def test_rows_of_parquet_and_json_lines_are_the_same_problems(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    lines, tables = tmp_path / "lines", tmp_path / "tables"
    for folder in (lines, tables / "humaneval-py", tables / "humaneval-sh"):
        folder.mkdir(parents=True)
    for key in ("py", "sh"):
        write(lines, key, row(key))
        parquet.write_table(pyarrow.Table.from_pylist([row(key)]), tables / f"humaneval-{key}" / "test-0-of-1.parquet")
    suite = MultilingualSuite("humaneval", (language("py"), language("sh")))
    first, second = suite.load(lines), suite.load(tables)
    assert [sample.id for sample in first.samples] == ["py/HumanEval_0_twice", "sh/HumanEval_0_twice"]
    assert (first.samples, first.sha256) == (second.samples, second.sha256)
    assert (first.revision, first.notes) == ("local:lines", ())


def test_languages_take_turns_and_what_is_absent_is_said(tmp_path: Path) -> None:
    write(tmp_path, "py", row("py", name="HumanEval_10_twice"), row("py", name="HumanEval_9_twice"))
    write(tmp_path, "sh", row("sh", name="HumanEval_9_twice"))
    suite = MultilingualSuite("humaneval", (language("py"), language("sh"), language("js")))
    data = suite.load(tmp_path)
    assert [sample.id for sample in data.samples] == [
        "py/HumanEval_9_twice", "sh/HumanEval_9_twice", "py/HumanEval_10_twice",
    ]  # fmt: skip
    assert data.notes == (f"left out, because {tmp_path} has no humaneval problems in it: JavaScript (js)",)


def test_missing_toolchains_are_left_out_with_a_note_unless_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("py", "sh"):
        write(tmp_path, key, row(key))
    monkeypatch.setattr("plt_benchmarks.multilingual.languages.PATH", str(tmp_path))
    monkeypatch.setattr("plt_benchmarks.multilingual.languages.shutil.which", lambda name, path: path + name)
    assert all(each.present or each.libraries for each in LANGUAGES)
    monkeypatch.setattr(
        "plt_benchmarks.multilingual.languages.shutil.which", lambda name, path: None if name == "bash" else path + name
    )
    data = MultilingualSuite("humaneval").load(tmp_path)
    assert [sample.id for sample in data.samples] == ["py/HumanEval_0_twice"]
    assert "left out, because its toolchain is not here: Bash (apt install bash)" in data.notes
    chosen = MultilingualSuite("humaneval", (language("sh"),)).load(tmp_path)
    assert [sample.id for sample in chosen.samples] == ["sh/HumanEval_0_twice"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"tests": None}, "line 1: expected 'tests' to be a string, found NoneType"),
        ({"stop_tokens": "x"}, "line 1: expected 'stop_tokens' to be a list of strings, found 'x'"),
        ({"tests": "pass"}, "line 1: expected 'tests' to have Python tests of MultiPL-E, found none"),
        ({"language": "js"}, "expected humaneval problems in py, found none"),
        ({"name": "mbpp_0_twice"}, "expected humaneval problems in py, found none"),
    ],
)
def test_rows_that_are_not_in_the_format(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    file = write(tmp_path, "py", row("py", **broken))
    with pytest.raises(SuiteError, match=re.escape(message)):
        MultilingualSuite("humaneval", (language("py"),)).load(file)


def test_a_problem_twice_a_folder_without_and_no_folder(tmp_path: Path) -> None:
    suite = MultilingualSuite("humaneval", (language("py"),))
    with pytest.raises(SuiteError, match=r"expected files humaneval-LANGUAGE\.jsonl"):
        suite.load(tmp_path)
    with pytest.raises(SuiteError, match="no such file or folder"):
        suite.load(tmp_path / "nowhere")
    write(tmp_path, "py", row("py"), row("py"))
    with pytest.raises(SuiteError, match="line 2: py/HumanEval_0_twice is there for the second time"):
        suite.load(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A cache of our own, and a hub that lists what it is asked for and has one language more each time."""
    import pyarrow
    from huggingface_hub import HfApi
    from pyarrow import parquet

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def download(repo: str, **options: Any) -> str:
        asked.append({**options, "repo": repo})
        folder = Hub("nuprl/MultiPL-E", REVISION, "humaneval").kept
        for key in [name.split("-")[1].partition("/")[0] for name in options["allow_patterns"]]:
            (folder / f"humaneval-{key}").mkdir(parents=True, exist_ok=True)
            table = pyarrow.Table.from_pylist([row(key)])
            parquet.write_table(table, folder / f"humaneval-{key}" / "test-00000-of-00001.parquet")
        return str(folder)

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=REVISION))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_the_official_files_are_fetched_once_by_language(hub: list[dict[str, Any]]) -> None:
    for chosen in (["sh"], ["sh"], ["sh", "js"], ["js"]):
        suite = MultilingualSuite("humaneval", tuple(map(language, chosen)))
        data = suite.load(None)
        assert [sample.id for sample in data.samples] == [f"{key}/HumanEval_0_twice" for key in chosen]
        assert data.revision == "nuprl/MultiPL-E@8a4cb75"
        assert suite.release.present
    assert [call["allow_patterns"] for call in hub] == [
        ["humaneval-sh/*.parquet"], ["humaneval-sh/*.parquet", "humaneval-js/*.parquet"],
    ]  # fmt: skip
    assert {(call["repo"], call["revision"]) for call in hub} == {("nuprl/MultiPL-E", REVISION)}


def test_the_official_data_has_no_python(hub: list[dict[str, Any]]) -> None:
    data = MultilingualSuite("humaneval", (language("py"), language("sh"))).load(None)
    assert [sample.id for sample in data.samples] == ["sh/HumanEval_0_twice"]
    assert [note.partition(" in it: ")[2] for note in data.notes] == ["Python (py)"]
    assert hub[0]["allow_patterns"] == ["humaneval-sh/*.parquet"]


def test_without_a_network_a_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    class OfSomeLibrary(Exception):
        """The hub's releases use different ones."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OfSomeLibrary("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    suite = MultilingualSuite("mbpp", (language("js"),))
    assert not suite.release.present
    with pytest.raises(SuiteError, match=r"cannot fetch .*MultiPL-E at 8a4cb75: no network; pass --data PATH"):
        suite.load(None)


# --- prompts and programs ---------------------------------------------------------------------------------


def test_a_base_model_continues_the_prompt_and_a_chat_model_is_asked_for_a_block() -> None:
    suite = MultilingualSuite("humaneval", (language("js"),))
    asked = suite.prompt(Sample("js/HumanEval_0_twice", row("js")))
    assert asked.text == PROBLEMS["js"]["prompt"]
    assert asked.stop == ("\nfunction ", "\n/*", "\n//", "\nconsole.log")
    (message,) = asked.messages
    assert message.content.startswith("Complete the following JavaScript code.")
    assert message.content.endswith("```javascript\n//Twice x\nfunction twice(x){\n```\n")
    assert (asked.prefill, asked.chat_stop) == ("", ())


def test_a_continuation_ends_at_the_first_stop_token() -> None:
    answer = Answer("    return 2 * x;\n}\n// more\nfunction other() {}\nfunction third() {}")
    solution, tests = program(language("js"), row("js"), answer)
    assert text_of(solution, tests) == (
        "//Twice x\nfunction twice(x){\n    return 2 * x;\n}\n" + str(PROBLEMS["js"]["tests"])
    )


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\ndef twice(x): ...\n```", "def twice(x): ...\n"),
        ("First:\n```sh\npip install x\n```\nthen\n```\ndef twice(x): ...\n```\nuse it:\n```\ntwice(3)\n```", None),
        ("<think>```\ntwice(no)\n```</think>\n```\ndef twice(x): ...", "def twice(x): ..."),
        ("def twice(x): ...", "def twice(x): ..."),
        ("```\nsomething else\n```", "something else\n"),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(text: str, block: str | None) -> None:
    assert code_block(text, "HumanEval_0_twice") == ("def twice(x): ...\n" if block is None else block)


CHAT = [
    ("py", "def half(x):\n    return x\n\ndef twice(x):\n    return half(x) * 2\n"),
    ("sh", "half() { echo $1; }\ntwice() {\n  echo $(( $(half $1) * 2 ))\n}\n"),
    ("cpp", "#include <vector>\nlong half(long x) { return x; }\nlong twice(long x) {\n  return 2 * half(x);\n}\n"
     'int main() {\n  std::cout << "{" << twice(2);\n}\n'),
    ("java", "import java.util.function.*;\nclass Problem {\n    static long half(long x) { return x; }\n"
     "    public static long twice(long x) {\n        return 2 * half(x);\n    }\n"
     "    public static void main(String[] a) {\n        System.out.println(\"}\");\n    }\n}\n"),
    ("java", "public class Solution {\n  public static long twice(long x) {\n    return 2 * x;\n  }\n}\n"),
    ("java", "public static long twice(long x) {\n    return 2 * x;\n}\n"),
    ("java", "import java.util.*;\n\nclass Problem\n{\n    public static long twice(long x)\n    {\n"
     "        return 2 * x;\n    }\n}\n"),
    ("java", "import java.util.List;\n\n/**\n * Doubles (as asked).\n */\npublic static long twice(long x) {\n"
     "    return 2 * x;\n}\n"),
    ("go", 'package main\n\nimport (\n\t"fmt"\n\t"strings"\n)\n\nfunc twice(x int) int {\n\t'
     'return x + len(strings.Repeat("a", x))\n}\n\nfunc main() {\n\tfmt.Println(twice(2))\n}\n'),
    ("js", "export function twice(x) {\n  return 2 * x;\n}\nmodule.exports = { twice };\n"),
    ("js", "function twice(x) {\n  return 2 * x;\n}\n\nexport { twice };\nexport default twice;\n"),
    ("ts", "function twice(x: number): number {\n  return 2 * x;\n}\n\nmodule.exports = { twice };\n"),
    ("php", "<?php\nfunction half($x) { return $x; }\nfunction twice($x) {\n  return 2 * half($x);\n}\n?>\n"),
    ("pl", "sub twice {\n    my ($x) = @_;\n    return 2 * $x;\n}\n"),
    ("rb", "def twice(x)\n  2 * x\nend\n"),
    ("lua", "local function half(x) return x end\n\nlocal function twice(x)\n  return 2 * half(x)\nend\n"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "code"), CHAT, ids=[f"{key}-{at}" for at, (key, _) in enumerate(CHAT)])
def test_whole_functions_of_chat_models(scorer: MultilingualScorer, key: str, code: str) -> None:
    found = needs(key)
    score = judged(scorer, row(key), Answer(f"Here it is:\n\n```{found.fence}\n{code}```\nIt doubles.", chat=True))
    assert score.values == {"right": True}, score.detail
    if key in COMPILED:
        return
    wrong = code.replace("2 *", "3 *").replace("* 2", "* 3").replace("x + len", "x + x + len")
    assert judged(scorer, row(key), Answer(f"```\n{wrong}```", chat=True)).values == {"right": False}


# --- verdicts ---------------------------------------------------------------------------------------------


def ended(stdout: str = "ready\n", stderr: str = "", code: int | None = 0, status: str = "exited") -> SandboxOutcome:
    return SandboxOutcome(status, code, stdout.encode(), stderr.encode(), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "outcome", "status"),
    [
        ("js", ended(), "OK"),
        ("js", ended(code=1, stderr="AssertionError"), "Exception"),
        ("js", ended(code=1, stderr="SyntaxError: x"), "SyntaxError"),
        ("js", ended(code=-signal.SIGXCPU), "Timeout"),
        ("js", ended(code=None, status="cpu_limit"), "Timeout"),
        ("js", ended(code=None, status="wall_limit"), "Timeout"),
        ("js", ended(code=None, status="memory_limit"), "Exception"),
        ("js", ended("ready\n" + "x" * 99, code=None, status="output_limit"), "Exception"),
        ("cpp", ended("compile 1\n", "error: no", code=1), "SyntaxError"),
        ("cpp", ended("", code=None, status="memory_limit"), "SyntaxError"),
        ("pl", ended(stderr="ERROR"), "Exception"),
        ("go", ended("ready\nFAIL x [build failed]\n"), "SyntaxError"),
        ("go", ended("ready\nFAIL\n"), "Exception"),
        ("go", ended("ready\nok  \tcommand-line-arguments\t0.002s\n"), "OK"),
        ("rkt", ended(stderr="FAILURE"), "Exception"),
        ("rkt", ended("ready\nnoise"), "OK"),
        ("cs", ended(stderr="  at System.Diagnostics.DefaultTraceListener.Fail"), "Exception"),
        ("scala", ended(stderr="warning"), "Exception"),
    ],
)
def test_verdicts_are_the_official_ones(key: str, outcome: SandboxOutcome, status: str) -> None:
    assert verdict_on(language(key), outcome).status == status


def test_a_driver_that_cannot_work_is_no_verdict() -> None:
    with pytest.raises(SandboxError, match=r"^C\+\+: the sandbox has no g\+\+"):
        verdict_on(language("cpp"), ended("broken the sandbox has no g++\n", code=3))

    class Broken:
        name = "broken"

        def run(self, _: SandboxJob) -> SandboxOutcome:
            return ended("", "MemoryError", code=1)

    score = judged(MultilingualScorer(Broken(), ()), row("cpp"), Answer("return 2 * x;"))
    assert (score.values, score.error) == ({}, "C++: the driver ended early: MemoryError")


def test_a_sandbox_without_the_toolchain_is_refused_before_anything_is_judged(sandbox: Sandbox) -> None:
    assert "Python 3" in version(sandbox, language("py"))
    with pytest.raises(SuiteError, match=r"Bash: the sandbox bubblewrap has no toolchain .* \(no klingon\): apt"):
        version(sandbox, replace(language("sh"), run=("klingon", "{source}")))
    with pytest.raises(SuiteError, match=r"has no toolchain that works \(no /x/y\)"):
        version(sandbox, replace(language("sh"), libraries=("/x/y",)))
    with pytest.raises(SuiteError, match=r"no toolchain that works .*exit code 3"):
        version(sandbox, replace(language("sh"), check=("bash", "-c", "exit 3")))
    broken = replace(language("sh"), check=("klingon", "--version"))
    with pytest.raises(SuiteError, match="leave sh out of --suite"):
        MultilingualSuite("humaneval", (broken,)).scorer(sandbox)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("py", "    import os; os._exit(0)"),
        ("py", "    import sys; sys.exit(0)"),
        ("py", "    class Same(int):\n        __eq__ = lambda *_: True\n    return Same(1)\nimport os; os._exit(0)"),
        ("py", "    return 2 if x == 1 else __import__('os')._exit(0)"),
        ("sh", "  :\n}; exit 0; x() {\n  :"),
        ("sh", "  :\n}\nrun_test() { :; }\nexec true\nx() {"),
        ("cpp", "  std::_Exit(0);"),
        ("js", "  process.exit(0);\n}"),
        ("js", "}\nrequire('node:assert').deepEqual = () => {};"),
        ("php", "  exit(0);\n}"),
        ("pl", "  exit 0;\n}"),
        ("rb", "  exit!(0)\nend"),
        ("lua", "  os.exit(0)\nend"),
        ("java", "      System.exit(0); return 0;"),
        ("go", '    os.Exit(0); return 0\n}'),
    ],
)  # fmt: skip
def test_answers_that_end_early_or_silence_the_tests_do_not_pass(
    scorer: MultilingualScorer, key: str, text: str
) -> None:
    needs(key)
    problem = row(key)
    if key == "go":
        problem["prompt"] = problem["prompt"].replace('"fmt"', '"fmt"\n    "os"')
    score = judged(scorer, problem, Answer(problem["prompt"] + text, solution=True))
    assert score.values == {"right": False}
    # Go's and Lua's own test runners see it.
    assert key in ("go", "lua") or score.detail["why"] == FORGED, score.detail


def test_what_hangs_or_prints_without_end_is_stopped(sandbox: Sandbox) -> None:
    quick = replace(language("py"), run_s=2)
    verdict = run(sandbox, quick, "while True: pass")
    assert (verdict.status, verdict.why) == ("Timeout", "it took more than 2 s")
    assert run(sandbox, quick, "import os\nwhile os.fork() or True: pass").status in ("Timeout", "Exception")
    assert run(sandbox, quick, "while True: print('x' * 9999)").status == "Exception"


def test_compiling_has_a_limit_of_its_own(sandbox: Sandbox) -> None:
    quick = replace(language("cpp"), compile_s=2)
    text = "#if __INCLUDE_LEVEL__ < 100\n#include __FILE__\n#include __FILE__\n#endif\nint main() {}\n"
    began = time.monotonic()
    verdict = run(sandbox, quick, text)
    assert verdict.status == "SyntaxError"
    assert time.monotonic() - began > 1, "the compiler ended by itself"


def test_an_answer_of_blanks_costs_no_time() -> None:
    began = time.process_time()
    program(language("java"), row("java"), Answer("class Problem {\n" + " " * 100_000, chat=True))
    assert time.process_time() - began < 5


def test_an_answer_without_end_is_not_run(scorer: MultilingualScorer) -> None:
    score = judged(scorer, row("py"), Answer("#" * 300_000))
    assert score.detail == {"why": "the answer has 300000 characters"}


def test_the_job_sees_no_home_and_its_input_is_empty(scorer: MultilingualScorer) -> None:
    needs("sh")
    text = f"  [[ -z $(cat) && -z $(ls {Path.home()} 2>/dev/null) ]] && echo $((2 * $1))\n"
    assert judged(scorer, row("sh"), Answer(text)).values == {"right": True}


# --- metrics ----------------------------------------------------------------------------------------------


def test_the_average_is_over_languages_and_its_interval_over_problems() -> None:
    suite = MultilingualSuite("humaneval")
    right, wrong, broken = Score({"right": True}), Score({"right": False}), Score(error="broken")
    scores = {
        "js/HumanEval_1_a": [right],
        "js/HumanEval_2_b": [right],
        "java/HumanEval_1_a": [wrong],
        "java/HumanEval_2_b": [broken],
        "cpp/HumanEval_1_a": [wrong],
        "cpp/HumanEval_2_b": [right],
    }
    metrics = suite.metrics(scores)
    assert list(metrics) == [
        "multilingual.pass@1", "multilingual.js.pass@1", "multilingual.java.pass@1", "multilingual.cpp.pass@1",
    ]  # fmt: skip
    assert metrics["multilingual.pass@1"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["multilingual.pass@1"].n == 2
    assert "over 3 languages" in metrics["multilingual.pass@1"].definition
    assert "(JavaScript, Java, C++)" in metrics["multilingual.pass@1"].definition
    assert metrics["multilingual.java.pass@1"].n == 1
    assert suite.metrics({}) == {}


# --- the data's own problems --------------------------------------------------------------------------------


def problems_of(key: str) -> dict[str, Sample]:
    suite = MultilingualSuite("humaneval", (language(key),))
    return {sample.data["name"]: sample for sample in suite.load(FOLDER).samples}


def cases(*, slow: bool) -> list[tuple[str, str]]:
    first = {key: next(iter(solved)) for key, solved in SOLUTIONS.items()}
    first["java"] = "HumanEval_8_sum_product"  # with javatuples
    quick = [(key, name) for key, name in CASES if key != "scala" and (key not in COMPILED or name == first[key])]
    return [case for case in CASES if case not in quick] if slow else quick


def check_right_wrong_and_empty(scorer: MultilingualScorer, key: str, name: str) -> None:
    needs(key)
    sample = problems_of(key)[name]
    text = SOLUTIONS[key][name]
    assert scorer.score(sample, Answer(text)).values == {"right": True}
    other = next((SOLUTIONS[key][each] for each in SOLUTIONS[key] if each != name), "")
    for wrong in (other, ""):
        score = scorer.score(sample, Answer(wrong))
        assert score.values == {"right": False}
        assert score.detail["status"] in ("SyntaxError", "Exception")


@real
@pytest.mark.parametrize(("key", "name"), cases(slow=False))
def test_right_wrong_and_empty_answers(scorer: MultilingualScorer, key: str, name: str) -> None:
    check_right_wrong_and_empty(scorer, key, name)


@real
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("key", "name"), cases(slow=True))
def test_right_wrong_and_empty_answers_where_compiling_takes_long(
    scorer: MultilingualScorer, key: str, name: str
) -> None:
    check_right_wrong_and_empty(scorer, key, name)


@real
@pytest.mark.parametrize("found", LANGUAGES, ids=[each.key for each in LANGUAGES])
def test_every_row_has_a_place_for_a_test_that_nothing_passes(found: Language) -> None:
    samples = problems_of(found.key)
    assert len(samples) == found.counts[0]
    tails = set()
    for sample in samples.values():
        tests = with_impossible_test(found, sample.data["tests"])
        before, after = tests.rsplit(found.impossible, 1)
        assert re.search(found.test, before.rstrip().split("\n")[-1] if found.key != "pl" else before, re.MULTILINE)
        assert not re.search(found.test, after, re.MULTILINE)
        tails.add(re.sub(r"\b(check|test_check)\(\w*\)", "", after))
    assert len(tails) <= 2  # six of D's rows have a brace more
    documented = [sample for sample in samples.values() if re.search(found.body, sample.data["prompt"], re.MULTILINE)]
    assert len(documented) == len(samples)
    assert all(sample.data["prompt"].startswith(header(found, sample.data["prompt"])) for sample in documented)


@real
def test_problems_that_the_data_itself_breaks() -> None:
    needs("php")
    # PHP has a function strlen of its own, and refuses a second one.
    sample = problems_of("php")["HumanEval_23_strlen"]
    scorer = MultilingualScorer(open_sandbox("bubblewrap"), ())
    score = scorer.score(sample, Answer("    return mb_strlen($string);\n}\n"))
    assert score.values == {"right": False}
    assert "Cannot redeclare strlen()" in score.detail["why"]


# --- the official evaluation's own way -----------------------------------------------------------------------

OFFICIAL: dict[str, tuple[list[str], ...]] = {
    "py": (["python3", "FILE.py"],),
    "js": (["node", "FILE.js"],),
    "cpp": (["g++", "FILE.cpp", "-o", "FILE", "-std=c++17"], ["./FILE"]),
    "rs": (["rustc", "FILE.rs", "-o", "FILE"], ["./FILE"]),
    "php": (["php", "FILE.php"],),
    "pl": (["perl", "FILE.pl"],),
    "rb": (["ruby", "FILE.rb"],),
    "lua": (["lua", "FILE.lua"],),
    "sh": (["bash", "FILE.sh"],),
    "java": (
        ["javac", "-encoding", "UTF8", "-cp", "/usr/share/java/javatuples.jar", "-d", ".", "FILE.java"],
        ["java", "-ea", "-cp", ".:/usr/share/java/javatuples.jar", "Problem"],
    ),
    "go": (["go", "test", "FILE_test.go"],),
    "ts": (["tsc", "--target", "esnext", "FILE.ts"], ["node", "FILE.js"]),
    "r": (["Rscript", "FILE.r"],),
}
"""The commands as the official container's evaluators give them; without the sandbox, on our own answers alone."""


def officially(key: str, text: str, folder: Path) -> bool:
    end = "_test.go" if key == "go" else f".{key}"
    (folder / f"FILE{end}").write_text(text)
    environment = {"PATH": PATH, "HOME": str(folder), "LANG": "C.UTF-8"}
    for command in OFFICIAL[key]:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False, timeout=120)
        if (
            done.returncode != 0
            or (key == "go" and b"FAIL" in done.stdout)
            or (key == "pl" and b"ERROR" in done.stdout)
        ):
            return False
    return True


@real
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("key", OFFICIAL)
def test_the_official_commands_agree(scorer: MultilingualScorer, key: str, tmp_path: Path) -> None:
    found = needs(key)
    samples = problems_of(key)
    for number, name in enumerate(SOLUTIONS[key]):
        others = [text for each, text in SOLUTIONS[key].items() if each != name]
        for at, text in enumerate([SOLUTIONS[key][name], others[0], ""]):
            folder = tmp_path / f"{number}-{at}"
            folder.mkdir()
            solution, tests = program(found, samples[name].data, Answer(text))
            ours = scorer.score(samples[name], Answer(text)).values["right"]
            assert ours is officially(key, text_of(solution, tests), folder) is (at == 0)


# --- from the command -----------------------------------------------------------------------------------------


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plt_eval", "run", "--results", str(folder), *arguments],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture
def replayed(tmp_path: Path) -> list[str]:
    """Options that judge one right and one wrong answer, in two languages."""
    for key in ("py", "sh"):
        write(tmp_path, key, row(key))
    lines = [
        {"task_id": "py/HumanEval_0_twice", "completion": "    return 2 * x\n"},
        {"task_id": "sh/HumanEval_0_twice", "completion": "    echo 3\n"},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--data", str(tmp_path), "--engine", "replay", "--completions", str(file)]


def test_the_command_judges_says_what_it_leaves_out_and_goes_on(replayed: list[str], tmp_path: Path) -> None:
    first = command("--suite", "multilingual:py,sh", "--json", *replayed, folder=tmp_path / "runs")
    assert first.returncode == 0, first.stderr
    (result,) = json.loads(first.stdout)
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    name = "multilingual-py-sh"
    assert values == {f"{name}.pass@1": 0.5, f"{name}.py.pass@1": 1.0, f"{name}.sh.pass@1": 0.0}
    again = command("--suite", "multilingual:sh,py", "--json", *replayed, folder=tmp_path / "runs")
    assert "complete already" in again.stderr
    all_here = command("--suite", "multilingual", "--json", *replayed, folder=tmp_path / "runs")
    assert all_here.returncode == 0, all_here.stderr
    assert "has no humaneval problems in it: " in all_here.stderr
    assert json.loads(all_here.stdout)[0]["metrics"]["multilingual.pass@1"]["value"] == 0.5


def test_the_data_has_no_gold_answers(replayed: list[str], tmp_path: Path) -> None:
    done = command("--suite", "multilingual:py", *replayed[:4], "--completions", "gold", folder=tmp_path / "runs")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_job_is_bounded() -> None:
    made: SandboxJob = job(language("cpp"), "x")
    assert made.limits.cpu_s == 47
    assert made.limits.wall_s < 300
    assert made.limits.processes <= 256


def test_many_languages_are_rows_of_the_table() -> None:
    from rich.console import Console

    from plt_eval.records import MetricRecord
    from plt_eval.tables import results_table

    metrics = {
        name: MetricRecord(**vars(metric))
        for name, metric in MultilingualSuite("humaneval")
        .metrics({f"{each.key}/HumanEval_1_a": [Score({"right": each.key == "js"})] for each in LANGUAGES})
        .items()
    }
    identity = SimpleNamespace(suite="multilingual", model="m", loops=2)
    result: Any = SimpleNamespace(
        run=SimpleNamespace(manifest=SimpleNamespace(identity=identity)),
        metrics=SimpleNamespace(metrics=metrics, problems=19, missing=1, total=20),
    )
    console = Console(width=80)
    with console.capture() as shown:
        console.print(results_table([result]))
    lines = shown.get().splitlines()
    assert any("js.pass@1" in line and "100.0% [20.7, 100.0] n=1" in line for line in lines)
    assert any("multilingual m r2" in line for line in lines)
    assert "n=19, 1/20 missing" in shown.get()


@real
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_humanevals_own_answers_are_right_in_python(scorer: MultilingualScorer) -> None:
    """The one language whose solutions the data's origin has; as a base model and as a chat model would give them."""
    lines = (FOLDER / "humaneval-python.jsonl").read_text().splitlines()
    gold = {f"_{row['task_id'].partition('/')[2]}_": row for row in map(json.loads, lines)}

    def wrong(sample: Sample) -> list[tuple[str, str]]:
        number = re.search(r"_\d+_", sample.id)
        assert number is not None
        row = gold[number[0]]
        base = Answer(row["canonical_solution"])
        chat = Answer(f"Sure:\n```python\n{row['prompt']}{row['canonical_solution']}```\n", chat=True)
        answers = {"base": base, "chat": chat}
        return [(sample.id, how) for how in answers if not scorer.score(sample, answers[how]).values["right"]]

    with ThreadPoolExecutor(2) as pool:
        failed = [miss for found in pool.map(wrong, problems_of("py").values()) for miss in found]
    assert failed == [
        ("py/HumanEval_10_make_palindrome", "base"),  # HumanEval's prompt has a helper, MultiPL-E's has not
        ("py/HumanEval_115_max_fill", "base"),  # the same, of an import
        ("py/HumanEval_151_double_the_difference", "base"),  # MultiPL-E's tests have floats where HumanEval's have not
        ("py/HumanEval_151_double_the_difference", "chat"),
    ]
