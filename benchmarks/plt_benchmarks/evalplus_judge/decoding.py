"""Plain bytes back to values: the trusted half of the codec.

The bytes were written beside hostile code, so nothing in them is believed: :func:`decode` takes any bytes and
either returns data made of the types that encoding.py lists or raises :class:`CodecError`. It creates no object of
a class that the bytes name, calls nothing that they name, and bounds their depth and number.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any

from plt_benchmarks.evalplus_judge.encoding import (
    BASES,
    BIG,
    CODEC_VERSION,
    MAX_DEPTH,
    MAX_ITEMS,
    RAW_KINDS,
    CodecError,
    Iterated,
    Kind,
    Opaque,
)

_MARKERS: dict[type, type] = {base: type(f"SubclassOf_{base.__name__}", (base,), {}) for base in BASES}


def decode(data: bytes | memoryview) -> Any:
    """The value in `data`. Raises CodecError, and nothing else, for anything that `encode` does not write."""
    try:
        reader = _Reader(memoryview(data))
        if reader.byte() != CODEC_VERSION:
            raise CodecError("not this version of the codec")
        value = next(reader.column(1, 0))
    except CodecError:
        raise
    except Exception as error:
        raise CodecError(f"not an encoded value: {type(error).__name__}") from None
    if reader.at != len(reader.data):
        raise CodecError("bytes after the value")
    return value


class _Reader:
    """Columns are read in full where they are arrays and made into objects lazily, in order, once."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0
        self.items = 0

    def take(self, size: int) -> memoryview:
        if size < 0 or size > len(self.data) - self.at:
            raise CodecError("cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def array(self, typecode: str, count: int) -> array[Any]:
        out = array(typecode)
        out.frombytes(self.take(count * out.itemsize))
        if sys.byteorder == "big":
            out.byteswap()
        return out

    def column(self, count: int, depth: int) -> Iterator[Any]:
        self.items += count
        if depth > MAX_DEPTH or self.items > MAX_ITEMS:
            raise CodecError("too deep or too large")
        if not count:
            return iter(())
        kind = self.byte()
        if kind != Kind.MIXED:
            return self.part(kind, count, depth)
        kinds = bytes(self.take(count))
        parts: list[Iterator[Any]] = [iter(())] * 256
        for kind in sorted(set(kinds)):
            parts[kind] = self.part(kind, kinds.count(kind), depth)
        return map(next, map(parts.__getitem__, kinds))

    def part(self, kind: int, count: int, depth: int) -> Iterator[Any]:
        if kind == Kind.NONE:
            return iter([None] * count)
        if kind in _READERS:
            return _READERS[kind](self, count)
        if kind in _BUILDERS:
            build = _BUILDERS[kind]
            lengths, items = self.nested(count, depth)
            if kind == Kind.TUPLE and 0 < lengths[0] < 1000 and min(lengths) == max(lengths):
                return zip(*[items] * lengths[0], strict=False)  # each row takes its items from the one iterator
            return (build(islice(items, n)) for n in lengths)
        if kind in _MAPPING_BUILDERS:
            make = _MAPPING_BUILDERS[kind]
            lengths, keys = self.nested(count, depth)
            also, values = self.nested(count, depth)
            if lengths != also:
                raise CodecError("keys without values")
            return (make(zip(islice(keys, n), islice(values, n), strict=True)) for n in lengths)
        if kind in _FROM_TUPLE:
            return map(_FROM_TUPLE[kind], self.column(count, depth + 1))
        raise CodecError("unknown kind")

    def nested(self, count: int, depth: int) -> tuple[Sequence[int], Iterator[Any]]:
        lengths = self.lengths(count)
        return lengths, self.column(sum(lengths), depth + 1)

    def lengths(self, count: int) -> Sequence[int]:
        lengths = _read_ints(self, count)
        if min(lengths) < 0:
            raise CodecError("negative length")
        return lengths


def _read_ints(reader: _Reader, count: int) -> Sequence[int]:
    typecode = reader.byte()
    if typecode == BIG:
        sizes = reader.lengths(count)
        return [int.from_bytes(reader.take(n), "little", signed=True) for n in sizes]
    if typecode not in b"bhiq":
        raise CodecError("unknown integers")
    return reader.array(chr(typecode), count)


def _read_bools(reader: _Reader, count: int) -> Iterator[bool]:
    return map((False, True).__getitem__, bytes(reader.take(count)))


def _read_complexes(reader: _Reader, count: int) -> Iterator[complex]:
    numbers = reader.array("d", 2 * count)
    return map(complex, numbers[::2], numbers[1::2])


def _read_strings(reader: _Reader, count: int) -> Iterator[str]:
    form = reader.byte()
    if form == ord("="):
        return _read_plain_strings(reader, count)
    if form != ord("#"):
        raise CodecError("unknown strings")
    table = list(_read_plain_strings(reader, reader.byte() + 1))
    return map(table.__getitem__, bytes(reader.take(count)))


def _read_plain_strings(reader: _Reader, count: int) -> Iterator[str]:
    lengths = reader.lengths(count)
    size = struct.unpack("<Q", reader.take(8))[0]
    text = bytes(reader.take(size)).decode("utf-8", "surrogatepass")
    if sum(lengths) != len(text):
        raise CodecError("strings and their lengths differ")
    return _cut(text, lengths)


def _cut(text: str, lengths: Sequence[int]) -> Iterator[str]:
    at = 0
    for length in lengths:
        yield text[at : at + length]
        at += length


def _read_blobs(reader: _Reader, count: int) -> Iterator[bytes]:
    lengths = reader.lengths(count)
    return iter([bytes(reader.take(n)) for n in lengths])


_READERS: dict[int, Callable[[_Reader, int], Iterator[Any]]] = {
    Kind.BOOL: _read_bools,
    Kind.INT: lambda reader, count: iter(_read_ints(reader, count)),
    Kind.FLOAT: lambda reader, count: iter(reader.array("d", count)),
    Kind.COMPLEX: _read_complexes,
    Kind.STR: _read_strings,
    Kind.BYTES: _read_blobs,
    Kind.BYTEARRAY: lambda reader, count: map(bytearray, _read_blobs(reader, count)),
}
_BUILDERS: dict[int, Callable[[Iterator[Any]], Any]] = {
    Kind.LIST: list,
    Kind.TUPLE: tuple,
    Kind.SET: set,
    Kind.FROZENSET: frozenset,
    Kind.DEQUE: deque,
    Kind.KEYS: lambda items: dict.fromkeys(items).keys(),
    Kind.ITEMS: lambda items: dict(items).items(),
}
_MAPPING_BUILDERS: dict[int, Callable[[Any], Any]] = {
    Kind.DICT: dict,
    Kind.COUNTER: lambda pairs: Counter(dict(pairs)),
    Kind.ORDERED: OrderedDict,
}


def _build_marked(value: Any) -> Any:
    return _MARKERS[type(value)](value)


def _build_numpy_scalar(value: Any) -> Any:
    dtype_name, content = value
    if dtype_name == "opaque":
        return Opaque("numpy.void")
    dtype = _numpy_dtype(dtype_name)
    if dtype.kind in RAW_KINDS:
        return _numpy_from_raw(dtype, (), content)[()]
    return dtype.type(content)


def _build_numpy_array(value: Any) -> Any:
    dtype_name, shape, content = value
    if dtype_name == "opaque":
        return Opaque("numpy.ndarray")
    dtype = _numpy_dtype(dtype_name)
    if dtype.kind in RAW_KINDS:
        return _numpy_from_raw(dtype, shape, content)
    import numpy

    flat = numpy.empty(len(content), dtype=dtype)
    for i, item in enumerate(content):
        flat[i] = item
    return flat.reshape(shape)


def _numpy_dtype(name: str) -> Any:
    import numpy

    if not re.fullmatch(r"[<>|=](?:[biufcmM]\d{1,2}(?:\[\w{1,12}\])?|[US]\d{1,7}|O\d?)", name):
        raise CodecError("unknown dtype")
    return numpy.dtype(name)


def _numpy_from_raw(dtype: Any, shape: tuple[int, ...], content: bytes) -> Any:
    import numpy

    flat = numpy.frombuffer(bytearray(content), dtype=dtype)
    if dtype.kind == "b":
        flat = numpy.frombuffer(content, dtype=numpy.uint8) != 0
    return flat.reshape(shape)


def _build_opaque(type_name: Any) -> Opaque:
    if type(type_name) is not str:
        raise CodecError("a type name that is no string")
    return Opaque(type_name)


_FROM_TUPLE: dict[int, Callable[[Any], Any]] = {
    Kind.RANGE: lambda v: range(*v),
    Kind.ITERATED: lambda v: Iterated(str(v[0]), tuple(v[1])),
    Kind.DECIMAL: lambda v: Decimal(v),
    Kind.FRACTION: lambda v: Fraction(*v),
    Kind.SUBCLASS: _build_marked,
    Kind.NPSCALAR: _build_numpy_scalar,
    Kind.NPARRAY: _build_numpy_array,
    Kind.OPAQUE: _build_opaque,
}
