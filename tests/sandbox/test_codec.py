from __future__ import annotations

import datetime
import enum
import math
import time
import types
import uuid
import zoneinfo
from array import array
from collections import Counter, OrderedDict, UserList, UserString, defaultdict, deque
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.sandbox.inside.codec import CLOSED, Budget, CodecError, Elements, Limits, Opaque, decode, encode
from coderl.sandbox.inside.wire import Record, pack_record, records

surrogates = st.text(st.characters(), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | surrogates
    | st.binary(max_size=20)
    | st.decimals(allow_nan=False)
    | st.fractions()
)
keys = scalars | st.tuples(scalars, scalars) | st.frozensets(scalars, max_size=3)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4).map(deque)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
    ),
    max_leaves=20,
)


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same type all the way down."""
    if type(left) is not type(right) or left != right:
        return False
    if isinstance(left, (list, tuple, deque)):
        return all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return all(same(left[key], right[key]) for key in left)
    return True


@given(plain)
def test_decoding_gives_back_what_was_encoded(value: Any) -> None:
    assert same(decode(encode(value)), value)


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_decoder_takes_any_bytes(data: bytes) -> None:
    with suppress(CodecError):
        decode(data)


@given(plain, st.data())
@settings(max_examples=500)
def test_decoder_takes_damaged_encodings(value: Any, data: st.DataObject) -> None:
    whole = bytearray(encode(value))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CodecError):
        decode(bytes(whole))


@given(plain)
def test_every_proper_prefix_is_refused(value: Any) -> None:
    whole = encode(value)
    for end in range(len(whole)):
        with pytest.raises(CodecError):
            decode(whole[:end])
    with pytest.raises(CodecError):
        decode(whole + b"\0")


@given(st.lists(plain, max_size=4), st.binary(max_size=40))
def test_records_before_garbage_are_kept(values: list[Any], garbage: bytes) -> None:
    data = b"".join(pack_record(Record("values", value=value)) for value in values)
    found = list(records(data + b"\xff\xff\xff\xff" + garbage))
    assert [decode(record.value) for record in found] == values


class Colour(enum.IntEnum):
    RED = 1


class Shape(enum.Enum):
    ROUND = 1


class Pair(NamedTuple):
    a: int
    b: int


class LyingInt(int):
    def __index__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class LyingList(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([1, 2, 3])

    def __len__(self) -> int:
        return 3


class LyingStr(str):
    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        return b"lie"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (defaultdict(list, a=[1]), {"a": [1]}),
        (Pair(1, 2), (1, 2)),
        (Colour.RED, 1),
        (LyingInt(0), 0),
        (LyingList([9]), [9]),
        (LyingStr("true"), "true"),
        (bytearray(b"a"), b"a"),
        ({"a": 1}.keys(), {"a"}),
        ({"a": 1}.items(), {("a", 1)}),
        (UserList([1]), [1]),
        (UserString("a"), "a"),
    ],
)
def test_subclasses_become_their_base_class(value: Any, expected: Any) -> None:
    assert same(decode(encode(value)), expected)


@pytest.mark.parametrize(
    "value",
    [
        Counter("aab"),
        OrderedDict(b=1, a=2),
        array("i", [1, 2]),
        uuid.UUID(int=5),
        ...,
        numpy.array([[1.5, 2.0]]),
        numpy.array(["a", "bc"]),
    ],
)
def test_types_that_equality_tells_apart_stay_what_they_are(value: Any) -> None:
    answer = decode(encode(value))
    assert type(answer) is type(value)
    assert numpy.all(answer == value)
    assert decode(encode(OrderedDict(a=2, b=1))) != OrderedDict(b=1, a=2) == {"a": 2, "b": 1}


def test_classes_stand_for_themselves() -> None:
    for kind in (int, type(None), Counter, types.GeneratorType):
        assert decode(encode(kind)) == decode(encode(kind))
    assert decode(encode(int)) != decode(encode(float))
    assert isinstance(decode(encode(type("int", (), {"__module__": "builtins"}))), Opaque)


def test_equal_sets_and_dicts_have_the_same_bytes() -> None:
    for items in (list(range(0, 3000, 7)), ["b", "a", ("c", 1)]):
        assert encode(set(items)) == encode(set(items) - set(items[:1]) | set(items[:1]))
        assert encode(dict.fromkeys(items)) == encode(dict.fromkeys(reversed(items)))


def test_what_can_be_gone_through_comes_as_an_iterator() -> None:
    answer = decode(encode(Elements([1, [2]])))
    assert (next(answer), list(answer)) == (1, [[2]])


def test_closed_sides_hold_nothing_opaque() -> None:
    with pytest.raises(CodecError, match="not plain data"):
        encode([object()], CLOSED)


def test_one_budget_holds_for_several_values() -> None:
    budget = Budget(Limits(nodes=10))
    assert decode(encode([1] * 6), budget=budget) == [1] * 6
    with pytest.raises(CodecError):
        decode(encode([1] * 6), budget=budget)


def test_not_a_number_equals_itself_only_within_a_container() -> None:
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode([math.nan])) == [math.nan] != [float("nan")]
    assert decode(encode([float("nan")])) != [math.nan]
    assert math.copysign(1, decode(encode(-0.0))) == -1


@given(st.dates() | st.times() | st.datetimes() | st.timedeltas())
def test_dates_and_times_cross(value: object) -> None:
    answer = decode(encode(value))
    assert answer == value
    assert type(answer) is type(value)


def test_an_aware_moment_stays_the_same_moment() -> None:
    value = datetime.datetime(2024, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
    assert decode(encode(value)) == value


@pytest.mark.parametrize("value", [object(), len, iter([]), Shape.ROUND])
def test_what_is_not_plain_data_is_opaque(value: object) -> None:
    answer = decode(encode(value))
    assert isinstance(answer, Opaque)
    assert answer != answer
    assert answer != value
    assert bool(answer) is bool(value)


def test_integers_past_the_digit_limit_cross() -> None:
    for value in (7**20_000, -(7**20_000), 2**63, -(2**63), 255, 256, -128, -129):
        assert decode(encode(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        "a" * 2000,
        list(range(200)),
        {i: i for i in range(30)},
        [[[[[[0]]]]]],
        Decimal(10**150),
        Fraction(10**300, 7),
    ],
)
def test_limits_hold_on_both_sides(value: Any) -> None:
    tight = Limits(size=1500, nodes=100, depth=4, hashed=20, number=50)
    with pytest.raises(CodecError):
        encode(value, tight)
    with pytest.raises(CodecError):
        decode(encode(value), tight)


def test_cycles_are_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(CodecError):
        encode(cycle)


def test_colliding_keys_cost_little() -> None:
    body = encode({i * (2**61 - 1): 0 for i in range(1, 2000)})
    assert len(decode(body)) == 1999
    with pytest.raises(CodecError):
        encode(dict.fromkeys(range(8001)))


@pytest.mark.parametrize("part", [1000, "ab" * 50, Fraction(1, 7), Decimal(7), frozenset([1, 2])])
def test_what_lies_within_colliding_keys_counts(part: Any) -> None:
    def keys(number: int, width: int) -> set[Any]:
        return {(*[part] * width, i * (2**61 - 1) + 5) for i in range(number)}

    small = keys(20, 5)
    assert decode(encode(small)) == small
    body = encode(keys(100, 100), Limits(hashed=1 << 20))
    began = time.process_time()
    with pytest.raises(CodecError):
        decode(body)
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("number", [Fraction(1, 7), Decimal(7)])
def test_slow_keys_count_more(number: Any) -> None:
    with pytest.raises(CodecError):
        encode({number + i for i in range(1200)})
    assert encode({int(number) + i for i in range(1200)})


def test_nested_keys_count_the_same_in_encoder_and_decoder() -> None:
    values = [{1: 2}, {(1, 2): 3}, {frozenset([(1, 2)])}, range(3), [slice(1, 2)], {Decimal(1): Fraction(1)}]
    for value in values:
        least = min(n for n in range(40) if _fits(encode, value, n))
        body = encode(value)
        assert least == min(n for n in range(40) if _fits(decode, body, n))


def _fits(work: Any, value: Any, hashed: int) -> bool:
    try:
        work(value, Limits(hashed=hashed))
    except CodecError:
        return False
    return True


@pytest.mark.parametrize(
    "data",
    [
        b"s\0\0\0\2" + encode(1) + encode(1.0),  # the same element twice
        b"d\0\0\0\1" + encode([]) + encode(1),  # an unhashable key
        b"F\0\0\0\6\0\0\0\1\1\0",  # a zero denominator
        b"b\0\0\0\1\2",
        b"n\0\0\0\1\0",
        b"f\0\0\0\1\0",
        b"u\0\0\0\1\xff",
        b"l\xff\xff\xff\xff",
        b"?\0\0\0\0",
    ],
)
def test_malformed_encodings_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)
