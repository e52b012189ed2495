"""Small changes to a program, each of which is likely to make it wrong: what tests are tried on."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator

from coderl.sandbox.checks.base import BadTests, parse, quiet

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

_BLOCKS = ("body", "orelse")

Edit = tuple[ast.AST, str, object]
"""A node, one of its fields, and the value that the field is given."""


def mutants(source: str, count: int, seed: int = 0, first_line: int = 1) -> list[str]:
    """Programs that differ from one in a single place each.

    Args:
        source: The program.
        count: How many, at most; a short program may not have so many.
        seed: Which ones, where there are more.
        first_line: The first line that may be changed; what stands before it was given.

    Returns:
        Sources, all different; none where the program is not Python.
    """
    try:
        tree = parse(source)
        original = ast.unparse(tree)
    except (BadTests, ValueError, RecursionError):
        return []
    edits = [
        edit
        for node in _nodes(tree)
        for edit in (*_own_edits(node), *_removals(node, first_line))
        if edit[1] in _BLOCKS or getattr(node, "lineno", 0) >= first_line
    ]
    random.Random(seed).shuffle(edits)
    found: dict[str, None] = {}
    quiet()
    for node, field, value in edits:
        if len(found) == count:
            break
        before = getattr(node, field)
        setattr(node, field, value)
        try:
            text = ast.unparse(tree)
            compile(text, "<test>", "exec")
        except (SyntaxError, ValueError, RecursionError):
            continue
        finally:
            setattr(node, field, before)
        if text != original:
            found[text] = None
    return list(found)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a program, without docstrings and what runs only as a script."""
    for node in ast.iter_child_nodes(tree):
        if not _is_unused(node):
            yield from _nodes(node)
    yield tree


def _own_edits(node: ast.AST) -> Iterator[Edit]:
    """The changes that can be made to one node itself."""
    if isinstance(node, ast.Compare):
        for other in _COMPARISONS.get(type(node.ops[0]), ()):
            yield node, "ops", [other(), *node.ops[1:]]
    elif isinstance(node, (ast.BinOp, ast.AugAssign)):
        for operation in _OPERATIONS.get(type(node.op), ()):
            yield node, "op", operation()
    elif isinstance(node, ast.BoolOp):
        yield node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield node, "test", ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Constant):
        yield from ((node, "value", value) for value in _constants(node.value))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield node, "value", ast.Constant(None)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            yield node, "func", ast.Name(_CALLS[node.func.id], ast.Load())
        if len(node.args) > 1:
            yield node, "args", node.args[::-1]


def _removals(node: ast.AST, first_line: int) -> Iterator[Edit]:
    """The blocks of a node with a statement less."""
    for field in _BLOCKS:
        block = getattr(node, field, None)
        if isinstance(block, list) and len(block) > 1:
            for at, one in enumerate(block):
                needed = isinstance(one, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
                if one.lineno >= first_line and not needed and not _is_unused(one):
                    yield node, field, block[:at] + block[at + 1 :]


def _is_unused(node: ast.AST) -> bool:
    """Whether it is a docstring, or runs only where the program is a script."""
    if isinstance(node, ast.If):
        return any(isinstance(one, ast.Name) and one.id == "__name__" for one in ast.walk(node.test))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _constants(value: object) -> tuple[object, ...]:
    if value is True or value is False:
        return (not value,)
    if isinstance(value, (int, float)):
        return value + 1, value - 1
    if isinstance(value, str):
        return (value + " ", "") if value else ("x",)
    return ()
