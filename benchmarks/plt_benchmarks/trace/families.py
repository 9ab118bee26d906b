"""The four families of generated programs, one function each, with a dial k for how much must be traced.

    chase     follow a variable through k copies to its digit: 7 assignments whatever k, 2 chains interleaved
    arith     the last digit of a variable that is updated k times
    call      the last digit of what a function of k steps returns
    string    a word of four letters after k rearrangements

How far one gets without the tracing, as the share of right answers (the tests measure it):

    chase     50%: the first root, or the last one; their order says nothing about which is asked for;
              of all programs the root that is copied more often would be right in 76, 81, 85 and 90% for k from
              1 to 4, as it mostly is the one with the chain of k copies; so problems are made only of programs
              where both are copied equally often (see gives_nothing_away)
    arith     10%: every step is a bijection modulo 10 of the value it updates, so all answers are about equally
    call      frequent whatever the steps, and what all steps but the last give is no better a guess than any
    string    20%: always the same one of the 7 rearrangements that the edits come to, whatever k; the word itself is
              never the answer, nor is what was there before any of the edits

The programs are as plain as that allows, since models of less than a million parameters have to learn them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LETTERS = "abcdefg"
"""Names of variables to chase: no more than a program needs, so that a small model sees each of them often."""
CHASE_LINES, CHASE_ROOTS, CHASE_DEEPEST = len(LETTERS), 2, 4
CHASE_QUERIES, CHASE_CHECKS = 7, 3
CALL_QUERIES = 4
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
    """Copies of copies of two digits, in an order in which every variable is assigned before it is copied; checks of
    some variables where they are assigned."""
    parents = _forest(k, rng)
    names = rng.sample(LETTERS, CHASE_LINES)
    digits = rng.sample(string.digits, CHASE_ROOTS)
    roots = [node for node, parent in enumerate(parents) if parent is None]
    value = dict(zip(roots, digits, strict=True))
    depth = dict.fromkeys(roots, 0)
    order = _running_order(parents, rng)
    lines = []
    for node in order:
        parent = parents[node]
        if parent is not None:
            value[node], depth[node] = value[parent], depth[parent] + 1
        lines.append(f"{names[node]}={value[node] if parent is None else names[parent]}\n")
    queries = [Query(names[node], value[node], depth[node]) for node in range(CHASE_LINES)]
    asked = [queries[node] for node in _asked(k, depth, rng)]
    checked = sorted(rng.sample(range(CHASE_LINES), CHASE_CHECKS))
    checks = [Check(place + 1, queries[order[place]]) for place in checked]
    return Program("chase", k, "".join(lines), tuple(asked), tuple(checks))


def gives_nothing_away(program: Program) -> bool:
    """Whether a program may be asked about: in `chase` only where both digits' variables are copied equally often."""
    if program.family != "chase":
        return True
    lines = [line.split("=") for line in program.source.splitlines()]
    copied = [value for _, value in lines]
    return len({copied.count(name) for name, value in lines if value.isdigit()}) == 1


def _forest(k: int, rng: random.Random) -> list[int | None]:
    """The parent of each variable, None for a root: one chain of k copies, and the others wherever they fall."""
    parents: list[int | None] = [None, *range(k), *[None] * (CHASE_ROOTS - 1)]
    depths = [*range(k + 1), *[0] * (CHASE_ROOTS - 1)]
    while len(parents) < CHASE_LINES:
        parent = rng.choice([node for node, depth in enumerate(depths) if depth < CHASE_DEEPEST])
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def _running_order(parents: Sequence[int | None], rng: random.Random) -> list[int]:
    """All variables, each after its parent; at each point any that can come next is equally likely to."""
    order: list[int] = []
    waiting = set(range(len(parents)))
    while waiting:
        ready = [node for node in sorted(waiting) if parents[node] not in waiting]
        order.append(rng.choice(ready))
        waiting.remove(order[-1])
    return order


def _asked(k: int, depth: Mapping[int, int], rng: random.Random) -> list[int]:
    """Different variables in random order: one of depth k, then one of each other depth, then any."""
    nodes = list(depth)
    rng.shuffle(nodes)
    first_of = {depth[node]: node for node in reversed(nodes)}
    asked = [first_of.pop(k), *first_of.values()][:CHASE_QUERIES]
    asked += [node for node in nodes if node not in asked][: CHASE_QUERIES - len(asked)]
    rng.shuffle(asked)
    return asked


# --- arith and call -----------------------------------------------------------------------------------

Step = tuple[str, Callable[[int], int]]
"""A statement, and what it makes of the value of x."""


def _step(rng: random.Random) -> Step:
    """One update of x, a bijection modulo 10."""
    digit = rng.randrange(1, 10)
    forms: list[Step] = [
        (f"x+={digit}", lambda value: value + digit),
        (f"x-={digit}", lambda value: value - digit),
        (f"x={digit}-x", lambda value: digit - value),
    ]
    return rng.choice(forms)


def arith(k: int, rng: random.Random) -> Program:
    """`x=47`, updated k times, of which the last digit is asked; checks before each update."""
    value = rng.randrange(10, 100)
    lines = [f"x={value}\n"]
    queries = [Query("x%10", str(value % 10), 0)]
    for done in range(1, k + 1):
        statement, update = _step(rng)
        value = update(value)
        lines.append(f"{statement}\n")
        queries.append(Query("x%10", str(value % 10), done))
    return Program("arith", k, "".join(lines), (queries[-1],), _on_the_way(queries))


def call(k: int, rng: random.Random) -> Program:
    """A function of one digit, asked for several of them."""
    steps = [_step(rng) for _ in range(k)]
    source = "def f(x):\n" + "".join(f" {statement}\n" for statement, _ in steps) + " return x%10\n"
    queries = []
    for argument in rng.sample(range(10), CALL_QUERIES):
        value = argument
        for _, update in steps:
            value = update(value)
        queries.append(Query(f"f({argument})", str(value % 10), k))
    return Program("call", k, source, tuple(queries))


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
