"""From a program to a payload, and from what came back to a verdict."""

from __future__ import annotations

import reprlib
import secrets
import signal
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from coderl.errors import UserError
from coderl.sandbox.checks.plan import Inline, Rpc, Sealed, inline_plan, rpc_plan, sealed_plan
from coderl.sandbox.checks.seal import Unsealable
from coderl.sandbox.compare import holds
from coderl.sandbox.inside import wire
from coderl.sandbox.inside.codec import TRUSTED, encode
from coderl.sandbox.program import Program
from coderl.types import Execution

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.sandbox.inside.wire import Record
    from coderl.sandbox.lane import RawRun
    from coderl.types import Grading, Outcome, Tier

Mode = Literal["auto", "sealed", "rpc", "inline"]
_OUTCOMES: tuple[Outcome, ...] = ("failed", "syntax_error", "error", "out_of_memory", "no_code")
"""What a child may say of itself. ``passed`` and ``infra_error`` are not among them."""


@dataclass(frozen=True, slots=True)
class Job:
    """One program, ready to be sent.

    Attributes:
        plan: How it is graded.
        payload: What the candidate's run gets.
        token: Proof of the runner's records, in inline grading.
        tests: What the tests' run gets, in rpc grading.
    """

    plan: Sealed | Rpc | Inline
    payload: bytes
    token: bytes = b""
    tests: bytes = b""


def plan_for(program: Program, mode: Mode) -> Sealed | Rpc | Inline:
    """The grading of a program: the strongest that its tests allow, or the one that is asked for.

    Raises:
        UserError: A grading was asked for by name and the tests do not allow it.
    """
    if mode == "inline" or not (program.tests or program.test.strip()):
        return _inline_plan(program, "")
    reasons = []
    for kind, make in (("sealed", _sealed_plan), ("rpc", _rpc_plan)):
        try:
            if mode in ("auto", kind):
                return make(program)
        except Unsealable as error:
            reasons.append(f"{kind}: {error}")
    if mode != "auto":
        raise UserError(f"these tests cannot be graded {'; '.join(reasons)}: use grading: auto")
    return _inline_plan(program, "; ".join(reasons))


def _sealed_plan(program: Program) -> Sealed:
    if program.setup.strip():
        raise Unsealable("the setup is part of the tests")
    return sealed_plan(program.tests, program.test, program.entry_point)


def _rpc_plan(program: Program) -> Rpc:
    return rpc_plan(program.tests, program.setup, program.test, program.entry_point, program.helpers)


def _inline_plan(program: Program, reason: str) -> Inline:
    return inline_plan(program.tests, program.test, program.entry_point, reason)


def prepare(program: Program, mode: Mode) -> Job:
    """What lanes need to run a program."""
    plan = plan_for(program, mode)
    if isinstance(plan, Sealed):
        steps = [step.code for step in plan.steps]
        return Job(plan, encode({"role": "sealed", "code": program.code, "steps": steps}, TRUSTED))
    if isinstance(plan, Rpc):
        tests = {"role": "tests", "helpers": plan.helpers, "setup": plan.setup, "tests": list(plan.tests)}
        tests |= {"names": list(plan.names), "values": list(plan.values), "modules": list(plan.modules)}
        sent = encode({"role": "candidate", "code": program.code}, TRUSTED)
        return Job(plan, sent, tests=encode(tests, TRUSTED))
    token = secrets.token_bytes(16)
    beside: dict[str, object] = {
        "role": "inline",
        "code": program.code,
        "setup": program.setup,
        "token": token,
    }
    beside |= {"tests": list(plan.tests), "canaries": list(plan.canaries), "harness": program.harness}
    return Job(plan, encode(beside, TRUSTED), token)


class UnfitForRpc(Exception):
    """The tests turned out to pass an object of their own, which cannot cross."""


def judge(job: Job, run: RawRun, tier: Tier, tests: RawRun | None = None) -> Execution:
    """The verdict on one run, and on that of its tests in rpc grading.

    Raises:
        UnfitForRpc: Another grading must be used. Only trusted tests can bring this about.
    """
    if tests and tests.how == wire.TIMED_OUT:
        run = replace(run, how=wire.TIMED_OUT)
    stories = [wire.records(one.data) for one in (run, tests) if one]
    for story in stories:
        first = next(story, None)
        if first is None or first.kind != "ready":
            cause = "the run could not be started" if first is None else f"no confinement: {first.value}"
            verdict: tuple[Outcome, int, str] = ("infra_error", 0, cause)
            break
    else:
        verdict = _outcome(job, run, *stories)
    outcome, passed, message = verdict
    return Execution(outcome, passed, job.plan.total, safe(message), run.seconds, grading_of(job), tier)


def grading_of(job: Job) -> Grading:
    """The name of a job's grading."""
    return "sealed" if isinstance(job.plan, Sealed) else "rpc" if isinstance(job.plan, Rpc) else "inline"


def _outcome(
    job: Job, run: RawRun, story: Iterator[Record], tests: Iterator[Record] | None = None
) -> tuple[Outcome, int, str]:
    start = next(story, None)
    if start is None or start.kind != "defined":
        if start is not None and start.kind == "refused":
            outcome, message = _claim(start.value, "error")
            return outcome, 0, message
        return _ended(run, 0, "while it was defined")
    if isinstance(job.plan, Sealed):
        tally = _sealed(job.plan, story)
    else:
        tally = _inline(job, tests if tests else story)
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
        if record.kind == "unfit" and isinstance(job.plan, Rpc):
            raise UnfitForRpc(record.value[1])
        if record.kind == "gone":
            break
        # One more failure may follow the tests, as the last word: a canary's, or that they never called it.
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
    if run.how == wire.STOPPED:
        return "error", passed, "it did not answer what it was asked"
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
