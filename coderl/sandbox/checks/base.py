"""The interface of a way to grade, and the part of a verdict that all of them share."""

from __future__ import annotations

import ast
import re
import reprlib
import signal
import textwrap
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from coderl.errors import UserError
from coderl.sandbox.inside import wire
from coderl.types import Execution

if TYPE_CHECKING:
    from coderl.sandbox.inside.wire import Record
    from coderl.sandbox.lane import RawRun
    from coderl.sandbox.program import Program
    from coderl.types import Grading, Outcome, Tier


class RunInLanes(Protocol):
    """Runs payloads in lanes."""

    def __call__(self, payloads: Sequence[bytes], trusted: bool = False) -> list[RawRun]:
        """Run one payload in a candidate's lane; given two, the second in a lane for tests, linked to it.

        Args:
            payloads: What to run.
            trusted: Whether the first goes to a lane for tests, where there is never a candidate.
        """


T = TypeVar("T")

_CLAIMABLE: tuple[Outcome, ...] = ("failed", "syntax_error", "error", "out_of_memory", "no_code")
"""Outcomes that a child may report about itself. ``passed`` and ``infra_error`` are not among them."""


class Unsuitable(Exception):
    """The tests cannot be graded in this way; the message is the reason.

    It must follow from the trusted tests alone, so that no candidate can bring it about.
    """


class LostRun(Exception):
    """A run that says nothing, through no fault of what was run."""


class BadTests(UserError):
    """The tests are not Python, so that no program passes them."""


class Shared(Protocol):
    """What is worked out once for all programs with the same tests."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, which is called once for a key. Other threads wait for it."""

    def run_trusted(self, payloads: Sequence[bytes], trusted: bool = True) -> list[RawRun]:
        """Run a payload in a lane without a candidate, with time to spare."""

    def run_right(self, payloads: Sequence[bytes], trusted: bool = True) -> list[RawRun]:
        """Run the payloads of a right program, with as much of the processor as any program."""


class Alone:
    """For a single program whose tests compare with literals."""

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """See :class:`Shared`."""
        return make()

    def run_trusted(self, payloads: Sequence[bytes], trusted: bool = True) -> list[RawRun]:
        """There is no lane to run it in."""
        raise Unsuitable("the tests compare with something that has to be worked out")

    run_right = run_trusted


class Check(ABC):
    """One program, ready to be sent in one way of grading.

    A subclass is a way to grade. Its constructor takes a :class:`~coderl.sandbox.program.Program` and sets
    ``total`` and ``payloads``; :meth:`count` reads the tests' results from the records that come back. To add
    one, write its file here and name it in :data:`coderl.sandbox.checks.choose.CHECKS`.

    Args:
        program: The program. Only its *tests* are ever parsed in this process; the candidate is not.
        shared: What is worked out once for all programs with the same tests.

    Attributes:
        grading: The name of this way to grade.
        total: Number of tests.
        payloads: What is sent to the candidate's run and, where there is one, to the tests' run.

    Raises:
        Unsuitable: Its tests cannot be graded in this way.
        BadTests: Its tests are not valid Python.
    """

    grading: ClassVar[Grading]
    total: int
    payloads: tuple[bytes, ...]

    @abstractmethod
    def __init__(self, program: Program, shared: Shared) -> None: ...

    @abstractmethod
    def count(self, candidate: Iterator[Record], tests: Iterator[Record] | None) -> Tally:
        """The tests' results.

        Args:
            candidate: The records of the candidate's run after it was defined.
            tests: Those of the tests' run, if there was one.
        """

    def grade(self, run: RunInLanes, tier: Tier) -> Execution:
        """Run the program and judge what comes back. A check that needs several runs overrides this.

        Args:
            run: Runs payloads in lanes.
            tier: The isolation of these lanes.
        """
        return self.verdict(run(self.payloads), tier)

    def verdict(self, runs: Sequence[RawRun], tier: Tier) -> Execution:
        """The verdict on the candidate's run, and on that of the tests where there is one."""
        run = runs[0]
        outcome, passed, message = self._outcome(run, [wire.records(one.data) for one in runs])
        return Execution(outcome, passed, self.total, safe(message), run.seconds, self.grading, tier)

    def _outcome(self, run: RawRun, streams: list[Iterator[Record]]) -> tuple[Outcome, int, str]:
        """The outcome, the number of tests passed, and a message."""
        # "ready" comes before any untrusted code has run, so a run without it is our failure and not the
        # program's.
        for stream in streams:
            first = next(stream, None)
            if first is None:
                return "infra_error", 0, "the run could not be started"
            if first.kind != "ready":
                return "infra_error", 0, f"no confinement: {first.value}"
        candidate, tests = streams[0], streams[1] if len(streams) > 1 else None
        start = next(candidate, None)
        if start is not None and start.kind == "refused":
            outcome, message = claim(start.value, "error")
            return outcome, 0, message
        if start is None or start.kind != "defined":
            return _cut_short(run, 0, "while it was defined")
        tally = self.count(candidate, tests)
        if not tally.ended:
            return _cut_short(run, tally.passed, "during the tests")
        if tally.failure is None and tally.passed == self.total:
            return ("passed", tally.passed, "") if self.total else ("failed", 0, "there are no tests")
        outcome, message = tally.failure or ("failed", "")
        return outcome, tally.passed, message


def tried(check: Check, shared: Shared) -> Outcome:
    """The verdict on a right program, on which the grading of all others may depend.

    Raises:
        LostRun: There is none. Nothing may be concluded from that.
    """
    result = check.grade(shared.run_right, "A")
    if result.outcome == "infra_error":
        raise LostRun(f"a right program could not be run: {result.message}")
    return result.outcome


@dataclass(slots=True)
class Tally:
    """Results of a run's tests.

    Attributes:
        passed: Number of tests that passed.
        failure: Outcome and message of the first that did not.
        ended: Whether the run came to the end of its tests.
    """

    passed: int = 0
    failure: tuple[Outcome, str] | None = None
    ended: bool = False

    def fail(self, outcome: Outcome, message: str) -> None:
        """Note a failure, unless there was one before."""
        self.failure = self.failure or (outcome, message)


def count_reports(records: Iterator[Record], total: int, token: bytes = b"") -> Tally:
    """The results of tests that ran in a child, each reported by one record that carries the run's token."""
    tally = Tally()
    for number, record in enumerate(records):
        if record.token != token:
            tally.fail("failed", "a record without the run's token")
            tally.ended = True
            break
        if record.kind == "gone":
            break
        # One more failure may follow the tests: a canary passed, or the tests never called the candidate.
        tally.ended = record.kind == "end" or number >= total
        if record.kind == "passed":
            tally.passed += 1
        elif record.kind == "raised":
            tally.fail(*wrong_answer(number, record))
        if tally.ended:
            break
    return tally


def wrong_answer(test: int, record: Record) -> tuple[Outcome, str]:
    """Outcome and message for a test, counted from 0, whose record is not what it should be."""
    outcome, message = claim(record.value, "failed")
    return outcome, f"test {test + 1}: {message}"


def claim(value: object, default: Outcome) -> tuple[Outcome, str]:
    """The outcome and message that a child reports about itself, if it is one that it may report."""
    if type(value) is tuple and len(value) == 2 and isinstance(value[1], str):
        return next((outcome for outcome in _CLAIMABLE if outcome == value[0]), default), value[1]
    return default, "an unreadable record"


def _cut_short(run: RawRun, passed: int, when: str) -> tuple[Outcome, int, str]:
    """The verdict on a run whose records stop before the end."""
    if run.how == wire.STOPPED:
        return "error", passed, "it did not answer what it was asked"
    if run.how == wire.TIMED_OUT or run.status == -signal.SIGXCPU:
        return "timeout", passed, f"the time was up {when}"
    if run.how == wire.FILLED:
        return "error", passed, f"it wrote too many files, or too much, {when}"
    if run.overflow:
        return "error", passed, "the answers are too large"
    how = f"was killed by signal {-run.status}" if run.status < 0 else f"left with status {run.status}"
    return "error", passed, f"the process {how} {when}"


def show(value: object) -> str:
    """A plain value in at most some 60 characters."""
    try:
        return reprlib.repr(value)
    except Exception:  # an integer past the limit of digits
        return f"<{type(value).__name__}>"


def safe(message: str) -> str:
    """At most 200 printable characters on one line: nothing that steers a terminal or a log."""
    flat = " ".join(message[:400].split())
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in flat)[:200]


_PARSER = threading.Lock()
"""Held while a tree is made: Python counts its depth for all threads together (else: SystemError)."""
_OF_TESTS = re.compile("<test>$")


def quiet() -> None:
    """Ignore what the compiler finds odd in tests, such as ``is 4``: it is for nobody here to change."""
    for kind in (SyntaxWarning, DeprecationWarning):
        # Added once: each change of the filters lets Python repeat all warnings that it has shown.
        if not any(one[2:4] == (kind, _OF_TESTS) for one in warnings.filters):
            warnings.filterwarnings("ignore", category=kind, module=_OF_TESTS.pattern)


def parse(source: str) -> ast.Module:
    """The syntax tree of trusted tests.

    Raises:
        BadTests: They are not Python.
    """
    quiet()
    try:
        with _PARSER:
            return ast.parse(source, "<test>")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        shown = textwrap.shorten(source, 60)
        raise BadTests(f"a test is not valid Python: {error} in {shown!r}: fix the problem's tests") from None
