"""The look at a set of problems: what is wrong with their text, and whether their solutions pass."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.problems.prompts import is_python, right_program, to_program
from coderl.review.kept import KeptPasses, key_of
from coderl.sandbox.checks import names
from coderl.sandbox.checks.base import BadTests, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coderl.problems.prompts import PromptForm
    from coderl.sandbox.program import Program, ProgramRunner
    from coderl.types import Execution, Problem

AT_A_TIME = 512
"""Problems whose programs are run, and remembered, at a time."""
# Statements that cannot keep an error of theirs from ending the tests.
_PLAIN = (ast.Assert, ast.Assign, ast.Import, ast.ImportFrom, ast.Expr)
_NO_MODULE = re.compile(r"No module named '(\w+)'?")


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
        kept: Where problems that are known to be right are remembered. None: all are run.
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
    findings = [Finding(problem, text_fault(problem, form)) for problem in problems]
    jobs = {at: _programs(found.problem) for at, found in enumerate(findings) if not found.fault}
    keys = {at: key_of(programs.values(), runner.identity) for at, programs in jobs.items()}
    if kept is not None and runner.identity:
        known = kept.known(list(keys.values()))
        jobs = {at: programs for at, programs in jobs.items() if keys[at] not in known}
    places = [(at, name) for at, programs in jobs.items() for name in programs]
    verdicts = dict(zip(places, _verdicts(problems, jobs, runner), strict=True))
    for (at, name), verdict in verdicts.items():
        if name == "solution":
            findings[at] = Finding(problems[at], solution_fault(verdict, runner.timeout), verdict)
        elif verdict.outcome == "passed":
            fault = "its tests check nothing: a program passes that only raises an error"
            findings[at] = replace(findings[at], fault=fault)
    if kept is not None and runner.identity:
        lost = {at for (at, _), verdict in verdicts.items() if verdict.outcome == "infra_error"}
        kept.add(keys[at] for at in jobs if at not in lost and not findings[at].fault)
    return findings


def _programs(problem: Problem) -> dict[str, Program]:
    """What is run for a problem: its solution, and a program that has all names and only raises.

    The second is spared where there is a solution, and each assert stands by itself: no error can be lost.
    """
    found = {}
    if right := right_program(problem.prompt, problem.solution):
        found["solution"] = to_program(problem, right)
    tests = [one for test in problem.tests or (problem.test,) for one in parse(test).body]
    if not found or not all(isinstance(one, _PLAIN) for one in tests):
        code = "class Nothing(Exception): pass\n" + "".join(
            f"def {name}(*arguments, **options): raise Nothing\n" for name in asked_for(problem)
        )
        found["raising"] = to_program(problem, code)
    return found


def _verdicts(
    problems: Sequence[Problem], jobs: dict[int, dict[str, Program]], runner: ProgramRunner
) -> list[Execution]:
    """The verdicts on all programs; one that was too slow beside the others is run once more."""
    programs = [one for some in jobs.values() for one in some.values()]
    try:
        verdicts = list(runner.run(programs))
    except UserError:
        # The error is about one of them, and does not say which.
        for at, some in jobs.items():
            try:
                runner.run(list(some.values()))
            except UserError as error:
                raise UserError(f"{problems[at].where or problems[at].id}: {error}") from None
        raise
    slow = [at for at, verdict in enumerate(verdicts) if verdict.outcome in ("timeout", "infra_error")]
    for at, verdict in zip(slow, runner.run([programs[at] for at in slow]) if slow else (), strict=True):
        verdicts[at] = verdict
    return verdicts


def text_fault(problem: Problem, form: PromptForm = "completion") -> str:
    """What is wrong with a problem's text; empty where nothing is."""
    try:
        setup = parse(problem.setup).body
    except BadTests as error:
        return f"its set-up code or imports are not Python: {str(error).partition(': ')[2]}"
    try:
        tests = [one for test in problem.tests or (problem.test,) for one in parse(test).body]
    except BadTests as error:
        return str(error)
    if problem.entry_point and not problem.tests and "check" not in names.binds(tests):
        return "its test does not define check(candidate): define it, with asserts about the candidate"
    if not _asserts([*setup, *tests], set(asked_for(problem))):
        return "its tests check nothing: write asserts about what the program gives"
    if form == "completion" and not any(
        map(is_python, (problem.prompt, problem.prompt + "\n    pass", problem.prompt + problem.solution))
    ):
        return (
            "its prompt is not Python, so no program that continues it is: put the words into a docstring, "
            "or ask in chat form"
        )
    return ""


def _asserts(body: Sequence[ast.stmt], program: set[str]) -> bool:
    """Whether tests may fail for what a program answers: by an assert, or by something that they call."""
    nodes = [node for one in body for node in ast.walk(one)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)} | {"check", "candidate"}
    for node in nodes:
        if isinstance(node, ast.Assert) and not isinstance(node.test, (ast.Constant, ast.Tuple)):
            return True
        if isinstance(node, ast.Raise):
            return True
        if isinstance(node, ast.Call) and names.called(node) not in program | own | names.BUILTINS | {
            "print"
        }:
            return True
    return False


def asked_for(problem: Problem) -> list[str]:
    """The names of the program that the tests of a problem use."""
    if problem.entry_point:
        return [problem.entry_point] if problem.entry_point.isidentifier() else []
    tests = [one for text in (problem.setup, *problem.tests) for one in parse(text).body]
    given = names.binds(tests) | names.BUILTINS | names.WELL_KNOWN.keys() | {"print", "__name__"}
    right = right_program(problem.prompt, problem.solution)
    defined = names.binds(parse(right).body) if is_python(right) else set()
    return sorted(name for name in names.reads(tests) if name in defined or name not in given)


def solution_fault(verdict: Execution, timeout: float) -> str:
    """Why a problem whose own solution has this verdict cannot be used; empty where it can."""
    if verdict.outcome in ("passed", "infra_error"):
        return ""
    missing = _NO_MODULE.search(verdict.message)
    if missing and missing[1] != "numpy":
        return (
            f"it needs the package {missing[1]}, and programs may import the standard library and numpy: "
            "write it without, or leave it out"
        )
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
