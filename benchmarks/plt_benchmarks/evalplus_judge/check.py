"""The official comparison on plain data: evalplus' own `untrusted_check`, given outputs instead of a solution.

What it executes as "the solution" is a line of ours that hands out the decoded outputs in order. So the comparison, its
tolerances and its special oracles are the official code, in a process that the candidate never touched.

Works on the one request of the process it is called in (see judge.py, which forks one for each).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import types
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_benchmarks.evalplus_judge.decoding import decode
from plt_benchmarks.evalplus_judge.encoding import CodecError

WALL_S = 3600.0
"""For decoding one output: no limit, because judge.py has one in processor time."""


@dataclass(frozen=True)
class Request:
    """Outputs of a complete set of tests, and the file with the expected ones, which hold `expected_size` bytes.
    `every_test` has the official find_zero oracle decide every test, where the official loop forgets to record its
    success."""

    dataset: str
    entry_point: str
    atol: float
    expected: Path
    expected_size: int
    inputs: Sequence[Any]
    outputs: Sequence[bytes | pickle.PickleBuffer]
    every_test: bool = False


def write_expected(path: Path, values: Sequence[bytes | memoryview], times: Sequence[float]) -> None:
    """Store encoded expected outputs and their reference times (seconds); atomic. Raises OSError."""
    packer = zlib.compressobj(1)
    body = b"".join([*map(packer.compress, values), packer.flush()])
    head = {"sizes": list(map(len, values)), "times": list(times), "sha256": hashlib.sha256(body).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(partial, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + body)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_expected_head(path: Path) -> tuple[list[int], list[float], bytes]:
    """Sizes, times and the compressed body of a file of expected outputs. Raises ValueError for a damaged file."""
    line, _, body = path.read_bytes().partition(b"\n")
    head = json.loads(line)
    if not isinstance(head, dict) or hashlib.sha256(body).hexdigest() != head.get("sha256"):
        raise ValueError(f"{path} is damaged")
    return head["sizes"], head["times"], body


class ExpectedOutputs(Sequence[Any]):
    """The values in a file of expected outputs, each decoded when asked for. `damage` is set when one cannot be. Raises
    ValueError for a damaged file."""

    def __init__(self, path: Path) -> None:
        sizes, _, packed = read_expected_head(path)
        self._body = memoryview(zlib.decompress(packed))
        self._ends = list(itertools.accumulate(sizes, initial=0))
        self.damage: CodecError | None = None

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        try:
            return decode(self._body[self._ends[index] : self._ends[index + 1]])
        except CodecError as error:
            self.damage = error
            raise


class _InThisProcess:
    """Stands for multiprocessing.Process in the official check, whose process is the one we are in."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._target, self._args = target, args

    def start(self) -> None:
        self._target(*self._args)

    def join(self, timeout: float | None = None) -> None:
        pass

    def is_alive(self) -> bool:
        return False


_replay: Callable[..., Any]


def replay(*inputs: Any) -> Any:
    """What the candidate returned at this call; stands for the candidate in the official check."""
    return _replay(*inputs)


def check(request: Request) -> str:
    """The official status, "pass" or "fail". To be called once in a process: the official check takes functions away
    from it. Raises ValueError for a damaged file of expected outputs."""
    global _replay
    import evalplus.eval as official

    outputs = (decode(memoryview(output)) for output in request.outputs)
    entry_point, atol = request.entry_point, request.atol
    expected: Sequence[Any]
    if request.every_test:
        # A name without an oracle of its own, and the oracle's verdicts as the outputs to be compared with True.
        entry_point, atol, expected = "find_zero_on_every_test", 0.0, [True] * len(request.inputs)

        def _replay(*inputs: Any) -> Any:
            return bool(abs(official._poly(*inputs, next(outputs))) <= request.atol)
    else:
        expected, numbered = ExpectedOutputs(request.expected), enumerate(outputs)

        def _replay(*_: Any) -> Any:
            index, output = next(numbered)
            if _is_hollow(output) and isinstance(expected[index], list | tuple) and output != expected[index]:
                raise ValueError("numpy.allclose holds for nothing at all beside any one number")
            return output

    official.multiprocessing = types.SimpleNamespace(Process=_InThisProcess)
    status, _ = official.untrusted_check(
        request.dataset,
        f"from {__name__} import replay as {entry_point}",
        list(request.inputs),
        entry_point,
        expected=expected,
        atol=atol,
        ref_time=[0.0] * len(request.inputs),
        fast_check=True,
        min_time_limit=WALL_S,
    )
    if isinstance(expected, ExpectedOutputs) and expected.damage:
        raise ValueError(f"{request.expected}: {expected.damage}")
    return str(status)


def _is_hollow(output: Any) -> bool:
    """Whether this is a list or tuple that has items but no numbers, such as [[]]."""
    if not isinstance(output, list | tuple) or not output:
        return False
    first = output
    while isinstance(first, list | tuple) and first:
        first = first[0]
    import numpy

    try:
        return not isinstance(first, str | bytes) and len(first) == 0 and bool(numpy.asarray(output).size == 0)
    except (TypeError, ValueError):  # it begins with a number, or its rows differ in length
        return False
