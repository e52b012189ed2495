"""How much tests catch: do they fail small changes of a problem's solution, and trivial programs?

What weak tests let through is rewarded like the right program, and a policy learns to write it.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coderl.problems.mutants import mutants
from coderl.problems.prompts import right_program, to_program
from coderl.review.look import asked_for
from coderl.sandbox.checks import names
from coderl.sandbox.checks.base import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.review.look import Finding
    from coderl.sandbox.program import Program, ProgramRunner
    from coderl.types import Problem

SLOWEST = 10.0
"""Times the solution's own seconds after which a changed solution counts as caught."""
LEAST_SECONDS = 0.5
"""Seconds that a changed solution has, however fast the solution is."""
_BODIES = {"return None": "None", "return the argument": "arguments[0] if arguments else None"}
"""What trivial functions return, by label."""


@dataclass(frozen=True, slots=True)
class Strength:
    """What the tests of a problem catch.

    Attributes:
        caught: Changed solutions that do not pass.
        survivors: Sources of the changed solutions that pass. Some are no worse than the solution: not every
            change makes a program wrong.
        trivial: Which trivial programs pass, by what they do, such as ``return None``.
    """

    caught: int
    survivors: tuple[str, ...]
    trivial: tuple[str, ...]

    @property
    def total(self) -> int:
        """Changed solutions that got a verdict."""
        return self.caught + len(self.survivors)

    @property
    def weak(self) -> bool:
        """Whether a trivial program passes, or most of the changed solutions."""
        return bool(self.trivial) or self.caught < len(self.survivors)


def measure(findings: Sequence[Finding], runner: ProgramRunner, count: int, seed: int = 0) -> list[Strength]:
    """Try changed solutions and trivial programs on the tests of problems whose solution passes.

    Args:
        findings: What the look found, with the verdicts on the solutions.
        runner: Runs the programs.
        count: Changed solutions for each problem, at most: short ones do not have so many.
        seed: Which ones, where there are more.

    Returns:
        In order, one for each finding; of problems without a solution that passes only ``trivial`` is told.
    """
    jobs: list[Program] = []
    labels: list[tuple[int, str]] = []  # the finding, and the trivial program's name; empty for a changed one
    for place, found in enumerate(findings):
        if found.fault:
            continue
        problem, took = found.problem, found.solution.seconds if found.solution else runner.timeout
        seconds = min(runner.timeout, max(LEAST_SECONDS, SLOWEST * took))
        right = right_program(problem.prompt, problem.solution)
        sources = list(trivial_programs(problem).items())
        if found.solution and found.solution.outcome == "passed":
            # What a prompt defines was given, and is not the solution's.
            given = problem.prompt.count("\n") + 1 if right.startswith(problem.prompt) else 0
            sources += [("", code) for code in mutants(right, count, seed, given)]
        labels += [(place, label) for label, _ in sources]
        jobs += [to_program(problem, code, timeout=seconds) for _, code in sources]
    passing: list[list[str]] = [[] for _ in findings]
    trivial: list[list[str]] = [[] for _ in findings]
    caught = [0] * len(findings)
    for (place, label), job, verdict in zip(labels, jobs, runner.run(jobs), strict=True):
        if verdict.outcome == "infra_error":
            continue
        if verdict.outcome == "passed":
            (trivial if label else passing)[place].append(label or job.code)
        elif not label:
            caught[place] += 1
    return [
        Strength(number, tuple(codes), tuple(named))
        for number, codes, named in zip(caught, passing, trivial, strict=True)
    ]


def trivial_programs(problem: Problem) -> dict[str, str]:
    """Programs that do not solve a problem, by what they do."""
    found = {"pass": "pass"}
    asked = asked_for(problem)
    if not asked:
        return found
    expected = _first_expected(problem)
    bodies = _BODIES | ({f"return {expected}": expected} if expected else {})
    for label, value in bodies.items():
        found[label] = "\n".join(f"def {name}(*arguments, **options):\n    return {value}" for name in asked)
    return found


def kind_of(label: str) -> str:
    """A trivial program's kind, by its label: constants are all of one kind."""
    return label if label in ("pass", *_BODIES) else "return the first expected value"


def _first_expected(problem: Problem) -> str:
    """The literal that the first assert compares with, as source; empty where there is none."""
    tests = [node for test in problem.tests or (problem.test,) for node in ast.walk(parse(test))]
    for node in tests:
        if not isinstance(node, ast.Assert):
            continue
        claim, sides = node.test, list[ast.expr]()
        if isinstance(claim, ast.Compare) and isinstance(claim.ops[0], ast.Eq):
            sides = [claim.comparators[0], claim.left]
        elif isinstance(claim, ast.Call) and names.called(claim) in names.CLOSENESS:
            sides = claim.args[1::-1]
        elif isinstance(claim, ast.Call):
            return "True"
        if literals := [side for side in sides if _is_literal(side)]:
            return ast.unparse(literals[0])
    return ""


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def change(right: str, changed: str, width: int = 70) -> str:
    """The first place where a changed program differs from the right one, as ``old -> new``.

    Args:
        right: Source of the right program.
        changed: Source of the changed one, as :func:`~coderl.problems.mutants.mutants` writes it.
        width: Characters of old and of new that are shown, around where they part.
    """
    before, after = ast.unparse(parse(right)).splitlines(), changed.splitlines()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            old, new = (" ".join(map(str.strip, part)) for part in (before[a:b], after[c:d]))
            parts = (at for at, (one, other) in enumerate(zip(old, new, strict=False)) if one != other)
            start = next(parts, min(len(old), len(new))) - width // 3
            old, new = (_part(text, start, width) for text in (old, new))
            return f"{old or '(nothing)'} -> {new or '(nothing)'}"
    return "no line differs"


def _part(text: str, start: int, width: int) -> str:
    """A part of a long text; dots stand for what is left out."""
    if len(text) <= width:
        return text
    start = max(0, start)
    return f"{'...' * (start > 0)}{text[start : start + width]}{'...' * (start + width < len(text))}"
