"""Runs the outer program of tests: that of their closed sides, in a process that never has a candidate.

It tells what each closed side is, or why it is none after all: because it raises, is not plain data, or is
made of an object that the candidate gets into its hands.
"""

from __future__ import annotations

import gc
import sys
import types
import warnings
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .codec import CLOSED, SENT, TRUSTED, CodecError, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_MOST = 200_000
"""Objects that are followed from one; where there are more, it is taken for the candidate's."""
_ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(...), type),
    *(Decimal, Fraction, date, time, timedelta, types.ModuleType),
)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, Decimal, Fraction, date, time, timedelta)
_HOLDERS = (tuple, frozenset)


class Outer:
    """The names that an outer program calls (see :mod:`coderl.sandbox.checks.cut`), and what came of it.

    Attributes:
        trace: Place and encoded values of each closed side, in the order of their evaluation.
        inputs: For each loop whose inputs are sent, its encoded rounds, one list a start of the loop.
        spoiled: Places whose closed sides are none, and why.

    Args:
        answers: A program's, to be judged, in the order in which they are asked for.
    """

    def __init__(self, answers: list[list[bytes]] | None = None) -> None:
        self.trace: list[tuple[str, bytes]] = []
        self.inputs: dict[str, list[list[bytes]]] = {}
        self.spoiled: dict[str, str] = {}
        self.verdicts: list[str] = []  # of what is judged: empty, or what is wrong
        self._answers = None if answers is None else iter(answers)
        self._handed: dict[int, object] = {}  # by id; they are kept, so that no other gets it
        self._all = False

    def names(self) -> dict[str, Callable[..., Any]]:
        """What the program finds under which name."""
        return {
            "__expect__": self.expect,
            "__hand__": self.hand,
            "__judge__": self.judge,
            "__classes__": _classes,
            "__alone__": _alone,
            "__loop__": self.loop,
            "__fed__": self.fed,
            "__give__": self.give,
        }

    def expect(
        self, place: str, closed: Callable[[], tuple[Any, ...]], used: Callable[[], tuple[Any, ...]]
    ) -> None:
        """A closed side."""
        try:
            if self._all or (self._handed and any(id(one) in self._handed for one in _reached(used()))):
                raise ValueError("the program may have changed it")
            data = encode(closed(), CLOSED)
            decode(data, TRUSTED)
            self.trace.append((place, data))
        except Exception as error:
            self.spoiled.setdefault(place, f"{type(error).__name__}: {error}"[:200])

    def judge(self, place: str, judge: Callable[..., Any], used: Callable[[], tuple[Any, ...]]) -> None:
        """A truth about answers; without any it is only noted."""
        if self._answers is None:
            self.expect(place, lambda: (judge.__code__.co_argcount,), used)
            return
        data = next(self._answers)
        try:
            wrong = "" if judge(*(decode(one, SENT) for one in data)) else "wrong answer"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"[:200]
        self.verdicts.append(wrong)

    def hand(self, *values: Any) -> None:
        """Values that the candidate gets hold of."""
        try:
            self._handed |= {id(one): one for one in _reached(values)}
        except CodecError:
            self._all = True

    def loop(self, place: str, iterable: Iterable[Any]) -> Iterator[Any]:
        """One start of a loop whose inputs are sent."""
        self.inputs.setdefault(place, []).append([])
        yield from iterable

    def give(self, place: str, value: Any) -> None:
        """What the program is given at a place."""
        self._sent(place, self.inputs.setdefault(place, [[]]), value)

    def fed(self, place: str, *values: Any) -> None:
        """One round of a loop."""
        self._sent(place, self.inputs[place], values)

    def _sent(self, place: str, starts: list[list[bytes]], values: Any) -> None:
        """A copy is sent, so that it must be nothing that the candidate gets elsewhere."""
        try:
            reached = {id(one): one for one in _reached((values,))}
            if self._all or reached.keys() & self._handed.keys():
                raise ValueError("the program may have changed it")
            self._handed |= reached
            starts[-1].append(encode(values, TRUSTED))
            _require_plain(values)
        except Exception as error:
            self.spoiled.setdefault(place, f"{type(error).__name__}: {error}"[:200])


def _classes(kinds: Any) -> Any:
    """Classes, unless what is one of theirs is for them to tell."""
    for kind in kinds if isinstance(kinds, tuple) else (kinds,):
        if type(kind) is not type:
            raise ValueError("not a plain class")
    return kinds


def _alone(value: Any) -> Any:
    """A value that is one of a kind, so that a copy of it is as good."""
    if value is None or value is ... or isinstance(value, (bool, type)):
        return value
    raise ValueError("not one of a kind")


def _require_plain(value: Any) -> None:
    """Raise unless a program cannot tell a decoded copy from the value."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if type(one) in (list, tuple, set, frozenset):
            waiting += one
        elif type(one) is dict:
            waiting += [*one.keys(), *one.values()]
        elif type(one) not in _PLAIN:
            raise ValueError(f"a {type(one).__name__} is not plain data")


def _reached(values: Iterable[Any]) -> Iterator[object]:
    """The changeable objects that can be reached from values.

    Raises:
        CodecError: They are too many to follow.
    """
    waiting, seen = list(values), set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or (isinstance(one, _ATOMS) and not _is_of_tests(one)):
            continue
        seen.add(id(one))
        if len(seen) > _MOST or len(waiting) > 10 * _MOST:
            raise CodecError("too many objects")
        if not isinstance(one, _HOLDERS):
            yield one
        if isinstance(one, types.FunctionType):
            cells = [cell.cell_contents for cell in one.__closure__ or () if cell.cell_contents is not one]
            waiting += [*cells, *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
        else:
            waiting += gc.get_referents(one)


def _is_of_tests(value: object) -> bool:
    """Whether it is a class that the tests define, whose attributes can be changed."""
    return (
        isinstance(value, type) and getattr(sys.modules.get(value.__module__), value.__name__, 0) is not value
    )


def run_outer(source: str, answers: list[list[bytes]] | None) -> dict[str, Any]:
    """Run an outer program, and give what came of it as plain data.

    Args:
        source: The program.
        answers: See :class:`Outer`.
    """
    warnings.simplefilter("ignore")
    outer = Outer(answers)
    failure = ""
    try:
        exec(compile(source, "<tests>", "exec", dont_inherit=True), outer.names())
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"[:200]
    if answers is not None:
        return {"verdicts": outer.verdicts, "failure": failure}
    return {"trace": outer.trace, "inputs": outer.inputs, "spoiled": outer.spoiled, "failure": failure}
