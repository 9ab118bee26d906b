"""What runs inside the sandbox, by the Python of BigCodeBench's environment: post-process a text, run the tests on it.

Started as a script with a JSON request on standard input (see judge.py, which writes it); the harness never imports
it. The official functions do the work: `bigcodebench.sanitize.sanitize` and `bigcodebench.eval.unsafe_execute`. They
run in child processes; this one waits for them, cannot be read or traced by them, and alone speaks to the harness.

A candidate shares its process with the tests, because the tests patch what it calls: it can do to them whatever Python
can. What this file does about that: the report bears a secret, is sent at the moment at which the official function
has its verdict, and tells besides how many tests ran, whether one was skipped, what of unittest and of the tests was
changed meanwhile, and whether a last test of ours, which fails, was seen to fail.

Standard library and the official package only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import secrets
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

CANARY = "the last test, which has to fail"
WALL_FACTOR = 2.0
"""Real time for so much processor time, for those who sleep or wait."""
MOST_TOLD = 4000
"""Characters kept of what a test said."""
_PR_SET_DUMPABLE = 4


def main() -> None:
    if len(sys.argv) == 1:
        # Start over with the order of sets pinned: the same answer must get the same verdict every time.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        os.execve(sys.executable, [sys.executable, "-P", "-s", sys.argv[0], "again"], environment)
    request = json.load(sys.stdin)
    out = os.dup(1)
    os.set_inheritable(out, False)
    _place_font_cache()
    told = _fonts() if request == "fonts" else _judged(request)
    with os.fdopen(out, "w") as stream:
        json.dump(told, stream)


def _place_font_cache() -> None:
    """Matplotlib takes seconds to find its fonts anew."""
    folder = os.environ["SANDBOX_FILES"]
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith("fontlist"):
            cache = os.path.join(os.environ["HOME"], ".cache", "matplotlib")
            os.makedirs(cache, exist_ok=True)
            with open(os.path.join(folder, name), "rb") as source, open(os.path.join(cache, name), "wb") as target:
                target.write(source.read())


def _fonts() -> dict[str, str]:
    """Matplotlib's list of fonts, by file name."""
    importlib.import_module("matplotlib.font_manager")
    cache = os.path.join(os.environ["HOME"], ".cache", "matplotlib")
    fonts = {}
    for name in os.listdir(cache):
        if name.startswith("fontlist"):
            with open(os.path.join(cache, name)) as file:
                fonts[name] = file.read()
    return fonts


def _judged(request: dict[str, Any]) -> dict[str, Any]:
    """Post-process, put what calibrates before it, and judge."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    program, note = request["text"], "none"
    if request["sanitize"]:
        text, note = _in_child(_sanitize, request, request["sanitize_s"], request["sanitize_wall_s"])
        program = text if note == "done" else program
        note = "sanitized" if note == "done" else "timed out" if note == "time limit" else "failed"
    request = {**request, "program": request["prefix"] + program, "secret": secrets.token_hex(16)}
    _preload()
    # The official check waits one second more than the tests may take.
    report, ended = _in_child(_run_tests, request, None, WALL_FACTOR * request["timeout_s"] + 1)
    told: dict[str, Any] = {"program": program, "post_processing": note, "ended": ended}
    if ended == "done":
        true = isinstance(report, dict) and report.pop("secret", None) == request["secret"]
        told |= {"report": report} if true else {"ended": "what it sent was no report"}
    return told


def _preload() -> None:
    """What the official process has loaded as well."""
    for name in ("numpy", "matplotlib.pyplot", "bigcodebench.eval"):
        importlib.import_module(name)


# --- children -------------------------------------------------------------------------------------------


def _in_child(
    work: Callable[[dict[str, Any], Callable[[Any], None]], None], request: dict[str, Any], cpu_s: Any, wall_s: float
) -> tuple[Any, str]:
    """What `work` sent first, and "done"; or None and how it ended instead."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _silence()
            os.closerange(3, write_end)  # above all the harness's own standard output
            os.closerange(write_end + 1, 1 << 16)
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
            if cpu_s is not None:
                used = int(time.process_time())
                resource.setrlimit(resource.RLIMIT_CPU, (used + cpu_s, used + cpu_s + 1))
            work(request, _sender(write_end))
        finally:
            os._exit(1)
    os.close(write_end)
    text, whole = _read_frame(read_end, time.monotonic() + wall_s)
    os.close(read_end)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if text is not None:
        try:
            return json.loads(text), "done"
        except (ValueError, RecursionError):
            return None, "no report"
    if not whole:
        return None, "time limit"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return None, "time limit"
    return None, "ended before the tests did"


def _sender(fd: int) -> Callable[[Any], None]:
    """Sends one thing, with all it needs taken before any candidate code runs."""
    dumps, write, exit_ = json.dumps, os.write, os._exit

    def send(thing: Any) -> None:
        data = dumps(thing).encode()
        data = b"%d\n" % len(data) + data
        while data:
            data = data[write(fd, data) :]
        exit_(0)

    return send


def _read_frame(fd: int, deadline: float) -> tuple[bytes | None, bool]:
    """The first whole message from a pipe, or None; and whether an end came in time."""
    data = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            continue
        part = os.read(fd, 1 << 20)
        if not part:
            return None, True
        data += part
        size, newline, rest = data.partition(b"\n")
        if not size.isdigit() or len(size) > 9:
            return None, True
        if newline and len(rest) >= int(size):
            return rest[: int(size)], True
    return None, False


def _silence() -> None:
    """Point the standard streams, also those below Python, at nothing."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)


def _sanitize(request: dict[str, Any], send: Callable[[Any], None]) -> None:
    """The official post-processing. What its module imports for its command line only is left out."""
    for name in ("pqdm", "pqdm.processes", "tqdm", "termcolor", "bigcodebench.data"):
        module = types.ModuleType(name)
        module.__getattr__ = lambda _: None  # type: ignore[method-assign]
        sys.modules[name] = module
    official = importlib.import_module("bigcodebench.sanitize")
    send(official.sanitize(request["text"], request["entry_point"]))


# --- the candidate's process ----------------------------------------------------------------------------


def _run_tests(request: dict[str, Any], send: Callable[[Any], None]) -> None:
    """The official function on the candidate; its verdict goes out when it is there, before it puts things away."""
    official: Any = importlib.import_module("bigcodebench.eval")
    official.time_limit = _time_limit
    watch = _watched(official)
    secret = request.pop("secret")
    details: dict[str, str] = {}

    class Stat:
        value = property(lambda _: 3, lambda _, value: report(value))

    def report(value: int) -> None:
        said = {str(name): str(text)[-MOST_TOLD:] for name, text in details.items()}
        send({"secret": secret, "stat": value, "details": said, **watch()})

    megabytes = request["memory_mb"], request["memory_mb"], request["stack_mb"]
    code, test = request.pop("program"), request.pop("test")
    official.unsafe_execute(request["entry_point"], code, test, request["timeout_s"], *megabytes, Stat(), details)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """As the official time limit, in processor time: a busy machine fails nobody."""
    timeout = importlib.import_module("bigcodebench.eval.utils").TimeoutException

    def out_of_time(*_: Any) -> None:
        raise timeout("Timed out!")

    signal.signal(signal.SIGPROF, out_of_time)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _watched(official: Any) -> Callable[[], dict[str, Any]]:
    """Have the official function load tests and record results through parts of ours that watch. Returns a function
    that tells what they saw."""
    import unittest
    from unittest import case, loader, result, suite

    outcome = case._Outcome  # type: ignore[attr-defined]
    kinds = [case.TestCase, outcome, result.TestResult, suite.TestSuite, suite.BaseTestSuite]
    kinds += [loader.TestLoader, case._AssertRaisesContext, case._AssertRaisesBaseContext]
    before = {kind: dict(vars(kind)) for kind in kinds}
    shadowed: set[str] = set()
    seen: dict[str, Any] = {"ran": 0, "bad": 0, "skipped": 0, "loaded": 0}

    def changed() -> list[str]:
        found = {
            f"{kind.__name__}.{name}"
            for kind, old in before.items()
            for name in _differences(old, vars(kind), grows=kind not in kinds)
        }
        return sorted(found | shadowed)

    class Result(unittest.TestResult):
        def startTest(self, test: Any) -> None:
            seen["ran"] += 1
            super().startTest(test)

        def stopTest(self, test: Any) -> None:
            ours = before[case.TestCase]
            shadowed.update(f"self.{name}" for name in vars(test) if callable(ours.get(name)))
            super().stopTest(test)

        def addFailure(self, test: Any, err: Any) -> None:
            seen["bad"] += 1
            super().addFailure(test, err)

        def addError(self, test: Any, err: Any) -> None:
            seen["bad"] += 1
            super().addError(test, err)

        def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
            seen["bad"] += err is not None
            super().addSubTest(test, subtest, err)

        def addSkip(self, test: Any, reason: str) -> None:
            seen["skipped"] += 1
            super().addSkip(test, reason)

    class Last(unittest.TestCase):
        def id(self) -> str:
            return CANARY

        def runTest(self) -> None:
            seen["changed"] = changed()
            seen["weak"] = _weak(self)
            self.fail(CANARY)

    class Loader(unittest.TestLoader):
        def loadTestsFromTestCase(self, kind: Any) -> Any:
            found = super().loadTestsFromTestCase(kind)
            seen["loaded"] = found.countTestCases()
            before[kind] = dict(vars(kind))
            found.addTest(Last())
            return found

    names = {**vars(unittest), "TestLoader": Loader, "TestResult": Result}
    official.unittest = types.SimpleNamespace(**names)
    return lambda: dict(seen)


def _differences(old: dict[str, Any], new: Any, *, grows: bool) -> list[str]:
    """Functions of a class that are others now or gone, and, unless it `grows`, new ones."""
    gone = {name for name, value in old.items() if callable(_function(value)) and new.get(name) is not value}
    return sorted(gone if grows else gone | {name for name in new if name not in old and callable(new[name])})


def _function(value: Any) -> Any:
    return getattr(value, "__func__", value)


def _weak(test: Any) -> list[str]:
    """Assertions that hold though they must not."""
    untrue: dict[str, tuple[Any, ...]] = {
        "assertEqual": (1, 2),
        "assertNotEqual": (1, 1),
        "assertTrue": (False,),
        "assertFalse": (True,),
        "assertIs": (1, 2),
        "assertIsNone": (1,),
        "assertIsNotNone": (None,),
        "assertIn": (1, []),
        "assertNotIn": (1, [1]),
        "assertIsInstance": (1, str),
        "assertGreater": (1, 2),
        "assertGreaterEqual": (1, 2),
        "assertLess": (2, 1),
        "assertLessEqual": (2, 1),
        "assertAlmostEqual": (1, 2),
        "assertListEqual": ([1], [2]),
        "assertDictEqual": ({1: 1}, {1: 2}),
        "assertCountEqual": ([1], [2]),
        "assertRegex": ("a", "b"),
        "assertRaises": (ValueError, int, "1"),
    }
    weak = []
    for name, arguments in untrue.items():
        try:
            getattr(test, name)(*arguments)
        except AssertionError:
            continue
        weak.append(name)
    return weak


if __name__ == "__main__":
    main()
