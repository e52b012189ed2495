"""From a program to a payload, and from what came back to a verdict."""

from __future__ import annotations

import reprlib
import secrets
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from coderl.errors import UserError
from coderl.sandbox import wire
from coderl.sandbox.codec import TRUSTED, encode
from coderl.sandbox.compare import holds
from coderl.sandbox.plan import Inline, Program, Sealed, inline_plan, sealed_plan
from coderl.sandbox.seal import Unsealable
from coderl.types import Execution

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.sandbox.lane import RawRun
    from coderl.sandbox.wire import Record
    from coderl.types import Outcome, Tier

Mode = Literal["auto", "sealed", "rpc", "inline"]
_OUTCOMES: tuple[Outcome, ...] = ("failed", "syntax_error", "error", "out_of_memory", "no_code")
"""What a child may say of itself. ``passed`` and ``infra_error`` are not among them."""


@dataclass(frozen=True, slots=True)
class Job:
    """One program, ready to be sent.

    Attributes:
        plan: Sealed or inline.
        payload: What the child gets.
        token: Empty in sealed grading.
    """

    plan: Sealed | Inline
    payload: bytes
    token: bytes = b""


def plan_for(program: Program, mode: Mode) -> Sealed | Inline:
    """The grading of a program.

    Raises:
        UserError: Sealed grading was asked for by name and its tests do not allow it.
    """
    if mode == "inline":
        return inline_plan(program.tests, program.test, program.entry_point)
    try:
        if not (program.tests or program.test.strip()):
            raise Unsealable("there are none")
        return sealed_plan(program.tests, program.test, program.entry_point)
    except Unsealable as error:
        if mode == "sealed":
            raise UserError(f"these tests cannot be graded sealed ({error}): use grading: auto") from None
        return inline_plan(program.tests, program.test, program.entry_point, str(error))


def prepare(program: Program, mode: Mode) -> Job:
    """What a lane needs to run a program."""
    plan = plan_for(program, mode)
    common = {"code": program.code, "setup": program.setup, "token": b""}
    if isinstance(plan, Sealed):
        steps = [(step.source, step.check is not None) for step in plan.steps]
        return Job(plan, encode(common | {"steps": steps}, TRUSTED))
    token = secrets.token_bytes(16)
    parts = {"token": token, "tests": list(plan.tests), "canaries": list(plan.canaries)}
    return Job(plan, encode(common | parts, TRUSTED), token)


def judge(job: Job, run: RawRun, tier: Tier) -> Execution:
    """The verdict on one run."""
    story = wire.records(run.data)
    first = next(story, None)
    grading: Literal["sealed", "inline"] = "sealed" if isinstance(job.plan, Sealed) else "inline"
    if first is None or first.kind != "ready":
        cause = "the run could not be started" if first is None else f"no confinement: {first.value}"
        verdict: tuple[Outcome, int, str] = ("infra_error", 0, cause)
    else:
        verdict = _outcome(job, run, story)
    outcome, passed, message = verdict
    return Execution(outcome, passed, job.plan.total, safe(message), run.seconds, grading, tier)


def _outcome(job: Job, run: RawRun, story: Iterator[Record]) -> tuple[Outcome, int, str]:
    start = next(story, None)
    if start is None or start.kind != "defined":
        if start is not None and start.kind == "refused":
            outcome, message = _claim(start.value, "error")
            return outcome, 0, message
        return _ended(run, 0, "while it was defined")
    tally = _sealed(job.plan, story) if isinstance(job.plan, Sealed) else _inline(job, story)
    if tally.ended and tally.passed == job.plan.total and tally.failure is None:
        return ("passed", tally.passed, "") if job.plan.total else ("failed", 0, "there are no tests")
    if not tally.ended:
        return _ended(run, tally.passed, "during the tests")
    outcome, message = tally.failure or ("failed", "")
    return outcome, tally.passed, message


@dataclass(slots=True)
class _Tally:
    """Tests passed, the first failure, and whether the last record was the end."""

    passed: int = 0
    failure: tuple[Outcome, str] | None = None
    ended: bool = False

    def fail(self, outcome: Outcome, message: str) -> None:
        self.failure = self.failure or (outcome, message)


def _sealed(plan: Sealed, story: Iterator[Record]) -> _Tally:
    tally = _Tally()
    wrong: set[int] = set()
    reached = 0
    for step, record in zip(plan.steps, story, strict=False):
        if record.kind == "end":
            break
        reached += 1
        ok = record.kind == "value" and (step.check is None or holds(step.check, record.value))
        if not ok:
            wrong.add(step.test)
            tally.fail(*_wrong_answer(step.test, record))
    done = {step.test for step in plan.steps[:reached]} - {step.test for step in plan.steps[reached:]}
    tally.passed = len(done - wrong)
    tally.ended = reached == len(plan.steps)
    return tally


def _wrong_answer(test: int, record: Record) -> tuple[Outcome, str]:
    if record.kind == "value":
        return "failed", f"test {test + 1}: wrong answer {show(record.value)}"
    outcome, message = _claim(record.value, "failed")
    return outcome, f"test {test + 1}: {message}"


def _inline(job: Job, story: Iterator[Record]) -> _Tally:
    tally = _Tally()
    for test, record in enumerate(story):
        if record.token != job.token:
            tally.fail("failed", "a record without the run's token")
            tally.ended = True
            break
        tally.ended = record.kind == "end" or test >= job.plan.total
        if record.kind == "passed":
            tally.passed += 1
        elif record.kind == "raised":
            tally.fail(*_wrong_answer(test, record))
        if tally.ended:
            break
    return tally


def _claim(value: object, default: Outcome) -> tuple[Outcome, str]:
    """What a child says of itself, if it is a thing it may say."""
    if type(value) is tuple and len(value) == 2 and isinstance(value[1], str):
        return next((outcome for outcome in _OUTCOMES if outcome == value[0]), default), value[1]
    return default, "an unreadable record"


def _ended(run: RawRun, passed: int, when: str) -> tuple[Outcome, int, str]:
    """The verdict on a run that stopped short."""
    if run.how == wire.TIMED_OUT or run.status == -signal.SIGXCPU:
        return "timeout", passed, f"the time was up {when}"
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
