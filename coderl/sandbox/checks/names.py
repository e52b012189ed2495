"""Names in the text of tests: what an expression reads, what a statement binds, and what can be trusted.

What is trusted has the same value in any process: it keeps no state, draws no random number, reads no clock
and no file. So it may be evaluated where the candidate is not.
"""

from __future__ import annotations

import ast
import builtins
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator

_WITH_STATE = frozenset(
    (
        *("input", "open", "print", "exec", "eval", "compile", "globals", "locals", "vars", "dir", "id"),
        *("__import__", "breakpoint", "exit", "quit", "help", "hash", "object", "memoryview", "super"),
        *("copyright", "credits", "license", "setattr", "delattr"),
    )
)
BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_")) - _WITH_STATE
"""Builtins that mean the same in any process."""

MODULES = frozenset(
    (
        *("abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "copy"),
        *("dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib"),
        *("heapq", "html", "itertools", "json", "math", "numbers", "numpy", "operator", "re", "statistics"),
        *("string", "struct", "textwrap", "types", "typing", "unicodedata", "uuid", "zlib"),
    )
)
"""Modules whose functions mean the same in any process, except :data:`UNSTEADY` ones."""

UNSTEADY = frozenset(
    (
        *("now", "today", "utcnow", "uuid1", "uuid4", "random", "getnode", "getrandbits", "shuffle"),
        *("ctypeslib", "memmap", "fromfile", "tofile", "load", "loadtxt", "genfromtxt", "save", "savetxt"),
        *("__dict__", "__globals__", "__builtins__", "__code__", "__subclasses__"),
    )
)
"""Attributes whose value depends on when and where they are asked for."""

WELL_KNOWN: dict[str, tuple[str, str]] = {
    **{name: (name, "") for name in MODULES - {"datetime", "array", "copy", "html", "abc", "struct"}},
    "np": ("numpy", ""),
    **{
        name: ("math", name)
        for name in [
            "sqrt",
            "floor",
            "ceil",
            "pi",
            "inf",
            "nan",
            "isclose",
            "log",
            "log2",
            "exp",
            "sin",
            "cos",
            "tan",
            "hypot",
            "fabs",
            "isnan",
            "isinf",
        ]
    },
    **{name: ("itertools", name) for name in ("chain", "product", "permutations", "combinations")},
    "reduce": ("functools", "reduce"),
    **{
        name: ("collections", name)
        for name in ("Counter", "OrderedDict", "defaultdict", "deque", "namedtuple")
    },
    "copy": ("copy", "copy"),
    "deepcopy": ("copy", "deepcopy"),
    **{name: ("datetime", name) for name in ("date", "timedelta")},
    "Decimal": ("decimal", "Decimal"),
    "Fraction": ("fractions", "Fraction"),
}
"""Names that tests use without importing them, because programs usually do: module, and name in it.

Not those that programs are asked for, such as ``gcd`` and ``mean``."""
for _name in dir(builtins):
    WELL_KNOWN.pop(_name, None)  # such as math's pow

EQUALITIES = frozenset(
    (
        *("assert_equal", "assertEqual", "assert_array_equal", "assertListEqual", "assertDictEqual"),
        *("assertTupleEqual", "assertSetEqual", "array_equal"),
    )
)
"""Functions of two arguments that ask whether they are equal."""
CLOSENESS = frozenset(("isclose", "allclose", "assert_allclose"))
"""Functions of two arguments that ask whether they are nearly equal."""
RAISING = frozenset(name for name in EQUALITIES | CLOSENESS if name.startswith("assert"))
"""Those that raise instead of giving a truth, so that a statement of its own calls them."""
STEADY_MANAGERS = frozenset(
    (
        *("open", "redirect_stdout", "redirect_stderr", "ThreadPoolExecutor", "TemporaryDirectory"),
        *("NamedTemporaryFile", "nullcontext", "catch_warnings"),
    )
)
"""Context managers that let an AssertionError through."""

_PLAIN_DATA = (
    *(str, bytes, list, dict, set, frozenset, tuple, int, float, complex, range),
    *(Counter, OrderedDict, deque),
)
JUDGED = frozenset(("json", "math", "numpy", "np", "operator", "re", "statistics", "string"))
"""Modules whose functions are for plain data, so that they may as well be called outside."""
PARAMETRIC = frozenset(
    (
        *("abs", "bool", "bytes", "complex", "enumerate", "float", "format", "frozenset", "getattr", "int"),
        *("iter", "len", "list", "next", "range", "repr", "reversed", "round", "set", "sorted", "str", "sum"),
        *("tuple", "hasattr", "isinstance"),
    )
)
"""Builtins that take one value, and beside it nothing but what to do with it."""
OF_PLAIN_DATA = frozenset(
    (
        *(name for kind in _PLAIN_DATA for name in dir(kind)),
        *("shape", "dtype", "ndim", "size", "tolist", "all", "any", "sum", "max", "min", "mean"),
        *("year", "month", "day"),
    )
)
"""Attributes that plain data have."""
OF_TYPES = frozenset(("callable", "hasattr", "isinstance", "issubclass", "type"))
"""Functions that look at what a value is, which a copy of it as plain data may not tell."""

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def reads(node: ast.AST | Iterable[ast.AST]) -> set[str]:
    """Names that are read in a node and are not bound within it by a scope of its own."""
    found: set[str] = set()
    for one in [node] if isinstance(node, ast.AST) else node:
        _collect(one, frozenset(), found)
    return found


def _collect(node: ast.AST, bound: frozenset[str], found: set[str]) -> None:
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load) and node.id not in bound:
            found.add(node.id)
        return
    if isinstance(node, _COMPREHENSIONS):
        for generator in node.generators:
            _collect(generator.iter, bound, found)
            bound |= binds(generator.target)
            for condition in generator.ifs:
                _collect(condition, bound, found)
        for value in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            _collect(value, bound, found)
        return
    if isinstance(node, _SCOPES):
        outside, inside, own = _parts_of_scope(node)
        for part in outside:
            _collect(part, bound, found)
        for part in inside:
            _collect(part, bound | own, found)
        return
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id not in bound:
        found.add(node.target.id)  # it reads what it changes, though the tree calls that a store
    for child in ast.iter_child_nodes(node):
        _collect(child, bound, found)


def _parts_of_scope(node: ast.AST) -> tuple[list[ast.AST], list[ast.AST], set[str]]:
    """What a definition evaluates at once, what it evaluates later, and the names of its own scope."""
    if isinstance(node, ast.ClassDef):
        keywords = [keyword.value for keyword in node.keywords]
        return [*node.decorator_list, *node.bases, *keywords], [*node.body], binds(node.body)
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    arguments += [one for one in (given.vararg, given.kwarg) if one]
    own = {one.arg for one in arguments}
    defaults: list[ast.AST] = [*given.defaults, *(one for one in given.kw_defaults if one)]
    if isinstance(node, ast.Lambda):
        return defaults, [node.body], own
    return [*node.decorator_list, *defaults], [*node.body], own | binds(node.body) | {node.name}


def binds(node: ast.AST | Iterable[ast.AST]) -> set[str]:
    """Names that a node binds in the scope it stands in."""
    found: set[str] = set()
    for one in in_scope(node):
        if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load):
            found.add(one.id)
        elif isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(one.name)
        elif isinstance(one, ast.alias):
            found.add((one.asname or one.name).partition(".")[0])
        elif isinstance(one, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and one.name:
            found.add(one.name)
    return found


def in_scope(node: ast.AST | Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The node and what lies below it, but not within scopes of their own."""
    waiting = [node] if isinstance(node, ast.AST) else list(node)
    while waiting:
        one = waiting.pop()
        yield one
        if not isinstance(one, (*_SCOPES, *_COMPREHENSIONS)):
            waiting += ast.iter_child_nodes(one)


def changes(node: ast.stmt) -> set[str]:
    """Names that a statement binds, or whose values it may change, as ``x[0] = 1`` and ``x.append(1)`` do."""
    found = binds(node)
    for one in ast.walk(node):
        if isinstance(one, (ast.Attribute, ast.Subscript)) and not isinstance(one.ctx, ast.Load):
            found |= {root(one)} - {""}
        elif isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute):
            found |= {root(one.func)} - {""}
    return found


def root(node: ast.expr) -> str:
    """The name that a chain of attributes, items and calls begins with, or an empty string."""
    while not isinstance(node, ast.Name):
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            return ""
    return node.id


def called(node: ast.AST) -> str:
    """The last part of the name of the function that a call calls: ``isclose`` of ``math.isclose(1, 2)``."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def is_unsteady(node: ast.AST | Iterable[ast.AST]) -> bool:
    """Whether its value depends on when or where it is evaluated."""
    return any(
        (isinstance(one, ast.Attribute) and one.attr in UNSTEADY)
        or isinstance(one, (ast.Await, ast.Yield, ast.YieldFrom))
        for part in ([node] if isinstance(node, ast.AST) else node)
        for one in ast.walk(part)
    )
