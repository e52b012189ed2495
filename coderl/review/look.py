"""The look at a set of problems: what is wrong with their text, and whether their solutions pass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.problems.prompts import is_python, right_program, to_program
from coderl.review.kept import KeptPasses, key_of
from coderl.sandbox.checks import names
from coderl.sandbox.checks.base import BadTests, parse
from coderl.sandbox.checks.claims import asks_nothing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coderl.problems.prompts import PromptForm
    from coderl.sandbox.program import Program, ProgramRunner
    from coderl.types import Execution, Problem

AT_A_TIME = 512
"""Solutions that are run, and kept on disk, at a time."""
_NO_MODULE = re.compile(r"No module named '([^'.]+)")


@dataclass(frozen=True, slots=True)
class Finding:
    """What is known of a problem after the look.

    Attributes:
        problem: The problem.
        fault: Why it cannot be used; empty where it can.
        solution: The verdict on its own solution; None where it has none or its text is at fault, and where
            it is known to pass from an earlier look.
    """

    problem: Problem
    fault: str = ""
    solution: Execution | None = None

    @property
    def where(self) -> str:
        """Its ``file:line``, else its id."""
        return self.problem.where or self.problem.id


def look(
    problems: Sequence[Problem],
    runner: ProgramRunner,
    form: PromptForm = "completion",
    kept: KeptPasses | None = None,
    progress: str | None = None,
) -> list[Finding]:
    """Look at problems: their tests must be Python and check something, their own solution must pass.

    Args:
        problems: What to look at.
        runner: Runs the solutions.
        form: How problems are asked; a completion continues its prompt, which then has to be Python.
        kept: Where solutions that pass are remembered. None: all are run.
        progress: Label of a progress bar, on a terminal. None shows none.

    Returns:
        A finding for each problem, in order.

    Raises:
        UserError: A way to grade was asked for that the tests of a problem do not allow.
    """
    from tqdm.auto import tqdm

    found: list[Finding] = []
    bar = tqdm(
        total=len(problems), desc=progress, unit="problem", leave=False, disable=None if progress else True
    )
    with bar:
        for at in range(0, len(problems), AT_A_TIME):
            found += _look(problems[at : at + AT_A_TIME], runner, form, kept)
            bar.update(len(found) - bar.n)
    return found


def _look(
    problems: Sequence[Problem], runner: ProgramRunner, form: PromptForm, kept: KeptPasses | None
) -> list[Finding]:
    findings = {problem.id: Finding(problem, text_fault(problem, form)) for problem in problems}
    jobs = {
        problem.id: to_program(problem, right)
        for problem in problems
        if not findings[problem.id].fault and (right := right_program(problem.prompt, problem.solution))
    }
    keys = {name: key_of(job, runner.identity) for name, job in jobs.items()}
    keeps = kept if runner.identity else None
    known = keeps.known(list(keys.values())) if keeps else set()
    rest = {name: job for name, job in jobs.items() if keys[name] not in known}
    for name, verdict in zip(rest, _verdicts(rest, findings, runner), strict=True):
        fault = solution_fault(verdict, runner.timeout)
        findings[name] = Finding(findings[name].problem, fault, verdict)
    if keeps:
        passed = [one for one in findings.values() if one.solution and one.solution.outcome == "passed"]
        keeps.add(keys[one.problem.id] for one in passed)
    return list(findings.values())


def _verdicts(
    jobs: dict[str, Program], findings: dict[str, Finding], runner: ProgramRunner
) -> list[Execution]:
    """The verdicts on solutions; one that was too slow beside the others is run once more."""
    try:
        verdicts = dict(zip(jobs, runner.run(list(jobs.values())), strict=True))
    except UserError:
        # The error is about one of them, and does not say which.
        for name, job in jobs.items():
            try:
                runner.run([job])
            except UserError as error:
                raise UserError(f"{findings[name].where}: {error}") from None
        raise
    slow = [name for name, verdict in verdicts.items() if verdict.outcome in ("timeout", "infra_error")]
    verdicts |= zip(slow, runner.run([jobs[name] for name in slow]), strict=True)
    return list(verdicts.values())


def text_fault(problem: Problem, form: PromptForm = "completion") -> str:
    """What is wrong with a problem's text; empty where nothing is."""
    tests = problem.tests or (problem.test,)
    try:
        parse(problem.setup)
        bodies = [parse(test).body for test in tests]
    except BadTests as error:
        return str(error)
    if problem.entry_point and not problem.tests and "check" not in names.binds(bodies[0]):
        return "its test does not define check(candidate): define it, with asserts about the candidate"
    if all(map(asks_nothing, bodies)):
        return "its tests check nothing: give it an assert that calls the program"
    if form == "completion" and not any(
        map(is_python, (problem.prompt, problem.prompt + "\n    pass", problem.prompt + problem.solution))
    ):
        return (
            "its prompt is not Python, so no program that continues it is: put the words into a docstring, "
            "or ask in chat form"
        )
    return ""


def solution_fault(verdict: Execution, timeout: float) -> str:
    """Why a problem whose own solution has this verdict cannot be used; empty where it can."""
    if verdict.outcome in ("passed", "infra_error"):
        return ""
    if missing := _NO_MODULE.search(verdict.message):
        return f"it needs the package {missing[1]}: programs may import the standard library and numpy"
    if verdict.outcome == "timeout":
        return (
            f"its own solution takes more than {timeout:g} s: raise the time limit, or make the tests smaller"
        )
    message = f" ({verdict.message})" if verdict.message else ""
    return f"its own solution does not pass, {verdict.outcome}{message}: mend the solution or the tests"


def summary_lines(findings: Iterable[Finding], limit: int = 10) -> list[str]:
    """The faults as lines, with the places of each; what several problems share is said once.

    Args:
        findings: What was found; problems without fault are passed over.
        limit: Lines, at most; a last one says how many more there are.
    """
    places: dict[str, list[str]] = {}
    for one in findings:
        if one.fault:
            places.setdefault(one.fault, []).append(one.where)
    lines = [
        f"{', '.join(where[:3])}{f' and {len(where) - 3} more' if len(where) > 3 else ''}: {fault}"
        for fault, where in places.items()
    ]
    if len(lines) > limit:
        lines[limit:] = [f"and {len(lines) - limit} further faults: `coderl check FILE` lists them"]
    return lines
