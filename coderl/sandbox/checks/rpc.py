"""Rpc grading: the tests run as they are, in a process of their own, and call the candidate's from there.

It is exact for one kind of tests: loops and functions of the tests' own that call the program with plain
values and do nothing with an answer but compare it, or hand it to a function of their own. What they call of
the candidate is a stub (:mod:`coderl.sandbox.inside.rpc`); plain data comes back. Its process never sees a
test, and the process of the tests never sees the candidate's code.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coderl.sandbox.checks import names
from coderl.sandbox.checks.base import Check, Tally, Unsuitable, count_reports, parse, tried
from coderl.sandbox.checks.claims import statements
from coderl.sandbox.checks.inline import passes_inline
from coderl.sandbox.inside import wire
from coderl.sandbox.inside.codec import TRUSTED, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coderl.sandbox.checks.base import Shared
    from coderl.sandbox.inside.wire import Record
    from coderl.sandbox.lane import RawRun
    from coderl.sandbox.program import Program
    from coderl.types import Execution, Tier


class Rpc(Check):
    """The run of the tests reports each test; it holds no candidate, so that its records can be believed."""

    grading = "rpc"

    def __init__(self, program: Program, shared: Shared, plan: RpcPlan | None = None) -> None:
        plan = plan or shared.once((rpc_plan, program.trusted), lambda: _tried(program, shared))
        self.total = len(plan.tests)
        tests = {
            "role": "tests",
            "helpers": plan.helpers,
            "setup": plan.setup,
            "tests": list(plan.tests),
            "names": list(plan.names),
        }
        candidate = {"role": "candidate", "code": program.code, "given": program.helpers}
        self.payloads = (encode(candidate, TRUSTED), encode(tests, TRUSTED))

    def verdict(self, runs: Sequence[RawRun], tier: Tier) -> Execution:
        """The verdict on the candidate's run; it is out of time when the tests are."""
        candidate, tests = runs
        if tests.how == wire.TIMED_OUT:
            candidate = replace(candidate, how=wire.TIMED_OUT)
        return super().verdict((candidate, tests), tier)

    def count(self, candidate: Iterator[Record], tests: Iterator[Record] | None) -> Tally:
        """Count the reports of the tests' run."""
        assert tests is not None, "rpc grading runs the tests in a lane of their own"
        return count_reports(tests, self.total)


def _tried(program: Program, shared: Shared) -> RpcPlan:
    """The program's rpc plan, if a right program passes it that passes in plain Python."""
    plan = rpc_plan(*program.trusted)
    if program.reference:
        right = replace(program, code=program.reference)
        if tried(Rpc(right, shared, plan), shared) in ("failed", "error") and passes_inline(right, shared):
            raise Unsuitable("the row's own solution passes in plain Python and not so")
    return plan


@dataclass(frozen=True, slots=True)
class RpcPlan:
    """What the run of the tests needs.

    Attributes:
        tests: Source of each test.
        names: Functions of the program that they call; each becomes a stub.
        helpers: Source that runs before all, and sees nothing of the program.
        setup: Source that runs before the tests, with the stubs.
    """

    tests: tuple[str, ...]
    names: tuple[str, ...]
    helpers: str
    setup: str


def rpc_plan(
    program_tests: tuple[str, ...], setup: str, test: str, entry_point: str, helpers: str, reference: str
) -> RpcPlan:
    """The rpc plan of assert lines or of a ``check(candidate)``.

    Raises:
        Unsuitable: There is none; the message is the reason.
        BadTests: A test is not Python.
    """
    try:
        return _planned(program_tests, setup, test, entry_point, helpers)
    except RecursionError:
        raise Unsuitable("the tests are too deep to be looked through") from None


def _planned(
    program_tests: tuple[str, ...], setup: str, test: str, entry_point: str, helpers: str
) -> RpcPlan:
    tests = program_tests or (f"{test}\ncheck({entry_point})" if entry_point else test,)
    shown = statements(helpers)
    tree = ast.Module([*shown, *parse("\n".join([setup if program_tests else "", *tests])).body], [])
    bound = names.binds(tree.body)
    of_program = names.reads(tree) - bound - _PROVIDED
    if entry_point and not program_tests:
        of_program |= {entry_point}
    if len(of_program) != 1:
        raise Unsuitable("the tests use other than one function of the program")
    (function,) = of_program
    if function[:1].isupper():
        raise Unsuitable(f"{function} makes objects of the program's own")
    _Allowed(function, tree, shown).require()
    return RpcPlan(tests, (function,), helpers if shown else "", setup if program_tests else "")


_PROVIDED = names.BUILTINS | {"object", "print", "iter", "next", "hash", "id", "__name__"}
_MODULES = names.MODULES | {"random", "time"}
_STATEMENTS = (
    *(ast.Assert, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.For, ast.While, ast.If, ast.Pass),
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.Return, ast.Break, ast.Continue),
)
_GIVEN = (
    *(ast.Constant, ast.Name, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Starred, ast.UnaryOp, ast.BinOp),
    *(
        ast.Subscript,
        ast.Slice,
        ast.keyword,
        ast.Call,
        ast.Attribute,
        ast.operator,
        ast.unaryop,
        ast.expr_context,
    ),
)
_COPIES = frozenset(
    ("deepcopy", "copy", "list", "tuple", "set", "dict", "str", "int", "float", "len", "range")
)
_NUMERIC = frozenset(("abs", "round", "float", "fabs")) | names.CLOSENESS
_OF_ARRAYS = frozenset(("dtype", "shape", "ndim", "size", "all", "any"))
_NO_PLAIN_DATA = frozenset(
    ("bytearray", "namedtuple", "defaultdict", "array", "partial", "seed", "memoryview")
)


class _Allowed:
    """The kind of tests that mean the same wherever the program is.

    Args:
        program: The name of its function.
        tree: The tests, with what comes before them.
        shown: Of these, what the program has been shown, such as a prompt.
    """

    def __init__(self, program: str, tree: ast.Module, shown: Sequence[ast.stmt]) -> None:
        self.tree = tree
        self.shown = {id(one) for node in shown for one in ast.walk(node)}
        self.parents = {id(child): one for one in ast.walk(tree) for child in ast.iter_child_nodes(one)}
        self.functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        self.program = {program}
        check = self.functions.pop("check", None)
        if check and len(check.args.args) == 1:  # what it is given is the program's function
            self.program.add(check.args.args[0].arg)
        self.answers: set[str] = set()

    def require(self) -> None:
        """Raise unless the tests are of this kind.

        Raises:
            Unsuitable: They are not; the message says what is not.
        """
        mine = [one for one in ast.walk(self.tree) if id(one) not in self.shown]
        for one in mine:
            if isinstance(one, ast.stmt) and not isinstance(one, _STATEMENTS):
                raise Unsuitable(f"a {type(one).__name__.lower()} may look at the program itself")
            if isinstance(one, (ast.Import, ast.ImportFrom)):
                self._require_module(one)
            word = one.attr if isinstance(one, ast.Attribute) else one.id if isinstance(one, ast.Name) else ""
            if word in _NO_PLAIN_DATA:
                raise Unsuitable(f"{word} is no plain data")
        for function in self.functions.values():
            self._require_comparing(function)
            if names.reads(function) & self.program:
                raise Unsuitable(f"{function.name} is a function of the tests that calls the program")
        calls = [one for one in mine if isinstance(one, ast.Call) and self._is_program(one.func)]
        if not any(map(self._repeats, calls)):
            raise Unsuitable("the tests have no loop and no function of their own")
        for call in calls:
            self._require_plain(call)
            self._require_compared(call)
        if self.answers and len(calls) > 1:
            raise Unsuitable("an answer is kept while the program is called again")
        for one in mine:
            if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load):
                self._require_use(one)

    def _require_comparing(self, function: ast.FunctionDef) -> None:
        """Raise unless a function of the tests takes answers for plain data, whatever they are."""
        if id(function) in self.shown:
            return
        own = {one.arg for one in ast.walk(function) if isinstance(one, ast.arg)}
        own |= {
            one.id
            for one in ast.walk(function)
            if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
        }
        for one in ast.walk(function):
            asked = isinstance(one, (ast.Attribute, ast.Subscript)) and names.root(one) in own
            if asked and not (isinstance(one, ast.Attribute) and one.attr in _OF_ARRAYS):
                raise Unsuitable(f"{function.name} looks into what it is given")
            calls = isinstance(one, ast.Call) and isinstance(one.func, ast.Name)
            if calls and names.called(one) in own | {"next", "iter"}:
                raise Unsuitable(f"{function.name} calls what it is given")

    def _require_module(self, node: ast.Import | ast.ImportFrom) -> None:
        modules = (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
        )
        for module in modules:
            if module.partition(".")[0] not in _MODULES:
                raise Unsuitable(f"the tests use {module}, which must be the program's")

    def _is_program(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self.program

    def _repeats(self, node: ast.AST) -> bool:
        """Whether it stands in a loop, or is handed to a function of the tests."""
        while (parent := self.parents.get(id(node))) is not None:
            if isinstance(parent, (ast.For, ast.While, ast.comprehension, ast.GeneratorExp, ast.ListComp)):
                return True
            if isinstance(parent, ast.Call) and names.called(parent) in self.functions:
                return True
            node = parent
        return False

    def _require_plain(self, call: ast.Call) -> None:
        """Raise unless the program is given plain data that does not come from it."""
        for part in [*call.args, *call.keywords]:
            for one in ast.walk(part):
                if not isinstance(one, _GIVEN) or (
                    isinstance(one, ast.Call) and names.called(one) not in _COPIES
                ):
                    raise Unsuitable("what the program is given may not be plain data")
                if isinstance(one, ast.Name) and one.id in self.functions.keys() | self.program:
                    raise Unsuitable("the program is given a function or what it answered")

    def _require_compared(self, node: ast.expr) -> None:
        """Raise unless all that becomes of an answer is that it is compared or handed to a function."""
        parent = self.parents[id(node)]
        if isinstance(parent, ast.Starred):
            parent = self.parents[id(parent)]
        while isinstance(parent, (ast.BinOp, ast.UnaryOp, ast.BoolOp)):
            parent = self.parents[id(parent)]
        if isinstance(parent, ast.Compare):
            if any(isinstance(one, (ast.Is, ast.IsNot)) for one in parent.ops):
                raise Unsuitable("an answer is compared by identity")
            return
        if isinstance(parent, ast.Call) and names.called(parent) in self.functions.keys() | _NUMERIC:
            return
        if isinstance(parent, ast.Assert):
            return
        if (
            isinstance(parent, ast.Assign)
            and len(parent.targets) == 1
            and isinstance(parent.targets[0], ast.Name)
        ):
            self.answers.add(parent.targets[0].id)
            return
        raise Unsuitable("an answer is used otherwise than to compare it")

    def _require_use(self, name: ast.Name) -> None:
        """Raise unless a name that holds an answer, or the program, is used as they may be."""
        parent = self.parents[id(name)]
        if name.id in self.answers:
            self._require_compared(name)
            while isinstance(parent, ast.expr | ast.keyword):
                if isinstance(parent, ast.Call) and self._is_program(parent.func):
                    raise Unsuitable("the program is given what it answered")
                parent = self.parents[id(parent)]
        elif self._is_program(name):
            handed_to_check = isinstance(parent, ast.Call) and names.called(parent) == "check"
            if not (isinstance(parent, ast.Call) and parent.func is name) and not handed_to_check:
                raise Unsuitable(f"the tests need {name.id} itself, not what it answers")
