"""CRUXEval: reading answers, judging them, and the data itself."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from plt_benchmarks.cruxeval import CRUXEVAL_I, CRUXEVAL_I_COT, CRUXEVAL_O, CRUXEVAL_O_COT, CruxEvalSuite, predicted
from plt_benchmarks.literals import DriverEnded
from plt_benchmarks.protocols import Answer, Sample, Sandbox, SandboxJob, SandboxOutcome, Score, SuiteError
from plt_eval.sandbox import open_sandbox

ROW = {
    "id": "s",
    "code": "def f(a, b=1):\n    print('noise')\n    return [a] * b",
    "input": "'x', 2",
    "output": "['x', 'x']",
}
DATA = os.environ.get("PLT_EVAL_DATA")
real = pytest.mark.skipif(DATA is None, reason="PLT_EVAL_DATA is not set")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return open_sandbox("bubblewrap")


def judged(suite: CruxEvalSuite, sandbox: Sandbox, text: str, row: dict[str, str] = ROW) -> Score:
    return suite.scorer(sandbox).score(Sample(row["id"], row), Answer(text))


def test_prompts_end_where_the_answer_begins_and_hide_what_is_asked() -> None:
    sample = Sample("s", ROW)
    asked = CRUXEVAL_O.prompt(sample)
    assert asked.text.endswith("assert f('x', 2) == ??\n[/PYTHON]\n[ANSWER]\n")
    assert "['x', 'x']" not in asked.text
    assert CRUXEVAL_I.prompt(sample).text.endswith("assert f(??) == ['x', 'x']\n[/PYTHON]\n[ANSWER]\n")
    for suite in (CRUXEVAL_I_COT, CRUXEVAL_O_COT):
        assert suite.prompt(sample).text.endswith("[/PYTHON]\n[THOUGHT]\n")
    assert [message.role for message in asked.messages] == ["system", "user"]
    assert asked.stop == asked.chat_stop == ("[/ANSWER]",)


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("assert f(1) == 2\n", "2"),
        ("[ANSWER]\nassert f('a == b') == 'c == d'\n[/ANSWER] and more", "'c == d'"),
        ("thoughts [ANSWER] no [/ANSWER]\n[ANSWER]\n```python\nassert f(1) == [\n 1]\n```", "[1]"),
        ("2", "2"),
        ("assert f(1) == 'a' and then", "'a' and then"),
        ("", None),
    ],
)
def test_the_output_of_an_answer(text: str, output: str | None) -> None:
    assert predicted("output", text) == output


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("assert f(1, b=2) == 2\n", "1, b=2"),
        ("[ANSWER]\nassert f('a == b') == 'c'", "'a == b'"),
        ("f([1]) == 3", "[1]"),
        ("f()", ""),
        ("assert g(1) == 2", None),
        ("3 # f(", None),
        ("", None),
        ("16", None),
    ],
)
def test_the_input_of_an_answer(text: str, arguments: str | None) -> None:
    assert predicted("input", text) == arguments


def test_right_answers(sandbox: Sandbox) -> None:
    for text in ("assert f('x', 2) == ['x', 'x']", "['x', 'x']", '["x", "x"]'):
        assert judged(CRUXEVAL_O, sandbox, text).values == {"right": True}, text
    for text in (
        "assert f('x', 2) == ['x', 'x']",
        "f('x', b=2)",
        "f(chr(120), 1 + 1)",
        "f(*('x', 2))",
        "f('x', 2) == 7",
    ):
        assert judged(CRUXEVAL_I, sandbox, text).values == {"right": True}, text
    for suite in (CRUXEVAL_I, CRUXEVAL_O, CRUXEVAL_I_COT, CRUXEVAL_O_COT):
        gold = suite.gold(Sample("s", ROW))
        assert gold is not None
        assert judged(suite, sandbox, gold.text).values == {"right": True}


WRONG_OUTPUTS = [
    "",
    "nothing to read",
    "assert f('x', 2) == ['x']",
    "assert f('x', 2) == None or True",
    "assert f('x', 2) == f('x', 2)",
    "assert f('x', 2) == ['x'] * 2",
    "(" * 5000,
    "9" * 90_000,
    "x" * 200_000,
    "type('E', (), {'__eq__': lambda *_: True})()",
]
WRONG_INPUTS = [
    "",
    "'x', 2 # f(",
    "f('x', 3)",
    "f(1 / 0)",
    "f('x', *[2] * 10**9)",
    "f('x', type('T', (int,), {'__rmul__': lambda *_: ['x', 'x'], '__index__': lambda _: 2})(3))",
    "f('x', 3) == ['x', 'x'] or True",
    "f(exit())",
    "f(__import__('os')._exit(0))",
    "f((lambda: (__import__('builtins').print('\"equal\"'), __import__('os')._exit(0)))())",
    "f(type('E', (), {'__eq__': lambda *_: True, '__mul__': lambda s, _: s})(), 2)",
]


@pytest.mark.parametrize("text", WRONG_OUTPUTS, ids=lambda text: text[:30])
def test_wrong_outputs(sandbox: Sandbox, text: str) -> None:
    score = judged(CRUXEVAL_O, sandbox, text)
    assert (score.values, score.error) == ({"right": False}, None)
    assert score.detail["why"]


@pytest.mark.parametrize("text", WRONG_INPUTS, ids=lambda text: text[:30])
def test_wrong_inputs(sandbox: Sandbox, text: str) -> None:
    score = judged(CRUXEVAL_I, sandbox, text)
    assert (score.values, score.error) == ({"right": False}, None)
    assert score.detail["why"]


def test_inputs_that_are_functions(sandbox: Sandbox) -> None:
    row = {
        **ROW,
        "code": "names = ['a']\ndef f(l, g):\n    return [g(x) for x in l]",
        "input": "0, 0",
        "output": "['A']",
    }
    for text in ("f(['a'], lambda x: x.upper())", "f(names[:], str.upper)", "f(range(1), lambda _: chr(65))"):
        assert judged(CRUXEVAL_I, sandbox, text, row).values == {"right": True}, text
    for text in (
        "f([(0 for _ in [])], lambda g: g.gi_frame.f_globals.update(found=1))",
        "f([0], lambda x: type('E', (), {'__eq__': lambda *_: True})())",
        "f([0], lambda x: exec('1'))",
        "f([0], ().__class__)",
        "f([0], lambda x: print('equal'))",
    ):
        assert judged(CRUXEVAL_I, sandbox, text, row).values == {"right": False}, text


ODD = {
    "a number of thousands of digits": "0x" + "f" * 5000,
    "a long sum": "+".join(["1"] * 500),
    "many signs": "-" * 500 + "1",
    "many attributes": "a" + ".b" * 800,
    "many calls": "a" + "()" * 400,
    "many indices": "a" + "[0]" * 20_000,
    "many conditions": "1 if 1 else " * 400 + "1",
    "many lambdas": "lambda: " * 300 + "1",
    "many brackets": "[" * 199 + "]" * 199,
    "a lone surrogate": "'\ud800'",
    "a NUL": "'\0'",
    "infinity": "1e999",
    "no number": "float('nan')",
    "a walrus": "(a := 1)",
    "an unfinished string": '"' * 5001,
}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD.keys())
def test_odd_answers_are_wrong_and_break_nothing(sandbox: Sandbox, value: str) -> None:
    for suite in (CRUXEVAL_I, CRUXEVAL_O):
        for form in ("assert f({}) == 1", "assert f(1) == {}", "f({})", "{}"):
            score = judged(suite, sandbox, form.format(value))
            assert (score.values, score.error) == ({"right": False}, None), form


def test_what_the_sandbox_says_of_an_input_is_data_and_no_source(sandbox: Sandbox) -> None:
    """The evaluation is the model's own process: whatever it prints is at most another input, judged like one."""
    for said in ("1) or True or f(2", "'x', 2)\n#", "*[1], 2", "__import__('os')", "'x', 2) == ['x', 'x'] #", "b=b"):
        lie = f"f((lambda: (print({json.dumps(said)!r}, flush=True), __import__('os')._exit(0)))())"
        expected = said == "'x', 2)\n#"  # a right input, however it came about
        assert judged(CRUXEVAL_I, sandbox, lie).values == {"right": expected}, said


def test_a_function_that_does_not_end(sandbox: Sandbox) -> None:
    row = {**ROW, "code": "def f(n):\n    while n: pass\n    return 1", "input": "0", "output": "1"}
    assert judged(CRUXEVAL_I, sandbox, "f(0)", row).values == {"right": True}
    score = judged(CRUXEVAL_I, sandbox, "f(1)", row)
    assert (score.values, score.detail) == ({"right": False}, {"why": "cpu limit"})


def test_rows_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "cruxeval.jsonl"
    for row, message in (
        ({**ROW, "code": 3}, "line 1: expected 'code' to be a string, found int"),
        ({"id": "x"}, "line 1: expected 'code' to be a string, found the keys id"),
        ({**ROW, "input": "1, ("}, "expected 'input' to be arguments of f"),
        ({**ROW, "output": "1 +"}, "expected 'output' to be an expression"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(SuiteError, match=message.replace("(", r"\(")):
            CRUXEVAL_I.load(path)
    path.write_text((json.dumps(ROW) + "\n") * 2)
    with pytest.raises(SuiteError, match="line 2: id s is there for the second time"):
        CRUXEVAL_I.load(path)


# --- the real data ------------------------------------------------------------------------------------


def pasted(row: dict[str, str], suite: CruxEvalSuite, answer: str) -> bool:
    """The authors' rule: the answer pasted into an assertion. For harmless answers only. (They give it 3 seconds by the
    clock: too few where other work shares the machine.)"""
    value = predicted(suite.task, answer)
    if value is None:
        return False
    source = f"{row['code']}\nassert {row['output']} == f({value})"
    if suite.task == "output":
        source = f"{row['code']}\nassert f({row['input']}) == {value}"
    try:
        done = subprocess.run([sys.executable, "-I", "-c", source], capture_output=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


@real
@pytest.mark.parametrize("suite", [CRUXEVAL_I, CRUXEVAL_O], ids=lambda suite: suite.name)
def test_all_gold_answers_are_right_those_of_others_as_by_the_authors_rule(
    suite: CruxEvalSuite, sandbox: Sandbox
) -> None:
    assert DATA is not None
    data = suite.load(Path(DATA))
    assert data.revision == "cruxeval-v1"
    assert len(data.samples) == suite.problems
    scorer = suite.scorer(sandbox)
    answers = [suite.gold(sample) for sample in data.samples]
    assert all(answer is not None for answer in answers)
    others = [*answers[1:], answers[0]][::8]

    def right(pair: tuple[Sample, Answer | None]) -> bool:
        assert pair[1] is not None
        score = scorer.score(*pair)  # type: ignore[arg-type]
        assert score.error is None
        return bool(score.values["right"])

    with ThreadPoolExecutor(2) as pool:
        gold = list(pool.map(right, zip(data.samples, answers, strict=True)))
        mixed = list(pool.map(right, zip(data.samples[::8], others, strict=True)))
    assert [sample.id for sample, verdict in zip(data.samples, gold, strict=True) if not verdict] == []
    rule = [
        pasted(dict(s.data), suite, a.text) for s, a in zip(data.samples[::8], others, strict=True) if a is not None
    ]
    assert mixed == rule
    assert sum(mixed) < 10
    metrics = suite.metrics({s.id: [Score({"right": verdict})] for s, verdict in zip(data.samples, gold, strict=True)})
    assert metrics[f"{suite.name}.pass@1"].value == 1.0
    assert all(ast.parse(sample.data["code"]) for sample in data.samples)


@pytest.mark.parametrize("suite", [CRUXEVAL_I, CRUXEVAL_O])
def test_a_sandbox_that_does_not_work_is_no_verdict(suite: CruxEvalSuite, sandbox: Sandbox) -> None:
    class Broken:
        name = "broken"

        def run(self, job: SandboxJob) -> SandboxOutcome:
            return sandbox.run(replace(job, program="raise SystemExit('no room')"))

    with pytest.raises(DriverEnded, match=r"did not start in the sandbox .*no room"):
        judged(suite, Broken(), "assert f('x', 2) == ['x', 'x']")
