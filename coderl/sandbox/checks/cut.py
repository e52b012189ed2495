"""Cuts the text of tests in two: what runs beside the candidate, and what never comes near it.

The candidate's process runs the tests' own statements, in order, so that objects, aliases, decorators, seeds
and files mean what they mean in plain Python. Only an assert is taken apart. Of ``assert f(xs) ==
sorted(ys)`` the *open* side ``f(xs)`` is evaluated there and its value sent out; the *closed* side
``sorted(ys)``, which is built from nothing that the candidate has had in its hands, is evaluated in a
process that has no candidate, once for all programs, and compared with the value outside. An assert that has
no closed side, or whose open side is a truth that the candidate's process would have to tell, is *believed*:
it runs as it stands.

So the text becomes two programs. The inner one calls

    ``__send__(value, how)``      the value of an open side (``how``: see :data:`Sent`)
    ``__done__(test)``            a test has come to its end
    ``__fail__(test, error)``     it has not
    ``__inputs__(loop)``          what a loop goes through, where the closed program has worked that out
    ``__given__(place)``          what the program is given there, likewise

and the outer one

    ``__expect__(assert, closed, names)``  the closed side, as functions that give it and the values of its
    names ``__judge__(assert, judge, names)``    a function of answers whose truth is asserted
    ``__classes__(classes)``               the closed side of ``isinstance``
    ``__alone__(value)``                   that of ``is``
    ``__hand__(*values)``                  values that the candidate gets into its hands here
    ``__loop__(loop, iterable)``           what a loop goes through
    ``__fed__(loop, *values)``             the part of it that the inner program needs
    ``__give__(place, value)``             what the program is given.
"""

from __future__ import annotations

import ast
import copy
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coderl.sandbox.checks import names
from coderl.sandbox.checks.base import Unsuitable, parse
from coderl.sandbox.checks.claims import Claim, Expressions, is_idle, statements, walk
from coderl.sandbox.checks.names import binds, called, changes, reads
from coderl.sandbox.checks.needless import Needless, leaves


@dataclass(frozen=True, slots=True)
class Cut:
    """Trusted text, cut.

    Attributes:
        setup: The inner program's part that runs before the tests.
        tests: Its parts for each test, or one for a ``check`` with all its tests.
        total: Number of tests.
        outer: The outer program.
        claims: By the place of their assert; both programs meet them in the same order.
        order: The places of each test's claims.
        steady: Whether nothing repeats or skips one; otherwise the outer program tells.
        believed: Why an assert is believed, for each that is.
    """

    setup: str
    tests: tuple[str, ...]
    total: int
    outer: str
    claims: dict[str, Claim]
    order: tuple[tuple[str, ...], ...]
    steady: bool
    believed: tuple[str, ...]


_OURS = frozenset(
    (
        *("__send__", "__done__", "__fail__", "__inputs__", "__given__", "__expect__", "__judge__"),
        *("__hand__", "__classes__", "__alone__", "__loop__", "__fed__", "__give__"),
    )
)


class _Leaves(Exception):
    """A loop or function may be left where the candidate decides it, so its asserts cannot be counted."""


class _Gives(Exception):
    """A loop's inputs must be sent one by one."""


class _Program(Exception):
    """Names that must be the program's, since an assert would have no open side otherwise."""

    def __init__(self, found: set[str]) -> None:
        self.names = frozenset(found)


def cut(
    tests: tuple[str, ...],
    setup: str = "",
    test: str = "",
    entry_point: str = "",
    helpers: str = "",
    reference: str = "",
    spoiled: frozenset[str] = frozenset(),
) -> Cut:
    """The text of tests in two parts.

    Args:
        tests: Tests as statements, in order; or none, and ``test`` with ``entry_point``.
        setup: Statements before them.
        test: Source of ``check(candidate)``.
        entry_point: Name of the function that ``check`` receives.
        helpers: Trusted source of functions that the tests use and the program has as well, such as a prompt.
        reference: A right program. What it defines is the program's; what it reads, programs must find.
        spoiled: Places of asserts whose closed sides turned out not to be closed.

    Raises:
        BadTests: The text is not Python.
        Unsuitable: It uses a name that the inner or the outer program has.
    """
    right, shown = statements(reference), statements(helpers)
    own = frozenset(binds(right) - {name for node in right for name in _imports(node)} - binds(shown))
    own |= {entry_point} if entry_point and not tests else set()
    kept = frozenset(one.id for one in walk(right) if isinstance(one, ast.Name))
    text = [node for source in (tests or (test,)) for node in parse(source).body]
    if _OURS & ({one.id for one in walk(text) if isinstance(one, ast.Name)}):
        raise Unsuitable("the tests use a name of the runner's")
    while True:
        cutter = _Cutter(own, kept, spoiled, shown, text, right)
        try:
            return cutter.tests(tests, setup) if tests else cutter.check(test, entry_point)
        except _Program as found:
            own |= found.names


class _Cutter(Expressions):
    """One pass over the text."""

    def __init__(
        self,
        own: frozenset[str],
        kept: frozenset[str],
        spoiled: frozenset[str],
        helpers: list[ast.stmt],
        text: list[ast.stmt],
        right: list[ast.stmt],
    ) -> None:
        super().__init__(own, text, right, binds(helpers) - own)
        self.text = text
        self.has_reference = bool(right)
        self.kept = kept
        self.spoiled = spoiled
        self.helpers = helpers
        self.claims: dict[str, Claim] = {}
        self.order: list[list[str]] = [[]]
        self.steady_order = True
        self.believed: list[str] = []
        self.modules |= {name for node in helpers for name in _imports(node)}
        self.asserting: set[str] = set()  # functions of the tests that assert
        self.once: set[str] = set()  # names of what can be gone through once
        self.fed: set[str] = set()  # names that only the outer program needs, to go through a loop
        self._unit = 0
        self._loops = 0
        self._giving = False  # whether what is closed in an open side is sent by itself
        self._in_check = False

    # The two forms of tests

    def tests(self, tests: Sequence[str], setup: str) -> Cut:
        """Tests as statements: each source is one test."""
        before, outer = [], []
        for node in parse(setup).body:
            mine, theirs = self.unasserted(node) if _asserts(node) else self.statement(node)
            before += mine
            outer += theirs
        inner = []
        for number, source in enumerate(tests):
            self._unit = number
            self.order += [[]] if number else []
            mine, theirs = self.block(parse(source).body)
            inner.append([*mine, _call("__done__", ast.Constant(number))])
            outer += theirs
        return self._cut(before, inner, outer, len(tests))

    def check(self, source: str, entry_point: str) -> Cut:
        """A ``check(candidate)``: each statement of its body that asserts is a test of its own."""
        body = parse(source).body
        index = next((at for at, node in enumerate(body) if _is_check(node)), None)
        calls_itself = any(isinstance(one, ast.Name) and one.id == "check" for one in walk(body))
        if index is None or not entry_point or calls_itself:
            return self.tests([source + (f"\ncheck({entry_point})" if entry_point else "")], "")
        check = body[index]
        assert isinstance(check, ast.FunctionDef)
        before = self.block(body[:index])
        outside, self.names = self.names, self.names.copy()
        self.names.bind({check.args.args[0].arg}, "open")
        inner, outer, total = self._body(check)
        self.names = outside
        after = self.block(body[index + 1 :])
        calls = [parse(f"check({argument})").body[0] for argument in (entry_point, None)]
        return self._cut(
            [],
            [[*before[0], _function(check, inner), *after[0], calls[0]]],
            [*before[1], _function(check, outer), *after[1], calls[1]],
            total,
        )

    def _body(self, check: ast.FunctionDef) -> tuple[list[ast.stmt], list[ast.stmt], int]:
        """The body of ``check``. One that may be left early is a single test, which is believed."""
        names, start, self._in_check = self.names.copy(), len(self.believed), True
        inner: list[ast.stmt] = []
        outer: list[ast.stmt] = []
        total = 0
        try:
            for node in check.body:
                if _asserts(node) and not is_idle(node):
                    self.order += [[]] if total else []
                    mine, theirs = self.block([node])
                    inner.append(_guarded(mine, total))
                    total += 1
                elif not is_idle(node):
                    mine, theirs = self.block([node])
                    inner += mine
                else:
                    continue
                outer += theirs
        except _Leaves:
            self.names, self.claims, self.order, total = names, {}, [[]], 0
            del self.believed[start:]
            inner, outer = self.unasserted(*check.body, leaves=False)
        finally:
            self._in_check = False
        if not total:
            inner = [*inner, _call("__done__", ast.Constant(0))]
        return inner, outer, total or 1

    def _cut(
        self, setup: list[ast.stmt], tests: list[list[ast.stmt]], outer: list[ast.stmt], total: int
    ) -> Cut:
        every = [node for part in (setup, *tests) for node in part]
        # A program may read what the setup binds, and constants, whoever else does.
        given = {name for node in setup for name in binds(node)}
        given |= {node.name for node in walk(every) if isinstance(node, ast.ClassDef)}
        if not self.has_reference:
            given |= {name for node in every for name in binds(node) if name.isupper()}
        probes = names.WELL_KNOWN.keys() - {name for node in walk(every) for name in binds(node)}
        needless = Needless(
            self.claims.values(), every, outer, self.fed, self.kept | self.modules | given, probes
        )
        imports = [_import(name) for name in sorted(reads(outer) & names.WELL_KNOWN.keys() - self.own)]
        needed = bool(reads(outer) & binds(self.helpers))
        return Cut(
            setup=_source(needless.dropped(setup)),
            tests=tuple(_source(needless.dropped(test)) for test in tests),
            total=total,
            outer=_source([*imports, *(self.helpers if needed else []), *outer]),
            claims=self.claims,
            order=tuple(map(tuple, self.order)),
            steady=self.steady_order,
            believed=tuple(self.believed),
        )

    # Statements

    def block(self, body: Iterable[ast.stmt]) -> _Parts:
        """Statements in order, as parts of the inner and the outer program."""
        inner: list[ast.stmt] = []
        outer: list[ast.stmt] = []
        for node in body:
            mine, theirs = self.statement(node)
            inner += mine
            outer += theirs
        return inner, outer

    def statement(self, node: ast.stmt) -> _Parts:
        """One statement."""
        if isinstance(node, ast.Assert):
            return self.asserted(node.test)
        if isinstance(node, ast.Expr) and called(node.value) in names.RAISING and self.is_known(node.value):
            return self.asserted(node.value)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return self.imported(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return self.defined(node)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Delete)):
            return self.simple(node)
        if isinstance(node, (ast.For, ast.While, ast.If)) and not self.is_open(_head(node)):
            return self.repeated(node)
        if isinstance(node, ast.With) and all(map(self._is_steady, node.items)):
            return self.managed(node)
        if isinstance(node, (ast.Break, ast.Continue)) and self._loops:
            return [node], [node]
        return ([node], []) if isinstance(node, ast.Pass) else self.unasserted(node)

    def simple(self, node: ast.stmt) -> _Parts:
        """A statement without parts that are statements."""
        value = getattr(node, "value", None)
        if isinstance(node, ast.Expr) and isinstance(value, ast.Constant):
            return [], []  # a docstring could give answers away
        if not self.is_open(node):
            self.names.bind(binds(node), "closed")
            if called(value or node) in _ITERATORS or isinstance(value, ast.GeneratorExp):
                self.once |= binds(node)
            return [node], [node]
        if any(called(one).startswith("assert") for one in ast.walk(node)) or reads(node) & self.asserting:
            self._believe(node, "it calls a function that asserts")
        mine, handed = self._with_given(node) if self._giving else (node, self.handed([node], whole=True))
        changed = changes(node) & self.names.closed - self.modules - self.functions.keys()
        self.names.bind(changed, "open", "weak")
        held: list[Literal["open", "weak", "objects"]] = ["open"]
        held += ["weak"] if value is None or not self.is_strong(value) else []
        held += ["objects"] if value is not None and self.is_object(value) else []
        self.names.bind(binds(node), *held)
        return [mine], handed

    def imported(self, node: ast.Import | ast.ImportFrom) -> _Parts:
        """An import: of a module that means the same everywhere, or of one that has a state."""
        taken = {one.name for one in node.names}
        modules = {node.module or ""} if isinstance(node, ast.ImportFrom) else taken
        self.modules |= _imports(node)
        for one in node.names:
            whole = f"{node.module}.{one.name}" if isinstance(node, ast.ImportFrom) else one.name
            shown = one.asname or (
                one.name if isinstance(node, ast.ImportFrom) else one.name.partition(".")[0]
            )
            self.aliases[shown] = whole if one.asname or isinstance(node, ast.ImportFrom) else shown
        if all(name.partition(".")[0] in names.MODULES and "random" not in name for name in modules) and not (
            isinstance(node, ast.ImportFrom) and taken & (names.UNSTEADY | {"*"})
        ):
            self.names.bind(binds(node), "closed")
            return [node], [node]
        self.names.bind(binds(node), "open")
        return [node], []

    def defined(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> _Parts:
        """A function or class of the tests' own."""
        self.functions[node.name] = reads(node) - {node.name}
        outer_names = {
            name
            for one in ast.walk(node)
            if isinstance(one, (ast.Global, ast.Nonlocal))
            for name in one.names
        }
        if outer_names:
            self.names.bind(outer_names | {node.name}, "open", "weak")
            self.asserting |= {node.name} if _asserts(node) else set()
            return [node], self.handed([node])
        if changes(ast.If(ast.Constant(True), node.body, [])) & self.functions[node.name] - self.modules:
            self.stateful.add(node.name)
        if _asserts(node) or self.functions[node.name] & self.asserting:
            self.asserting.add(node.name)
        unknown = self.functions[node.name] & (self.asserting - {node.name})
        self.names.bind({node.name}, "closed")  # it may call itself
        if not self.is_open(node) and not unknown & self.names.open:
            return [node], [node]
        handed = self.handed([node])
        self.names.bind({node.name}, "open")
        return [node], handed

    def managed(self, node: ast.With) -> _Parts:
        """A ``with`` that swallows no error: its body runs once, as if it stood alone."""
        handed = self.handed(item.context_expr for item in node.items)
        for item in node.items:
            self.names.bind(binds(item.optional_vars or ast.Pass()), "open")
        inner, outer = self.block(node.body)
        return [ast.With(node.items, inner or [ast.Pass()])], [*handed, *outer]

    def _is_steady(self, item: ast.withitem) -> bool:
        """Whether a context manager is one of those that let errors through."""
        name = called(item.context_expr)
        return name in names.STEADY_MANAGERS and self.is_known(item.context_expr)

    def repeated(self, node: ast.For | ast.While | ast.If) -> _Parts:
        """A loop or a choice that the candidate has no say in: both programs go through it alike."""
        if not _asserts(node):
            own = binds(node) - self.names.open
            closed = all(map(self.is_trusted, reads(node) - own)) and not names.is_unsteady(node)
            if not closed or _left(node, False, self._in_check):
                return self.unasserted(node)
            if _left(node, self._loops > 0, False):
                self.steady_order = False
            self.names.bind(binds(node), "closed")
            return [node], [node]
        place = self._place(node)
        start = self.names.copy(), dict(self.claims), list(self.order[-1]), len(self.believed)
        giving = self._giving
        loops, turns = self._loops, 1 if isinstance(node, ast.If) else len(binds(node)) + 2
        try:
            for _ in range(turns if place not in self.spoiled else 0):
                opened = set(self.names.open)
                try:
                    inner, outer = self._turn(node, place)
                except _Gives:
                    self._giving = True
                    self.names, self.claims, self.order[-1] = start[0].copy(), dict(start[1]), list(start[2])
                    del self.believed[start[3] :]
                    self._loops = loops
                    inner, outer = self._turn(node, place)
                if turns == 1 or self.names.open <= opened:
                    self.steady_order = False
                    return inner, outer
                # What the body opens is open from its start, for the loop comes round: look once more.
                opened |= self.names.open
                self.names, self.claims, self.order[-1] = start[0].copy(), dict(start[1]), list(start[2])
                self.names.bind(opened - start[0].open, "open", "weak")
                del self.believed[start[3] :]
        except _Leaves as leaves:
            if isinstance(node, ast.If) or leaves.args == ("return",):
                raise
        finally:
            self._loops, self._giving = loops, giving
        self.names, self.claims, self.order[-1] = start[:3]
        del self.believed[start[3] :]
        return self.unasserted(node)

    def _turn(self, node: ast.For | ast.While | ast.If, place: str) -> _Parts:
        """One look at a loop or a choice. What only closed sides need of a loop's values is not sent."""
        self._loops += not isinstance(node, ast.If)
        targets = binds(node.target) if isinstance(node, ast.For) else set()
        self.names.bind(targets, "closed")
        before = set(self.claims)
        inner, outer = self.block(node.body)
        inner_else, outer_else = self.block(node.orelse)
        parts = []
        claimed = [side for key in self.claims.keys() - before for side in self.claims[key].closed]
        both = {id(one) for one in leaves([*outer, *outer_else])}
        every = list(leaves([*inner, *inner_else]))
        mine = [one for one in every if id(one) not in both]
        secret = self._secret(node, claimed, mine)
        feed = isinstance(node, ast.For) and bool(secret)
        read = reads(mine)
        for one in reversed(every):
            read |= reads(one) if id(one) in both and binds(one) & read else set()
        if feed and not self._giving and secret & read:
            raise _Gives  # what is expected and what is given hang together: send what is given alone
        needed = set() if self._giving else read & targets
        once = reads(_head(node)) & self.once
        if feed and self._read_elsewhere(node, targets | once):
            raise _Leaves("break")  # the loop's last values are needed where they cannot be sent
        for body, orelse in ((inner, inner_else), (outer, outer_else)):
            whole: Any = type(node)(**{name: getattr(node, name) for name in node._fields})
            whole.body, whole.orelse = body or [ast.Pass()], orelse
            parts.append(whole)
        if feed:
            self.fed |= reads(_head(node)) | (binds(node) - needed)
            wanted = sorted(needed)
            key = ast.Constant(place)
            parts[0].target = ast.Tuple([ast.Name(name, ast.Store()) for name in wanted], ast.Store())
            parts[0].iter = _call("__inputs__", key).value
            parts[1].iter = _call("__loop__", key, parts[1].iter).value
            fed = _call("__fed__", key, *(ast.Name(name, ast.Load()) for name in wanted))
            parts[1].body = [fed, *parts[1].body]
        return [parts[0]], [parts[1]]

    def _secret(
        self, loop: ast.For | ast.While | ast.If, closed: list[ast.expr], inner: list[ast.stmt]
    ) -> set[str]:
        """Names of a loop that closed sides need, and that the program is not given as they are."""
        found = reads(closed) - self.modules - self.functions.keys()
        for node in reversed(list(walk(loop.body))):
            if isinstance(node, (ast.Assign, ast.AugAssign)) and binds(node) & found:
                found |= reads(node)
        found &= binds(loop) | reads(_head(loop))
        parts = {id(one.value) for one in walk(inner) if isinstance(one, (ast.Subscript, ast.Attribute))}
        whole = {one.id for one in walk(inner) if isinstance(one, ast.Name) and id(one) not in parts}
        return found - whole

    def _read_elsewhere(self, loop: ast.stmt, targets: set[str]) -> bool:
        """Whether what a loop goes through with is read outside of it."""
        waiting: list[ast.AST] = list(self.text)
        while waiting:
            one = waiting.pop()
            if one is loop or (getattr(one, "lineno", 0) == loop.lineno and type(one) is type(loop)):
                continue
            rebinds = isinstance(one, ast.For) and binds(one.target) & targets
            if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Store) and one.id in targets:
                return True
            if not rebinds and not isinstance(
                one, (ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.Lambda)
            ):
                waiting += ast.iter_child_nodes(one)
        return False

    def unasserted(self, *body: ast.stmt, leaves: bool = True) -> _Parts:
        """Statements that run beside the candidate as they stand, what they assert included."""
        for node in body:
            if leaves and (left := _left(node, self._loops > 0, self._in_check)):
                raise _Leaves(left)
        if self._giving and self.values(body):
            raise _Leaves("break")
        handed = self.handed(body)
        for node in body:
            if _asserts(node) or reads(node) & self.asserting:
                self._believe(
                    node, f"it stands in a {type(node).__name__.lower()} that the program may steer"
                )
            changed = binds(node) | changes(node) & self.names.closed - self.modules - self.functions.keys()
            self.names.bind(changed, "open", "weak")
        return list(body), handed

    def handed(self, nodes: Iterable[ast.AST], whole: bool = False) -> list[ast.stmt]:
        """The outer program's word of what the candidate gets hold of here.

        Args:
            nodes: What the inner program evaluates.
            whole: Whether it does so once and for sure, so that the outer program can evaluate what is
                closed in it.
        """
        given: list[ast.expr] = []
        for node in nodes:
            self.names.shared |= set(self.values([node])) - self.functions.keys()
            given += self._given(node) if whole else _names(self.values([node]))
        return [_call("__hand__", *given)] if given else []

    def _with_given(self, node: ast.stmt) -> tuple[ast.stmt, list[ast.stmt]]:
        """A statement whose closed parts are sent one by one."""
        gives: list[ast.stmt] = []
        sent = {name: part for name, part in ast.iter_fields(node) if name != "value"}
        if any(self.values([part]) for part in walk(ast.iter_child_nodes(node)) if _is_target(part)):
            raise _Leaves("break")
        value = self._with_inputs(getattr(node, "value", None), gives)
        made: Any = type(node)
        return ast.copy_location(made(**sent, value=value), node), gives

    def _with_inputs(self, node: Any, gives: list[ast.stmt]) -> Any:
        """An open expression whose closed parts are sent one by one, in the order of their evaluation."""
        if not isinstance(node, ast.AST):
            return node
        if isinstance(node, ast.expr) and not self.is_open(node) and not isinstance(node, ast.Starred):
            if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load) or not self.values([node]):
                return node
            if self._place(node) in self.spoiled:
                raise _Leaves("break")
            place = ast.Constant(self._place(node))
            gives.append(_call("__give__", place, node))
            return _call("__given__", place).value
        if isinstance(node, _NOT_ONCE):
            if self.values([node]):
                raise _Leaves("break")
            return node
        parts = {}
        for name, part in ast.iter_fields(node):
            listed = isinstance(part, list)
            sent = [self._with_inputs(one, gives) for one in (part if listed else [part])]
            parts[name] = sent if listed else sent[0]
        return ast.copy_location(type(node)(**parts), node)

    def _given(self, node: ast.AST) -> list[ast.expr]:
        """The closed parts of something open."""
        if isinstance(node, ast.expr) and not self.is_open(node) and not isinstance(node, ast.Starred):
            loaded = isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
            return [node] if loaded and self.values([node]) else []
        if isinstance(node, _NOT_ONCE):
            return _names(self.values([node]))
        return [part for child in ast.iter_child_nodes(node) for part in self._given(child)]

    # Asserts

    def asserted(self, test: ast.expr) -> _Parts:
        """One assert, of which each part of a conjunction is taken by itself."""
        if not self.is_open(test):
            # What the program has been given may be all that an assert looks at.
            self.names.bind(reads(test) & self.names.shared, "open")
        if not self.is_open(test) and (found := self.asked(test)):
            raise _Program(found)
        inner: list[ast.stmt] = []
        outer: list[ast.stmt] = []
        for part in _conjuncts(test):
            for mine, theirs in self._all_of(part) or [self._asserted(part)]:
                inner += mine
                outer += theirs
        return inner, outer

    def _all_of(self, part: ast.expr) -> list[_Parts]:
        """``all(f(x) == y for x, y in cases)`` is a loop that asserts, which can be taken apart."""
        generator = (
            part.args[0] if called(part) == "all" and isinstance(part, ast.Call) and part.args else None
        )
        if not isinstance(generator, (ast.GeneratorExp, ast.ListComp)) or not self.is_trusted("all"):
            return []
        if len(generator.generators) != 1 or self.is_open(generator.generators[0].iter):
            return []
        only = generator.generators[0]
        body: ast.stmt = ast.copy_location(ast.Assert(generator.elt), generator.elt)
        for condition in only.ifs:
            body = ast.copy_location(ast.If(condition, [body], []), condition)
        inside = [one for one in ast.walk(generator.elt) if isinstance(one, (ast.Lambda, ast.comprehension))]
        shadowed = {one.arg for part in inside for one in ast.walk(part) if isinstance(one, ast.arg)}
        if shadowed & binds(only.target) or any(
            binds(p.target) & binds(only.target) for p in inside if isinstance(p, ast.comprehension)
        ):
            return []
        # In a scope of its own, so that its names stay its own.
        renamed = {name: f"__{name}__" for name in binds(only.target)}
        loop = ast.For(only.target, only.iter, [body], [])
        return [self.statement(_Renamed(renamed).visit(ast.copy_location(copy.deepcopy(loop), part)))]

    def _asserted(self, part: ast.expr) -> _Parts:
        place = self._place(part)
        try:
            if place in self.spoiled:
                raise Unsuitable("what it compares with is not the tests' own")
            opened, how, claim = self.claim(part)
        except Unsuitable as reason:
            self._believe(part, str(reason))
            handed = self.handed([part])
            self.names.bind(binds(part), "open", "weak")
            return [ast.Expr(part) if called(part) in names.RAISING else ast.Assert(part)], handed
        self.claims[place] = claim
        self.order[-1].append(place)
        # In plain Python a name that nobody has bound is an error, whatever it would be here.
        unbound = reads(part) - reads(opened) - self.names.closed - names.BUILTINS
        inner: list[ast.stmt] = [ast.Expr(name) for name in _names(sorted(unbound))]
        gives: list[ast.stmt] = []
        if self._giving:
            opened = [self._with_inputs(one, gives) for one in opened]
        inner += [_call("__send__", one, ast.Constant(how)) for one in opened]
        used = _names(self.values(claim.closed))
        judged = claim.kind == "judged"
        expect = _call(
            "__judge__" if judged else "__expect__",
            ast.Constant(place),
            _later(claim.closed[0], len(opened)) if judged else _later(_tuple(claim.closed)),
            _later(_tuple(used)),
        )
        both = [*gives, *([] if self._giving else self.handed(opened, whole=True)), expect]
        return inner, both if claim.hole < len(claim.closed) else both[::-1]

    def _place(self, node: ast.AST) -> str:
        return f"{self._unit}:{getattr(node, 'lineno', 0)}:{getattr(node, 'col_offset', 0)}"

    def _believe(self, node: ast.AST, reason: str) -> None:
        self.believed.append(f"{reason}: {textwrap.shorten(ast.unparse(node), 80)}")


_Parts = tuple[list[ast.stmt], list[ast.stmt]]


class _Renamed(ast.NodeTransformer):
    """Gives names others."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)


def _conjuncts(test: ast.expr) -> Iterator[ast.expr]:
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        for part in test.values:
            yield from _conjuncts(part)
    else:
        yield test


def _asserts(node: ast.AST) -> bool:
    """Whether it may fail a test by a word of its own."""
    return any(
        isinstance(one, (ast.Assert, ast.Raise)) or called_raising(one) or called(one) in _FAILING
        for one in ast.walk(node)
    )


_NOT_ONCE = (
    *(ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
    *(ast.BoolOp, ast.IfExp),
)
"""Expressions whose parts may be evaluated several times, or not at all."""
_ITERATORS = frozenset(("zip", "map", "filter", "iter", "enumerate", "reversed"))
_FAILING = frozenset(("exit", "_exit", "fail", "quit", "abort"))


def called_raising(node: ast.AST) -> bool:
    """Whether it is a call such as ``assert_equal(a, b)``."""
    return isinstance(node, ast.Call) and called(node) in names.RAISING


def _left(node: ast.stmt, in_loop: bool, in_function: bool) -> str:
    """How a statement may leave the loop or function that it stands in."""
    if in_function and any(isinstance(one, ast.Return) for one in names.in_scope(node)):
        return "return"
    return "break" if in_loop and _breaks([node]) else ""


def _breaks(body: Iterable[ast.AST]) -> bool:
    """Whether a break or continue in it belongs to a loop around it."""
    for node in body:
        if isinstance(node, (ast.Break, ast.Continue)):
            return True
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        inner = (
            node.orelse
            if isinstance(node, (ast.For, ast.While, ast.AsyncFor))
            else ast.iter_child_nodes(node)
        )
        if _breaks(inner):
            return True
    return False


def _head(node: ast.For | ast.While | ast.If) -> ast.expr:
    return node.iter if isinstance(node, ast.For) else node.test


def _is_target(node: ast.AST) -> bool:
    return isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load)


def _is_check(node: ast.stmt) -> bool:
    if not (isinstance(node, ast.FunctionDef) and node.name == "check" and not node.decorator_list):
        return False
    given = node.args
    others = [*given.posonlyargs, *given.kwonlyargs, given.vararg, given.kwarg]
    yields = any(isinstance(one, (ast.Yield, ast.YieldFrom, ast.Await)) for one in names.in_scope(node.body))
    return len(given.args) == 1 and not any(others) and not yields


def _imports(node: ast.stmt) -> set[str]:
    return binds(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else set()


def _guarded(body: list[ast.stmt], number: int) -> ast.stmt:
    """One test among others: what it raises ends it alone."""
    done = _call("__done__", ast.Constant(number))
    fail = _call("__fail__", ast.Constant(number), ast.Name("__error__", ast.Load()))
    handler = ast.ExceptHandler(ast.Name("BaseException", ast.Load()), "__error__", [fail])
    node = ast.Try([*body, done], [handler], [], [])
    node.made = True  # type: ignore[attr-defined]
    return node


def _function(node: ast.FunctionDef, body: list[ast.stmt]) -> ast.stmt:
    made = ast.FunctionDef(node.name, node.args, body or [ast.Pass()], [], None)
    made.made = True  # type: ignore[attr-defined]
    return made


def _call(name: str, *arguments: ast.expr) -> ast.Expr:
    return ast.Expr(ast.Call(ast.Name(name, ast.Load()), list(arguments), []))


def _later(value: ast.expr, answers: int = 0) -> ast.expr:
    """A function that gives a value, of answers if it is made of any."""
    arguments = [ast.arg(f"__answer{number}__") for number in range(answers)]
    return ast.Lambda(ast.arguments([], arguments, None, [], [], None, []), value)


def _tuple(values: Iterable[ast.expr]) -> ast.expr:
    return ast.Tuple(list(values), ast.Load())


def _names(found: Iterable[str]) -> list[ast.expr]:
    return [ast.Name(name, ast.Load()) for name in found]


def _import(name: str) -> ast.stmt:
    module, attribute = names.WELL_KNOWN[name]
    if attribute:
        return ast.ImportFrom(module, [ast.alias(attribute, name)], 0)
    return ast.Import([ast.alias(module, name)])


def _source(body: list[ast.stmt]) -> str:
    return ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
