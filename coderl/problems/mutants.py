"""Small changes to a program, each of which is likely to make it wrong: what tests are tried on."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_OPERATIONS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add,),
    ast.Div: (ast.FloorDiv, ast.Mult),
    ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.FloorDiv,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitAnd,),
}
_CALLS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sorted": "list",
    "set": "list",
    "append": "extend",
}

Edit = Callable[[], None]


def mutants(source: str, count: int, seed: int = 0) -> list[str]:
    """Programs that differ from one in a single place each.

    Args:
        source: The program.
        count: How many, at most; a short program may not have so many.
        seed: Which ones, where there are more.

    Returns:
        Sources, all different; none where the program is not Python.
    """
    try:
        tree = ast.parse(source)
        original = ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError):
        return []
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    places = [
        (at, number)
        for at, node in enumerate(ast.walk(tree))
        for number, _ in enumerate(_edits(node))
        if not (isinstance(node, ast.Constant) and id(node) in docstrings)
    ]
    random.Random(seed).shuffle(places)
    found: dict[str, None] = {}
    for at, number in places:
        if len(found) == count:
            break
        changed = copy.deepcopy(tree)
        node = next(one for place, one in enumerate(ast.walk(changed)) if place == at)
        list(_edits(node))[number]()
        try:
            text = ast.unparse(ast.fix_missing_locations(changed))
            compile(text, "<mutant>", "exec")
        except (SyntaxError, ValueError, RecursionError):
            continue
        if text != original:
            found[text] = None
    return list(found)


def _edits(node: ast.AST) -> Iterator[Edit]:
    """The changes that can be made to one node, in place."""

    def put(field: str, value: object) -> Edit:
        return lambda: setattr(node, field, value)

    if isinstance(node, ast.Compare):
        for other in _COMPARISONS.get(type(node.ops[0]), ()):
            yield put("ops", [other(), *node.ops[1:]])
    elif isinstance(node, (ast.BinOp, ast.AugAssign)):
        for operation in _OPERATIONS.get(type(node.op), ()):
            yield put("op", operation())
    elif isinstance(node, ast.BoolOp):
        yield put("op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield put("test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant):
        yield from (put("value", value) for value in _constants(node.value))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield put("value", ast.Constant(None))
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            yield put("func", ast.Name(_CALLS[node.func.id], ast.Load()))
        if len(node.args) > 1:
            yield put("args", node.args[::-1])
    for field in ("body", "orelse"):
        part = getattr(node, field, None)
        if isinstance(part, list) and len(part) > 1:  # a statement less
            for at, one in enumerate(part):
                needed = isinstance(one, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
                if not needed and not _is_docstring(one):
                    yield put(field, part[:at] + part[at + 1 :])


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _constants(value: object) -> tuple[object, ...]:
    if value is True or value is False:
        return (not value,)
    if isinstance(value, (int, float)):
        return value + 1, value - 1
    if isinstance(value, str):
        return (value + " ", "") if value else ("x",)
    return ()
