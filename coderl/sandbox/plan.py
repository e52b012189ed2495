"""Which grading a program's tests allow, and the steps the jailed side is sent.

Only the *trusted tests* are parsed here. The candidate is never parsed, compiled or run in this process.

Sealed grading splits each assert (:mod:`coderl.sandbox.seal`); a ``check(candidate)`` that does nothing but
assert is taken apart into its asserts. Everything else runs inline, beside the candidate.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.sandbox.seal import Unsealable, seal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.sandbox.compare import Check


@dataclass(frozen=True, slots=True)
class Program:
    """A candidate and the tests it must pass.

    Attributes:
        code: The candidate: untrusted source.
        tests: Assert lines (MBPP form); each is one test, passed if every statement in it holds.
        setup: Source run after the candidate and before the tests.
        test: Source that defines ``check(candidate)`` (HumanEval form), used where ``tests`` is empty.
        entry_point: Name of the function that ``check`` receives.
    """

    code: str
    tests: tuple[str, ...] = ()
    setup: str = ""
    test: str = ""
    entry_point: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One statement (``check`` is None) or one expression whose value is compared.

    Attributes:
        test: Index of the test it belongs to.
        source: What the jailed side runs.
        check: What its value must satisfy.
    """

    test: int
    source: str
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed plan: the jailed side gets each step's source and nothing else."""

    steps: tuple[Step, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Inline:
    """An inline plan: tests run beside the candidate.

    Attributes:
        tests: Source of each test.
        canaries: Sources that an honest process fails: each must raise.
        reason: Why the tests cannot be sealed.
    """

    tests: tuple[str, ...]
    canaries: tuple[str, ...]
    reason: str = ""

    @property
    def total(self) -> int:
        """Number of tests."""
        return len(self.tests)


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        shown = textwrap.shorten(source, 60)
        raise UserError(
            f"a test is not valid Python: {error} in {shown!r}: mend the problem's tests"
        ) from None


def _steps(index: int, source: str) -> list[Step]:
    steps = []
    for node in _parse(source).body:
        if isinstance(node, ast.Assert):
            steps.append(Step(index, *seal(node.test, source)))
        elif isinstance(node, (ast.Assign, ast.Import, ast.ImportFrom)):
            steps.append(Step(index, ast.get_source_segment(source, node) or ""))
        else:
            raise Unsealable(f"a test with a {type(node).__name__} statement")
    if not any(step.check for step in steps):
        raise Unsealable("a test without an assert")
    return steps


@lru_cache(maxsize=4096)
def sealed_plan(tests: tuple[str, ...], test: str = "", entry_point: str = "") -> Sealed:
    """The sealed plan of assert lines, or of a ``check(candidate)`` that is nothing but asserts.

    Raises:
        Unsealable: There is none; the message says why.
        UserError: A test is not Python.
    """
    lines = tests or tuple(_asserts(test, entry_point))
    steps = [step for index, source in enumerate(lines) for step in _steps(index, source)]
    return Sealed(tuple(steps), len(lines))


def _asserts(test: str, entry_point: str) -> Iterator[str]:
    """The asserts of a ``check`` as tests of their own; what stands before them goes with the first."""
    before = ""
    for node in _parse(test).body:
        if (
            isinstance(node, ast.FunctionDef)
            and node.name == "check"
            and len(node.args.args) == 1
            and entry_point
        ):
            before += f"{node.args.args[0].arg} = {entry_point}\n"
            for line in _body(node, test):
                yield before + line
                before = ""
        else:
            before += f"{ast.get_source_segment(test, node)}\n"
    if before:
        raise Unsealable("there is no check that asserts, or more follows it")


def _body(check: ast.FunctionDef, test: str) -> Iterator[str]:
    for node in check.body:
        said = (
            node.test if isinstance(node, ast.Assert) else node.value if isinstance(node, ast.Expr) else None
        )
        if isinstance(node, ast.Pass) or (isinstance(said, ast.Constant) and said.value):
            continue  # nothing is tested: a docstring, or "assert True"
        if not isinstance(node, ast.Assert):
            raise Unsealable(f"check does more than assert: a {type(node).__name__} statement")
        yield ast.get_source_segment(test, node) or ""


_NEVER = ("assert False", "assert 0 == 1", "assert not 1", "assert [1] == [2] and 'a' == 'b'")


@lru_cache(maxsize=4096)
def inline_plan(tests: tuple[str, ...], test: str = "", entry_point: str = "", reason: str = "") -> Inline:
    """The inline plan of assert lines or of a ``check(candidate)``, with its canaries.

    The canaries are asserts that are false whatever the candidate does: constants, the tests with each
    expected value replaced by a string made for the purpose, and ``check`` given a function that answers NaN
    or a bare object.
    """
    if tests:
        bait = next(filter(None, map(_bait, tests)), "")
        return Inline(tests, (*_NEVER, bait) if bait else _NEVER, reason)
    if not test.strip():
        return Inline((), (), reason)
    if not entry_point:
        return Inline((test,), tuple(filter(None, (*_NEVER, _bait(test)))), reason)
    call = f"\ncheck({entry_point})"
    wrong = [f"check(lambda *_, **__: {answer})" for answer in ("float('nan')", "object()")]
    bait = _bait(test) + call if _bait(test) else ""
    return Inline((test + call,), tuple(filter(None, (*_NEVER, *wrong, bait))), reason)


class _Baiting(ast.NodeTransformer):
    """Gives each equality that is asserted a right side that nothing honest equals."""

    found = False

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        said = node.test
        if isinstance(said, ast.Compare) and len(said.ops) == 1 and isinstance(said.ops[0], ast.Eq):
            said.comparators = [ast.Constant("no honest answer: 5f1d7c")]
            self.found = True
        return node


def _bait(source: str) -> str:
    """The tests with every asserted equality made false, or nothing where they assert none."""
    baiting = _Baiting()
    tree = baiting.visit(_parse(source))
    return ast.unparse(tree) if baiting.found else ""
