"""Plain data as bytes: the only language the jailed side can speak.

A value is a tag byte, a length, and that many bytes (or, for containers, that many values). The encoder
collapses subclasses to their base through the base class's own slots, so an overridden ``__eq__``,
``__iter__`` or ``__str__`` changes nothing; what is not plain data becomes :class:`Opaque`, equal to nothing.
The decoder is strict and bounded: on any bytes it gives a value of the listed types or raises
:class:`CodecError`, nothing else.

Pickle would run code, and JSON would merge what Python distinguishes (lists and tuples, non-string keys,
NaN).
"""

from __future__ import annotations

import struct
from collections import deque
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
    """

    size: int = 8 << 20
    nodes: int = 300_000
    depth: int = 100
    hashed: int = 4_000
    number: int = 4_096
    key: int = 64


ANSWER = Limits()
"""For what comes from a jailed process."""
TRUSTED = Limits(size=256 << 20, nodes=1 << 24, hashed=1 << 20)
"""For what the trusted side sends in."""

_LENGTH = struct.Struct(">I")
_DOUBLE = struct.Struct(">d")
_PAIR = struct.Struct(">dd")
_SEQUENCES: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"s", frozenset: b"z", deque: b"q"}
_BUILD: dict[bytes, Callable[[Iterable[Any]], Any]] = {tag: kind for kind, tag in _SEQUENCES.items()}
_HASHED = (b"s", b"z")
_NUMBERS = (b"i", b"D", b"F")
_SLOW = 8
"""Times that a fraction or a decimal counts as hashed: to compare two takes so much longer."""
_STEPS: dict[type, bytes] = {range: b"r", slice: b"k"}
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

    def __init__(self, limits: Limits, export: Callable[[object], int] | None = None) -> None:
        self.limits = limits
        self.export = export
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
        for item in items:
            self.value(item, depth + 1)
        self.keys -= counted

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
        base: Any = kind if kind in _BASES else next((b for b in _BASES if issubclass(kind, b)), None)
        if base in _SEQUENCES:
            self.sequence(_SEQUENCES[base], list(base.__iter__(value)), depth)
        elif base is dict:
            self.mapping(list(dict.items(value)), depth)
        elif kind in _STEPS:
            self.sequence(_STEPS[kind], [value.start, value.stop, value.step], depth)
        elif base is not None:
            self.scalar(base, value)
        else:
            self.other(value, kind, depth)

    def mapping(self, items: list[tuple[Any, Any]], depth: int) -> None:
        self.head(b"d", len(items))
        for key, item in items:
            self.keys += 1
            self.value(key, depth + 1)
            self.keys -= 1
            self.value(item, depth + 1)

    def scalar(self, base: Any, value: Any) -> None:
        """A value without parts, read through the slots of its plain type."""
        if base is bool:
            self.data(b"b", b"\1" if value else b"\0")
        elif base is int:
            self.data(b"i", _integer(int.__index__(value)))
        elif base is float:
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
        """What is no plain type: a view, a numpy number, or an object that a number stands for."""
        if value is None:
            self.data(b"n", b"")
        elif kind in _VIEWS:  # keys and items compare as sets
            self.sequence(b"s", list(value), depth)
        elif kind.__module__ == "numpy" and hasattr(kind, "dtype") and getattr(value, "ndim", 1) == 0:
            self.value(value.item(), depth + 1)
        elif self.export:
            self.data(b"h", _LENGTH.pack(self.export(value)))
        else:
            self.data(b"o", b"\1" if _truth(value) else b"\0")


def _truth(value: object) -> bool:
    try:
        return bool(value)
    except Exception:
        return True


def encode(value: Any, limits: Limits = ANSWER, export: Callable[[object], int] | None = None) -> bytes:
    """The bytes of a value.

    Args:
        value: What to encode.
        limits: How large it may be.
        export: Gives a number for an object that is not plain data, which then stands for it.

    Raises:
        CodecError: It is larger than the limits.
    """
    encoder = _Encoder(limits, export)
    encoder.value(value)
    return b"".join(encoder.parts)


class _Decoder:
    """One decoding under way."""

    def __init__(self, data: bytes, limits: Limits, find: Callable[[int], object] | None = None) -> None:
        self.data = data
        self.limits = limits
        self.find = find
        self.at = 0
        self.nodes = 0
        self.hashed = 0
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
        self.nodes += 1
        self.hashed += self.keys > 0
        if self.nodes > self.limits.nodes or depth > self.limits.depth or self.hashed > self.limits.hashed:
            raise CodecError("too many values or keys, or nested too deeply")
        tag, length = self.take(1), _LENGTH.unpack(self.take(4))[0]
        if tag in _BUILD:
            return self.sequence(tag, length, depth)
        if tag == b"d":
            return self.mapping(length, depth)
        if tag in _STEPS.values() and length == 3:
            steps = [self.key(depth) for _ in range(length)]
            return range(*steps) if tag == b"r" else slice(*steps)
        return self.scalar(tag, self.take(length))

    def room(self, count: int) -> None:
        if self.nodes + count > self.limits.nodes:
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
        if tag == b"n" and not body:
            return None
        if tag in _MOMENT_OF and body.isascii() and len(body) <= _LONGEST_MOMENT:
            return _MOMENT_OF[tag].fromisoformat(body.decode())
        if tag == b"p":
            return timedelta(*_SPAN.unpack(body))
        if tag == b"h" and self.find:
            return self.find(_LENGTH.unpack(body)[0])
        if tag == b"o" and self.find:
            raise CodecError("where objects have numbers, none is opaque")
        if tag in (b"b", b"o") and body in (b"\0", b"\1"):
            return (body == b"\1") if tag == b"b" else Opaque(body == b"\1")
        return self.number(tag, body)

    def number(self, tag: bytes, body: bytes) -> Decimal | Fraction:
        """A decimal or a fraction, and nothing else."""
        if len(body) > 2 * self.limits.number:
            raise CodecError("a number is too long")
        self.hashed += _SLOW if self.keys else 0
        if tag == b"D" and body.isascii():
            return Decimal(body.decode())
        if tag == b"F":
            split = 4 + _LENGTH.unpack(body[:4])[0]
            parts = (int.from_bytes(part, "big", signed=True) for part in (body[4:split], body[split:]))
            return Fraction(*parts)
        raise CodecError(f"unknown tag {tag!r} or wrong length")


def decode(data: bytes, limits: Limits = ANSWER, find: Callable[[int], object] | None = None) -> Any:
    """The value that :func:`encode` made the bytes from, as plain data.

    Args:
        data: The encoding.
        limits: How large it may be.
        find: Gives the object that a number stands for, or raises LookupError; without it there are none.

    Raises:
        CodecError: The bytes are not exactly one encoded value within the limits.
    """
    if len(data) > limits.size:
        raise CodecError("the encoding is too long")
    decoder = _Decoder(data, limits, find)
    try:
        value = decoder.value()
    except CodecError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, struct.error) as error:
        # Bad UTF-8, an unhashable key, a malformed decimal, a zero denominator, a float of the wrong length,
        # a number that no object has.
        raise CodecError(f"malformed value: {type(error).__name__}") from None
    if decoder.at != len(data):
        raise CodecError("bytes follow the value")
    return value
