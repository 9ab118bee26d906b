"""The four families of generated programs, one function each, with a dial k for how much must be traced.

    chase     follow a variable through k copies to its digit: 12 assignments whatever k, 4 chains interleaved
    arith     one variable updated k times modulo 10, with a second one as an operand
    call      what a function of k steps returns, modulo 10
    string    a short word after k edits

Nothing but the tracing gives an answer away. In `chase` the four roots come in an order that says nothing about which
of them is asked for. In `arith` and `call` every step is a bijection modulo 10 of the value it updates, so no step can
be left out and all answers are about equally frequent. In `string` no edit undoes what came before: all values on the
way are different.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LETTERS = "abcdefghijkl"
"""Names of variables: no more than the longest program needs, so that a small model sees each of them often."""
CHASE_LINES, CHASE_ROOTS, CHASE_DEEPEST = len(LETTERS), 4, 6
CHASE_QUERIES, CHASE_CHECKS = 5, 6
CALL_QUERIES = 4
WORD_LETTERS = "abcdefgh"
SHORTEST_WORD, LONGEST_WORD = 2, 5


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
    """Copies of copies of four digits, in an order in which every variable is assigned before it is copied; checks of
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
"""An expression, and what it makes of the value of the variable that is updated."""


def _step(variable: str, other: str, other_value: int, rng: random.Random) -> Step:
    """One update of `variable`, a bijection modulo 10; `other` is a variable that keeps its value."""
    digit, unit = rng.randrange(1, 10), rng.choice((3, 7, 9))
    forms: list[Step] = [
        (f"{variable}+{other}", lambda value: value + other_value),
        (f"{other}+{variable}", lambda value: value + other_value),
        (f"{variable}-{other}", lambda value: value - other_value),
        (f"{other}-{variable}", lambda value: other_value - value),
        (f"{variable}+{digit}", lambda value: value + digit),
        (f"{variable}-{digit}", lambda value: value - digit),
        (f"{digit}-{variable}", lambda value: digit - value),
        (f"{variable}*{unit}", lambda value: value * unit),
    ]
    return rng.choice(forms)


def arith(k: int, rng: random.Random) -> Program:
    """`a=(a+4)%10`, k times, after the assignments of both variables; checks before each update."""
    variable, other = rng.sample(LETTERS, 2)
    value, other_value = rng.randrange(10), rng.randrange(1, 10)
    lines = [f"{variable}={value}\n", f"{other}={other_value}\n"]
    rng.shuffle(lines)
    constant = Query(other, str(other_value), 0)
    queries = [Query(variable, str(value), 0)]
    for done in range(1, k + 1):
        expression, update = _step(variable, other, other_value, rng)
        value = update(value) % 10
        lines.append(f"{variable}=({expression})%10\n")
        queries.append(Query(variable, str(value), done))
    asked = rng.sample([queries[-1], constant], 2)
    return Program("arith", k, "".join(lines), tuple(asked), (Check(2, constant), *_on_the_way(queries, first_line=2)))


def call(k: int, rng: random.Random) -> Program:
    """A function of one argument and one constant, asked for several arguments."""
    variable, other = rng.sample(LETTERS.replace("f", ""), 2)
    other_value = rng.randrange(1, 10)
    steps = [_step(variable, other, other_value, rng) for _ in range(k)]
    body = "".join(f" {variable}={expression}\n" for expression, _ in steps)
    source = f"def f({variable},{other}={other_value}):\n{body} return {variable}%10\n"
    queries = []
    for argument in rng.sample(range(10), CALL_QUERIES):
        value = argument
        for _, update in steps:
            value = update(value)
        queries.append(Query(f"f({argument})", str(value % 10), k))
    return Program("call", k, source, tuple(queries))


def _on_the_way(queries: Sequence[Query], first_line: int) -> tuple[Check, ...]:
    """Checks from the queries after each line but the last, the first of which is about line `first_line`."""
    return tuple(Check(line, query) for line, query in enumerate(queries[:-1], first_line))


# --- string -------------------------------------------------------------------------------------------

EDITS: Mapping[str, Callable[[str, str], str]] = {
    "{s}[::-1]": lambda word, _: word[::-1],
    "{s}[1:]": lambda word, _: word[1:],
    "{s}[:-1]": lambda word, _: word[:-1],
    "{s}[1:]+{s}[0]": lambda word, _: word[1:] + word[0],
    "{s}[-1]+{s}[:-1]": lambda word, _: word[-1] + word[:-1],
    "{s}[0]+{s}": lambda word, _: word[0] + word,
    "{s}+'{letter}'": lambda word, letter: word + letter,
    "'{letter}'+{s}": lambda word, letter: letter + word,
}
"""Expression -> what it makes of a word and a letter."""


def edit(k: int, rng: random.Random) -> Program:
    """Family `string`: a word of different letters, edited k times; checks before each edit."""
    name = rng.choice(LETTERS)
    words = ["".join(rng.sample(WORD_LETTERS, rng.randrange(3, 5)))]
    lines = [f"{name}='{words[0]}'\n"]
    while len(words) <= k:
        form, letter = rng.choice(list(EDITS)), rng.choice(WORD_LETTERS)
        word = EDITS[form](words[-1], letter)
        if SHORTEST_WORD <= len(word) <= LONGEST_WORD and word not in words:
            words.append(word)
            lines.append(f"{name}={form.format(s=name, letter=letter)}\n")
    queries = [Query(name, repr(word), done) for done, word in enumerate(words)]
    return Program("string", k, "".join(lines), (queries[-1],), _on_the_way(queries, first_line=1))
