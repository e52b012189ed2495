"""Splitting one trusted assert into the expression that is sent and the check on its value.

Of ``assert LEFT == LITERAL`` the jailed side evaluates ``LEFT`` and the trusted side compares. It is possible
where ``LEFT`` does not itself give the answer away.
"""

from __future__ import annotations

import ast
from collections import Counter, deque
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from coderl.sandbox.codec import CodecError, decode, encode
from coderl.sandbox.compare import MIRRORED, OPERATORS, Check, Close, Near, Relation, Truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Unsealable(Exception):
    """These tests need the candidate's own objects, or would show it the answer."""


_BUILDERS: dict[str, Callable[..., Any]] = {
    **{kind.__name__: kind for kind in (set, frozenset, list, tuple, dict, float, complex, bytes)},
    **{kind.__name__: kind for kind in (Decimal, Fraction, deque, Counter)},
}
_SPINE = (ast.Call, ast.Name, ast.Attribute, ast.Subscript)


def literal(node: ast.expr) -> Any:
    """The value of an expression that is plain data, such as ``[1, (2, 'x')]`` or ``float('inf')``.

    Raises:
        Unsealable: It is not.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BUILDERS:
        if node.keywords:
            raise Unsealable("a constructor with keywords")
        return _build(_BUILDERS[node.func.id], map(literal, node.args))
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return _build({ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)], [map(literal, node.elts)])
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Unsealable("the expected value is not a literal") from None


def _build(kind: Callable[..., Any], arguments: Iterable[Any]) -> Any:
    try:
        return kind(*arguments)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise Unsealable(f"no literal: {error}") from None


def _is_literal(node: ast.expr) -> bool:
    try:
        literal(node)
    except Unsealable:
        return False
    return True


def _left(node: ast.expr, text: str) -> str:
    """Source of an expression that may be sent: calls, names, attributes and subscripts.

    Operators and comparisons may stand in arguments and nowhere else: ``(f(2) == 4) == True`` sends the 4.
    """
    top = node
    while isinstance(node, _SPINE):
        if isinstance(node, ast.Name):
            return f"({ast.get_source_segment(text, top)}\n)"
        node = node.func if isinstance(node, ast.Call) else node.value
    if isinstance(node, (ast.Constant, ast.JoinedStr)) and node is not top:  # ", ".join(f(x))
        return f"({ast.get_source_segment(text, top)}\n)"
    raise Unsealable("an operator stands outside the call")


def seal(node: ast.expr, text: str) -> tuple[str, Check]:
    """The expression to send and what its value must satisfy."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _left(node.operand, text), Truth(False)
    if isinstance(node, ast.Call) and _name(node.func) in ("math.isclose", "isclose"):
        return _close(node, text)
    if isinstance(node, ast.Compare):
        return _comparison(node, text)
    if not (isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))):
        raise Unsealable("the assert is not a comparison or a call")
    if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "all", "any", "bool", "hasattr"):
        raise Unsealable("the assert asks for a truth that the candidate's process would have to tell")
    return _left(node, text), Truth(True)


def _comparison(node: ast.Compare, text: str) -> tuple[str, Check]:
    if len(node.ops) != 1:
        raise Unsealable("a chained comparison")
    left, right, symbol = node.left, node.comparators[0], type(node.ops[0]).__name__
    if symbol in ("Is", "IsNot") and not (
        isinstance(right, ast.Constant) and right.value in (None, True, False)
    ):
        raise Unsealable("identity with something other than None, True or False")
    if _is_literal(right):
        near = _near(left, symbol, literal(right), text)
        return near or (_left(left, text), Relation(OPERATORS[symbol], _carried(literal(right))))
    if symbol not in MIRRORED:
        raise Unsealable("the expected value is not a literal")
    return _left(right, text), Relation(OPERATORS[MIRRORED[symbol]], _carried(literal(left)))


def _near(node: ast.expr, symbol: str, bound: Any, text: str) -> tuple[str, Check] | None:
    """``abs(f(x) - 1.5) < 1e-6``, either way round: the difference is taken on the trusted side."""
    inner = node.args[0] if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords else None
    if not (isinstance(node, ast.Call) and _name(node.func) == "abs" and isinstance(inner, ast.BinOp)):
        return None
    if not isinstance(inner.op, ast.Sub):
        return None
    call, value = (inner.left, inner.right) if _is_literal(inner.right) else (inner.right, inner.left)
    return _left(call, text), Near(OPERATORS[symbol], literal(value), bound)


def _close(node: ast.Call, text: str) -> tuple[str, Check]:
    """``math.isclose(f(x), 1.5, rel_tol=1e-6)``, either way round."""
    if len(node.args) != 2 or any(keyword.arg not in ("rel_tol", "abs_tol") for keyword in node.keywords):
        raise Unsealable("isclose with unknown arguments")
    call, value = node.args if _is_literal(node.args[1]) else reversed(node.args)
    tolerances = {str(keyword.arg): literal(keyword.value) for keyword in node.keywords}
    return _left(call, text), Close(
        literal(value), tolerances.get("rel_tol", 1e-9), tolerances.get("abs_tol", 0.0)
    )


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _carried(value: Any) -> Any:
    """The expected value, if an answer equal to it could be carried at all."""
    try:
        decode(encode(value))
    except CodecError as error:
        raise Unsealable(str(error)) from None
    return value
