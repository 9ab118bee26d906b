"""The stream of records that the driver sends out of the sandbox.

A record is a fixed header and a payload. What a reader may believe: records before the first candidate code
(`HELLO`, `PROGRAM`) come from the driver; everything later may have been written by the candidate. A forged record can
claim an output, which is then compared like any other; no record can claim a verdict.

Standard library only: this file also travels into the sandbox.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

HELLO = 1
"""The driver runs; the payload is its Python's "major.minor"."""
PROGRAM = 2
"""The program that is about to be judged (UTF-8, surrogates passed); `run` says what was done to it."""
LOADED = 3
"""The program was executed and has its entry point."""
VALUE = 4
"""Call number `call` of run `run` returned; the payload is the encoded output."""
RAISED = 5
"""It raised, or the program itself did (call NO_CALL); the payload is the name of the class."""
TIMEOUT = 6
"""It exceeded its limit."""
FAILED = 7
"""The driver cannot do what it was asked to; the payload is one line."""

NO_CALL = 0xFFFFFFFF
_HEADER = struct.Struct("<BBIdQ")


class Frame(NamedTuple):
    """`run` numbers the sets of tests, `call` the calls in a set, `cpu_s` is processor time of the call."""

    kind: int
    run: int
    call: int
    cpu_s: float
    payload: memoryview

    @property
    def text(self) -> str:
        return bytes(self.payload).decode("utf-8", "replace")


def pack(kind: int, run: int = 0, call: int = NO_CALL, cpu_s: float = 0.0, size: int = 0) -> bytes:
    """The header of a record with `size` bytes of payload to follow."""
    return _HEADER.pack(kind, run, call, cpu_s, size)


def unpack(stream: bytes) -> Iterator[Frame]:
    """The whole records at the start of `stream`; whatever comes after the last of them is dropped."""
    view, at = memoryview(stream), 0
    while at + _HEADER.size <= len(view):
        kind, run, call, cpu_s, size = _HEADER.unpack_from(view, at)
        at += _HEADER.size
        if size > len(view) - at:
            return
        yield Frame(kind, run, call, cpu_s, view[at : at + size])
        at += size
