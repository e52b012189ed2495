"""What an assert claims: which side of it is the program's, how that is sent, and what it must satisfy.

An expression is *open* if its value may depend on the program, else *closed*. The value of an open one is an
answer if it is *strong*: not a truth about an answer, which the program's process could as well invent, nor
something in which an answer meets what is expected of it.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from coderl.errors import UserError
from coderl.sandbox.checks import names
from coderl.sandbox.checks.base import Unsuitable, parse
from coderl.sandbox.checks.names import called, reads, root
from coderl.sandbox.compare import Kind

Sent = Literal["value", "constant", "truth", "type", "elements"]
"""How a value is sent: as it is; only if it is None, a truth, an ellipsis or a class; as its truth; as its
classes; or, where it is no plain data but can be gone through, as what that gives."""

_MUTATORS = frozenset(
    (
        *("__next__", "add", "append", "appendleft", "clear", "discard", "extend", "insert", "next", "pop"),
        *("popitem", "popleft", "remove", "reverse", "rotate", "send", "setdefault", "sort", "subtract"),
        *("update", "write"),
    )
)
"""Functions and methods that change what they are called with."""
_WRAPPERS = frozenset(
    (
        *("abs", "all", "any", "bool", "dict", "float", "frozenset", "int", "len", "list", "max", "min"),
        *("repr", "reversed", "round", "set", "sorted", "str", "tuple"),
    )
)
_TRUTHS = frozenset(("isinstance", "issubclass", "callable", "hasattr", "is_", "eq"))
_DIFFERENCES = frozenset(("abs", "fabs"))
_COMPARED_HERE = frozenset(("math.isclose", "numpy.isclose", "numpy.allclose"))
_SEVERAL = frozenset(("max", "min", "divmod", "pow", "zip"))
_OF_TRUTH = ("__", "is", "has", "equals", "compare", "contains", "startswith", "endswith", "matches")
"""How methods are called that give a truth."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What an answer must satisfy: a :class:`~coderl.sandbox.compare.Expectation` in the making.

    Attributes:
        closed: The closed sides, as expressions; what they are is yet to be worked out.
    """

    kind: Kind
    closed: tuple[ast.expr, ...] = ()
    operators: tuple[str, ...] = ()
    hole: int = 0
    keywords: tuple[str, ...] = ()
    negated: bool = False


@dataclass(slots=True)
class Names:
    """What is known of names at one place of the text.

    Attributes:
        closed: Bound by the tests, from nothing of the candidate's.
        open: Bound by the tests from what the candidate gives.
        weak: Those of ``open`` that hold a truth, which must not pass for an answer.
        objects: Those of ``open`` that hold an instance of a class of the candidate's.
        shared: Those of ``closed`` that the candidate has been given, and may have changed.
    """

    closed: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    weak: set[str] = field(default_factory=set)
    objects: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)

    def copy(self) -> Names:
        """The same, to be changed by itself."""
        return Names(*(set(getattr(self, one.name)) for one in fields(self)))

    def bind(self, bound: set[str], *to: Literal["closed", "open", "weak", "objects"]) -> None:
        """Note what names are bound to, and forget what they were."""
        for one in fields(self):
            getattr(self, one.name).difference_update(bound)
        for name in to:
            getattr(self, name).update(bound)


def _classes(text: list[ast.stmt], right: list[ast.stmt]) -> set[str]:
    """Names of the program's classes: those of a right program, or capitalized ones where there is none.

    Some functions have such a name as well. These are called in one assert after the other, for nothing but
    data to compare with.
    """
    if right:
        return {node.name for node in right if isinstance(node, ast.ClassDef)}
    compared: Counter[str] = Counter()
    called_at_all: Counter[str] = Counter()
    for node in walk(text):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id[:1].isupper():
            called_at_all[node.func.id] += 1
        elif isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare):
            left, *others = node.test.left, *node.test.comparators
            if isinstance(left, ast.Call) and not any(isinstance(one, ast.Call) for one in walk(others)):
                compared[called(left)] += 1
    return {name for name, count in called_at_all.items() if not 2 <= compared[name] == count}


def _holders(text: list[ast.stmt]) -> set[str]:
    """Names of objects that are no plain data, as the attributes say that tests ask of them."""
    asked = [one for one in walk(text) if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name)]
    return {
        one.value.id
        for one in asked
        if one.attr not in names.OF_PLAIN_DATA and isinstance(one.value, ast.Name)
    }


def statements(source: str) -> list[ast.stmt]:
    """The statements of a source that need not be Python, such as an unfinished prompt."""
    try:
        return parse(source).body
    except UserError:
        return []


def asks_nothing(body: Iterable[ast.stmt]) -> bool:
    """Whether tests neither call anything nor assert anything but a constant."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            if not asks_nothing(node.body):
                return False
        elif isinstance(node, ast.Expr) and called(node.value) == "check":
            continue
        elif not is_idle(node) and not isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)):
            return False
    return True


def is_idle(node: ast.stmt) -> bool:
    """Whether it is a docstring, ``pass`` or ``assert True``."""
    value = node.test if isinstance(node, ast.Assert) else node.value if isinstance(node, ast.Expr) else None
    return isinstance(node, ast.Pass) or (isinstance(value, ast.Constant) and bool(value.value))


def walk(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes and all that lies below them."""
    for node in body:
        yield from ast.walk(node)


Claimed = tuple[list[ast.expr], Sent, Claim]
"""The open sides of an assert, how their values are sent, and what they must satisfy."""


class Expressions:
    """The expressions of a text, at the place that a walk through its statements has come to.

    Args:
        own: Names that are the program's, whatever else they could be.
        text: The statements of the text.
        right: Those of a right program, if there is one.
        closed: Names of helpers, which are closed from the beginning.

    Attributes:
        names: What is known of names at this place.
        helped: Names of helpers.
        modules: Names of modules, and of what is imported from them.
        aliases: What these stand for, such as ``numpy`` for ``np``, and ``numpy.isclose`` for ``isclose``.
        stateful: Functions of the tests that change what others look at.
        functions: The tests' own functions and classes, and what they read.
    """

    def __init__(
        self, own: frozenset[str], text: list[ast.stmt], right: list[ast.stmt], closed: set[str]
    ) -> None:
        self.own = own
        self.names = Names(closed=closed)
        self.helped = frozenset(closed)
        self.modules: set[str] = set()
        self.aliases: dict[str, str] = {}
        self.stateful: set[str] = set()
        self.functions: dict[str, set[str]] = {}
        self._classes = _classes(text, right)
        self._holders = _holders(text)
        words = {one.id for one in walk(text) if isinstance(one, ast.Name)}
        words |= {one.attr for one in walk(text) if isinstance(one, ast.Attribute)}
        self._decimals = bool(words & {"Decimal", "getcontext", "localcontext"})

    def claim(self, test: ast.expr) -> Claimed:
        """The open side of an assert, how its value is sent, and what it must satisfy.

        Raises:
            Unsuitable: There is none, or its value proves nothing.
        """
        negated = False
        while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            negated, test = not negated, test.operand
        if any(isinstance(one, ast.NamedExpr) for one in ast.walk(test)):
            raise Unsuitable("it binds a name")
        if not self.is_open(test):
            raise Unsuitable("it asks nothing of the program")
        try:
            opened, how, claim = self._claim(test)
        except Unsuitable as reason:
            return self._judged(ast.UnaryOp(ast.Not(), test) if negated else test, reason)
        self._require_steady(claim.closed)
        return opened, how, replace(claim, negated=negated)

    def _require_steady(self, closed: Sequence[ast.expr]) -> None:
        """Raise where to evaluate closed sides elsewhere is not the same.

        Raises:
            Unsuitable: They change something, or depend on a context that the program may have changed.
        """
        nodes = list(walk(closed))
        if any(isinstance(one, ast.Call) and called(one) in _MUTATORS for one in nodes):
            raise Unsuitable("what it compares with changes as it is looked at")
        if self.stateful & set(self.values(closed)):
            raise Unsuitable("what it compares with is worked out by a function that changes something")
        if self._decimals and any(isinstance(one, ast.BinOp) for one in nodes):
            raise Unsuitable("how decimals are worked out depends on a context")

    def _claim(self, test: ast.expr) -> Claimed:
        if called(test) in names.EQUALITIES | names.CLOSENESS and self.is_known(test):
            return self._closeness(test)
        if isinstance(test, ast.Compare):
            return self._comparison(test)
        if not isinstance(test, ast.Call):
            raise Unsuitable("its truth is for the program to tell")
        if called(test) == "isinstance" and len(test.args) == 2 and self.is_trusted("isinstance"):
            opened, classes = test.args
            if not self.is_open(classes) and self.is_strong(opened):
                classes = ast.Call(ast.Name("__classes__", ast.Load()), [classes], [])
                return [opened], "type", Claim("isinstance", (classes,))
        if not (self._is_asked(test) and self.is_strong(test)):
            raise Unsuitable("its truth is for the program to tell")
        return [test], "truth", Claim("truth")

    def _judged(self, test: ast.expr, reason: Unsuitable) -> Claimed:
        """An assert whose answers are looked at by more than a comparison, which takes place outside."""
        answers: list[ast.expr] = []
        outside = self._outside(test, answers, reason)
        bare = outside.operand if isinstance(outside, ast.UnaryOp) else outside
        if isinstance(bare, ast.Name) or any(map(self.is_object, answers)):
            raise reason  # it is the answer's own truth, or an object's
        for one in ast.walk(outside):
            # An attribute of what an answer holds, or a call of it, is for the program to give.
            name = root(one) if isinstance(one, ast.Attribute) else ""
            own = isinstance(one, ast.Attribute) and one.attr not in names.OF_PLAIN_DATA
            if own and name not in self.modules | self.functions.keys():
                raise reason
            calls = isinstance(one, ast.Call) and isinstance(one.func, ast.Name)
            if calls and not self.is_trusted(called(one)):
                raise reason
        self._require_steady([outside])
        if called(test) in names.RAISING:  # it gives nothing where all is well
            outside = ast.BoolOp(ast.Or(), [outside, ast.Constant(True)])
        return answers, "elements", Claim("judged", (outside,))

    def _outside(self, node: Any, answers: list[ast.expr], reason: Unsuitable) -> Any:
        """An expression with its answers taken out, which can be evaluated outside.

        Raises:
            Unsuitable: The given reason. It looks at what a copy of an answer does not tell, or which answers
                are asked for depends on answers.
        """
        if not isinstance(node, ast.AST) or not self.is_open(node):
            return node
        if isinstance(node, ast.expr) and not isinstance(node, ast.Starred) and self.is_strong(node):
            answers.append(node)
            return ast.Name(f"__answer{len(answers) - 1}__", ast.Load())
        if isinstance(node, (ast.Lambda, ast.Name, ast.Attribute)):
            raise reason
        if isinstance(node, ast.Compare):
            opened = [one for one in (node.left, *node.comparators) if self.is_open(one)]
            by_identity = any(isinstance(one, (ast.Is, ast.IsNot)) for one in node.ops)
            if len(opened) > 1 or (by_identity and self.is_strong(opened[0])):
                raise reason  # nothing to compare with is the tests' own; or a copy is not the same object
        if isinstance(node, ast.Call):
            known = root(node.func) not in self.functions and called(node) not in names.OF_TYPES
            of_data = isinstance(node.func, ast.Attribute) and node.func.attr in names.OF_PLAIN_DATA
            if not known or called(node) == "format" or (self.is_open(node.func) and not of_data):
                raise reason
            functions = [one.value for one in node.keywords if one.arg == "key"]
            functions += node.args[:1] if called(node) in ("map", "filter", "reduce") else []
            if any(map(self.is_open, functions)):
                raise reason
            if of_data and self.is_open(node.func):
                assert isinstance(node.func, ast.Attribute)
                func = ast.Attribute(
                    self._outside(node.func.value, answers, reason), node.func.attr, ast.Load()
                )
                return ast.Call(func, *self._rest(node, ("args", "keywords"), answers, reason))
        if isinstance(node, (ast.BoolOp, ast.IfExp)):
            later = node.values[1:] if isinstance(node, ast.BoolOp) else [node.body, node.orelse]
            if any(map(self.is_open, later)):
                raise reason
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            first = node.generators[0]
            rest = copy.copy(node)
            rest.generators = [copy.copy(first), *node.generators[1:]]
            rest.generators[0].iter = ast.Tuple([], ast.Load())
            if self.is_open(rest):
                raise reason
            rest.generators[0].iter = self._outside(first.iter, answers, reason)
            return rest
        return type(node)(*self._rest(node, node._fields, answers, reason))

    def _rest(
        self, node: ast.AST, fields: Iterable[str], answers: list[ast.expr], reason: Unsuitable
    ) -> list[Any]:
        """The fields of a node, with answers taken out."""
        parts = []
        for name in fields:
            part = getattr(node, name)
            listed = isinstance(part, list)
            outside = [self._outside(one, answers, reason) for one in (part if listed else [part])]
            parts.append(outside if listed else outside[0])
        return parts

    def _is_asked(self, call: ast.Call) -> bool:
        """Whether it calls the program: a function, or a method of an object of its own class."""
        if isinstance(call.func, ast.Name):
            return call.func.id not in _TRUTHS and self.is_open(call.func)
        return isinstance(call.func, ast.Attribute) and self.is_object(call.func.value)

    def _comparison(self, test: ast.Compare) -> Claimed:
        operands = [test.left, *test.comparators]
        operators = tuple(type(operator).__name__ for operator in test.ops)
        holes = [at for at, operand in enumerate(operands) if self.is_open(operand)]
        if len(holes) != 1:
            raise Unsuitable("both of its sides are the program's")
        hole = holes[0]
        opened, closed = operands[hole], tuple(operands[:hole] + operands[hole + 1 :])
        if {"Is", "IsNot"} & set(operators):
            if not self.is_strong(opened):
                raise Unsuitable("its truth is for the program to tell")
            return [opened], "constant", Claim("chain", tuple(map(_alone, closed)), operators, hole)
        if self.is_object(opened):
            raise Unsuitable("an object of the program's own is compared")
        if len(operators) == 1 and (near := self._near(opened, operators[0], closed[0], hole)):
            return near
        if not self.is_strong(opened):
            raise Unsuitable("its truth is for the program to tell")
        # What has a name may be gone through once more.
        sought = hole == 1 and operators[0] in ("In", "NotIn") and not isinstance(opened, ast.Name)
        return [opened], "elements" if sought else "value", Claim("chain", closed, operators, hole)

    def _near(self, opened: ast.expr, operator: str, bound: ast.expr, hole: int) -> Claimed | None:
        """``abs(f(x) - 1.5) < 1e-6``: the difference is taken outside."""
        inner = opened.args[0] if isinstance(opened, ast.Call) and called(opened) in _DIFFERENCES else None
        if not (isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub)):
            return None
        sides = [inner.left, inner.right]
        holes = [at for at, side in enumerate(sides) if self.is_open(side)]
        if len(holes) != 1 or not self.is_strong(sides[holes[0]]):
            return None
        expected = sides[1 - holes[0]]
        return [sides[holes[0]]], "value", Claim("near", (expected, bound), (operator,), hole)

    def _closeness(self, test: ast.expr) -> Claimed:
        """``math.isclose(f(x), 1.5, rel_tol=1e-6)``, ``np.allclose(...)``, ``assert_equal(f(x), 5)``."""
        assert isinstance(test, ast.Call)
        if len(test.args) != 2 or any(keyword.arg is None for keyword in test.keywords):
            raise Unsuitable("it does not compare two values")
        holes = [at for at, side in enumerate(test.args) if self.is_open(side)]
        if len(holes) != 1 or not self.is_strong(test.args[holes[0]]):
            raise Unsuitable("both of its sides are the program's")
        keywords = [one for one in test.keywords if one.arg not in ("err_msg", "verbose", "msg")]
        tolerances = tuple(one.value for one in keywords)
        if self.is_open(ast.Tuple([*tolerances], ast.Load())):
            raise Unsuitable("its tolerance is the program's")
        full = self.known_as(test.func)
        kind: Kind = "close"
        if full in ("numpy.isclose", "numpy.allclose"):
            kind = "numpy_close"
        elif called(test) in names.EQUALITIES:
            kind = "equal"
        elif called(test) != "isclose":
            kind = "numpy_close"
        if root(test.func) in self.modules and full not in _COMPARED_HERE:
            raise Unsuitable("it compares in a way of its own")
        closed = (test.args[1 - holes[0]], *tolerances)
        arguments = tuple(str(one.arg) for one in keywords)
        return [test.args[holes[0]]], "value", Claim(kind, closed, hole=holes[0], keywords=arguments)

    def asked(self, test: ast.expr) -> set[str]:
        """Which builtin or well-known name of an assert must be the program's."""
        sides = [test.left, *test.comparators] if isinstance(test, ast.Compare) else [test]
        for side in sides:
            found = {
                one.func.id
                for one in ast.walk(side)
                if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)
            }
            found -= self.names.closed | names.CLOSENESS | names.EQUALITIES | self.own
            if found:
                return found - _WRAPPERS or found
        return set()

    def is_open(self, node: ast.AST) -> bool:
        """Whether its value may depend on the candidate."""
        return any(not self.is_trusted(name) for name in reads(node)) or names.is_unsteady(node)

    def is_trusted(self, name: str) -> bool:
        """Whether a name is the tests' own, or means the same everywhere."""
        if name in self.names.closed:
            return True
        mine = name in self.names.open or name in self.own
        return not mine and (name in names.BUILTINS or name in names.WELL_KNOWN)

    def is_known(self, call: ast.expr) -> bool:
        """Whether a function that compares is the one that everybody knows, and not the tests' own."""
        name = root(call)
        return name not in self.functions and name not in self.own and name not in self.names.open

    def is_object(self, node: ast.expr) -> bool:
        """Whether its value is an instance of a class of the candidate's, as its name says."""
        if isinstance(node, ast.Name):
            return node.id in self.names.objects or (node.id in self._holders and node.id in self.names.open)
        if isinstance(node, (ast.BinOp, ast.UnaryOp)):
            parts = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.operand]
            return any(map(self.is_object, parts))
        if isinstance(node, ast.Subscript):
            return self.is_object(node.value)
        if isinstance(node, (ast.List, ast.Tuple)):
            return any(map(self.is_object, node.elts))
        if not isinstance(node, ast.Call):
            return False
        # A class, or a class method that makes an instance.
        function = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        return isinstance(function, ast.Name) and function.id in self._classes and self.is_open(function)

    def is_strong(self, node: ast.AST) -> bool:
        """Whether the value of an open expression is an answer, and not a truth about one.

        What the candidate is given as an argument is an input, whatever it is.
        """
        if isinstance(node, (ast.Compare, ast.BoolOp, ast.IfExp, ast.Not)):
            return False
        if isinstance(node, ast.Attribute) and node.attr == "dtype":  # which equals names and classes
            return False
        if isinstance(node, ast.Name):
            return node.id not in self.names.weak
        if self._mixes(node):
            return False
        if isinstance(node, ast.Call):
            if called(node) in _TRUTHS | names.CLOSENESS | names.EQUALITIES:
                return False
            if root(node.func) in self.functions:
                return False
            method = isinstance(node.func, ast.Attribute) and not self.is_object(node.func.value)
            if method and called(node).startswith(_OF_TRUTH):
                return False
            if self.is_open(node.func):
                return self.is_strong(node.func)
        return all(map(self.is_strong, ast.iter_child_nodes(node)))

    def _mixes(self, node: ast.AST) -> bool:
        """Whether an answer meets what may be expected of it, and could look at that."""
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return self._meet(node.elts)
        if isinstance(node, ast.Dict):
            return self._meet([one for one in (*node.keys, *node.values) if one])
        if isinstance(node, ast.BinOp):
            return self._meet([node.left, node.right]) and not self.is_object(node)
        if isinstance(node, ast.Subscript):
            return self.is_open(node.slice) and not self.is_open(node.value)
        if not isinstance(node, ast.Call) or not self.is_open(node):
            return False
        data = [one for one in node.args if not self._is_parameter(one)]
        data += [one.value for one in node.keywords if not self._is_parameter(one.value)]
        if not self.is_open(node.func):
            return self._mixes_in(node.func, data, len(node.args))
        if not isinstance(node.func, ast.Attribute) or self.is_object(node.func.value):
            return False  # a call of the program's, which is given what it is given
        receiver = node.func.value
        of_answer = isinstance(receiver, ast.Call) or (
            isinstance(receiver, ast.Name) and self.is_open(receiver)
        )
        given = [one for one in node.args if not self.is_open(one)]
        return bool(given) and of_answer and node.func.attr in names.OF_PLAIN_DATA

    def _mixes_in(self, function: ast.expr, data: list[ast.expr], count: int) -> bool:
        """Whether a function that is not the program's brings an answer together with other data."""
        if isinstance(function, ast.Lambda):
            return True
        name = root(function)
        if isinstance(function, ast.Name) and name in names.BUILTINS and name not in self.names.closed:
            return name not in names.PARAMETRIC and (self._meet(data) or (name in _SEVERAL and count > 1))
        if name in self.modules or name in names.WELL_KNOWN:
            return self.module_of(name) in names.JUDGED or self._meet(data)
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Constant):
            return function.attr != "join"
        return True  # a method of a value of the tests

    def _meet(self, parts: Sequence[ast.expr]) -> bool:
        opened = [self.is_open(one) for one in parts]
        return any(opened) and not all(opened)

    def _is_parameter(self, node: ast.expr) -> bool:
        """Whether an argument says what to do, and is no data."""
        if isinstance(node, ast.Constant):
            return node.value is None or isinstance(node.value, (bool, int))
        if isinstance(node, ast.Lambda):
            return not self.is_open(node)
        return isinstance(node, ast.Name) and node.id in names.BUILTINS and self.is_trusted(node.id)

    def module_of(self, name: str) -> str:
        """The module that a name stands for, or comes from; empty where nobody says."""
        return self.aliases.get(name, names.WELL_KNOWN.get(name, ("", ""))[0]).partition(".")[0]

    def known_as(self, function: ast.expr) -> str:
        """The full name of a function of a module: ``numpy.isclose`` of ``np.isclose``."""
        name = root(function)
        module, attribute = names.WELL_KNOWN.get(name, ("", ""))
        full = self.aliases.get(name, f"{module}.{attribute}".strip("."))
        return ".".join([full or name, *ast.unparse(function).split(".")[1:]])

    def values(self, nodes: Iterable[ast.AST]) -> list[str]:
        """The tests' own values that these nodes read, be it through functions of the tests."""
        found = reads(nodes)
        waiting = list(found)
        while waiting:
            new = self.functions.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return sorted(found & self.names.closed - self.modules - self.helped)


def _alone(node: ast.expr) -> ast.expr:
    """An operand of ``is``, which must be one of a kind.

    Raises:
        Unsuitable: Whether it is depends on the interpreter.
    """
    if not isinstance(node, ast.Constant):
        return ast.Call(ast.Name("__alone__", ast.Load()), [node], [])
    if node.value is None or node.value is ... or isinstance(node.value, bool):
        return node
    raise Unsuitable("what it is compared with by identity is not one of a kind")
