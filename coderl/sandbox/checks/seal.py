"""Splitting one trusted assert into the expression that is sent and the check on its value.

Of ``assert LEFT == LITERAL`` the jailed side evaluates ``LEFT`` and the trusted side compares. It is possible
where ``LEFT`` does not itself give the answer away, so no literal may stand in it but as an input::

    LEFT  := CALL | WRAP(LEFT) | LEFT[constant] | LEFT.name | LEFT.name() | "constant".join(LEFT)
    CALL  := name(anything but the candidate's other functions)
    WRAP  := len | sorted | set | ... (of one argument)

``assert LEFT`` is sealed only for a CALL: of anything else the candidate's process would decide the verdict.
"""

from __future__ import annotations

import ast
import builtins
from collections import Counter, deque
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from coderl.sandbox.checks.base import Unsuitable
from coderl.sandbox.compare import MIRRORED, OPERATORS, Close, Comparison, Near, Relation, Truth
from coderl.sandbox.inside.codec import CodecError, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


# Not Decimal: to compare one with a huge integer takes time that the answer decides.
_BUILDERS: dict[str, Callable[..., Any]] = {
    **{kind.__name__: kind for kind in (set, frozenset, list, tuple, dict, float, complex, bytes)},
    **{kind.__name__: kind for kind in (Fraction, deque, Counter)},
}
_WRAPPERS = frozenset(
    (
        *(abs, all, any, bool, dict, float, frozenset, int, len, list, max, min),
        *(next, repr, reversed, round, set, sorted, str, sum, tuple),
    )
)
_BUILTINS = frozenset(dir(builtins))


def literal(node: ast.expr) -> Any:
    """The value of an expression that is plain data, such as ``[1, (2, 'x')]`` or ``float('inf')``.

    Raises:
        Unsuitable: It is not.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BUILDERS:
        if node.keywords:
            raise Unsuitable("a constructor with keywords")
        return _build(_BUILDERS[node.func.id], map(literal, node.args))
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return _build({ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)], [map(literal, node.elts)])
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Unsuitable("the expected value is not a literal") from None


def _build(kind: Callable[..., Any], arguments: Iterable[Any]) -> Any:
    try:
        return kind(*arguments)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise Unsuitable(f"no literal: {error}") from None


def _is_literal(node: ast.expr) -> bool:
    try:
        literal(node)
    except Unsuitable:
        return False
    return True


def _left(node: ast.expr) -> str:
    """Source of an expression that may be sent; written anew, so that no comment goes along."""
    if not (_is_call(node) or _is_wrapped(node)):
        raise Unsuitable("something other than an input stands beside the call")
    return ast.unparse(node)


def _is_call(node: ast.expr) -> bool:
    """Whether it calls one function of the candidate."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    if node.func.id in _BUILTINS:
        return redefined(node.func.id, [node])
    return not any(
        isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id not in _BUILTINS
        for argument in _arguments(node)
        for inner in ast.walk(argument)
    )


def _arguments(node: ast.Call) -> list[ast.expr]:
    return [*node.args, *(keyword.value for keyword in node.keywords)]


def redefined(name: str, calls: Iterable[ast.Call]) -> bool:
    """Whether calls of a builtin's name show that the candidate has redefined it: they give it literals."""
    return any(
        isinstance(node.func, ast.Name) and node.func.id == name and all(map(_is_literal, _arguments(node)))
        for node in calls
    )


def _is_wrapped(node: ast.expr) -> bool:
    """Whether it asks something of a LEFT without adding a value of its own."""
    inner: ast.expr | None = None
    if (isinstance(node, ast.Subscript) and _is_literal(node.slice)) or isinstance(node, ast.Attribute):
        inner = node.value
    elif isinstance(node, ast.Call) and not node.keywords:
        bare, one = not node.args, len(node.args) == 1
        if isinstance(node.func, ast.Name) and getattr(builtins, node.func.id, None) in _WRAPPERS and one:
            inner = node.args[0]
        elif isinstance(node.func, ast.Attribute) and bare:
            inner = node.func.value
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "join" and one:
            inner = node.args[0] if isinstance(node.func.value, ast.Constant) else None
    return inner is not None and (_is_call(inner) or _is_wrapped(inner))


def seal(node: ast.expr) -> tuple[str, Comparison]:
    """The expression to send and what its value must satisfy.

    Raises:
        Unsuitable: It would give the answer away, or be answered by the candidate.
    """
    if isinstance(node, ast.Compare):
        return _comparison(node)
    if isinstance(node, ast.Call) and _name(node.func) in ("math.isclose", "isclose"):
        return _close(node)
    expected = not (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))
    operand = node.operand if isinstance(node, ast.UnaryOp) else node
    if not _is_call(operand):
        raise Unsuitable("the assert asks for a truth that the candidate's process would have to tell")
    return _left(operand), Truth(expected)


def _comparison(node: ast.Compare) -> tuple[str, Comparison]:
    if len(node.ops) != 1:
        raise Unsuitable("a chained comparison")
    left, right, symbol = node.left, node.comparators[0], type(node.ops[0]).__name__
    if symbol in ("Is", "IsNot") and not (
        isinstance(right, ast.Constant) and right.value in (None, True, False)
    ):
        raise Unsuitable("identity with something other than None, True or False")
    if _is_literal(right):
        near = _near(left, symbol, literal(right))
        return near or (_left(left), Relation(OPERATORS[symbol], _carried(literal(right))))
    if symbol not in MIRRORED:  # "in" among them: the answer may be anything that can be searched
        raise Unsuitable("the expected value is not a literal")
    return _left(right), Relation(OPERATORS[MIRRORED[symbol]], _carried(literal(left)))


def _near(node: ast.expr, symbol: str, bound: Any) -> tuple[str, Comparison] | None:
    """``abs(f(x) - 1.5) < 1e-6``, either way round: the difference is taken on the trusted side."""
    inner = node.args[0] if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords else None
    if not (isinstance(node, ast.Call) and _name(node.func) == "abs" and isinstance(inner, ast.BinOp)):
        return None
    if not isinstance(inner.op, ast.Sub):
        return None
    call, value = (inner.left, inner.right) if _is_literal(inner.right) else (inner.right, inner.left)
    return _left(call), Near(OPERATORS[symbol], literal(value), bound)


def _close(node: ast.Call) -> tuple[str, Comparison]:
    """``math.isclose(f(x), 1.5, rel_tol=1e-6)``, either way round."""
    if len(node.args) != 2 or any(keyword.arg not in ("rel_tol", "abs_tol") for keyword in node.keywords):
        raise Unsuitable("isclose with unknown arguments")
    call, value = node.args if _is_literal(node.args[1]) else reversed(node.args)
    tolerances = {str(keyword.arg): literal(keyword.value) for keyword in node.keywords}
    return _left(call), Close(literal(value), tolerances.get("rel_tol", 1e-9), tolerances.get("abs_tol", 0.0))


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _carried(value: Any) -> Any:
    """The expected value, if an answer equal to it could be carried at all."""
    try:
        decode(encode(value))
    except CodecError as error:
        raise Unsuitable(str(error)) from None
    return value
