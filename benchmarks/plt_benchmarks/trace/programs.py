"""Seeded streams of small programs to trace: documents to train on, and held-out problems.

    for document in training_documents(seed=0, programs=60000):
        ...                                             # "q=47\\nc=82\\na=q\\n...assert b==47\\nassert c==82\\n"
    problem = test_problems(seed=0, per_k=40)[0]
    problem.prompt, problem.answer                      # "...assert b==", "47"

What is trained on and what is asked are different programs whatever the seeds: a hash of the program itself, with its
variables renamed in order and its assertions left out, says on which side of the split it is (see split_of). A document
never states what a held-out program gives either: it may begin with one, but checks within a program are written only
where the program up to there is on the training side. What is held out is the program as it is written: one that comes
to the same, as one with its steps in another order does in `arith`, may be trained on (see suite.py).

Everything is a function of its arguments alone, on every machine; GENERATOR_VERSION changes when what is generated for
the same arguments does.
"""

from __future__ import annotations

import difflib
import hashlib
import keyword
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from plt_benchmarks.trace.families import Check, Program, Query, arith, call, chase, edit

__all__ = [
    "FAMILIES",
    "GENERATOR_VERSION",
    "Check",
    "Problem",
    "Program",
    "Query",
    "generate",
    "split_of",
    "test_problems",
    "training_documents",
    "without_assertions",
]

GENERATOR_VERSION = 3
FAMILIES: dict[str, range] = {
    "chase": range(1, 5),
    "arith": range(1, 5),
    "call": range(2, 5),
    "string": range(1, 5),
}
"""Family -> the k that are asked for, easiest first. Training begins at k=1 in every family; `call` is not asked
for that, with 18 different programs in all."""
TURN = ("chase", "arith", "arith", "call", "string")
"""The documents of a turn: `arith` twice, since its are half as long as the others'."""
TEST_SHARE = 10
"""One program in so many is held out."""
MOST_REPEATED = 200
"""So many problems in a row that were all there before: there are hardly any others."""

_MAKERS: dict[str, Callable[[int, random.Random], Program]] = {
    "chase": chase,
    "arith": arith,
    "call": call,
    "string": edit,
}
_TOKEN = re.compile(r"'[^'\n]*'|[A-Za-z_]\w*")


@dataclass(frozen=True)
class Problem:
    """One held-out question: a program, and the query of its own k."""

    program: Program
    query: Query

    @property
    def prompt(self) -> str:
        """The program and the assertion up to its answer."""
        return f"{self.program.source}assert {self.query.expression}=="

    @property
    def answer(self) -> str:
        """The literal that completes the prompt."""
        return self.query.answer


def generate(family: str, k: int, rng: random.Random) -> Program:
    """A random program of `family` in which k steps must be traced, k from 1. Raises ValueError for an unknown family,
    or a k that it does not have."""
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"unknown family {family!r}{hint}; known: {', '.join(FAMILIES)}")
    ks = _trained_at(family)
    if k not in ks:
        raise ValueError(f"family {family}: expected k from {ks[0]} to {ks[-1]}, found {k!r}")
    return _MAKERS[family](k, rng)


def split_of(source: str) -> Literal["train", "test"]:
    """On which side the program is, whatever its variables are called and whatever it is asked: lines that begin with
    `assert` do not count. About one program in TEST_SHARE is on the test side."""
    digest = hashlib.sha256(canonical(without_assertions(source)).encode()).digest()
    return "test" if int.from_bytes(digest[:8]) % TEST_SHARE == 0 else "train"


def without_assertions(source: str) -> str:
    """The program itself: `source` without its lines that begin with `assert`."""
    return "".join(line for line in source.splitlines(keepends=True) if not line.startswith("assert"))


def canonical(source: str) -> str:
    """`source` with its names (not its keywords and strings) renamed v0, v1, ... in order of first appearance."""
    names: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        token = match[0]
        if token.startswith("'") or keyword.iskeyword(token):
            return token
        return names.setdefault(token, f"v{len(names)}")

    return _TOKEN.sub(rename, source)


def training_documents(seed: int, programs: int) -> Iterator[str]:
    """The texts of `programs` programs on the training side, each ending in a newline, families as in TURN, k in turn.

    Programs that can be checked on the way are so in half of the documents; the others ask at the end, as the held-out
    problems do. More programs with the same seed begin with the same texts.
    """
    rng = random.Random(f"trace/train/{seed}")
    for number in range(programs):
        turn, place = divmod(number, len(TURN))
        if place == 0:
            order = rng.sample(TURN, len(TURN))
        ks = _trained_at(order[place])
        program = _generate_on("train", order[place], ks[turn % len(ks)], rng)
        yield program.document(_safe_checks(program) if rng.randrange(2) else ())


def test_problems(seed: int, per_k: int) -> list[Problem]:
    """`per_k` different problems on the test side for every family and k, in the order of FAMILIES.

    Raises ValueError where a family has not so many of them.
    """
    problems = []
    for family, ks in FAMILIES.items():
        for k in ks:
            problems += _problems(family, k, per_k, random.Random(f"trace/test/{seed}/{family}/{k}"))
    return problems


test_problems.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test's to pytest


def _trained_at(family: str) -> range:
    """All k of the family, those that are asked for among them."""
    return range(1, FAMILIES[family][-1] + 1)


def _problems(family: str, k: int, count: int, rng: random.Random) -> list[Problem]:
    found: dict[str, Problem] = {}
    repeated = 0
    while len(found) < count:
        program = _generate_on("test", family, k, rng)
        problem = Problem(program, next(query for query in program.queries if query.k == k))
        key = canonical(problem.prompt)
        repeated = repeated + 1 if key in found else 0
        if repeated == MOST_REPEATED:
            raise ValueError(f"family {family}, k={k}: expected {count} different problems, found only {len(found)}")
        found.setdefault(key, problem)
    return list(found.values())


def _generate_on(side: Literal["train", "test"], family: str, k: int, rng: random.Random) -> Program:
    while True:
        program = generate(family, k, rng)
        if split_of(program.source) == side:
            return program


def _safe_checks(program: Program) -> list[Check]:
    """The program's checks, without those that would state what a held-out program gives."""
    lines = program.source.splitlines(keepends=True)
    return [check for check in program.checks if split_of("".join(lines[: check.lines])) == "train"]
