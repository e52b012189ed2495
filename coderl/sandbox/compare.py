"""Comparisons on the trusted side: what an answer, already plain data, must satisfy."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def _in(value: Any, container: Any) -> bool:
    return value in container


def _not_in(value: Any, container: Any) -> bool:
    return value not in container


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Is": operator.is_,
    "IsNot": operator.is_not,
    "In": _in,
    "NotIn": _not_in,
}
"""By the name of the syntax node."""

MIRRORED = {
    "Eq": "Eq",
    "NotEq": "NotEq",
    "Lt": "Gt",
    "LtE": "GtE",
    "Gt": "Lt",
    "GtE": "LtE",
}
"""The operator with the same meaning when its sides are exchanged."""


@dataclass(frozen=True, slots=True)
class Relation:
    """``answer OP expected``."""

    operator: Callable[[Any, Any], Any]
    expected: Any

    def test(self, answer: Any) -> bool:
        """Whether the answer satisfies it. May raise what the comparison raises."""
        return bool(self.operator(answer, self.expected))


@dataclass(frozen=True, slots=True)
class Truth:
    """The answer is true, or false."""

    expected: bool

    def test(self, answer: Any) -> bool:
        """Whether the answer satisfies it. May raise what the comparison raises."""
        return bool(answer) is self.expected


@dataclass(frozen=True, slots=True)
class Close:
    """``math.isclose(answer, expected, ...)``."""

    expected: Any
    relative: float
    absolute: float

    def test(self, answer: Any) -> bool:
        """Whether the answer satisfies it. May raise what the comparison raises."""
        return math.isclose(answer, self.expected, rel_tol=self.relative, abs_tol=self.absolute)


@dataclass(frozen=True, slots=True)
class Near:
    """``abs(answer - expected) OP bound``."""

    operator: Callable[[Any, Any], Any]
    expected: Any
    bound: Any

    def test(self, answer: Any) -> bool:
        """Whether the answer satisfies it. May raise what the comparison raises."""
        return bool(self.operator(abs(answer - self.expected), self.bound))


Comparison = Relation | Truth | Close | Near


def holds(comparison: Comparison, answer: Any) -> bool:
    """Whether the answer satisfies the comparison. A comparison that raises does not hold."""
    try:
        return comparison.test(answer)
    except (TypeError, ValueError, ArithmeticError, RecursionError):
        return False
