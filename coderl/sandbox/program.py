"""What goes into a sandbox, and the interface of whatever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from coderl.types import Grading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.types import Execution

GradingMode = Literal["auto", Grading]
"""A way to grade by name, or ``auto``: the strongest that a program's tests allow."""


@dataclass(frozen=True, slots=True)
class Program:
    """A candidate program and the tests it must pass.

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
        grading: How the verdict is reached. None: the sandbox's setting.
        reference: A right program, if there is one. It tells which names are the program's, and tests are
            taken apart so that it passes where it passes in plain Python.
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
    grading: GradingMode | None = None
    harness: bool = False
    reference: str = ""

    @property
    def trusted(self) -> tuple[tuple[str, ...], str, str, str, str, str]:
        """All that decides how it is graded: tests, setup, test, entry point, helpers, reference."""
        return self.tests, self.setup, self.test, self.entry_point, self.helpers, self.reference


class ProgramRunner(ABC):
    """Programs in, executions out: all that algorithms and evaluation know of a sandbox.

    :class:`coderl.sandbox.Sandbox` is the one that isolates; tests may use one that makes up its verdicts.

    Attributes:
        timeout: Seconds of wall time for a program that sets no time limit of its own.
    """

    timeout: float

    @property
    def identity(self) -> str:
        """All that verdicts depend on beside the program; empty where they are not to be kept."""
        return ""

    @abstractmethod
    def run(self, programs: Sequence[Program]) -> list[Execution]:
        """One execution per program, in order; ``infra_error`` where nothing can be said about it."""

    def submit(self, program: Program) -> Future[Execution]:
        """Begin with a program, and give its execution to come. Here it is run at once."""
        future: Future[Execution] = Future()
        future.set_result(self.run([program])[0])
        return future

    def start(self) -> None:  # noqa: B027 -- nothing to do where no process is started
        """Get ready; called again, it does nothing.

        Raises:
            UserError: Programs cannot be run here, or not safely enough.
        """

    def close(self) -> None:  # noqa: B027 -- see above
        """Release processes and files. It may be started again."""
