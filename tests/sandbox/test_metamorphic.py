"""Tests that are written in another way and mean the same give the same verdict, graded no more strongly."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from coderl.sandbox import Program, Sandbox
from coderl.sandbox.checks.choose import CHECKS
from tests.sandbox.test_oracle import embedded, honest, mbpp, sample, with_mutants

RANK = {kind.grading: rank for rank, kind in enumerate(CHECKS)}


class Bound(ast.NodeTransformer):
    """``assert f(x) == y`` as ``got = f(x)`` and ``assert got == y``."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt] | ast.stmt:
        if not (isinstance(node.test, ast.Compare) and isinstance(node.test.left, ast.Call)):
            return node
        name = ast.Name("got_value", ast.Load())
        assign = ast.Assign([ast.Name("got_value", ast.Store())], node.test.left)
        node.test.left = name
        return [assign, node]


class Wanted(ast.NodeTransformer):
    """``assert f(x) == y`` as ``want = y`` and ``assert f(x) == want``."""

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt] | ast.stmt:
        if not (isinstance(node.test, ast.Compare) and isinstance(node.test.comparators[0], ast.Constant)):
            return node
        assign = ast.Assign([ast.Name("want_value", ast.Store())], node.test.comparators[0])
        node.test.comparators[0] = ast.Name("want_value", ast.Load())
        return [assign, node]


class Turned(ast.NodeTransformer):
    """``assert f(x) == y`` as ``assert y == f(x)``."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        test = node.test
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq) and len(test.ops) == 1:
            test.left, test.comparators[0] = test.comparators[0], test.left
        return node


class Renamed(ast.NodeTransformer):
    """Names that the test binds get others."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(f"{node.id}_of_mine", node.ctx) if node.id in self.names else node


def changed(transformer: ast.NodeTransformer) -> Callable[[str], str]:
    return lambda test: ast.unparse(ast.fix_missing_locations(transformer.visit(ast.parse(test))))


def renamed(test: str) -> str:
    tree = ast.parse(test)
    plain = (ast.Assign, ast.Assert, ast.For, ast.AugAssign, ast.Expr)
    if not all(isinstance(node, plain) for node in ast.walk(tree) if isinstance(node, ast.stmt)):
        return test
    stored = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return changed(Renamed(stored))(test)


def wrapped(test: str) -> str:
    body = "\n".join(f"    {line}" for line in test.splitlines())
    # What a program reads as a global, or another test uses, is no longer there.
    simple = all(isinstance(node, ast.Assert) for node in ast.parse(test).body) and "'''" not in test
    return f"def test_it():\n{body}\ntest_it()" if simple else test


WAYS: dict[str, Callable[[str], str]] = {
    "bound": changed(Bound()),
    "wanted": changed(Wanted()),
    "turned": changed(Turned()),
    "renamed": renamed,
    "wrapped": wrapped,
    "written anew": lambda test: ast.unparse(ast.parse(test)),
}


@pytest.mark.slow
def test_another_way_to_write_tests_changes_no_verdict(request: pytest.FixtureRequest) -> None:
    seed = int(os.environ.get("ORACLE_SEED", "0"))
    data_dir = request.getfixturevalue("data_dir")
    few = sample(honest(), 30, seed), sample(embedded(), 20, seed), sample(mbpp(data_dir), 40, seed)
    named = [(name, one) for part in few for name, one in with_mutants(part, 1, seed) if one.tests]
    with Sandbox(timeout=5.0, allow_weak_isolation=True) as sandbox:
        before = sandbox.run([one for _, one in named])
        for way, write in WAYS.items():
            after = sandbox.run([rewritten(one, write) for _, one in named])
            wrong = [
                f"{way}: {name}: {old.grading} {old.outcome} -> {new.grading} {new.outcome} ({new.message})\n"
                + "\n".join(rewritten(one, write).tests)
                for (name, one), old, new in zip(named, before, after, strict=True)
                if (old.outcome == "passed") != (new.outcome == "passed")
                or RANK[new.grading] < RANK[old.grading]
            ]
            assert not wrong, "\n".join(wrong)


def rewritten(one: Program, write: Callable[[str], str]) -> Program:
    return replace(one, tests=tuple(map(write, one.tests)))
