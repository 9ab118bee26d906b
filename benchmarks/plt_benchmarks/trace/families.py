"""The four families of generated programs, one function each, with a dial k for how much must be traced.

    chase     follow a variable through k copies to its number: two chains of k copies each, interleaved
    arith     the value of a variable to which k digits are added, or taken away
    call      what a function of k such steps returns
    string    a word of four letters after k rearrangements

How far one gets without the tracing, as the share of right answers (the tests measure it):

    chase     50%: either of the two numbers. Both are copied equally often along chains of the same length; their
              order, that of the chains' ends and the names say nothing about which is asked for; and from k=2 on
              neither does the first copy
    arith     6%: the number that it begins with and the most frequent change, in all k; the most frequent answer is
    call      right in 3%, and leaving out any step is always wrong. Values stay between 10 and 99, and are
              not taken modulo anything: the distance to a wrong answer is something to learn from
    string    20%: always the same one of the 7 rearrangements that the edits come to, whatever k; the word itself is
              never the answer, nor is what was there before any of the edits

The programs are as plain as that allows, since models of less than a million parameters have to learn them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

CHASE_ROOTS = 2
LETTERS = "abcdefghij"
"""Names of variables to chase: as many as the longest program needs, so that a small model sees each of them often."""
CHASE_QUERIES, CHASE_CHECKS = 4, 2
CALL_QUERIES = 4
STARTS, TWO_DIGITS = range(10, 60), range(10, 100)
"""Numbers to begin with, and those that there may be on the way."""
WORD_LETTERS, WORD_LENGTH = "abcdefgh", 4


@dataclass(frozen=True)
class Query:
    """What can be asked of a program: `answer` is the literal for which `assert EXPRESSION==ANSWER` holds, and `k` the
    number of steps behind it (0: it is written down as it is)."""

    expression: str
    answer: str
    k: int


@dataclass(frozen=True)
class Check:
    """A query that holds after the first `lines` lines of a program, before the rest of it runs."""

    lines: int
    query: Query


@dataclass(frozen=True)
class Program:
    """A program and its queries.

    `source` is the program text, ending in a newline, with no assertion in it. `queries` hold at its end; at least one
    has the program's own `k`. `checks` hold on the way; there are none in families that ask at the end alone.
    """

    family: str
    k: int
    source: str
    queries: tuple[Query, ...]
    checks: tuple[Check, ...] = ()

    def document(self, checks: Sequence[Check] = ()) -> str:
        """The program as a text to learn from: `checks` where they hold, then each query, as `assert EXPR==ANSWER`."""
        text = ""
        for number, line in enumerate(self.source.splitlines(keepends=True), 1):
            text += line + "".join(_assertion(check.query) for check in checks if check.lines == number)
        return text + "".join(map(_assertion, self.queries))


def _assertion(query: Query) -> str:
    return f"assert {query.expression}=={query.answer}\n"


# --- chase --------------------------------------------------------------------------------------------


def chase(k: int, rng: random.Random) -> Program:
    """Two numbers, each handed on by k copies, one after the other; the copies of both in any order. Checks of some
    variables where they are assigned."""
    names = iter(rng.sample(LETTERS, CHASE_ROOTS * (k + 1)))
    last: list[Query] = []
    lines: list[str] = []
    told: list[Query] = []
    for value in _two_numbers(rng):
        last.append(Query(next(names), value, 0))
        lines.append(f"{last[-1].expression}={value}\n")
        told.append(last[-1])
    for chain in _merged(k, rng):
        before = last[chain]
        last[chain] = Query(next(names), before.answer, before.k + 1)
        lines.append(f"{last[chain].expression}={before.expression}\n")
        told.append(last[chain])
    asked = [rng.choice(last)]
    asked += rng.sample([query for query in told if query not in asked], CHASE_QUERIES - 1)
    rng.shuffle(asked)
    checked = sorted(rng.sample(range(len(told)), CHASE_CHECKS))
    checks = tuple(Check(place + 1, told[place]) for place in checked)
    return Program("chase", k, "".join(lines), tuple(asked), checks)


def _two_numbers(rng: random.Random) -> list[str]:
    """Different in both digits, so that each of them tells which it is."""
    return [
        f"{ten}{one}" for ten, one in zip(rng.sample(string.digits[1:], 2), rng.sample(string.digits, 2), strict=True)
    ]


def _merged(k: int, rng: random.Random) -> list[int]:
    """Which chain each copy belongs to, k copies of each. The chain that is copied first ends first one time in two;
    with one copy each it always does."""
    first_ends_first = rng.random() < 0.5
    while True:
        chains = rng.sample([0] * k + [1] * k, 2 * k)
        if k == 1 or (chains[0] != chains[-1]) == first_ends_first:
            return chains


# --- arith and call -----------------------------------------------------------------------------------

Step = tuple[str, int]
"""A statement, and what it adds to x."""


def _step(rng: random.Random) -> Step:
    """Adding or taking away a digit, never nothing."""
    sign, digit = rng.choice("+-"), rng.randrange(1, 10)
    return f"x{sign}={digit}", digit if sign == "+" else -digit


def arith(k: int, rng: random.Random) -> Program:
    """`x=47`, updated k times; checks before each update."""
    value = rng.choice(STARTS)
    lines = [f"x={value}\n"]
    queries = [Query("x", str(value), 0)]
    while len(queries) <= k:
        statement, change = _step(rng)
        if value + change in TWO_DIGITS:
            value += change
            lines.append(f"{statement}\n")
            queries.append(Query("x", str(value), len(queries)))
    return Program("arith", k, "".join(lines), (queries[-1],), _on_the_way(queries))


def call(k: int, rng: random.Random) -> Program:
    """A function of k such updates, called with several numbers."""
    steps = [_step(rng) for _ in range(k)]
    source = "def f(x):\n" + "".join(f" {statement}\n" for statement, _ in steps) + " return x\n"
    sums = list(accumulate(change for _, change in steps))
    fitting = [start for start in STARTS if all(start + change in TWO_DIGITS for change in sums)]
    arguments = rng.sample(fitting, CALL_QUERIES)
    return Program("call", k, source, tuple(Query(f"f({at})", str(at + sums[-1]), k) for at in arguments))


def _on_the_way(queries: Sequence[Query]) -> tuple[Check, ...]:
    """Checks from the queries after each line but the last."""
    return tuple(Check(line, query) for line, query in enumerate(queries[:-1], 1))


# --- string -------------------------------------------------------------------------------------------

EDITS: Mapping[str, Callable[[str], str]] = {
    "s[::-1]": lambda word: word[::-1],
    "s[1:]+s[0]": lambda word: word[1:] + word[0],
    "s[-1]+s[:-1]": lambda word: word[-1] + word[:-1],
    "s[2:]+s[:2]": lambda word: word[2:] + word[:2],
    "s[0]+s[:0:-1]": lambda word: word[0] + word[:0:-1],
}
"""Expression -> what it makes of a word."""


def edit(k: int, rng: random.Random) -> Program:
    """Family `string`: a word of different letters, rearranged k times; checks before each edit."""
    words = ["".join(rng.sample(WORD_LETTERS, WORD_LENGTH))]
    lines = [f"s='{words[0]}'\n"]
    while len(words) <= k:
        expression, rearrange = rng.choice(list(EDITS.items()))
        word = rearrange(words[-1])
        if word not in words:
            words.append(word)
            lines.append(f"s={expression}\n")
    queries = [Query("s", repr(word), done) for done, word in enumerate(words)]
    return Program("string", k, "".join(lines), (queries[-1],), _on_the_way(queries))
