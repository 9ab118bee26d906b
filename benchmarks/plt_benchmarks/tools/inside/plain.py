"""Values of one process for another that does not trust it: JSON, with what JSON has no word for spelt out.

Reading makes plain data, and the two classes of the simulated file system, and never runs anything.
"""

from __future__ import annotations

from typing import Any


class Opaque:
    """Something that is no plain data; equal to nothing."""

    def __init__(self, shown: str) -> None:
        self.shown = shown

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self.shown


def packed(value: Any) -> Any:
    """`value` in JSON types."""
    if value is None or type(value) in (bool, str, float):
        return value
    if type(value) is int:
        return value if abs(value) < 1 << 4096 else {"opaque": "a number with more than 1200 digits"}
    if type(value) is list:
        return [packed(item) for item in value]
    for kind, name in ((tuple, "tuple"), (set, "set")):
        if type(value) is kind:
            return {name: [packed(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[packed(key), packed(item)] for key, item in value.items()]}
    if type(value).__name__ in ("File", "Directory") and type(value).__module__.endswith(".gorilla_file_system"):
        kept = {name: item for name, item in vars(value).items() if name in ("name", "content", "contents")}
        return {type(value).__name__: packed(kept)}
    return {"opaque": repr(value)[:200]}


def unpacked(told: Any, classes: dict[str, type] | None = None) -> Any:
    """What `packed` told. `classes` has File and Directory. Raises ValueError, TypeError, KeyError or AttributeError
    for anything else."""
    if isinstance(told, list):
        return [unpacked(item, classes) for item in told]
    if not isinstance(told, dict):
        return told
    ((name, inside),) = told.items()
    if name == "tuple":
        return tuple(unpacked(item, classes) for item in inside)
    if name == "set":
        return {unpacked(item, classes) for item in inside}
    if name == "dict":
        return {unpacked(key, classes): unpacked(item, classes) for key, item in inside}
    if name == "opaque":
        return Opaque(str(inside))
    kind = (classes or {})[name]
    made: Any = object.__new__(kind)
    vars(made).update(unpacked(inside, classes), parent=None)
    return made
