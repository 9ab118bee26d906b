"""The official comparison on plain data: evalplus' own `untrusted_check`, given outputs instead of a solution.

What it executes as "the solution" is a line of ours that hands out the decoded outputs in order. So the comparison, its
tolerances and its special oracles are the official code, in a process that the candidate never touched.

Works on the one request of the process it is called in (see judge.py, which forks one for each).
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plt_benchmarks.evalplus_judge.decoding import decode
from plt_benchmarks.evalplus_judge.encoding import CodecError

MEMORY = 8 << 30
"""Address space of a comparison: the largest expected outputs take over 1 GiB, and so do a candidate's."""
WALL_S = 60.0
"""For a set's comparisons; they take milliseconds, seconds for the largest."""


@dataclass(frozen=True)
class Request:
    """Outputs of a complete set of tests, and the file with the expected ones. `every_test` has the official find_zero
    oracle decide every test, where the official loop forgets to record its success."""

    dataset: str
    entry_point: str
    atol: float
    expected: Path
    inputs: Sequence[Any]
    outputs: Sequence[bytes]
    every_test: bool = False


def write_expected(path: Path, values: Sequence[bytes], times: Sequence[float]) -> None:
    """Store encoded expected outputs and their reference times (seconds); atomic. Raises OSError."""
    body = zlib.compress(b"".join(values), 1)
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


def read_expected(path: Path) -> list[Any]:
    """The expected outputs in a file. Raises ValueError for a damaged file."""
    sizes, _, packed = read_expected_head(path)
    body, at, values = memoryview(zlib.decompress(packed)), 0, []
    for size in sizes:
        values.append(decode(body[at : at + size]))
        at += size
    return values


_outputs: Iterator[Any] = iter(())


def next_output(*_: Any) -> Any:
    """What the candidate returned at this call; stands for the candidate in the official check."""
    output = next(_outputs)
    if isinstance(output, CodecError):
        raise output
    return output


def _decoded(outputs: Sequence[bytes]) -> Iterator[Any]:
    for output in outputs:
        try:
            yield decode(output)
        except CodecError as error:
            yield error


def check(request: Request) -> str:
    """The official status, "pass", "fail" or "timeout". Raises ValueError for a damaged file of expected outputs."""
    global _outputs
    from evalplus.eval import _special_oracle, untrusted_check

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    entry_point, atol = request.entry_point, request.atol
    if request.every_test:
        # A name without an oracle of its own, and the oracle's verdicts as the outputs to be compared with True.
        entry_point, atol, expected = "find_zero_on_every_test", 0.0, [True] * len(request.inputs)
        xs = zip(request.inputs, _decoded(request.outputs), strict=True)
        _outputs = iter([_holds(_special_oracle._poly, inputs, x, request.atol) for inputs, x in xs])
    else:
        expected = read_expected(request.expected)
        _outputs = iter(list(_decoded(request.outputs)))
    status, _ = untrusted_check(
        request.dataset,
        f"from {__name__} import next_output as {entry_point}",
        list(request.inputs),
        entry_point,
        expected=expected,
        atol=atol,
        ref_time=[0.0] * len(request.inputs),
        fast_check=True,
        min_time_limit=WALL_S,
    )
    return str(status)


def _holds(poly: Any, inputs: Sequence[Any], x: Any, atol: float) -> bool:
    try:
        return bool(abs(poly(*inputs, x)) <= atol)
    except Exception:
        return False
