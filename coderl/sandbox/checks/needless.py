"""Statements of tests that only closed sides need, so that the candidate's process never gets them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Set
from typing import TYPE_CHECKING

from coderl.sandbox.checks.names import binds, changes, reads

if TYPE_CHECKING:
    from coderl.sandbox.checks.claims import Claim


class Needless:
    """The statements to leave out of an inner program.

    Args:
        claims: The closed sides.
        inner: The statements of the inner program.
        outer: Those of the outer program.
        fed: Names that loops of the outer program alone go through.
        kept: Names that are sent whatever becomes of them.
        probes: Names that nobody may have bound, which is an error even in a statement that is left out.
    """

    def __init__(
        self,
        claims: Iterable[Claim],
        inner: list[ast.stmt],
        outer: list[ast.stmt],
        fed: set[str],
        kept: Iterable[str],
        probes: Set[str],
    ) -> None:
        self._probes = probes
        claims = list(claims)
        both = {id(node) for node in leaves(outer)}
        found = [(node, changes(node) - _counters(node), id(node) in both) for node in leaves(inner)]
        only = fed | reads([side for claim in claims for side in claim.closed])
        for node, changed, _ in reversed(found):
            only |= reads(node) if changed & only else set()
        only |= {name for node, _, _ in found for name in _given_away(node, claims)}
        only -= set(kept)
        size = -1
        while len(only) != size:
            size = len(only)
            for node, changed, closed in found:
                if not (closed and changed and changed <= only):
                    only -= reads(node) | changed
        self._found = {id(node) for node, changed, closed in found if closed and changed and changed <= only}

    def dropped(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """The statements without the needless ones."""
        kept: list[ast.stmt] = []
        for node in body:
            if id(node) in self._found:
                looked_for = sorted(reads(node) & self._probes)
                kept += [ast.Expr(ast.Name(name, ast.Load())) for name in looked_for]
                continue
            for part in ("body", "orelse", "finalbody") if not _is_leaf(node) else ():
                if getattr(node, part, None):
                    setattr(node, part, self.dropped(getattr(node, part)) or [ast.Pass()])
            kept.append(node)
        return kept


def _counters(node: ast.stmt) -> set[str]:
    """What the loops of a statement count with."""
    return {name for one in ast.walk(node) if isinstance(one, ast.For) for name in binds(one.target)}


def _given_away(node: ast.stmt, claims: Iterable[Claim]) -> set[str]:
    """Names that a statement binds to the very constant that an assert compares with."""
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)):
        return set()
    constants = [side.value for claim in claims for side in claim.closed if isinstance(side, ast.Constant)]
    return binds(node) if node.value.value in constants else set()


def _is_leaf(node: ast.stmt) -> bool:
    """Whether it is to be sent as a whole. What the cut has made of a compound statement is marked."""
    return not getattr(
        node, "made", isinstance(node, (ast.If, ast.For, ast.While, ast.With)) and _sends(node)
    )


def _sends(node: ast.AST) -> bool:
    return any(isinstance(one, ast.Name) and one.id in ("__send__", "__expect__") for one in ast.walk(node))


def leaves(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements, and those within what is taken apart; of that, the head as an expression."""
    for node in body:
        if _is_leaf(node):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                yield node
            continue
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                yield ast.Expr(part)
            elif isinstance(part, ast.withitem):
                yield ast.Expr(part.context_expr)
        for name in ("body", "orelse", "finalbody"):
            yield from leaves(getattr(node, name, []))
