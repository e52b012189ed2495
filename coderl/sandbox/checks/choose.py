"""Which way a program is graded: the table of ways, and what ``auto`` makes of it."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.sandbox.checks.base import Check, Unsuitable
from coderl.sandbox.checks.inline import Inline
from coderl.sandbox.checks.rpc import Rpc
from coderl.sandbox.checks.sealed import Sealed

if TYPE_CHECKING:
    from coderl.sandbox.program import GradingMode, Program

CHECKS: tuple[type[Check], ...] = (Sealed, Rpc, Inline)
"""The ways to grade, the strongest first. The last takes any tests."""


def choose(program: Program, mode: GradingMode) -> tuple[Check, str]:
    """The program in the strongest way that its tests allow, or in the one that is asked for.

    Returns:
        The program ready to be sent, and why nothing stronger would do (empty where nothing stronger was
        tried).

    Raises:
        UserError: A way was asked for by name and the tests do not allow it, or they are not Python.
    """
    if not (program.tests or program.test.strip()):
        mode = "inline"  # no tests: it is only run
    reasons: list[str] = []
    for kind in CHECKS:
        if mode not in ("auto", kind.grading):
            continue
        try:
            return kind(program), "; ".join(reasons)
        except Unsuitable as error:
            reasons.append(f"{kind.grading}: {error}")
    raise UserError(f"these tests cannot be graded {'; '.join(reasons)}: use grading: auto")


class Chooser:
    """Chooses for one sandbox, and remembers which tests turned out to be unsuitable when they ran.

    Args:
        mode: How programs are graded that do not ask for a way of their own.

    Attributes:
        inline_reasons: Why ``auto`` graded programs inline, and how many.
    """

    def __init__(self, mode: GradingMode) -> None:
        self.mode: GradingMode = mode
        self.inline_reasons: Counter[str] = Counter()
        self._unsuitable: dict[int, str] = {}  # reasons, by the hash of the tests
        self._lock = threading.Lock()

    def check(self, program: Program) -> Check:
        """The program, ready to be sent.

        Raises:
            UserError: See :func:`choose`.
        """
        unsuitable = self._unsuitable.get(_tests_of(program), "")
        check, reason = choose(program, "inline" if unsuitable else program.grading or self.mode)
        if check.grading == "inline" and (reason := unsuitable or reason):
            with self._lock:
                self.inline_reasons[reason] += 1
        return check

    def instead(self, program: Program, check: Check, error: Unsuitable) -> Check:
        """The program in another way than one that its tests turned out to be unsuitable for.

        Raises:
            UserError: That way was asked for by name.
        """
        if (program.grading or self.mode) != "auto":
            raise UserError(
                f"these tests cannot be graded {check.grading}: {error}: use grading: auto"
            ) from None
        self._unsuitable[_tests_of(program)] = f"{check.grading}: {error}"
        return self.check(program)


def _tests_of(program: Program) -> int:
    return hash((program.tests, program.setup, program.test, program.entry_point, program.helpers))
