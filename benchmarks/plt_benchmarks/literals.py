"""Answers that are Python literals: reading them, and making them of harmless expressions without believing anybody.

is_literal("[1, 'a']")                      # True: plain data, written down
evaluated(sandbox, "[0] * 2, k=1 + 1")      # "[0, 0], k=2": evaluated in the sandbox, and only plain data leaves it
"""

from __future__ import annotations

import ast
import json
from dataclasses import replace

from plt_benchmarks.outcomes import how_it_ended, told_by
from plt_benchmarks.protocols import Sandbox, SandboxJob, SandboxLimits, SandboxOutcome

MOST_CHARACTERS = 100_000
"""Longer answers are wrong without being looked at."""
LIMITS = SandboxLimits(wall_s=60, cpu_s=5, memory=1 << 30, processes=4, tmp_bytes=16 << 20)

_EVALUATE = """
import json, sys
request = json.load(sys.stdin)
print("ready", flush=True)
taken = eval("(lambda *a, **k: (a, k))(" + request["arguments"] + "\\n)", {})
parts = [repr(value) for value in taken[0]] + [name + "=" + repr(value) for name, value in taken[1].items()]
json.dump(", ".join(parts), sys.stdout)
"""


class DriverEnded(RuntimeError):
    """Our own program ended before it came to what it was asked, so there is no verdict."""


def expression(text: str) -> ast.expr | None:
    """`text` as an expression, None if it is none."""
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def is_literal(text: str) -> bool:
    """Whether `text` is plain data."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return True


def call_arguments(call: ast.expr) -> str | None:
    """The arguments of a call of f, as source."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "f":
        return None
    parts = [("", value) for value in call.args]
    parts += [(f"{word.arg}=" if word.arg else "**", word.value) for word in call.keywords]
    written = [(name, source(value)) for name, value in parts]
    return None if any(text is None for _, text in written) else ", ".join(f"{name}{text}" for name, text in written)


def source(node: ast.expr) -> str | None:
    """`node` written out; None where that is impossible: numbers of thousands of digits, hundreds of levels."""
    try:
        return ast.unparse(node)
    except (ValueError, RecursionError):
        return None


def evaluated(sandbox: Sandbox, arguments: str) -> str | None:
    """`arguments` of a call as literals, None where they cannot be that. The expressions are the model's own, and so
    may be what they print: all that they can bring about is that other plain data is tried."""
    text = told_by(run_program(sandbox, _EVALUATE, {"arguments": arguments}), str)
    return text if text is not None and len(text) <= MOST_CHARACTERS and _plain_arguments(text) else None


def run_program(sandbox: Sandbox, program: str, request: dict[str, str]) -> SandboxOutcome:
    """Run a small program that reads `request` as JSON, prints a line "ready" before it does anything with it, and
    tells a string as JSON. Raises DriverEnded when it does not come to be ready."""
    outcome = sandbox.run(SandboxJob(program, stdin=json.dumps(request).encode(), limits=LIMITS))
    word, _, said = outcome.stdout.partition(b"\n")
    if word != b"ready":
        raise DriverEnded(f"the program did not start in the sandbox ({how_it_ended(outcome)})")
    return replace(outcome, stdout=said)


def _plain_arguments(text: str) -> bool:
    """Whether `text` is a list of arguments that are all literals."""
    call = expression(f"f({text})")
    if (
        not isinstance(call, ast.Call)
        or call_arguments(call) is None
        or any(word.arg is None for word in call.keywords)
    ):
        return False
    written = [source(value) for value in [*call.args, *(word.value for word in call.keywords)]]
    return all(text is not None and is_literal(text) for text in written)
