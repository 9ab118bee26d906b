"""What runs inside the sandbox: post-process a text, execute the program, call it, and send what it returns.

Started as a script with a pickled plan on standard input (see candidate.py, which writes it); the harness never
imports it. Each set of tests gets a process of its own, forked before any candidate code ran, in the environment
that the official scorer makes: its temporary folder, its guard, its silenced streams, its limits per call, its
order of things. Two differences: time is processor time, so that a busy machine fails nobody, and nothing here
knows what the outputs should be.

The driver shares its process with the candidate, so a hostile candidate owns it. That is why it sends outputs and
no verdicts.

Standard library only; the official files and our shared ones are found in the folder SANDBOX_FILES.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pickle
import resource
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

GUARD_BYTES = 4 << 30
"""The official limit of address space, data and stack."""
RECURSION_LIMIT = 1000
OFFICIAL_DEPTH = 29
"""How much of RECURSION_LIMIT is used up when the official command calls a program: 27 frames and 2 calls in C."""
MAX_ITERATED = 10_000_000

PRELOADED = {
    "multiprocessing": ("multiprocessing",),
    "concurrent": ("multiprocessing", "concurrent.futures.process"),
    "numpy": ("numpy",),
    "pandas": ("numpy", "pandas"),
    "scipy": ("numpy",),
    "sklearn": ("numpy",),
    "sympy": ("numpy",),
}
"""What the official process has loaded when a program that mentions the name comes, and what cannot be loaded any more
under its guard (other modules can)."""


def main() -> None:
    if len(sys.argv) == 1:
        # Start over with the order of sets pinned: the same answer must get the same verdict every time.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        os.execve(sys.executable, [sys.executable, "-P", "-s", sys.argv[0], "again"], environment)
    plan = pickle.load(sys.stdin.buffer)
    shared = _load("encoding"), _load("frames"), _load("official_utils")
    out = os.dup(1)
    frames = shared[1]
    version = "{}.{}".format(*sys.version_info).encode()
    _send(out, [frames.pack(frames.HELLO, size=len(version)), version])
    program, note = _sanitized(plan, out, frames) if plan["sanitize"] else (plan["text"], 0)
    judged = program.encode("utf-8", "surrogatepass")
    _send(out, [frames.pack(frames.PROGRAM, note, size=len(judged)), judged])
    _preload(program)
    for number, run in enumerate(plan["runs"]):
        if not _run_forked(out, shared, program, plan, number, run):
            break


# --- parts that no candidate code has touched yet -------------------------------------------------------


def _load(name: str) -> types.ModuleType:
    """The module of that name in SANDBOX_FILES."""
    path = os.path.join(os.environ["SANDBOX_FILES"], name + ".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _send(fd: int, parts: list[bytes], write: Callable[[int, Any], int] = os.write) -> None:
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[write(fd, view[: 1 << 20]) :]


def _preload(program: str) -> None:
    for name in sorted({name for word in PRELOADED if word in program for name in PRELOADED[word]}):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _sanitized(plan: dict[str, Any], out: int, frames: Any) -> tuple[str, int]:
    """The text after the official post-processing and 1, or the text as it is and 2 (took too long) or 3 (broke).
    It parses what a model wrote, so it works in a process with limits."""
    for module in ("tree_sitter", "tree_sitter_python"):
        if importlib.util.find_spec(module) is None:
            said = f"{sys.executable} in the sandbox has no {module}, which evalplus.sanitize needs".encode()
            _send(out, [frames.pack(frames.FAILED, size=len(said)), said])
            os._exit(0)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _sanitize_child(plan, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        text, whole = _read_all(pipe.fileno(), time.monotonic() + plan["sanitize_wall_s"])
    if not whole:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if whole and status == 0:
        return text.decode("utf-8", "surrogatepass"), 1
    cpu_limit = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    return plan["text"], 2 if cpu_limit else 3


def _sanitize_child(plan: dict[str, Any], fd: int) -> None:
    """Never returns."""
    status = 1
    try:
        _silence()
        resource.setrlimit(resource.RLIMIT_CPU, (plan["sanitize_cpu_s"], plan["sanitize_cpu_s"]))
        for name in ("tqdm", "termcolor", "evalplus", "evalplus.data"):
            # What sanitize.py imports for its command line only, and what would load pandas and more.
            module = types.ModuleType(name)
            module.__getattr__ = lambda _: None  # type: ignore[method-assign]
            sys.modules[name] = module
        sys.modules["evalplus.syncheck"] = _load("syncheck")
        text = _load("sanitize").sanitize(plan["text"], plan["entry_point"])
        _send(fd, [text.encode("utf-8", "surrogatepass")])
        status = 0
    finally:
        os._exit(status)


def _read_all(fd: int, deadline: float) -> tuple[bytes, bool]:
    """Everything up to the end of a pipe, and whether the end came in time."""
    parts: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            part = os.read(fd, 1 << 20)
            if not part:
                return b"".join(parts), True
            parts.append(part)
    return b"".join(parts), False


def _run_forked(out: int, shared: Any, program: str, plan: dict[str, Any], number: int, run: dict[str, Any]) -> bool:
    """Run one set of tests in a process of its own. Whether it came to its end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            _silence()
            _run(out, shared, program, plan, number, run)
            status = 0
        finally:
            os._exit(status)
    status, used, in_time = _wait(child, time.monotonic() + run["wall_s"])
    ended = "wall limit" if not in_time else signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
    cpu_s = used.ru_utime + used.ru_stime
    print(number, f"{cpu_s:.2f}", ended or f"exit code {os.WEXITSTATUS(status)}", file=sys.stderr, flush=True)
    return status == 0 and in_time


def _wait(child: int, deadline: float) -> tuple[int, resource.struct_rusage, bool]:
    """The wait status of `child`, what it used, and whether it ended in time (or else was killed)."""
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        left = deadline - time.monotonic()
        if pid:
            return status, used, True
        if left <= 0:
            os.kill(child, signal.SIGKILL)
            return *os.wait4(child, 0)[1:], False
        signal.sigtimedwait([signal.SIGCHLD], left)


def _silence() -> None:
    """Point the standard streams, also those below Python, at nothing."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)


# --- the candidate's process ----------------------------------------------------------------------------


def _run(out: int, shared: Any, program: str, plan: dict[str, Any], number: int, run: dict[str, Any]) -> None:
    encoding, frames, official = shared
    clock, bound_cpu = time.process_time, _cpu_bound()

    def send(kind: int, index: int, cpu_s: float, parts: list[bytes]) -> None:
        header = frames.pack(kind, number, index, cpu_s, sum(map(len, parts)))
        write_parts(out, [header, *parts], write)

    write_parts, write = _send, os.write
    with official.create_tempdir():
        official.reliability_guard(maximum_memory_bytes=_guard_bytes())
        sys.setrecursionlimit(RECURSION_LIMIT - OFFICIAL_DEPTH + _frames_below())
        spent = 0.0
        index = frames.NO_CALL
        try:
            bound_cpu(run["cpu_s"])
            space: dict[str, Any] = {}
            with official.swallow_io():
                exec(program, space)
                function = space[plan["entry_point"]]
            spent = clock()
            send(frames.LOADED, frames.NO_CALL, spent, [])
            for index, arguments in enumerate(run["inputs"]):
                bound_cpu(run["cpu_s"] - spent)
                start = clock()
                limits = _limits(official.TimeoutException, run["limits"][index], run["wall_limits"][index])
                with limits, official.swallow_io():
                    returned = function(*arguments)
                took = clock() - start
                spent += took
                if spent > run["cpu_s"]:
                    raise official.TimeoutException
                bound_cpu(run["encode_cpu_s"])
                send(frames.VALUE, index, took, _encoded(encoding, returned, plan))
                del returned
        except official.TimeoutException:
            send(frames.TIMEOUT, index, 0.0, [])
        except BaseException as error:
            send(frames.RAISED, index, 0.0, [type(error).__name__.encode("utf-8", "replace")[:200]])
        os._exit(0)


def _guard_bytes() -> int | None:
    """The official limit, or None where a hard limit below it would make the official guard fail."""
    hard = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK))
    return GUARD_BYTES if all(limit in (-1, GUARD_BYTES) or limit > GUARD_BYTES for limit in hard) else None


def _frames_below() -> int:
    frame, count = sys._getframe(1), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1  # type: ignore[assignment]
    return count


def _cpu_bound() -> Callable[[float], None]:
    """A function: from the call on, more than so many seconds of processor time (rounded up) end the process."""
    clock, setrlimit, hard = time.process_time, resource.setrlimit, resource.getrlimit(resource.RLIMIT_CPU)[1]

    def bound(seconds: float) -> None:
        soft = int(clock() + max(0.0, seconds)) + 2
        setrlimit(resource.RLIMIT_CPU, (soft if hard == -1 else min(soft, hard), hard))

    return bound


@contextlib.contextmanager
def _limits(timeout: type[Exception], cpu_s: float, wall_s: float) -> Iterator[None]:
    """As the official time limit, in processor time; with a wide limit in real time for those who sleep."""

    start, clock = time.process_time(), time.process_time

    def out_of_cpu(*_: Any) -> None:
        left = start + cpu_s - clock()
        if left < 0.01:
            raise timeout
        signal.setitimer(signal.ITIMER_PROF, left)  # the timer counts by ticks of the kernel and came early

    def out_of_time(*_: Any) -> None:
        raise timeout

    signal.signal(signal.SIGPROF, out_of_cpu)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _encoded(encoding: Any, returned: Any, plan: dict[str, Any]) -> list[bytes]:
    if plan["iterate"] and encoding.is_opaque(returned):
        # The official check iterates over what these tasks return, so a generator is as good as a list.
        items = tuple(islice(returned, MAX_ITERATED))
        returned = encoding.Iterated(type(returned).__name__, items)
    # Nearly every item takes a byte or more, so that what is cut off here would not get out anyhow.
    return encoding.encode_parts(returned, plan["output_bytes"])  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
