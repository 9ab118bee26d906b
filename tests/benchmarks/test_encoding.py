"""The codec: what goes in comes out, and no bytes do anything but give data or one known error."""

from __future__ import annotations

import math
import random
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_benchmarks.evalplus_judge import encoding
from plt_benchmarks.evalplus_judge.decoding import decode
from plt_benchmarks.evalplus_judge.encoding import CodecError, Iterated, Opaque, encode

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters())
    | st.binary()
)
HASHABLE = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4), max_leaves=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(HASHABLE, inner, max_size=5)
        | st.sets(HASHABLE, max_size=5)
        | st.lists(inner).map(deque)
    ),
    max_leaves=30,
)


def same(a: Any, b: Any) -> bool:
    """Equal in every bit and every type, all the way down; sets and dictionaries in any order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        return len(a) == len(b) and sorted(map(picture, a)) == sorted(map(picture, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    return bool(a == b)


def picture(value: Any) -> str:
    if isinstance(value, frozenset):
        return f"frozenset {sorted(map(picture, value))}"
    return f"({', '.join(map(picture, value))})" if isinstance(value, tuple) else f"{type(value)} {value!r}"


@given(VALUES)
@settings(max_examples=400)
def test_what_goes_in_comes_out(value: Any) -> None:
    assert same(decode(encode(value)), value)


@given(st.lists(VALUES, max_size=6), st.sampled_from([1, 63, 64, 200]))
@settings(max_examples=100)
def test_long_columns(values: list[Any], times: int) -> None:
    assert same(decode(encode(values * times)), values * times)


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        2**63 - 1,
        -(2**63),
        2**63,
        -(2**63) - 1,
        10**5000,
        -(10**5000),
        -0.0,
        math.inf,
        math.nan,
        5e-324,
        complex(-0.0, math.nan),
        "\ud800\udc00",
        "\ud83d" + "\ude00",
        "\0",
        "𝒳" * 100,
        b"",
        bytearray(b"x"),
        [[], [[]], ()],
        [None] * 1000,
        [True, 1, 1.0, "1", None] * 100,
        [f"{i}" for i in range(70_000)],
        ["a", "b"] * 70_000,
        [f"{i % 300}" for i in range(70_000)],
        [*["a"] * 70_000, 1, ["a"]],
        [*["a"] * 70_000, 1, None],
        [("a", "b")] * 70_000,
        [(), ()],
        [[("\ud800", "b"), ("b", "b")]] * 70_000,
        {(1, 2): {3: [4]}, None: ()},
        range(3, 30, 5),
        deque([1, 2]),
        Counter("aab"),
        OrderedDict([(2, 1), (1, 2)]),
        Decimal("1.10"),
        Fraction(-3, 7),
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:12] if not isinstance(value, int) else value % 1000}",
)
def test_edges(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_ordered_dict_keeps_its_own_order() -> None:
    value = OrderedDict(a=1, b=2)
    value.move_to_end("a")
    assert list(decode(encode(value)).items()) == [("b", 2), ("a", 1)]


def test_dict_views_compare_as_views() -> None:
    assert decode(encode({1: 2, 3: 4}.keys())) == {1, 3}
    assert decode(encode({1: 2}.items())) == {(1, 2)}


def test_subclasses_become_data_that_is_still_no_plain_data() -> None:
    point = namedtuple("point", "x y")
    colour = IntEnum("colour", "RED BLUE")
    for value, base in [
        (point(1, 2), (1, 2)),
        (colour.BLUE, 2),
        (defaultdict(list, {1: [2]}), {1: [2]}),
        (type("L", (list,), {})([1]), [1]),
        (type("F", (float,), {})(-0.0), -0.0),
        (type("S", (str,), {})("s"), "s"),
    ]:
        result = decode(encode(value))
        assert result == base
        assert type(result) is not type(base)
        assert isinstance(result, type(base))


class AlwaysEqual:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


def test_overridden_comparisons_do_not_travel() -> None:
    assert decode(encode(AlwaysEqual())) != 1
    for base, value in [(int, 1), (str, "a"), (float, 1.5), (list, [1]), (tuple, (1,)), (dict, {1: 2}), (set, {1})]:
        lies = {"__eq__": lambda *_: True, "__ne__": lambda *_: False, "__hash__": lambda _: 7}
        liar = type("Liar", (base,), lies)
        result = decode(encode(liar(value)))
        assert result == value
        assert result != "something else"
        assert [result] != ["something else"]


def test_overridden_access_is_not_asked() -> None:
    class Liar(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([42])

        def __len__(self) -> int:
            return 1

    class Number(int):
        def __add__(self, other: int) -> int:
            return 42

        def __index__(self) -> int:
            return 42

    assert decode(encode(Liar([1, 2]))) == [1, 2]
    assert decode(encode(Number(7))) == 7


@pytest.mark.parametrize(
    "value", [object(), len, (i for i in ()), lambda: 0, type, ...], ids=lambda v: type(v).__name__
)
def test_what_is_no_data_equals_nothing(value: object) -> None:
    result = decode(encode([value]))[0]
    assert isinstance(result, Opaque)
    assert result != value
    assert result is not None
    assert [result] != [Opaque("x")]
    assert result.type_name.endswith(type(value).__name__)
    assert encoding.is_opaque(value)


def test_iterated_gives_its_items_and_equals_nothing() -> None:
    result = decode(encode(Iterated("map", (1, 2))))
    assert set(result) == {1, 2}
    assert result != [1, 2]
    assert result != (1, 2)


def test_cycles_and_depth_become_opaque() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: list[Any] = []
    for _ in range(encoding.MAX_DEPTH + 5):
        deep = [deep]
    for value in (cycle, deep, [cycle, cycle]):
        assert isinstance(decode(encode(value)), Opaque)


def test_doubling_structures_end() -> None:
    value: list[Any] = [0]
    for _ in range(60):
        value = [value, value]
    assert isinstance(decode(b"".join(encoding.encode_parts(value, 1 << 16))), Opaque)
    assert decode(b"".join(encoding.encode_parts([[0] * 50] * 50, 1 << 16))) == [[0] * 50] * 50


NUMPY_VALUES = [
    numpy.float32(1.5),
    numpy.float64(math.pi),
    numpy.int8(-3),
    numpy.uint64(2**64 - 1),
    numpy.bool_(True),
    numpy.complex128(1 + 2j),
    numpy.str_("né"),
    numpy.datetime64("2020-01-02"),
    numpy.arange(6).reshape(2, 3),
    numpy.array([], dtype="float32"),
    numpy.array(3.0),
    numpy.array([True, False]),
    numpy.array(["a", "bc"]),
    numpy.array([1, "x", None], dtype=object),
    numpy.arange(6).reshape(2, 3).T,
    numpy.array([[1.0, math.nan]]),
]


@pytest.mark.parametrize("value", NUMPY_VALUES, ids=lambda value: f"{type(value).__name__}-{value.dtype}-{value.shape}")
def test_numpy_keeps_its_type(value: Any) -> None:
    result = decode(encode([value]))[0]
    assert type(result) is type(value)
    assert result.dtype == value.dtype
    assert result.shape == value.shape
    assert result.tolist() == value.tolist() or numpy.array_equal(result, value, equal_nan=True)


def test_numpy_records_are_opaque() -> None:
    assert isinstance(decode(encode(numpy.zeros(2, dtype="i4,f4"))), Opaque)


@given(st.binary(max_size=200))
@settings(max_examples=2000)
def test_any_bytes_give_data_or_the_known_error(data: bytes) -> None:
    for candidate in (data, bytes([encoding.CODEC_VERSION]) + data):
        try:
            decode(candidate)
        except CodecError:
            continue


SEEDS = [
    [1, 2.0, "three", None, True, {"a": (1, {2})}, b"x", 2**80, 1j],
    NUMPY_VALUES,
    [Decimal(1), Fraction(1, 2), Counter("ab"), deque([1]), range(3), {1: 2}.keys(), Iterated("g", (1,)), object()],
    [("a", "b", "c")] * 40,
]


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_damaged_bytes_give_data_or_the_known_error(seed: int) -> None:
    good = encode(SEEDS[seed])
    generator = random.Random(seed)
    for _ in range(3000):
        damaged = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        data = bytes(damaged[: generator.randint(1, len(damaged))] if generator.random() < 0.3 else damaged)
        try:
            decode(data)
        except CodecError:
            continue


def test_claims_of_size_without_bytes_are_refused_at_once() -> None:
    version = bytes([encoding.CODEC_VERSION])
    huge = struct.pack("<q", 2**62)
    for claim in (
        version + bytes([encoding.Kind.LIST]) + b"q" + huge,
        version + bytes([encoding.Kind.STR]) + b"=" + b"q" + huge,
        version + bytes([encoding.Kind.INT]) + b"*" + b"q" + huge,
        version
        + bytes([encoding.Kind.LIST])
        + b"i"
        + struct.pack("<i", encoding.MAX_ITEMS + 1)
        + bytes([encoding.Kind.NONE]),
    ):
        with pytest.raises(CodecError):
            decode(claim)


def test_bytes_after_the_value_are_refused() -> None:
    with pytest.raises(CodecError, match="after the value"):
        decode(encode(1) + b"x")


def test_the_writer_needs_the_standard_library_alone() -> None:
    """It travels into a sandbox where nothing else may be installed."""
    import ast
    from pathlib import Path

    folder = Path(encoding.__file__).parent
    for name in ("encoding.py", "frames.py", "driver.py"):
        for node in ast.walk(ast.parse((folder / name).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {full.partition(".")[0] for full in names} <= sys.stdlib_module_names
