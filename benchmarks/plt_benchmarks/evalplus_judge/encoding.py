"""Values to plain bytes: how a candidate's outputs leave the process that made them.

    assert decode(encode([1, 2.0, {"a": None}])) == [1, 2.0, {"a": None}]      # decode is in decoding.py

What survives: None, bool, int (any size), float (every bit), complex, str (lone surrogates too), bytes, bytearray,
list, tuple, set, frozenset, dict, range, deque, Counter, OrderedDict, dict views, Decimal, Fraction, numpy
scalars and arrays with their dtype. An instance of a subclass becomes its base's data in a marker subclass, so
that it compares as data while `type(a) == type(b)` still tells it from the base. Anything else becomes an
:class:`Opaque`, which equals nothing.

The format is columnar, because some answers are a million tuples: a column of n values is one byte for their
common kind (or `MIXED` and n kinds), then one part per kind in ascending order. A part of containers is their
lengths, then one column of all their items in a row. Numbers are little-endian arrays. So both ways run at the
speed of C loops.

Standard library only: this file also travels into the sandbox.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

CODEC_VERSION = 1
MAX_DEPTH = 100
"""Containers within containers; deeper values become Opaque."""
MAX_ITEMS = 1 << 28
"""Values in one encoded value, everything nested counted."""


class Kind:
    """The byte that says what a column holds."""

    NONE, BOOL, INT, FLOAT, COMPLEX, STR, BYTES, BYTEARRAY, LIST, TUPLE, SET, FROZENSET, DICT = range(13)
    RANGE, DEQUE, COUNTER, ORDERED, KEYS, ITEMS, ITERATED, DECIMAL, FRACTION = range(13, 22)
    SUBCLASS, NPSCALAR, NPARRAY, OPAQUE = range(22, 26)
    MIXED = 255


BIG = ord("*")


class CodecError(ValueError):
    """These bytes are not an encoded value."""


class _TooMuch(Exception):
    pass


class Opaque:
    """Something that is not data; equals nothing, not even itself."""

    __slots__ = ("type_name",)

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Opaque({self.type_name!r})"


class Iterated(Opaque):
    """The items of something that is not data but could be iterated over (a generator, a map...)."""

    __slots__ = ("items",)

    def __init__(self, type_name: str, items: Sequence[Any]) -> None:
        super().__init__(type_name)
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def encode(value: object) -> bytes:
    """The bytes of `value`; never fails for lack of a kind (see Opaque)."""
    return b"".join(encode_parts(value))


def encode_parts(value: object, max_items: int = MAX_ITEMS) -> list[bytes]:
    """`encode` in pieces, for large values; with more than `max_items` inside it is Opaque."""
    head = bytes([CODEC_VERSION])
    try:
        parts = [head]
        _Encoder(parts, max_items).column(lambda: iter((value,)), 1, 0)
    except (_TooMuch, RecursionError):
        parts = [head]
        _Encoder(parts, MAX_ITEMS).column(lambda: iter((Opaque("too deep or too large"),)), 1, 0)
    return parts


def kind_of(data: bytes | memoryview) -> int:
    """The kind of the value that `encode` made these bytes of."""
    return data[1]


def is_opaque(value: object) -> bool:
    """Whether `value` as a whole would become Opaque."""
    kind = type(value)
    return kind not in _KIND_OF_TYPE and _classify(kind) == Kind.OPAQUE


# --- kinds --------------------------------------------------------------------------------------------

_KIND_OF_TYPE: dict[type, int] = {
    type(None): Kind.NONE,
    bool: Kind.BOOL,
    int: Kind.INT,
    float: Kind.FLOAT,
    complex: Kind.COMPLEX,
    str: Kind.STR,
    bytes: Kind.BYTES,
    bytearray: Kind.BYTEARRAY,
    list: Kind.LIST,
    tuple: Kind.TUPLE,
    set: Kind.SET,
    frozenset: Kind.FROZENSET,
    dict: Kind.DICT,
    range: Kind.RANGE,
    deque: Kind.DEQUE,
    Counter: Kind.COUNTER,
    OrderedDict: Kind.ORDERED,
    type({}.keys()): Kind.KEYS,
    type({}.items()): Kind.ITEMS,
    Iterated: Kind.ITERATED,
}

BASES = (str, int, float, complex, bytes, bytearray, list, tuple, set, frozenset, dict)
_TO_BASE: dict[type, Callable[[Any], Any]] = {
    # Unbound methods of the base: an override in the subclass is not asked.
    str: str.__str__,
    int: lambda v: int.__add__(v, 0),
    float: lambda v: struct.unpack("<d", struct.pack("<d", v))[0],
    complex: lambda v: complex(complex.real.__get__(v), complex.imag.__get__(v)),
    bytes: lambda v: bytes.__getitem__(v, slice(None)),
    bytearray: lambda v: bytearray(bytearray.__iter__(v)),
    list: lambda v: list(list.__iter__(v)),
    tuple: lambda v: tuple(tuple.__iter__(v)),
    set: lambda v: set(set.__iter__(v)),
    frozenset: lambda v: frozenset(frozenset.__iter__(v)),
    dict: lambda v: dict(dict.items(v)),
}


def _classify(kind: type) -> int:
    """The kind of a type that is not in the table. Modules that nobody has loaded made no value."""
    if "decimal" in sys.modules and kind is sys.modules["decimal"].Decimal:
        return Kind.DECIMAL
    if "fractions" in sys.modules and kind is sys.modules["fractions"].Fraction:
        return Kind.FRACTION
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if issubclass(kind, numpy.generic):
            return Kind.NPSCALAR
        if issubclass(kind, numpy.ndarray):
            return Kind.NPARRAY
    return Kind.SUBCLASS if issubclass(kind, BASES) else Kind.OPAQUE


# --- writing ------------------------------------------------------------------------------------------

_LONG = 10_000
_Source = Callable[[], Iterator[Any]]  # starts the same values over; a column may be read several times


class _Encoder:
    def __init__(self, parts: list[bytes], max_items: int) -> None:
        self.parts = parts
        self.items_left = min(max_items, MAX_ITEMS)

    def column(self, source: _Source, count: int, depth: int) -> None:
        self.items_left -= count
        if depth > MAX_DEPTH or self.items_left < 0:
            raise _TooMuch
        if not count:
            return
        if count >= _LONG and type(next(source())) is str and (few := _few_strings(source, count)):
            self.parts += [bytes([Kind.STR]), *few]  # without a look at every type, which would take as long again
            return
        kinds_of = {t: _KIND_OF_TYPE[t] if t in _KIND_OF_TYPE else _classify(t) for t in set(map(type, source()))}
        kinds = sorted(set(kinds_of.values()))
        if len(kinds) == 1:
            self.parts.append(bytes(kinds))
            self.part(kinds[0], source, count, depth)
            return
        self.parts.append(bytes([Kind.MIXED]))
        self.parts.append(bytes(map(kinds_of.__getitem__, map(type, source()))))
        for kind in kinds:
            values = [v for v in source() if kinds_of[type(v)] == kind]
            self.part(kind, values.__iter__, len(values), depth)

    def part(self, kind: int, source: _Source, count: int, depth: int) -> None:
        """Write `count` values that are all of `kind`."""
        if kind in _LEAVES:
            self.parts.extend(_LEAVES[kind](source))
        elif kind == Kind.STR:
            self.parts.extend(_strings(source, count))
        elif kind in _SEQUENCES:
            self.nest(source, None, depth)
        elif kind in _MAPPINGS:
            mapping = _MAPPINGS[kind]
            self.nest(source, mapping.keys, depth)
            self.nest(source, mapping.values, depth)
        elif kind != Kind.NONE:
            unpack = _AS_TUPLE[kind]
            self.column(lambda: map(unpack, source()), count, depth + 1)

    def nest(self, source: _Source, items_of: Callable[[Any], Iterable[Any]] | None, depth: int) -> None:
        """Write the lengths of containers, and all their items (or what `items_of` gives) as one column."""
        lengths = list(map(len, source()))
        self.parts.extend(_numbers(lengths))

        def items() -> Iterator[Any]:
            return chain.from_iterable(map(items_of, source()) if items_of else source())

        self.column(items, sum(lengths), depth + 1)


_SEQUENCES = (Kind.LIST, Kind.TUPLE, Kind.SET, Kind.FROZENSET, Kind.DEQUE, Kind.KEYS, Kind.ITEMS)
_MAPPINGS: dict[int, type[dict[Any, Any]]] = {Kind.DICT: dict, Kind.COUNTER: dict, Kind.ORDERED: OrderedDict}


def _array(typecode: str, values: Iterable[Any]) -> bytes:
    out = array(typecode, values)
    if sys.byteorder == "big":
        out.byteswap()
    return out.tobytes()


def _numbers(values: Sequence[int]) -> list[bytes]:
    return list(_ints(values.__iter__)) if values else []


def _ints(source: _Source) -> Iterable[bytes]:
    """A typecode and an array in it, or `*`, byte lengths and two's complements."""
    low, high = min(source()), max(source())
    for typecode, bits in (("b", 7), ("h", 15), ("i", 31), ("q", 63)):
        if -(1 << bits) <= low and high < 1 << bits:
            return (typecode.encode(), _array(typecode, source()))
    blobs = [v.to_bytes(v.bit_length() // 8 + 1, "little", signed=True) for v in source()]
    return (bytes([BIG]), *_numbers(list(map(len, blobs))), *blobs)


def _floats(source: _Source) -> Iterable[bytes]:
    return (_array("d", source()),)


def _complexes(source: _Source) -> Iterable[bytes]:
    return (_array("d", chain.from_iterable((v.real, v.imag) for v in source())),)


def _strings(source: _Source, count: int) -> Iterable[bytes]:
    """b"=" and all of them, or what `_few_strings` makes."""
    return _few_strings(source, count) or (b"=", *_plain_strings(list(source())))


def _few_strings(source: _Source, count: int) -> list[bytes] | None:
    """b"#", a table of the different strings and an index for each; None unless they are all strings, and few."""
    if count < 64:
        return None
    try:
        few = len(set(islice(source(), 1024))) <= 256
        table = set(source()) if few else set()
    except TypeError:
        return None
    if not 0 < len(table) <= min(256, count // 2) or any(type(text) is not str for text in table):
        return None
    texts = sorted(table)
    index = {text: number for number, text in enumerate(texts)}
    return [b"#", bytes([len(texts) - 1]), *_plain_strings(texts), bytes(map(index.__getitem__, source()))]


def _plain_strings(values: list[str]) -> Iterable[bytes]:
    text = "".join(values).encode("utf-8", "surrogatepass")
    return (*_numbers(list(map(len, values))), struct.pack("<Q", len(text)), text)


def _blobs(source: _Source) -> Iterable[bytes]:
    values = list(map(bytes, source()))
    return (*_numbers(list(map(len, values))), *values)


_LEAVES: dict[int, Callable[[_Source], Iterable[bytes]]] = {
    Kind.BOOL: lambda source: (bytes(source()),),
    Kind.INT: _ints,
    Kind.FLOAT: _floats,
    Kind.COMPLEX: _complexes,
    Kind.BYTES: _blobs,
    Kind.BYTEARRAY: _blobs,
}


def _subclass_as_base(value: Any) -> Any:
    base = next(base for base in BASES if isinstance(value, base))
    return _TO_BASE[base](value)


def _numpy_scalar(value: Any) -> tuple[Any, ...]:
    kind = value.dtype.kind
    if kind in "US":
        return (value.dtype.str, value.item())
    return (value.dtype.str if kind in RAW_KINDS else "opaque", value.tobytes() if kind in RAW_KINDS else b"")


def _numpy_array(value: Any) -> tuple[Any, ...]:
    value = sys.modules["numpy"].asarray(value)
    kind = value.dtype.kind
    if kind in RAW_KINDS:
        return (value.dtype.str, value.shape, value.tobytes())
    if kind in "USO":
        return (value.dtype.str, value.shape, value.ravel().tolist())
    return ("opaque", (), b"")


def _type_name(value: Any) -> str:
    if type(value) is Opaque:
        return value.type_name
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"[:200]


RAW_KINDS = "biufcmM"
_AS_TUPLE: dict[int, Callable[[Any], Any]] = {
    Kind.RANGE: lambda v: (v.start, v.stop, v.step),
    Kind.ITERATED: lambda v: (v.type_name, tuple(v.items)),
    Kind.DECIMAL: str,
    Kind.FRACTION: lambda v: (v.numerator, v.denominator),
    Kind.SUBCLASS: _subclass_as_base,
    Kind.NPSCALAR: _numpy_scalar,
    Kind.NPARRAY: _numpy_array,
    Kind.OPAQUE: _type_name,
}
