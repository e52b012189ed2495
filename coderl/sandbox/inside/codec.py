"""Plain data as bytes: the only language the jailed side can speak.

A value is a tag byte, a length, and that many bytes (or, for containers, that many values). Types that
Python's ``==`` tells apart keep their type: a ``Counter``, an ``OrderedDict``, an array. Other subclasses are
written as their base, through the base class's own slots, so that an overridden ``__eq__``, ``__iter__`` or
``__str__`` changes nothing; what is not plain data becomes :class:`Opaque`, equal to nothing. The decoder is
strict and bounded: on any bytes it gives a value of the listed types or raises :class:`CodecError`, nothing
else.

Pickle would run code, and JSON would merge what Python distinguishes (lists and tuples, non-string keys,
NaN).
"""

from __future__ import annotations

import math
import re
import struct
import sys
import types
import uuid
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, UserString, deque
from collections.abc import Set
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class CodecError(ValueError):
    """The bytes are not an encoded value, or the value is larger than the limits allow."""


class Opaque:
    """Stands for an answer that is not plain data: equal to nothing, itself included.

    Args:
        truth: ``bool()`` of the original, for tests such as ``assert f(x)``.
    """

    __slots__ = ("truth",)

    def __init__(self, truth: bool = True) -> None:
        self.truth = truth

    def __bool__(self) -> bool:
        return self.truth

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return "<not plain data>"


@dataclass(frozen=True, slots=True)
class ClassName:
    """Stands for a class, which does not cross: equal to the stand-in of the same class.

    Args:
        name: Its module and name.
    """

    name: str


class Elements(list[Any]):
    """Stands for something to go through, once: decoded, it is an iterator."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest value that is encoded or decoded.

    Attributes:
        size: Bytes of the whole encoding.
        nodes: Values; a container counts, and so does each of its elements.
        depth: Containers within containers.
        hashed: Values within sets and dict keys, at any depth of these and over the whole value. Numbers that
            collide make a hash table quadratic, and tuples of them more than that, so this bounds the time a
            hostile answer can cost the trusted side.
        number: Half the bytes of a fraction or a decimal (their arithmetic is quadratic).
        key: Bytes of a number within a set, a dict's key or a range. Numbers that collide are compared with
            each other, and to compare an integer with a decimal takes time quadratic in its length.
        ordered: Sets and dicts of more elements than this are written in the order of their bytes, so that
            equal ones need no decoding to be found equal.
        opaque: Whether there may be what is not plain data.
        integer: Bytes of the longest integer that is decoded.
    """

    size: int = 14 << 20
    nodes: int = 300_000
    depth: int = 100
    hashed: int = 8_000
    number: int = 4_096
    key: int = 64
    ordered: int = 1
    opaque: bool = True
    integer: int = 1 << 30


ANSWER = Limits()
"""For decoding what comes from a jailed process."""
SENT = Limits(size=14 << 20, nodes=2_000_000, hashed=1 << 20, number=1 << 20)
"""For what a jailed process encodes: it is the trusted side that must look at no more than it can afford."""
CLOSED = Limits(14 << 20, nodes=1 << 24, hashed=1 << 20, number=1 << 20, key=1 << 20, opaque=False)
"""For closed sides, which are compared with by what they are."""
TRUSTED = Limits(256 << 20, nodes=1 << 24, hashed=1 << 20, number=1 << 20, key=1 << 20, ordered=1 << 24)
"""For what the trusted side sends in."""

_LENGTH = struct.Struct(">I")
_DOUBLE = struct.Struct(">d")
_PAIR = struct.Struct(">dd")
_SEQUENCES: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"s", frozenset: b"z", deque: b"q"}
_BUILD: dict[bytes, Callable[[Iterable[Any]], Any]] = {tag: kind for kind, tag in _SEQUENCES.items()}
_BUILD[b"I"] = iter
_HASHED = (b"s", b"z")
_MAPPINGS: dict[bytes, Callable[[Any], Any]] = {b"d": dict, b"C": Counter, b"O": OrderedDict}
_ALONE: dict[bytes, Any] = {b"n": None, b"E": ..., b"N": math.nan}
_NUMPY_TYPE = re.compile(r"[<>=|]?[biufcUS][0-9]{1,3}")
_LONGEST_NAME = 200
_LARGEST_ARRAY = 16 << 20
_NUMBERS = (b"i", b"D", b"F")
_SLOW = 8
"""Times that a fraction or a decimal counts as hashed: to compare two takes so much longer."""
_STEPS: dict[type, bytes] = {range: b"r", slice: b"k"}
_USER = (UserDict, UserList, UserString)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.items()))
_BASES = (
    *(bool, int, float, complex, str, bytes, bytearray, list, tuple),
    *(set, frozenset, dict, deque, Decimal, Fraction, datetime, date, time, timedelta),
)
_MOMENTS: dict[type, bytes] = {datetime: b"m", date: b"e", time: b"a"}
_MOMENT_OF: dict[bytes, Any] = {tag: kind for kind, tag in _MOMENTS.items()}
_SPAN = struct.Struct(">3i")  # days, seconds, microseconds
_LONGEST_MOMENT = 40


def _integer(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


class _Encoder:
    """One encoding in the making."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.parts: list[bytes] = []
        self.size = 0
        self.nodes = 0
        self.hashed = 0
        self.keys = 0  # how many sets and keys this place lies within

    def data(self, tag: bytes, body: bytes) -> None:
        self.size += 5 + len(body)
        if self.size > self.limits.size:
            raise CodecError("the value is too large")
        self.parts += (tag, _LENGTH.pack(len(body)), body)

    def sequence(self, tag: bytes, items: list[Any], depth: int) -> None:
        self.head(tag, len(items))
        counted = tag in _HASHED or tag in _STEPS.values()
        self.keys += counted
        starts = []
        for item in items:
            starts.append(len(self.parts))
            self.value(item, depth + 1)
        self.keys -= counted
        if tag in _HASHED and len(items) > self.limits.ordered:
            self.order(starts)

    def order(self, starts: list[int]) -> None:
        """Bring the last elements, which begin at these places, into the order of their bytes."""
        ends = [*starts[1:], len(self.parts)]
        chunks = sorted(b"".join(self.parts[a:b]) for a, b in zip(starts, ends, strict=True))
        self.parts[starts[0] :] = chunks

    def head(self, tag: bytes, count: int) -> None:
        self.size += 5
        if self.nodes + count > self.limits.nodes:
            raise CodecError("the value has too many elements")
        self.parts += (tag, _LENGTH.pack(count))

    def value(self, value: Any, depth: int = 0) -> None:
        """Any value, by its own type or the plain type it derives from."""
        self.nodes += 1
        self.hashed += self.keys > 0
        if self.nodes > self.limits.nodes or depth > self.limits.depth:
            raise CodecError("the value has too many elements or is nested too deeply")
        if self.hashed > self.limits.hashed:
            raise CodecError("the value has too many keys")
        kind = type(value)
        if kind is Elements:
            self.sequence(b"I", value, depth)
            return
        if kind not in _BASES and not self.limits.opaque and _compares_by_itself(kind):
            raise CodecError(f"a {kind.__name__} compares in a way of its own")
        base: Any = kind if kind in _BASES else next((b for b in _BASES if issubclass(kind, b)), None)
        if base in _SEQUENCES:
            self.sequence(_SEQUENCES[base], list(base.__iter__(value)), depth)
        elif base is dict:
            tag = b"C" if issubclass(kind, Counter) else b"O" if issubclass(kind, OrderedDict) else b"d"
            # An OrderedDict keeps its order elsewhere than the dict that it is.
            pairs = OrderedDict.items(value) if tag == b"O" else dict.items(value)
            self.mapping(tag, list(pairs), depth)
        elif kind in _STEPS:
            self.sequence(_STEPS[kind], [value.start, value.stop, value.step], depth)
        elif base is not None:
            self.scalar(base, value)
        else:
            self.other(value, kind, depth)

    def mapping(self, tag: bytes, items: list[tuple[Any, Any]], depth: int) -> None:
        self.head(tag, len(items))
        starts = []
        for key, item in items:
            starts.append(len(self.parts))
            self.keys += 1
            self.value(key, depth + 1)
            self.keys -= 1
            self.value(item, depth + 1)
        if tag != b"O" and len(items) > self.limits.ordered:
            self.order(starts)

    def scalar(self, base: Any, value: Any) -> None:
        """A value without parts, read through the slots of its plain type."""
        if base is bool:
            self.data(b"b", b"\1" if value else b"\0")
        elif base is int:
            self.data(b"i", _integer(int.__index__(value)))
        elif base is float:
            if value is math.nan:  # equal to itself within a list, as no other NaN is
                self.data(b"N", b"")
            elif value != value and not self.limits.opaque:
                raise CodecError("a NaN is equal to itself alone")
            else:
                self.data(b"f", _DOUBLE.pack(float.__float__(value)))
        elif base is str:
            self.data(b"u", str.encode(value, "utf-8", "surrogatepass"))
        elif base is complex:
            plain = complex.__complex__(value)
            self.data(b"c", _PAIR.pack(plain.real, plain.imag))
        elif base is Decimal:
            self.number(b"D", Decimal.__str__(value).encode())
        elif base is Fraction:
            parts = (_integer(int.__index__(value._numerator)), _integer(int.__index__(value._denominator)))
            self.number(b"F", _LENGTH.pack(len(parts[0])) + b"".join(parts))
        elif base in _MOMENTS:
            self.data(_MOMENTS[base], base.isoformat(value).encode())
        elif base is timedelta:
            self.data(b"p", _SPAN.pack(value.days, value.seconds, value.microseconds))
        else:  # bytes and bytearray, which Python calls equal
            self.data(b"y", bytes(memoryview(value)))

    def number(self, tag: bytes, body: bytes) -> None:
        if len(body) > 2 * self.limits.number:
            raise CodecError("a number is too long")
        self.hashed += _SLOW if self.keys else 0
        self.data(tag, body)

    def other(self, value: Any, kind: type, depth: int) -> None:
        """What is no plain type, but stands for plain data: a view, a numpy number, an array, a class."""
        if value is None:
            self.data(b"n", b"")
        elif value is Ellipsis:
            self.data(b"E", b"")
        elif kind in _VIEWS:  # keys and items compare as sets
            self.sequence(b"s", list(value), depth)
        elif kind in _USER:
            self.value(value.data, depth + 1)
        elif isinstance(value, (types.MappingProxyType, ChainMap)):
            self.mapping(b"d", list(dict(value).items()), depth)
        elif kind is memoryview:
            self.data(b"y", bytes(value))
        elif kind.__module__ == "collections" and isinstance(value, Set):  # an OrderedDict's keys
            self.sequence(b"s", list(value), depth)
        elif kind is array:
            self.sequence(b"A", [value.typecode, array.tolist(value)], depth)
        elif kind.__module__ == "uuid" and kind.__name__ == "UUID":
            self.data(b"U", _integer(value.int))
        elif kind.__module__ == "numpy" and hasattr(kind, "dtype"):
            if getattr(value, "ndim", 1) == 0 and value.dtype.char in "?lqdDUS":
                self.value(value.item(), depth + 1)  # a number that is no other than Python's
            elif not _NUMPY_TYPE.fullmatch(value.dtype.str):
                self.opaque(value, kind)
            else:
                self.sequence(b"R", [value.dtype.str, value.shape, value.tolist()], depth)
        elif isinstance(value, type) and (name := _class_name(value)):
            self.data(b"T", name.encode("utf-8", "surrogatepass"))
        else:
            self.opaque(value, kind)

    def opaque(self, value: Any, kind: type) -> None:
        """What is not plain data; only its truth is told."""
        if not self.limits.opaque:
            raise CodecError(f"a {kind.__name__} is not plain data")
        self.data(b"o", b"\1" if _truth(value) else b"\0")


def _compares_by_itself(kind: type) -> bool:
    """Whether a subclass of a plain type, and none that everybody knows, says what its instances equal."""
    at = next((at for at, one in enumerate(kind.__mro__) if one in _BASES), 0)
    own = [] if issubclass(kind, (Counter, OrderedDict)) else kind.__mro__[:at]
    return any(name in vars(one) for one in own for name in ("__eq__", "__contains__", "__lt__"))


_NAMELESS = {value: f"types.{name}" for name, value in vars(types).items() if isinstance(value, type)}


def _class_name(value: type) -> str:
    """The name under which anybody finds a class, or an empty string."""
    if getattr(sys.modules.get(value.__module__), value.__name__, None) is value:
        return f"{value.__module__}.{value.__name__}"
    return _NAMELESS.get(value, "")


def _truth(value: object) -> bool:
    try:
        return bool(value)
    except Exception:
        return True


def encode(value: Any, limits: Limits = ANSWER) -> bytes:
    """The bytes of a value.

    Args:
        value: What to encode.
        limits: How large it may be.

    Raises:
        CodecError: It is larger than the limits.
    """
    encoder = _Encoder(limits)
    encoder.value(value)
    return b"".join(encoder.parts)


class Budget:
    """What is left of the work that decoding may cost, over several values.

    Args:
        limits: What there is at first.
    """

    def __init__(self, limits: Limits = ANSWER) -> None:
        self.limits = limits
        self.nodes = 0
        self.hashed = 0
        self.bytes = 0

    def charge(self, size: int) -> None:
        """Take the bytes of one more value.

        Raises:
            CodecError: There are not so many left.
        """
        self.bytes += size
        if self.bytes > self.limits.size:
            raise CodecError("the encoding is too long")


class _Decoder:
    """One decoding under way."""

    def __init__(self, data: bytes, budget: Budget) -> None:
        self.data = data
        self.limits = budget.limits
        self.budget = budget
        self.at = 0
        self.keys = 0  # how many sets and keys this place lies within

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise CodecError("the bytes end too early")
        part = self.data[self.at : end]
        self.at = end
        return part

    def value(self, depth: int = 0) -> Any:
        """The value at this place."""
        spent, limits = self.budget, self.limits
        spent.nodes += 1
        spent.hashed += self.keys > 0
        if spent.nodes > limits.nodes or depth > limits.depth or spent.hashed > limits.hashed:
            raise CodecError("too many values or keys, or nested too deeply")
        tag, length = self.take(1), _LENGTH.unpack(self.take(4))[0]
        if tag in _BUILD:
            return self.sequence(tag, length, depth)
        if tag in _MAPPINGS:
            return _MAPPINGS[tag](self.mapping(length, depth))
        if tag in _STEPS.values() and length == 3:
            steps = [self.key(depth) for _ in range(length)]
            return range(*steps) if tag == b"r" else slice(*steps)
        if tag in (b"A", b"R") and length == 2 + (tag == b"R"):
            return _array(*(self.value(depth + 1) for _ in range(length)))
        return self.scalar(tag, self.take(length))

    def room(self, count: int) -> None:
        if self.budget.nodes + count > self.limits.nodes:
            raise CodecError("too many elements")

    def sequence(self, tag: bytes, count: int, depth: int) -> Any:
        hashed = tag in _HASHED
        self.room(count)
        items = [self.key(depth) if hashed else self.value(depth + 1) for _ in range(count)]
        return self.distinct(_BUILD[tag](items), count) if hashed else _BUILD[tag](items)

    def mapping(self, count: int, depth: int) -> dict[Any, Any]:
        self.room(count)
        items = {}
        for _ in range(count):
            key = self.key(depth)
            items[key] = self.value(depth + 1)
        self.distinct(items, count)
        return items

    def key(self, depth: int) -> Any:
        self.keys += 1
        value = self.value(depth + 1)
        self.keys -= 1
        return value

    @staticmethod
    def distinct(items: Any, count: int) -> Any:
        if len(items) != count:
            raise CodecError("a set or dict has the same key twice")
        return items

    def scalar(self, tag: bytes, body: bytes) -> Any:
        """The value without parts that a tag and its body stand for."""
        if self.keys and tag in _NUMBERS and len(body) > self.limits.key:
            raise CodecError("a key is too long a number")
        if tag == b"i" and len(body) > self.limits.integer:
            raise CodecError("an integer is too long")
        if tag == b"i" and body:
            return int.from_bytes(body, "big", signed=True)
        if tag == b"u":
            return body.decode("utf-8", "surrogatepass")
        if tag == b"y":
            return body
        if tag == b"f":
            return _DOUBLE.unpack(body)[0]
        if tag == b"c":
            return complex(*_PAIR.unpack(body))
        if tag in _ALONE and not body:
            return _ALONE[tag]
        if tag == b"T" and len(body) <= _LONGEST_NAME:
            return ClassName(body.decode("utf-8", "surrogatepass"))
        if tag == b"U" and len(body) <= 17:
            return uuid.UUID(int=int.from_bytes(body, "big", signed=True))
        if tag in _MOMENT_OF and body.isascii() and len(body) <= _LONGEST_MOMENT:
            return _MOMENT_OF[tag].fromisoformat(body.decode())
        if tag == b"p":
            return timedelta(*_SPAN.unpack(body))
        if tag in (b"b", b"o") and body in (b"\0", b"\1"):
            return (body == b"\1") if tag == b"b" else Opaque(body == b"\1")
        return self.number(tag, body)

    def number(self, tag: bytes, body: bytes) -> Decimal | Fraction:
        """A decimal or a fraction, and nothing else."""
        if len(body) > 2 * self.limits.number:
            raise CodecError("a number is too long")
        self.budget.hashed += _SLOW if self.keys else 0
        if tag == b"D" and body.isascii():
            return Decimal(body.decode())
        if tag == b"F":
            split = 4 + _LENGTH.unpack(body[:4])[0]
            parts = (int.from_bytes(part, "big", signed=True) for part in (body[4:split], body[split:]))
            return Fraction(*parts)
        raise CodecError(f"unknown tag {tag!r} or wrong length")


def _array(kind: Any, *parts: Any) -> Any:
    """An ``array.array`` of a type code and a list, or a numpy array of a type, a shape and nested lists."""
    if len(parts) == 1 and type(kind) is str and len(kind) == 1:
        return array(kind, parts[0])
    shape, values = parts
    if not (type(kind) is str and _NUMPY_TYPE.fullmatch(kind) and type(shape) is tuple):
        raise CodecError("no array")
    import numpy

    if math.prod(shape) * numpy.dtype(kind).itemsize > _LARGEST_ARRAY:
        raise CodecError("the array is too large")
    return numpy.array(values, dtype=kind).reshape(shape)[()]


def decode(data: bytes, limits: Limits = ANSWER, budget: Budget | None = None) -> Any:
    """The value that :func:`encode` made the bytes from, as plain data.

    Args:
        data: The encoding.
        limits: How large it may be.
        budget: What there is left for it, in the place of ``limits``.

    Raises:
        CodecError: The bytes are not exactly one encoded value within the limits.
    """
    budget = budget or Budget(limits)
    budget.charge(len(data))
    decoder = _Decoder(data, budget)
    try:
        value = decoder.value()
    except CodecError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, struct.error) as error:
        # Bad UTF-8, an unhashable key, a malformed decimal, a zero denominator, a float of the wrong length.
        raise CodecError(f"malformed value: {type(error).__name__}") from None
    if decoder.at != len(data):
        raise CodecError("bytes follow the value")
    return value
