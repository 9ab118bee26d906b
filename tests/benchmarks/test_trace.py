"""The generated programs are true, held apart, and give nothing away; the suite asks and judges them as it says."""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from plt_benchmarks.protocols import Answer, Sample, SandboxJob, SandboxOutcome, Score, SuiteData, SuiteError
from plt_benchmarks.registry import get_suite
from plt_benchmarks.trace import programs, suite
from plt_benchmarks.trace.families import CHASE_CHECKS, CHASE_QUERIES, CHASE_ROOTS, EDITS, WORD_LENGTH
from plt_benchmarks.trace.programs import (
    FAMILIES,
    Problem,
    Program,
    Query,
    canonical,
    generate,
    split_of,
    test_problems,
    training_documents,
)
from plt_benchmarks.trace.suite import TRACE, standard_problems
from plt_eval.cli.main import app

CELLS = [(family, k) for family, ks in FAMILIES.items() for k in ks]
TRAINED = [(family, k) for family in FAMILIES for k in range(1, 5)]
anything = st.tuples(st.sampled_from(TRAINED), st.integers(0, 10**9))
DRAWS = 1500


class NoSandbox:
    """Fails the test that runs anything in it."""

    name = "none"

    def run(self, job: SandboxJob) -> SandboxOutcome:
        raise AssertionError(f"the suite must not run {job.program!r}")


@functools.cache
def drawn(cell: tuple[str, int], seed: int) -> Program:
    return generate(*cell, random.Random(seed))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(training_documents(seed=0, programs=4000))


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return test_problems(seed=0, per_k=40)


@pytest.fixture(scope="module")
def data() -> SuiteData:
    return TRACE.load(None)


def values_at_end(source: str) -> dict[str, Any]:
    """What Python itself makes of a program (of ours: never of a model's)."""
    names: dict[str, Any] = {}
    exec(source, names)
    return names


# --- programs -------------------------------------------------------------------------------------------


@given(anything)
def test_python_agrees_with_every_answer_and_check(drawn_at: tuple[tuple[str, int], int]) -> None:
    program = drawn(*drawn_at)
    at_end = values_at_end(program.source)
    for query in program.queries:
        assert repr(eval(query.expression, at_end)) == query.answer
    lines = program.source.splitlines(keepends=True)
    for check in program.checks:
        on_the_way = values_at_end("".join(lines[: check.lines]))
        assert repr(eval(check.query.expression, on_the_way)) == check.query.answer


@given(anything)
def test_programs_are_short_and_ask_for_their_own_k(drawn_at: tuple[tuple[str, int], int]) -> None:
    (family, k), _ = drawn_at
    program = drawn(*drawn_at)
    assert (program.family, program.k) == (family, k)
    assert program.source.endswith("\n")
    assert "assert" not in program.source
    assert k in [query.k for query in program.queries]
    longest = max(len(f"assert {query.expression}=={query.answer}\n") for query in program.queries)
    assert len(program.source) + longest <= 100
    assert len(program.document(program.checks)) <= 160


@given(anything)
def test_a_document_is_the_source_with_assertions_in_it(drawn_at: tuple[tuple[str, int], int]) -> None:
    program = drawn(*drawn_at)
    text = program.document(program.checks)
    values_at_end(text)
    lines = text.splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("assert")) == program.source
    assert text.count("assert") == len(program.queries) + len(program.checks)
    assert program.document() == program.source + "".join(lines[-len(program.queries) :])


def test_generation_is_a_function_of_its_arguments() -> None:
    for cell in TRAINED:
        assert drawn(cell, 5) == drawn(cell, 5)
    assert list(training_documents(3, 60)) == list(training_documents(3, 90))[:60]
    assert list(training_documents(3, 60)) != list(training_documents(4, 60))


def test_what_cannot_be_generated_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown family 'arit' \(did you mean arith\?\); known: chase, arith"):
        generate("arit", 1, random.Random(0))
    with pytest.raises(ValueError, match=r"family call: expected k from 1 to 4, found 5"):
        generate("call", 5, random.Random(0))
    with pytest.raises(ValueError, match=r"family chase: expected k from 1 to 4, found 0"):
        generate("chase", 0, random.Random(0))
    monkeypatch.setattr(programs, "FAMILIES", {"call": range(1, 2)})
    with pytest.raises(ValueError, match=r"family call, k=1: expected 400 different problems, found only \d{2,3}$"):
        test_problems(seed=0, per_k=400)


# --- each family: what gives the answer away ------------------------------------------------------------


def chains(source: str) -> tuple[list[str], dict[str, tuple[str, int]]]:
    """The numbers in the order of the lines, and for each variable its number and the copies to it, from the text."""
    found: dict[str, tuple[str, int]] = {}
    numbers = []
    for line in source.splitlines():
        name, _, right = line.partition("=")
        assert name not in found
        if right.isdigit():
            numbers.append(right)
        found[name] = (right, 0) if right.isdigit() else (found[right][0], found[right][1] + 1)
    return numbers, found


@pytest.mark.parametrize("k", FAMILIES["chase"])
def test_chase_is_two_chains_alike(k: int) -> None:
    for seed in range(50):
        program = drawn(("chase", k), seed)
        numbers, found = chains(program.source)
        assert re.match(r"\w=\d\d\n\w=\d\d\n\w=\w\n", program.source)
        assert len(numbers) == CHASE_ROOTS
        assert len(program.source.splitlines()) == len(found) == CHASE_ROOTS * (k + 1)
        assert numbers[0][0] != numbers[1][0]
        assert numbers[0][1] != numbers[1][1]
        assert set(Counter(found.values()).values()) == {1}, "one variable for each number and depth"
        for query in (*program.queries, *(check.query for check in program.checks)):
            assert found[query.expression] == (query.answer, query.k)
        assert len({query.expression for query in program.queries}) == CHASE_QUERIES
        assert len({query.k for query in program.queries}) >= 2
        assert len(program.checks) == CHASE_CHECKS


def near(share: float, expected: float, n: int = DRAWS) -> bool:
    """Within 4 standard errors."""
    return abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def right_guesses(family: str, k: int, guess: Callable[[str, str], str]) -> float:
    """The share of programs for which `guess`, from the source and what is asked for, names the answer."""
    drawn_now = [drawn((family, k), seed) for seed in range(DRAWS)]
    queries = [asked_of(program) for program in drawn_now]
    right = [
        guess(program.source, query.expression) == query.answer
        for program, query in zip(drawn_now, queries, strict=True)
    ]
    return sum(right) / DRAWS


def asked_of(program: Program) -> Query:
    return next(query for query in program.queries if query.k == program.k)


def numbers_of(source: str) -> list[str]:
    return re.findall(r"\d+", source)


def assigned(source: str) -> list[str]:
    """The variables of a chase, in the order of the lines."""
    return [line.partition("=")[0] for line in source.splitlines()]


def ends(source: str) -> list[str]:
    """The variables that nothing is copied from, in the order of the lines."""
    return [name for name in assigned(source) if f"={name}\n" not in source]


def first_copied(source: str) -> int:
    """Which of the two numbers is handed on first."""
    return assigned(source).index(source.splitlines()[CHASE_ROOTS].partition("=")[2])


def by_the_ends(source: str, asked: str) -> str:
    """Its place among the ends, as if they stood in the order of the numbers."""
    return numbers_of(source)[ends(source).index(asked)]


def by_the_first_copy(source: str, asked: str) -> str:
    """One copy followed, and the rest by order: the number that is handed on first belongs to what ends first."""
    return numbers_of(source)[first_copied(source) ^ ends(source).index(asked)]


def by_letters(source: str, asked: str) -> str:
    """As if the number went to the name that comes first in the alphabet."""
    return numbers_of(source)[0 if asked == min(ends(source)) else 1]


CHASE_GUESSES: dict[str, Callable[[str, str], str]] = {
    "the first number": lambda source, _: numbers_of(source)[0],
    "the last number": lambda source, _: numbers_of(source)[-1],
    "the lower number": lambda source, _: min(numbers_of(source)),
    "the number that is handed on first": lambda source, _: numbers_of(source)[first_copied(source)],
    "the order of the ends": by_the_ends,
    "the alphabet": by_letters,
}


@pytest.mark.parametrize("k", FAMILIES["chase"])
@pytest.mark.parametrize("guess", CHASE_GUESSES)
def test_chase_cannot_be_guessed_better_than_one_time_in_two(k: int, guess: str) -> None:
    assert near(right_guesses("chase", k, CHASE_GUESSES[guess]), 1 / CHASE_ROOTS)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_following_only_the_first_copy_of_a_chase_gives_nothing(k: int) -> None:
    assert near(right_guesses("chase", k, by_the_first_copy), 1 / CHASE_ROOTS)


@pytest.mark.parametrize("k", FAMILIES["chase"])
def test_neither_number_of_a_chase_is_copied_more_often(k: int) -> None:
    for seed in range(300):
        source = drawn(("chase", k), seed).source
        _, found = chains(source)
        assert set(Counter(number for number, _ in found.values()).values()) == {k + 1}
        assert all(source.count(f"={name}\n") == 1 for name in assigned(source)[:CHASE_ROOTS])


@pytest.mark.parametrize("k", range(2, 5))
def test_chase_is_not_over_after_one_copy(k: int) -> None:
    """Only at k=1 is the value of the variable copied from that of a number."""
    for seed in range(300):
        program = drawn(("chase", k), seed)
        parent = re.search(rf"^{asked_of(program).expression}=(\w)$", program.source, re.MULTILINE)
        assert parent is not None
        assert not re.search(rf"^{parent[1]}=\d+$", program.source, re.MULTILINE)


ARITHMETIC = [cell for cell in TRAINED if cell[0] in ("arith", "call")]


@pytest.mark.parametrize(("family", "k"), ARITHMETIC)
def test_no_number_and_no_change_is_much_more_frequent_than_others(family: str, k: int) -> None:
    """The most frequent answer, and the most frequent change from the number that it begins with: as documented."""
    answers: Counter[int] = Counter()
    changes: Counter[int] = Counter()
    for seed in range(DRAWS):
        program = drawn((family, k), seed)
        answers[int(program.queries[0].answer)] += 1
        changes[int(program.queries[0].answer) - begins_with(program)] += 1
    assert max(answers.values()) / DRAWS < 0.05, answers
    assert max(changes.values()) / DRAWS < 0.085, changes


def begins_with(program: Program) -> int:
    text = program.source if program.family == "arith" else program.queries[0].expression
    found = re.search(r"\d+", text)
    assert found is not None
    return int(found[0])


@pytest.mark.parametrize(("family", "k"), ARITHMETIC)
def test_no_step_of_arithmetic_can_be_left_out(family: str, k: int) -> None:
    for seed in range(300):
        program = drawn((family, k), seed)
        assert all(without_step(program, step) != program.queries[0].answer for step in range(k))


def without_step(program: Program, step: int) -> str:
    """The first answer, had the program not that step."""
    lines = program.source.splitlines(keepends=True)
    names = values_at_end("".join(lines[: step + 1] + lines[step + 2 :]))
    return repr(eval(program.queries[0].expression, names))


@pytest.mark.parametrize(("family", "k"), ARITHMETIC)
def test_arithmetic_stays_within_two_digits(family: str, k: int) -> None:
    for seed in range(300):
        program = drawn((family, k), seed)
        asked = [*program.queries, *(check.query for check in program.checks)]
        assert all(re.fullmatch(r"[1-9]\d", query.answer) for query in asked)
        if family == "call":
            assert all(re.fullmatch(r"f\([1-5]\d\)", query.expression) for query in asked)


@pytest.mark.parametrize(("family", "k"), ARITHMETIC)
def test_every_step_is_plain(family: str, k: int) -> None:
    for seed in range(50):
        lines = drawn((family, k), seed).source.splitlines()
        first, steps = lines[0], lines[1 : k + 1]
        assert all(re.fullmatch(r" ?x[+-]=[1-9]", step) for step in steps)
        assert lines[k + 1 :] == ([] if family == "arith" else [" return x"])
        assert re.fullmatch(r"x=[1-5]\d" if family == "arith" else r"def f\(x\):", first)


def test_arith_is_checked_before_each_update() -> None:
    for k in FAMILIES["arith"]:
        checks = drawn(("arith", k), 1).checks
        assert [(check.lines, check.query.k) for check in checks] == [(line + 1, line) for line in range(k)]


@pytest.mark.parametrize("k", FAMILIES["string"])
def test_no_string_comes_back_on_the_way(k: int) -> None:
    for seed in range(300):
        program = drawn(("string", k), seed)
        words = [*(check.query.answer for check in program.checks), program.queries[-1].answer]
        first, *steps = program.source.splitlines()
        assert first == f"s={words[0]}"
        assert len(steps) == k
        assert {step.removeprefix("s=") for step in steps} <= set(EDITS)
        assert len(set(words)) == k + 1
        assert all(len(set(ast.literal_eval(word))) == WORD_LENGTH for word in words)
        assert len({"".join(sorted(word)) for word in words}) == 1


@pytest.mark.parametrize("k", FAMILIES["string"])
def test_no_rearrangement_is_the_answer_much_more_often_than_the_others(k: int) -> None:
    """Naming the same one always is right 1 time in 5, as documented."""
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(DRAWS):
        program = drawn(("string", k), seed)
        first, last = program.checks[0].query.answer, program.queries[-1].answer
        found[tuple(first.index(letter) for letter in last[1:-1])] += 1
    assert len(found) == (5 if k == 1 else 7)
    assert max(found.values()) / DRAWS < 0.25


# --- the split ------------------------------------------------------------------------------------------


def without_assertions(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("assert"))


def renamed(source: str) -> str:
    """`source` with every one-letter name replaced by the next letter, strings as they are."""
    return re.sub(
        r"'[^']*'|\b[a-z]\b", lambda match: match[0] if "'" in match[0] else chr((ord(match[0]) - 96) % 26 + 97), source
    )


@given(anything)
def test_the_split_sees_neither_names_nor_assertions(drawn_at: tuple[tuple[str, int], int]) -> None:
    program = drawn(*drawn_at)
    side = split_of(program.source)
    assert split_of(program.document(program.checks)) == side
    assert split_of(renamed(program.source)) == side
    assert canonical(renamed(program.source)) == canonical(program.source)


def test_the_canonical_form_keeps_what_a_program_does() -> None:
    assert canonical("def f(x,y=2):\n x=y-x\n return x%10\n") == "def v0(v1,v2=2):\n v1=v2-v1\n return v1%10\n"
    assert canonical("s='sas'\ns='b'+s\n") == "v0='sas'\nv0='b'+v0\n"
    assert canonical("a=1\nb=a\n") != canonical("a=1\nb=b\n")


def test_training_and_held_out_programs_are_apart_whatever_the_seeds(documents: list[str]) -> None:
    trained = {canonical(without_assertions(text)) for text in documents}
    asked = {canonical(problem.program.source) for seed in (0, 1) for problem in test_problems(seed, per_k=30)}
    assert not trained & asked
    assert all(split_of(text) == "train" for text in documents)
    assert {len(text.splitlines()) for text in trained} >= {2, 3, 4, 5}, "every k is among them"


def test_no_training_document_states_what_a_held_out_program_gives(documents: list[str]) -> None:
    """Each assertion follows a program, the lines so far, and that must be on the training side too."""
    checked = 0
    for text in documents:
        lines = text.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if line.startswith("assert"):
                assert split_of("".join(lines[:number])) == "train"
                checked += 1
    assert checked > len(documents)


def test_some_training_documents_begin_with_a_held_out_program_but_say_nothing_of_it(documents: list[str]) -> None:
    """Of such programs there are many, so that the checks that are left out are left out for a reason."""
    begun = 0
    for text in documents:
        program = without_assertions(text).splitlines(keepends=True)
        beginnings = ["".join(program[:number]) for number in range(1, len(program))]
        held_out = [lines for lines in beginnings if kind(text) in ("arith", "string") and split_of(lines) == "test"]
        begun += len(held_out)
        assert not any(f"{lines}assert" in text for lines in held_out)
    assert begun > 100


def test_training_states_nothing_of_a_problem_of_any_k(documents: list[str], problems: list[Problem]) -> None:
    """Every program that a training document states something of, up to there, against every problem."""
    stated = {stated_of for text in documents for stated_of in programs_stated(text)}
    asked = {canonical(problem.program.source) for problem in problems}
    assert not stated & asked
    assert {program.count("\n") for program in stated if "'" in program} == {1, 2, 3, 4, 5}


def programs_stated(text: str) -> set[str]:
    """The program up to each assertion of `text`, in canonical form."""
    lines = text.splitlines(keepends=True)
    ends = [number for number, line in enumerate(lines) if line.startswith("assert")]
    return {canonical(without_assertions("".join(lines[:end]))) for end in ends}


@pytest.mark.parametrize(("family", "k"), CELLS)
def test_both_sides_have_enough_programs(family: str, k: int) -> None:
    sides = Counter(split_of(source) for source in {drawn((family, k), seed).source for seed in range(1500)})
    assert 0.05 < sides["test"] / sides.total() < 0.16


def test_documents_are_true_and_mixed_evenly(documents: list[str]) -> None:
    kinds: Counter[str] = Counter()
    checked: Counter[bool] = Counter()
    for text in documents:
        assert text.endswith("\n")
        values_at_end(text)
        kinds[kind(text)] += 1
        if kind(text) == "string":
            checked[text.count("assert") > 1] += 1
    assert kinds == {"chase": 800, "arith": 1600, "call": 800, "string": 800}
    assert 270 < checked[True] < 450


def kind(text: str) -> str:
    if text.startswith("def"):
        return "call"
    if "'" in text:
        return "string"
    return "arith" if text.startswith("x=") else "chase"


def test_every_k_is_trained_equally_often(documents: list[str]) -> None:
    """From k=1, also in families that are not asked for it."""
    for family, other_lines in {"arith": 1, "call": 2, "string": 1}.items():
        sources = [without_assertions(text) for text in documents if kind(text) == family]
        each = len(sources) // 4
        assert Counter(source.count("\n") - other_lines for source in sources) == dict.fromkeys(range(1, 5), each)


def test_problems_are_balanced_held_out_and_different(problems: list[Problem]) -> None:
    assert Counter((problem.program.family, problem.program.k) for problem in problems) == dict.fromkeys(CELLS, 40)
    assert len({canonical(problem.prompt) for problem in problems}) == len(problems)
    for problem in problems:
        assert problem.query.k == problem.program.k
        assert split_of(problem.program.source) == "test"
        values_at_end(problem.prompt + problem.answer)


def test_a_problem_asks_as_documents_do() -> None:
    """The first assertion at the end of a document stands where a prompt's does: any of the queries can be there."""
    places = Counter([query.k for query in drawn(("chase", 4), seed).queries].index(4) for seed in range(400))
    assert set(places) == set(range(CHASE_QUERIES))


# --- the suite ------------------------------------------------------------------------------------------


def test_the_standard_set_does_not_drift(data: SuiteData) -> None:
    content = standard_problems()
    assert hashlib.sha256(content).hexdigest() == data.sha256 == TRACE.release.sha256
    assert hashlib.md5(content, usedforsecurity=False).hexdigest() == TRACE.release.md5
    assert data.revision == "trace-v3"
    assert len(data.samples) == 600
    assert TRACE.summary.startswith("600 ")
    assert [sample.data["family"] for sample in data.samples[: len(CELLS)]] == [family for family, _ in CELLS]
    assert {(sample.data["family"], sample.data["k"]) for sample in data.samples[: len(CELLS)]} == set(CELLS)


def test_training_text_does_not_drift() -> None:
    digest = hashlib.sha256("".join(training_documents(0, 500)).encode()).hexdigest()
    pinned = "38de6e1313309a0eccf90dbecbce136367eaa34c155f5f3a1e1e70edfe4b249e"
    assert digest == pinned, "what is generated changed: raise GENERATOR_VERSION, pin the new hashes"


def test_random_numbers_of_another_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "STANDARD_SEED", 1)
    with pytest.raises(SuiteError, match=r"^trace-v3: expected to generate problems of sha256 \w{64}, found \w{64}"):
        TRACE.load(None)


def test_a_prompt_for_base_and_chat_models(data: SuiteData) -> None:
    sample = data.samples[0]
    prompt = TRACE.prompt(sample)
    last = sample.data["prompt"].splitlines()[-1]
    assert prompt.text == sample.data["prompt"]
    assert re.fullmatch(r"assert [a-z]==", last)
    assert prompt.stop == prompt.chat_stop == ("\n",)
    assert f"```python\n{sample.data['prompt']}\n```" in prompt.messages[0].content
    assert prompt.prefill == f"```python\n{last}"
    longest = max(len(sample.data["canonical_solution"]) for sample in data.samples)
    assert longest + 1 < prompt.max_new_tokens < 32


def write(path: Path, *rows: object) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


ROW: dict[str, Any] = {
    "task_id": "my-1",
    "family": "mine",
    "k": 2,
    "prompt": "a='x'\nassert a==",
    "canonical_solution": "'x'",
}


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz"])
def test_other_problems_from_a_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROW, "", {**ROW, "task_id": "my-2"})
    loaded = TRACE.load(path)
    assert [sample.id for sample in loaded.samples] == ["my-1", "my-2"]
    assert loaded.revision == f"local:{name}"
    assert loaded.samples[0].data == ROW


def test_the_standard_set_from_a_file_is_known_again(tmp_path: Path, data: SuiteData) -> None:
    (tmp_path / "trace.jsonl").write_bytes(standard_problems())
    loaded = TRACE.load(tmp_path)
    assert (loaded.revision, loaded.sha256, loaded.samples) == (data.revision, data.sha256, data.samples)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: expected a JSON object, found broken JSON"),
        ([1], "line 2: expected a JSON object, found list"),
        ({**ROW, "task_id": 4}, "line 2: expected 'task_id' to be a string, found int"),
        ({key: value for key, value in ROW.items() if key != "k"}, "line 2: expected the key 'k', found canonical_"),
        ({**ROW, "k": True}, "line 2: expected 'k' to be a whole number, found bool"),
        ({**ROW, "k": -1}, "line 2: expected 'k' to be 0 or more, found -1"),
        ({**ROW, "family": "a/b"}, "line 2: expected 'family' to be a lower-case word, found 'a/b'"),
        ({**ROW, "prompt": "a=1\n"}, "line 2: expected 'prompt' to end in a line 'assert EXPRESSION==', found ''"),
        (
            {**ROW, "prompt": "a=1\na=="},
            "line 2: expected 'prompt' to end in a line 'assert EXPRESSION==', found 'a",
        ),
        (
            {**ROW, "prompt": "a=\nassert a=="},
            "line 2: expected 'prompt' to be the beginning of a Python program,",
        ),
        (
            {**ROW, "canonical_solution": "x"},
            "line 2: expected 'canonical_solution' to be a Python literal on one",
        ),
        ({**ROW, "canonical_solution": "7\n"}, "line 2: expected 'canonical_solution' to be a Python literal on one"),
        ({**ROW, "task_id": "first"}, "line 2: task_id first is there for the second time"),
    ],
)
def test_a_bad_record_is_named_in_one_line(tmp_path: Path, row: object, said: str) -> None:
    path = write(tmp_path / "mine.jsonl", {**ROW, "task_id": "first"}, row)
    with pytest.raises(SuiteError) as caught:
        TRACE.load(path)
    assert str(caught.value).startswith(f"{path}, {said}")
    assert "\n" not in str(caught.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="no such file or folder"):
        TRACE.load(tmp_path / "none.jsonl")
    with pytest.raises(SuiteError, match="expected problems, found none"):
        TRACE.load(write(tmp_path / "empty.jsonl"))


# --- scoring --------------------------------------------------------------------------------------------


def judged(expected: str, answer: Answer, expression: str = "f(4)") -> Score:
    row = {**ROW, "prompt": f"a=1\nassert {expression}==", "canonical_solution": expected, "family": "call", "k": 3}
    return TRACE.scorer(NoSandbox()).score(Sample("one", row), answer)


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ("7", "7", True),
        ("7", " 7 ", True),
        ("7", "7\nassert f(5)==8\n", True),
        ("7", "\n7", False),
        ("7", "77", False),
        ("7", "7.0", False),
        ("7", "", False),
        ("7", "'7'", False),
        ("'ab'", "'ab'", True),
        ("'ab'", "'a b'", False),
        ("'ab'", '"ab"', False),
        ("'ab'", "ab", False),
    ],
)
def test_a_continuation_must_be_the_literal(expected: str, text: str, right: bool) -> None:
    score = judged(expected, Answer(text))
    assert score.values == {"exact": right, "exact/call": right, "exact/call/k3": right}
    assert score.detail == {"expected": expected}


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ("7", "7", True),
        ("7", " 7\n```", True),
        ("7", "7```", True),
        ("7", "assert f(4)==7", True),
        ("7", "assert f(4) == 7", True),
        ("7", "```python\nassert f(4)==7\n```", True),
        ("7", "First f(4)==6, no:\n```python\nassert f(4)==7\n```\nThat is it.", True),
        ("7", "f(4)==7, or rather f(4)==6", False),
        ("7", "It is\n```\n7\n```\nas f returns 8", True),
        ("7", "```\n7\n```\n```\n8\n```", False),
        ("7", "The value is:\n`7`.", True),
        ("7", "7\n8", False),
        ("7", "True", False),
        ("1", "True", False),
        ("7", "", False),
        ("7", "```", False),
        ("'ab'", '"ab"', True),
        ("'ab'", "ab", False),
        ("7", "(" * 100000, False),
        ("7", "\x00", False),
    ],
)
def test_a_chat_answer_is_read_leniently(expected: str, text: str, right: bool) -> None:
    assert judged(expected, Answer(text, chat=True)).values["exact"] is right


def test_a_replayed_program_is_read_from_its_last_line() -> None:
    assert judged("7", Answer("a=1\nassert f(4)==7", solution=True)).values["exact"] is True
    assert judged("7", Answer("a=1\nassert f(4)==8", solution=True)).values["exact"] is False
    assert judged("7", Answer("7", solution=True)).values["exact"] is False


@given(st.text(max_size=60), st.booleans(), st.booleans())
def test_no_answer_breaks_the_judge(text: str, chat: bool, solution: bool) -> None:
    score = judged("'ab'", Answer(text, chat=chat, solution=solution), "s")
    assert score.error is None
    assert "\n" not in score.judged


def scores_of(data: SuiteData, write_answer: Callable[[Sample], str]) -> dict[str, list[Score]]:
    scorer = TRACE.scorer(NoSandbox())
    return {sample.id: [scorer.score(sample, Answer(write_answer(sample)))] for sample in data.samples}


def test_gold_is_right_everywhere_and_metrics_come_in_order(data: SuiteData) -> None:
    scores = scores_of(data, lambda sample: sample.data["canonical_solution"])
    metrics = TRACE.metrics(scores)
    assert all(metric.value == 1 for metric in metrics.values())
    names = ["exact", *(f"exact/{family}" for family in FAMILIES), *(f"exact/{family}/k{k}" for family, k in CELLS)]
    assert list(metrics) == [f"trace.{name}" for name in names]
    assert [metrics[f"trace.exact/{family}"].n for family in FAMILIES] == [40 * len(ks) for ks in FAMILIES.values()]
    assert metrics["trace.exact/chase/k2"].definition.startswith("problems of chase at k2 whose value is predicted")
    assert TRACE.metrics(dict(reversed(scores.items()))) == metrics


def test_metrics_count_each_cell_by_itself(data: SuiteData) -> None:
    def right_at_low_k(sample: Sample) -> str:
        good = sample.data["family"] == "arith" and sample.data["k"] <= 2
        return str(sample.data["canonical_solution"]) if good else "?"

    metrics = TRACE.metrics(scores_of(data, right_at_low_k))
    assert metrics["trace.exact"].value == pytest.approx(80 / 600)
    assert metrics["trace.exact/arith"].value == 0.5
    assert metrics["trace.exact/arith/k2"].value == 1
    assert metrics["trace.exact/arith/k3"].value == 0
    assert metrics["trace.exact/call"].value == 0
    half = metrics["trace.exact/arith"]
    assert half.low == pytest.approx(0.4234, abs=1e-3)
    assert half.high == pytest.approx(0.5766, abs=1e-3)


def test_several_answers_count_as_their_mean_and_errors_for_nothing(data: SuiteData) -> None:
    sample = data.samples[0]
    scorer = TRACE.scorer(NoSandbox())
    right = scorer.score(sample, Answer(sample.data["canonical_solution"]))
    wrong = scorer.score(sample, Answer("?"))
    broken = Score(error="it broke")
    metrics = TRACE.metrics({"a": [broken, right, wrong, wrong, right], "b": [right], "c": [broken]})
    assert metrics["trace.exact"].value == 0.75
    assert metrics["trace.exact"].n == 2
    assert TRACE.metrics({"c": [broken]}) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_guess_in_the_definition_is_what_guessing_gives(data: SuiteData, family: str) -> None:
    """The most frequent answer, given to everything, scores what the definition says; and that is little."""
    answers = Counter(sample.data["canonical_solution"] for sample in data.samples if sample.data["family"] == family)
    metric = TRACE.metrics(scores_of(data, lambda _: answers.most_common(1)[0][0]))[f"trace.exact/{family}"]
    assert f"the most frequent answer would give {100 * metric.value:.1f}%" in metric.definition
    assert metric.value < 0.08


@pytest.mark.parametrize("guess", CHASE_GUESSES)
def test_naming_one_of_the_two_numbers_is_right_one_time_in_two(data: SuiteData, guess: str) -> None:
    chase = [sample.data for sample in data.samples if sample.data["family"] == "chase"]
    hits = 0
    for row in chase:
        source, _, asked = row["prompt"].rpartition("assert ")
        hits += CHASE_GUESSES[guess](source, asked.removesuffix("==")) == row["canonical_solution"]
    assert near(hits / len(chase), 1 / CHASE_ROOTS, n=len(chase))


def test_the_suite_is_registered() -> None:
    assert get_suite("trace") == [TRACE]
    assert f"v{programs.GENERATOR_VERSION}" in TRACE.version


def test_the_command_replays_gold_and_keeps_its_table_narrow(tmp_path: Path) -> None:
    command = ["run", "--suite", "trace", "--engine", "replay", "--completions", "gold", "--limit", "30"]
    options = ["--results", str(tmp_path), "--scoring-workers", "1"]
    result = CliRunner().invoke(app, [*command, *options], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "100.0%" in result.output
    assert "exact/string" in result.output
    assert "exact/string/k1" not in result.output
    assert "`plt-eval show RUN` has 15 more, parts of these" in result.output
