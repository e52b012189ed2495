"""Sealed grading: the candidate's process evaluates expressions, and never sees what their values should be.

Each assert is split (:mod:`coderl.sandbox.checks.seal`) into the expression that is sent and the comparison
that stays here. A ``check(candidate)`` that does nothing but assert is taken apart into its asserts.
"""

from __future__ import annotations

import ast
import marshal
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from coderl.sandbox.checks.base import Check, Tally, Unsuitable, parse, used_names, wrong_answer
from coderl.sandbox.checks.seal import seal
from coderl.sandbox.compare import holds
from coderl.sandbox.inside.codec import TRUSTED, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coderl.sandbox.compare import Comparison
    from coderl.sandbox.inside.wire import Record
    from coderl.sandbox.program import Program


class Sealed(Check):
    """The candidate's run answers each step with a value, which is compared here."""

    grading = "sealed"

    def __init__(self, program: Program) -> None:
        if program.setup.strip():
            raise Unsuitable("the setup is part of the tests")
        self.steps, self.total = sealed_steps(program.tests, program.test, program.entry_point)
        steps = [step.code for step in self.steps]
        payload = {"role": "sealed", "code": program.code, "steps": steps}
        self.payloads = (encode(payload, TRUSTED),)

    def count(self, candidate: Iterator[Record], tests: Iterator[Record] | None) -> Tally:
        """Compare each step's value; a test has passed when all of its steps ran and held."""
        tally = Tally()
        wrong: set[int] = set()
        reached = 0
        for step, record in zip(self.steps, candidate, strict=False):
            if record.kind == "end":
                break
            reached += 1
            if record.kind != "value" or not (
                step.comparison is None or holds(step.comparison, record.value)
            ):
                wrong.add(step.test)
                tally.fail(*wrong_answer(step.test, record))
        # A test counts only when none of its steps is left: the run may have ended in the middle of one.
        done = {step.test for step in self.steps[:reached]} - {step.test for step in self.steps[reached:]}
        tally.passed = len(done - wrong)
        tally.ended = reached == len(self.steps)
        return tally


@dataclass(frozen=True, slots=True)
class Step:
    """One statement (``comparison`` is None), or one expression whose value is compared.

    Attributes:
        test: Index of the test it belongs to.
        source: What the candidate's process runs.
        comparison: What its value must satisfy.
        code: The source as marshalled bytecode.
    """

    test: int
    source: str
    comparison: Comparison | None = None
    code: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Compiled once for all runs: lanes have the very interpreter that this process runs in.
        kind = "eval" if self.comparison else "exec"
        code = marshal.dumps(compile(self.source, "<test>", kind, dont_inherit=True))
        object.__setattr__(self, "code", code)


@lru_cache(maxsize=4096)
def sealed_steps(
    tests: tuple[str, ...], test: str = "", entry_point: str = ""
) -> tuple[tuple[Step, ...], int]:
    """The steps and the number of tests of assert lines, or of a ``check(candidate)`` of nothing but asserts.

    Raises:
        Unsuitable: They cannot be sealed; the message is the reason.
        UserError: A test is not Python.
    """
    before: list[str] = []
    bodies = [parse(source).body for source in tests]
    if not tests:
        before, bodies = _check_to_asserts(parse(test), entry_point)
    steps = [Step(0, source) for source in before]
    steps += [step for index, body in enumerate(bodies) for step in _steps_of_test(index, body)]
    return tuple(steps), len(bodies)


def _steps_of_test(index: int, body: Sequence[ast.stmt]) -> list[Step]:
    steps = []
    for node in body:
        if isinstance(node, ast.Assert):
            steps.append(Step(index, *seal(node.test)))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            steps.append(Step(index, ast.unparse(node)))
        else:
            raise Unsuitable(f"a test with a {type(node).__name__} statement")
    if not any(step.comparison for step in steps):
        raise Unsuitable("a test without an assert")
    return steps


def _check_to_asserts(tree: ast.Module, entry_point: str) -> tuple[list[str], list[list[ast.stmt]]]:
    """What goes before the asserts of a ``check``, and each of them as a test of its own."""
    if not tree.body:
        raise Unsuitable("there is no check")
    *others, check = tree.body
    if not (isinstance(check, ast.FunctionDef) and check.name == "check" and len(check.args.args) == 1):
        raise Unsuitable("there is no check that asserts, or more follows it")
    if not entry_point:
        raise Unsuitable("nothing says what check is given")
    used = used_names(check)
    for node in others:
        named = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)) or named & used:
            raise Unsuitable("check uses what its source defines")
    before = [ast.unparse(node) for node in others if isinstance(node, (ast.Import, ast.ImportFrom))]
    asserts = [[node] for node in check.body if not _has_no_effect(node)]
    if not asserts:
        raise Unsuitable("check asserts nothing")
    return [*before, f"{check.args.args[0].arg} = {entry_point}"], asserts


def _has_no_effect(node: ast.stmt) -> bool:
    """Whether it is a docstring, ``pass`` or ``assert True``."""
    value = node.test if isinstance(node, ast.Assert) else node.value if isinstance(node, ast.Expr) else None
    return isinstance(node, ast.Pass) or (isinstance(value, ast.Constant) and bool(value.value))
