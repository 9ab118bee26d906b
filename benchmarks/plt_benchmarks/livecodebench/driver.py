"""What runs inside the sandbox: load a program, feed it the inputs of tests, and send what it gives.

Started as a script with a plan on standard input (see judge.py, which writes it); the harness never imports it. It
makes the surroundings that the official checker makes: one process for all tests of an answer, its imports before the
program, a program that reads and prints wrapped into a function, a `Solution` made once, its guard, its limit for each
test (in processor time, so that a busy machine fails nobody).

The driver shares its process with the program, so a hostile one owns it. That is why it knows no expected output and
sends no verdicts. Standard library only.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

STARRED = [
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
]
"""Modules all of whose names a program finds, in the official order: later ones win."""
PRELUDE = "".join(
    [
        *(f"from {name} import *\n" for name in STARRED),
        *(f"import {name}\n" for name in STARRED if name not in ("builtins", "typing")),
        "sys.setrecursionlimit(50000)\n",
    ]
)
MAX_DIGITS = 50_000
MAX_DEPTH = 100
"""Lists within lists in what a function returns; deeper ones are no data."""
TAKEN = {
    "builtins": "quit help",
    "os": (
        "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace "
        "unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir"
    ),
    "shutil": "rmtree move chown",
    "subprocess": "Popen",
}
"""What the official guard sets to None."""
HIDDEN = ("ipdb", "joblib", "resource", "psutil", "tkinter")
"""Modules that its guard makes fail to be imported."""

Send = Callable[[dict[str, Any]], None]


class TimeoutException(Exception):
    """Has the official name, which is how the official checker knows it."""


def main() -> None:
    if len(sys.argv) == 1:
        # Start over with the order of sets pinned: the same answer must get the same verdict every time.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        os.execve(sys.executable, [sys.executable, "-P", "-s", sys.argv[0], "again"], environment)
    sys.set_int_max_str_digits(MAX_DIGITS)
    plan = json.load(sys.stdin.buffer)
    function, inputs = plan["function"], plan["inputs"]
    if function is not None:
        inputs = [[json.loads(line) for line in text.split("\n")] for text in inputs]
    if "numpy" in plan["code"]:  # the official checker has it loaded, and under the guard it cannot be loaded any more
        with contextlib.suppress(ImportError):
            __import__("numpy")
    send = _sender()
    _silence()
    _guard()
    leave = os._exit
    send({"ready": True})
    try:
        if function is None:
            _run_program(plan, inputs, send)
        else:
            _run_function(plan, function, inputs, send)
    except BaseException as error:  # whatever the program raises, and however
        send({"ended": "timeout" if isinstance(error, TimeoutException) else f"{type(error).__name__}"[:100]})
    leave(0)


def _sender() -> Send:
    """A function that sends one record as a line of JSON to where standard output goes now."""
    fd, write, dump = os.dup(1), os.write, json.dumps

    def send(record: dict[str, Any]) -> None:
        view = memoryview(dump(record).encode() + b"\n")
        while view:
            view = view[write(fd, view[: 1 << 20]) :]

    return send


def _silence() -> None:
    """Point the standard streams, also those below Python, at nothing."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115


def _guard() -> None:
    for module, names in TAKEN.items():
        for name in names.split():
            setattr(__import__(module), name, None)
    for name in HIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]


@contextlib.contextmanager
def _limits(plan: dict[str, Any]) -> Iterator[None]:
    """TimeoutException after `limit_s` of processor time, or `wall_s` of real time, which only sleepers meet."""
    clock = time.process_time
    start = clock()

    def out_of_cpu(*_: Any) -> None:
        left = start + plan["limit_s"] - clock()
        if left < 0.01:
            raise TimeoutException
        signal.setitimer(signal.ITIMER_PROF, left)  # the timer counts by ticks of the kernel and came early

    def out_of_time(*_: Any) -> None:
        raise TimeoutException

    signal.signal(signal.SIGPROF, out_of_cpu)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, plan["limit_s"])
    signal.setitimer(signal.ITIMER_REAL, plan["wall_s"])
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _load(source: str, plan: dict[str, Any]) -> Any:
    """The module that `source` is, or its Solution, where it says that it has one."""
    module = types.ModuleType("tmp_sol", "")
    with _limits(plan):
        exec(source, module.__dict__)
        return module.Solution() if "class Solution" in source else module


# --- programs that read and print -----------------------------------------------------------------------


def _run_program(plan: dict[str, Any], inputs: list[str], send: Send) -> None:
    main_function = _load(_wrapped(_without_main_guard(plan["code"])), plan).wrapped_function
    for number, text in enumerate(inputs):
        captured = io.StringIO()
        captured.close = lambda: None  # type: ignore[method-assign]
        original, sys.stdout = sys.stdout, captured
        try:
            with _limits(plan), _feeding(text), contextlib.suppress(SystemExit):
                main_function()
        finally:
            sys.stdout = original
        send({"test": number, "printed": captured.getvalue()})


def _without_main_guard(code: str) -> str:
    """`code` with the body of a last `if __name__ == '__main__'` in its place: the module has another name."""
    try:
        tree = ast.parse(code)
        last = tree.body[-1]
        if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
            return ast.unparse(ast.Module([*tree.body[:-1], *last.body], []))
    except Exception:
        pass
    return code


def _wrapped(code: str) -> str:
    """Imports of the top level, and a function of all else; code that is no Python is left to fail as it is."""
    try:
        body = ast.parse(code).body
        imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        function = ast.parse("def wrapped_function(): pass").body[0]
        assert isinstance(function, ast.FunctionDef)
        function.body = [node for node in body if node not in imports]
        return f"{PRELUDE}\n{ast.unparse(ast.Module([*imports], []))}\n{ast.unparse(function)}"
    except Exception:
        return code


class _Input(io.StringIO):
    """Text to read, also as bytes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.buffer = io.BytesIO(text.encode("utf-8", "surrogatepass"))  # type: ignore[misc]


@contextlib.contextmanager
def _feeding(text: str) -> Iterator[None]:
    """Give `text` to whoever reads. A program that took hold of `stdin` while it was loaded has the standard input of
    before, of which only reading functions give something, each line without its end."""
    before, opened, lines = sys.stdin, builtins.open, iter(text.split("\n"))
    given = {
        "read": lambda *_: text,
        "readlines": lambda *_: text.split("\n"),
        "readline": lambda *_: next(lines),
    }
    for name, give in given.items():
        setattr(before, name, give)
    sys.stdin = _Input(text)
    # A program's own `open` is the real one, by the imports before it.
    builtins.open = lambda *_, **__: _Input(text)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdin, builtins.open = before, opened
        for name in given:
            delattr(before, name)


# --- functions ------------------------------------------------------------------------------------------


def _run_function(plan: dict[str, Any], name: str, inputs: list[list[Any]], send: Send) -> None:
    function = getattr(_load(f"{PRELUDE}\n\n{plan['code']}", plan), name)
    for number, arguments in enumerate(inputs):
        with _limits(plan):
            returned = function(*arguments)
            data = _plain(list(returned) if isinstance(returned, tuple) else returned, 0)
        send({"test": number, "returned": data})


def _plain(value: Any, depth: int) -> Any:
    """`value` in JSON: lists as they are, and as objects {"items": ...} dictionaries, {"ratio": ...} exact fractions,
    and {"other": type} what equals nothing that JSON can hold. Subclasses are taken for their bases."""
    kind = type(value)
    if kind in (int, str, float, bool, type(None)):
        return value
    if depth > MAX_DEPTH:
        return {"other": "deeply nested"}
    if kind.__module__ == "numpy" and hasattr(value, "dtype") and not getattr(value, "shape", None):
        return _plain(value.item(), depth + 1)
    for base, restore in _BASES.items():
        if isinstance(value, base):
            return restore(value, depth)
    return {"other": kind.__name__}


def _items(value: dict[Any, Any], depth: int) -> Any:
    pairs = list(dict.items(value))
    if not all(isinstance(key, str) for key, _ in pairs):
        return {"other": "dict"}
    return {"items": [[str.__str__(key), _plain(item, depth + 1)] for key, item in pairs]}


def _ratio(value: Any, _: int) -> Any:
    return {"ratio": list(value.as_integer_ratio())}


_BASES: dict[type, Callable[[Any, int], Any]] = {
    list: lambda value, depth: [_plain(item, depth + 1) for item in list.__iter__(value)],
    dict: _items,
    str: lambda value, _: str.__str__(value),
    int: lambda value, _: int.__add__(value, 0),
    float: lambda value, _: float.__add__(value, 0.0),
}
for _module, _name in (("decimal", "Decimal"), ("fractions", "Fraction")):
    _BASES[getattr(__import__(_module), _name)] = _ratio


if __name__ == "__main__":
    main()
