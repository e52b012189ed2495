"""Comparisons on the trusted side: what an answer, already plain data, must satisfy."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from coderl.sandbox.inside.codec import ClassName


def _in(value: Any, container: Any) -> bool:
    if isinstance(container, range) and not isinstance(value, int):
        # Python goes through a range for what is no integer.
        is_whole = isinstance(value, (float, Fraction, Decimal)) and value == value // 1
        return is_whole and int(value) in container
    return value in container


def _not_in(value: Any, container: Any) -> bool:
    return not _in(value, container)


def _is(value: Any, other: Any) -> bool:
    # Only constants and classes are asked for by identity. A class comes as a stand-in, one for each answer.
    return value is other or (type(value) is type(other) is ClassName and value == other)


def _is_not(value: Any, other: Any) -> bool:
    return not _is(value, other)


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Is": _is,
    "IsNot": _is_not,
    "In": _in,
    "NotIn": _not_in,
}
"""By the name of the syntax node."""

_LARGEST = 1_000_000
"""Elements that two arrays may be spread to by comparing them."""

Kind = Literal["chain", "truth", "isinstance", "close", "numpy_close", "equal", "near", "judged"]
"""What is asked of an answer.

``chain``: a comparison, ``low <= answer < high``. ``truth``: that it is true. ``isinstance``: that one of
some classes is among those it has. ``judged``: more than is compared here, in a process of its own.
``close``: ``math.isclose``. ``numpy_close``: ``numpy.allclose``. ``equal``: ``numpy.array_equal`` or plain
equality. ``near``: ``abs(answer - expected) < bound``.
"""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What an answer must satisfy.

    Attributes:
        kind: See :data:`Kind`.
        closed: The values on the tests' side: the other operands of a chain; the expected value and
            tolerances; classes; the number of answers that are judged together.
        operators: Of a chain, or of the bound; names as in :data:`OPERATORS`.
        hole: Where among a chain's operands the answer stands.
        keywords: Names of the tolerances.
        negated: Whether it must not be satisfied.
    """

    kind: Kind
    closed: tuple[Any, ...] = ()
    operators: tuple[str, ...] = ()
    hole: int = 0
    keywords: tuple[str, ...] = ()
    negated: bool = False

    def holds(self, answer: Any) -> bool:
        """Whether the answer satisfies it. A comparison that raises does not hold."""
        try:
            return bool(_KINDS[self.kind](self, answer)) is not self.negated
        except (TypeError, ValueError, ArithmeticError, RecursionError, LookupError, MemoryError):
            return False


def _chain(expectation: Expectation, answer: Any) -> bool:
    values = [*expectation.closed[: expectation.hole], answer, *expectation.closed[expectation.hole :]]
    pairs = itertools.pairwise(values)
    return all(OPERATORS[name](*pair) for name, pair in zip(expectation.operators, pairs, strict=True))


def _truth(_: Expectation, answer: Any) -> bool:
    return bool(answer)


def _isinstance(expectation: Expectation, answer: Any) -> bool:
    classes = expectation.closed[0]
    wanted = classes if isinstance(classes, tuple) else (classes,)
    return isinstance(answer, list) and any(one in wanted for one in answer)


def _tolerances(expectation: Expectation) -> dict[str, Any]:
    return dict(zip(expectation.keywords, expectation.closed[1:], strict=True))


def _close(expectation: Expectation, answer: Any) -> bool:
    return math.isclose(answer, expectation.closed[0], **_tolerances(expectation))


def _numpy_close(expectation: Expectation, answer: Any) -> bool:
    import numpy

    pair = [answer, expectation.closed[0]]
    if expectation.hole:
        pair.reverse()
    shapes = [numpy.shape(one) for one in pair]
    if math.prod(numpy.broadcast_shapes(*shapes)) > max(_LARGEST, *map(math.prod, shapes)):
        return False
    return bool(numpy.allclose(*pair, **_tolerances(expectation)))


def _equal(expectation: Expectation, answer: Any) -> bool:
    import numpy

    expected = expectation.closed[0]
    if isinstance(answer, numpy.ndarray) or isinstance(expected, numpy.ndarray):
        return bool(numpy.array_equal(answer, expected))
    return bool(answer == expected)


def _near(expectation: Expectation, answer: Any) -> bool:
    expected, bound = expectation.closed
    pair = [abs(answer - expected), bound]
    if expectation.hole:
        pair.reverse()
    return bool(OPERATORS[expectation.operators[0]](*pair))


_KINDS: dict[Kind, Callable[[Expectation, Any], bool]] = {
    "chain": _chain,
    "truth": _truth,
    "isinstance": _isinstance,
    "close": _close,
    "numpy_close": _numpy_close,
    "equal": _equal,
    "near": _near,
}
