"""Which grading a program's tests allow, and the steps the jailed side is sent.

Only the *trusted tests* are parsed here. The candidate is never parsed, compiled or run in this process.

Sealed grading splits each assert (:mod:`coderl.sandbox.checks.seal`); a ``check(candidate)`` that does
nothing but assert is taken apart into its asserts. In rpc grading the tests run as they are, in a process of
their own, where what they call of the candidate is a stub. What neither can carry runs inline, beside the
candidate.
"""

from __future__ import annotations

import ast
import builtins
import marshal
import sys
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.sandbox.checks.seal import Unsealable, redefined, seal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coderl.sandbox.compare import Check


@dataclass(frozen=True, slots=True)
class Step:
    """One statement (``check`` is None) or one expression whose value is compared.

    Attributes:
        test: Index of the test it belongs to.
        source: What the jailed side runs.
        check: What its value must satisfy.
        code: The same compiled, once for all runs; the jailed side has the very interpreter that this one is.
    """

    test: int
    source: str
    check: Check | None = None
    code: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kind = "eval" if self.check else "exec"
        code = marshal.dumps(compile(self.source, "<test>", kind, dont_inherit=True))
        object.__setattr__(self, "code", code)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed plan: the jailed side gets each step's source and nothing else."""

    steps: tuple[Step, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Rpc:
    """An rpc plan: the tests run in a process of their own.

    Attributes:
        tests: Source of each test.
        names: What they call of the candidate: each becomes a stub.
        values: What else they use of it, such as a function to hand on: looked up beforehand.
        modules: Modules of the standard library that they use without importing them.
        helpers: Source that runs before all, and sees nothing of the candidate.
        setup: Source that runs before the tests, with the stubs.
    """

    tests: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[str, ...]
    modules: tuple[str, ...]
    helpers: str
    setup: str

    @property
    def total(self) -> int:
        """Number of tests."""
        return len(self.tests)


@dataclass(frozen=True, slots=True)
class Inline:
    """An inline plan: tests run beside the candidate.

    Attributes:
        tests: Source of each test.
        canaries: Sources that an honest process fails: each must raise.
        reason: Why the tests allow nothing stronger; empty where inline was asked for.
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
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        shown = textwrap.shorten(source, 60)
        raise UserError(
            f"a test is not valid Python: {error} in {shown!r}: fix the problem's tests"
        ) from None


@lru_cache(maxsize=4096)
def sealed_plan(tests: tuple[str, ...], test: str = "", entry_point: str = "") -> Sealed:
    """The sealed plan of assert lines, or of a ``check(candidate)`` that is nothing but asserts.

    Raises:
        Unsealable: There is none; the message says why.
        UserError: A test is not Python.
    """
    before: list[str] = []
    bodies = [_parse(source).body for source in tests]
    if not tests:
        before, bodies = _apart(_parse(test), entry_point)
    steps = [Step(0, source) for source in before]
    steps += [step for index, body in enumerate(bodies) for step in _steps(index, body)]
    return Sealed(tuple(steps), len(bodies))


def _steps(index: int, body: Sequence[ast.stmt]) -> list[Step]:
    """The steps of one test."""
    steps = []
    for node in body:
        if isinstance(node, ast.Assert):
            steps.append(Step(index, *seal(node.test)))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            steps.append(Step(index, ast.unparse(node)))
        else:
            raise Unsealable(f"a test with a {type(node).__name__} statement")
    if not any(step.check for step in steps):
        raise Unsealable("a test without an assert")
    return steps


def _apart(tree: ast.Module, entry_point: str) -> tuple[list[str], list[list[ast.stmt]]]:
    """What goes before the asserts of a ``check``, and each of them as a test of its own."""
    if not tree.body:
        raise Unsealable("there is no check")
    *others, check = tree.body
    if not (isinstance(check, ast.FunctionDef) and check.name == "check" and len(check.args.args) == 1):
        raise Unsealable("there is no check that asserts, or more follows it")
    if not entry_point:
        raise Unsealable("nothing says what check is given")
    used = _used(check)
    for node in others:
        named = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)) or named & used:
            raise Unsealable("check uses what its source defines")
    before = [ast.unparse(node) for node in others if isinstance(node, (ast.Import, ast.ImportFrom))]
    asserts = [[node] for node in check.body if not _says_nothing(node)]
    if not asserts:
        raise Unsealable("check asserts nothing")
    return [*before, f"{check.args.args[0].arg} = {entry_point}"], asserts


def _says_nothing(node: ast.stmt) -> bool:
    """A docstring, ``pass`` or ``assert True``."""
    said = node.test if isinstance(node, ast.Assert) else node.value if isinstance(node, ast.Expr) else None
    return isinstance(node, ast.Pass) or (isinstance(said, ast.Constant) and bool(said.value))


@lru_cache(maxsize=4096)
def rpc_plan(program_tests: tuple[str, ...], setup: str, test: str, entry_point: str, helpers: str) -> Rpc:
    """The rpc plan of assert lines or of a ``check(candidate)``.

    Raises:
        Unsealable: There is none; the message says why.
        UserError: A test is not Python.
    """
    helpers = helpers if _is_python(helpers) else ""
    tests = program_tests or (f"{test}\ncheck({entry_point})" if entry_point else test,)
    setup = setup if program_tests else ""
    tree = _parse("\n".join([helpers, setup, *tests]))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    bound, imported = _bound(tree)
    used = _used(tree) - bound - _BUILTIN
    # A test may rely on a module that the candidate imports, or a later test.
    modules = (used - called | imported) & sys.stdlib_module_names
    names = used - modules
    if not names and not entry_point:  # what is asked for has a builtin's name
        names = {name for name in called & _BUILTIN - bound if redefined(name, calls)}
    if entry_point and not program_tests:
        names |= {entry_point}
    if reason := _neighbourly(tree, names):
        raise Unsealable(reason)
    if not names:
        raise Unsealable("the tests use nothing that is not their own")
    called = called & names | {entry_point} & names
    stubs, values, needed = (tuple(sorted(part)) for part in (called, names - called, modules))
    return Rpc(tests, stubs, values, needed, helpers, setup)


def _neighbourly(tree: ast.AST, names: set[str]) -> str:
    """Why tests must run in the candidate's own process: what they ask cannot be asked from another.

    Decided by the tests alone, so that no candidate can bring it about.
    """
    for node in ast.walk(tree):
        classes: list[ast.AST | None] = []
        if isinstance(node, ast.ExceptHandler):
            classes = [node.type]
        elif isinstance(node, ast.ClassDef):
            classes = [*node.bases]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            classes = [*node.args[1:]]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            classes = [node.value]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = {getattr(node, "module", ""), *(alias.name for alias in node.names)}
            if shared := modules & _SHARED:
                return f"the tests use {min(shared)}, which must be the candidate's"
        used = {inner.id for one in classes if one for inner in ast.walk(one) if isinstance(inner, ast.Name)}
        if of_candidate := used & names:
            return f"the tests need {min(of_candidate)} itself, not what it answers"
    return ""


_SHARED = frozenset(
    (
        *("asyncio", "inspect", "mock", "unittest.mock"),
        *("redirect_stdout", "redirect_stderr", "StringIO", "io", "gc"),
    )
)
"""Modules, and names from them, through which tests reach into the process they share with a candidate."""

_BUILTIN = frozenset(dir(builtins)) | {"__name__", "__file__"}


def _is_python(source: str) -> bool:
    try:
        _parse(source)
    except UserError:
        return False
    return True


def _used(tree: ast.AST) -> set[str]:
    """Names that are read anywhere in a source."""
    return {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def _bound(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Names that are given a value anywhere in a source, in whatever scope; and those that are modules'."""
    found, imported = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
            found.add(node.name or "")
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if not alias.asname}
    return found, imported


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
