"""Rpc grading: the tests run as they are, in a process of their own, and call the candidate's from there.

What the tests call of the candidate is a stub (:mod:`coderl.sandbox.inside.rpc`); plain data comes back. The
candidate's process never sees a test, and the process of the tests never sees the candidate's code.
"""

from __future__ import annotations

import ast
import builtins
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from coderl.errors import UserError
from coderl.sandbox.checks.base import Check, Tally, Unsuitable, count_reports, parse, used_names
from coderl.sandbox.checks.seal import redefined
from coderl.sandbox.inside import wire
from coderl.sandbox.inside.codec import TRUSTED, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coderl.sandbox.inside.wire import Record
    from coderl.sandbox.lane import RawRun
    from coderl.sandbox.program import Program
    from coderl.types import Execution, Tier


class Rpc(Check):
    """The run of the tests reports each test; it holds no candidate, so that its records can be believed."""

    grading = "rpc"

    def __init__(self, program: Program) -> None:
        plan = rpc_plan(program.tests, program.setup, program.test, program.entry_point, program.helpers)
        self.total = len(plan.tests)
        tests = {
            "role": "tests",
            "helpers": plan.helpers,
            "setup": plan.setup,
            "tests": list(plan.tests),
            "names": list(plan.names),
            "values": list(plan.values),
            "modules": list(plan.modules),
        }
        candidate = {"role": "candidate", "code": program.code}
        self.payloads = (encode(candidate, TRUSTED), encode(tests, TRUSTED))

    def verdict(self, runs: Sequence[RawRun], tier: Tier) -> Execution:
        """The verdict on the candidate's run; it is out of time when the tests are."""
        candidate, tests = runs
        if tests.how == wire.TIMED_OUT:
            candidate = replace(candidate, how=wire.TIMED_OUT)
        return super().verdict((candidate, tests), tier)

    def count(self, candidate: Iterator[Record], tests: Iterator[Record] | None) -> Tally:
        """Count the reports of the tests' run.

        Raises:
            Unsuitable: The tests pass an object of their own, which cannot cross.
        """
        assert tests is not None, "rpc grading runs the tests in a lane of their own"
        return count_reports(_suitable(tests), self.total)


def _suitable(tests: Iterator[Record]) -> Iterator[Record]:
    for record in tests:
        if record.kind == "unfit":
            raise Unsuitable(record.value[1])
        yield record


@dataclass(frozen=True, slots=True)
class RpcPlan:
    """What the run of the tests needs.

    Attributes:
        tests: Source of each test.
        names: Names of the candidate that they call: each becomes a stub.
        values: Other names of it that they use, such as a function to hand on: looked up beforehand.
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


@lru_cache(maxsize=4096)
def rpc_plan(
    program_tests: tuple[str, ...], setup: str, test: str, entry_point: str, helpers: str
) -> RpcPlan:
    """The rpc plan of assert lines or of a ``check(candidate)``.

    Raises:
        Unsuitable: There is none; the message is the reason.
        UserError: A test is not Python.
    """
    helpers = helpers if _is_python(helpers) else ""
    tests = program_tests or (f"{test}\ncheck({entry_point})" if entry_point else test,)
    setup = setup if program_tests else ""
    tree = parse("\n".join([helpers, setup, *tests]))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    bound, imported = _bound(tree)
    used = used_names(tree) - bound - _BUILTIN
    # A test may rely on a module that the candidate imports, or a later test.
    modules = (used - called | imported) & sys.stdlib_module_names
    names = used - modules
    if not names and not entry_point:  # what is asked for has a builtin's name
        names = {name for name in called & _BUILTIN - bound if redefined(name, calls)}
    if entry_point and not program_tests:
        names |= {entry_point}
    if reason := _needs_candidate_process(tree, names):
        raise Unsuitable(reason)
    if not names:
        raise Unsuitable("the tests use nothing that is not their own")
    called = called & names | {entry_point} & names
    stubs, values, needed = (tuple(sorted(part)) for part in (called, names - called, modules))
    return RpcPlan(tests, stubs, values, needed, helpers, setup)


def _needs_candidate_process(tree: ast.AST, names: set[str]) -> str:
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
        parse(source)
    except UserError:
        return False
    return True


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
