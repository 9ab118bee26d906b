"""A process that compares outputs: `python -m plt_benchmarks.evalplus_judge.judge`.

It reads pickled requests from its standard input (they come from the harness; what a candidate wrote comes beside
the pickle, as bytes) and answers each with one line of JSON, {"status": "pass"} or {"error": "..."}.
evalplus is imported once; every request is then judged in a process forked for it, so nothing is left of one
request in the next.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import sys
from multiprocessing.connection import Connection
from typing import Any, BinaryIO

from plt_benchmarks.evalplus_judge.check import Request, check

CPU_S = 300
"""Processor time of one comparison, decoding included; a candidate could make its outputs slow to decode."""
MEMORY, MEMORY_PER_BYTE = 1 << 30, 16
"""Address space of a comparison, besides what the process has: so much, and so much for each encoded byte."""

LENGTH = struct.Struct("<Q")


def main() -> None:
    """Serve until the standard input ends."""
    replies = os.dup(1)
    os.dup2(2, 1)
    _prepare()
    import evalplus.eval  # noqa: F401  (once, for every fork)

    os.write(replies, b'{"ready": true}\n')
    while (content := _read_request(sys.stdin.buffer)) is not None:
        os.write(replies, json.dumps(_judge(content)).encode() + b"\n")


def _prepare() -> None:
    multiprocessing.set_start_method("fork")
    os.environ.pop("EVALPLUS_TIMEOUT_PER_TASK", None)  # the official code cannot take it
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = "1"


def _read_request(stream: BinaryIO) -> list[bytes] | None:
    """A pickle and the buffers that belong to it; None at the end of the stream."""
    try:
        count = _read_length(stream)
        return [_read(stream, _read_length(stream)) for _ in range(count + 1)]
    except EOFError:
        return None


def _read_length(stream: BinaryIO) -> int:
    length: int = LENGTH.unpack(_read(stream, LENGTH.size))[0]
    return length


def _read(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _judge(content: list[bytes]) -> dict[str, Any]:
    """Judge one request in a child process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.Process(target=_answer, args=(content, sender))
    child.start()
    sender.close()
    try:
        answer: dict[str, Any] = json.loads(receiver.recv_bytes())
    except EOFError:
        answer = {}
    child.join()
    if child.exitcode == -signal.SIGXCPU:
        return {"status": "timeout"}
    return answer or {"error": f"the comparison died (exit code {child.exitcode})"}


def _answer(content: list[bytes], sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 10))
    gc.disable()  # nothing here makes cycles, and looking for them in millions of tuples takes long
    try:
        request: Request = pickle.loads(content[0], buffers=content[1:])
        _bound_memory(request.expected_size + sum(map(len, content)))
        answer = {"status": check(request)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    sender.send_bytes(json.dumps(answer).encode())


def _bound_memory(size: int) -> None:
    """Have the official code bound this process to what `size` bytes of encoded values may need. A hard limit below
    that would make the official code fail; then it is bound already, and not again."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = held + MEMORY + MEMORY_PER_BYTE * size
    hard = [resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK)]
    free = all(bound == resource.RLIM_INFINITY or bound >= limit for bound in hard)
    os.environ["EVALPLUS_MAX_MEMORY_BYTES"] = str(limit if free else -1)


if __name__ == "__main__":
    main()
