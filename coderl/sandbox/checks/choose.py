"""Which way a program is graded: the table of ways, and what ``auto`` makes of it."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from coderl.errors import UserError
from coderl.sandbox.checks.base import Check, Unsuitable
from coderl.sandbox.checks.inline import Inline
from coderl.sandbox.checks.rpc import Rpc
from coderl.sandbox.checks.sealed import Partly, Sealed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from coderl.sandbox.checks.base import RunInLanes, Shared, T
    from coderl.sandbox.program import GradingMode, Program
    from coderl.types import Grading

_MOST_KEPT = 8192

CHECKS: tuple[type[Check], ...] = (Sealed, Rpc, Partly, Inline)
"""The ways to grade, the strongest first. The last takes any tests."""


def choose(program: Program, mode: GradingMode, shared: Shared) -> tuple[Check, str]:
    """The program in the strongest way that its tests allow, or in the one that is asked for.

    Returns:
        The program ready to be sent, and why nothing stronger would do (empty where nothing stronger was
        tried).

    Raises:
        UserError: A way was asked for by name and the tests do not allow it.
        BadTests: The tests are not Python.
    """
    kind, reason = shared.once((choose, mode, program.trusted), lambda: _way(program, mode, shared))
    return kind(program, shared), reason


def _way(program: Program, mode: GradingMode, shared: Shared) -> tuple[type[Check], str]:
    """The way that a text is graded, and why in no stronger one: looked for once, by trying."""
    if not (program.tests or program.test.strip()):
        mode = CHECKS[-1].grading  # no tests: it is only run
    reasons: dict[str, str] = {}  # from what is wrong to the strongest way that it rules out
    for kind in CHECKS:
        if mode not in ("auto", kind.grading):
            continue
        try:
            kind(program, shared)
            return kind, _joined(reasons)
        except Unsuitable as error:
            reasons.setdefault(str(error), kind.grading)
    raise UserError(f"these tests cannot be graded {_joined(reasons)}: use grading: auto")


def _joined(reasons: dict[str, str]) -> str:
    return "; ".join(f"{way}: {reason}" for reason, way in reasons.items())


class Chooser:
    """Chooses for one sandbox, and keeps what was worked out for each problem's tests.

    Args:
        mode: How programs are graded that do not ask for a way of their own.

    Attributes:
        inline_reasons: Why ``auto`` graded programs inline, and how many.
    """

    def __init__(self, mode: GradingMode) -> None:
        self.mode: GradingMode = mode
        self.inline_reasons: Counter[str] = Counter()
        self._made: dict[Hashable, Future[Any]] = {}  # the oldest go first
        self._lock = threading.Lock()

    def check(self, program: Program, run_trusted: RunInLanes, run_right: RunInLanes) -> Check:
        """The program, ready to be sent.

        Args:
            program: The program.
            run_trusted: See :meth:`Shared.run_trusted`.
            run_right: See :meth:`Shared.run_right`.

        Raises:
            UserError: See :func:`choose`.
        """
        shared = _Shared(self, run_trusted, run_right)
        check, reason = choose(program, program.grading or self.mode, shared)
        if check.grading == CHECKS[-1].grading and reason:
            with self._lock:
                self.inline_reasons[reason] += 1
        return check

    def way(self, program: Program, run_trusted: RunInLanes, run_right: RunInLanes) -> tuple[Grading, str]:
        """How the program is graded, and why in no stronger way; arguments and errors as of :meth:`check`."""
        shared = _Shared(self, run_trusted, run_right)
        check, reason = choose(program, program.grading or self.mode, shared)
        return check.grading, reason

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """See :class:`~coderl.sandbox.checks.base.Shared`."""
        with self._lock:
            future = self._made.get(key)
            mine = future is None
            if future is None:
                future = self._made[key] = Future()
                while len(self._made) > _MOST_KEPT:
                    del self._made[next(iter(self._made))]
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:  # a lane that was lost says nothing about the tests
                    self._made.pop(key, None)
                future.set_exception(error)
        made: T = future.result()
        return made


class _Shared:
    """A chooser's memory, with the lanes of one program's run."""

    def __init__(self, chooser: Chooser, run_trusted: RunInLanes, run_right: RunInLanes) -> None:
        self.once = chooser.once
        self.run_trusted, self.run_right = run_trusted, run_right
