"""What is run, and what runs it: all that algorithms and evaluation know of a sandbox."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.types import Execution


@dataclass(frozen=True, slots=True)
class Program:
    """A candidate and the tests it must pass.

    Attributes:
        code: The candidate: untrusted source.
        tests: Assert lines (MBPP form); each is one test, passed if every statement in it holds.
        setup: Source run after the candidate and before the tests.
        test: Source that defines ``check(candidate)`` (HumanEval form), used where ``tests`` is empty.
        entry_point: Name of the function that ``check`` receives.
        helpers: Source that defines what the tests use beside the candidate, such as HumanEval's prompt. In
            rpc grading it runs where the tests do, and the candidate cannot redefine it there. Text that is
            not Python is ignored.
        timeout: Seconds of wall time for all tests. None: the sandbox's.
        grading: How the verdict is reached. None: as the sandbox does it.
        harness: Whether inline grading gives it the streams and builtins that it has in
            bigcode-evaluation-harness, where that can decide whether it passes.
    """

    code: str
    tests: tuple[str, ...] = ()
    setup: str = ""
    test: str = ""
    entry_point: str = ""
    helpers: str = ""
    timeout: float | None = None
    grading: Literal["auto", "sealed", "rpc", "inline"] | None = None
    harness: bool = False


class ProgramRunner(ABC):
    """Runs programs against their tests.

    Attributes:
        timeout: Seconds of wall time for a program with all its tests, where it names no other.
    """

    timeout: float

    @abstractmethod
    def run(self, programs: Sequence[Program]) -> list[Execution]:
        """One execution for each program, in order; ``infra_error`` where nothing can be said about one."""

    def start(self) -> None:  # noqa: B027 -- nothing to do where no process is started
        """Get ready. What would keep programs from running is reported now rather than later.

        Raises:
            UserError: The isolation is weak and nobody has allowed it.
        """

    def close(self) -> None:  # noqa: B027 -- see above
        """Leave no process behind. It may be started again."""
