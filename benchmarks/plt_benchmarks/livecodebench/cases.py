"""The tests of one problem. Published ones are JSON; the others are JSON in a pickle in zlib in base64."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plt_benchmarks.protocols import SuiteError

MOST_BYTES = 2 << 30
"""What the hidden tests of one problem may unpack to."""


@dataclass(frozen=True)
class Cases:
    """Inputs with the outputs that they should give: JSON texts, an argument a line, for the function `function` of a
    problem that asks for one, and else what a program reads and prints. `public` of them, the first, are public."""

    function: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    public: int


class _StringsOnly(pickle.Unpickler):
    """A pickle can call whatever it can name; this one can name nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, where text alone is expected")

    def persistent_load(self, pid: Any) -> Any:  # noqa: ARG002
        raise pickle.UnpicklingError("it refers to something outside")


def read_cases(place: str, row: Mapping[str, Any]) -> Cases:
    """The tests in a row of code_generation_lite, in the official order: public ones first. Raises SuiteError."""
    public = _cases(place, "public_test_cases", row["public_test_cases"])
    hidden = []
    if row.get("private_test_cases"):
        hidden = _cases(place, "private_test_cases", _unpacked(place, row["private_test_cases"]))
    inputs, outputs = zip(*public, *hidden, strict=True) if public or hidden else ((), ())
    if not inputs:
        raise SuiteError(f"{place}: expected at least one test, found none")
    return Cases(function_name(place, row), inputs, outputs, len(public))


def function_name(place: str, row: Mapping[str, Any]) -> str | None:
    """The function that a row's tests call, None for programs. Raises SuiteError."""
    try:
        metadata = json.loads(row["metadata"])
        name = metadata.get("func_name")
    except (ValueError, AttributeError, RecursionError):
        raise SuiteError(f"{place}: expected 'metadata' to be a JSON object, found {row['metadata'][:80]!r}") from None
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise SuiteError(f"{place}: expected 'func_name' to be a function's name, found {name!r}")
    return name


def _cases(place: str, key: str, text: Any) -> list[tuple[str, str]]:
    try:
        found = json.loads(text)
        cases = [(case["input"], case["output"]) for case in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SuiteError(f"{place}: expected {key!r} to be a JSON list of tests with input and output") from None
    if not all(isinstance(part, str) for case in cases for part in case):
        raise SuiteError(f"{place}: expected inputs and outputs in {key!r} to be strings")
    return cases


def _unpacked(place: str, text: Any) -> str:
    """JSON of hidden tests, which the data sets hold as it is or packed."""
    if not isinstance(text, str):
        raise SuiteError(f"{place}: expected 'private_test_cases' to be a string, found {type(text).__name__}")
    if text.lstrip()[:1] in ("[", "{"):
        return text
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(text, validate=True), MOST_BYTES)
        if not unpacker.eof:
            raise SuiteError(
                f"{place}: 'private_test_cases' unpack to more than {MOST_BYTES >> 30} GiB, or are cut short"
            )
        found = _StringsOnly(io.BytesIO(content)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError, LookupError) as error:
        if isinstance(error, SuiteError):
            raise
        raise SuiteError(f"{place}: 'private_test_cases' cannot be unpacked: {error}") from None
    except (AttributeError, ImportError, TypeError, MemoryError, RecursionError, OverflowError) as error:
        raise SuiteError(f"{place}: 'private_test_cases' are no pickled text ({type(error).__name__})") from None
    if not isinstance(found, str):
        raise SuiteError(f"{place}: expected pickled text in 'private_test_cases', found {type(found).__name__}")
    return found
