"""Inline grading: the tests run beside the candidate, in its own process, as bigcode-evaluation-harness does.

It carries any test, and its verdict can be forged by a program that takes the trouble. Canaries catch the
cheap ways: they are asserts that are false whatever the candidate does, and one that passes fails the run.
"""

from __future__ import annotations

import ast
import secrets
from functools import lru_cache
from typing import TYPE_CHECKING

from coderl.sandbox.checks.base import Check, Tally, count_reports, parse
from coderl.sandbox.inside.codec import TRUSTED, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.sandbox.inside.wire import Record
    from coderl.sandbox.program import Program

_NEVER = ("assert False", "assert 0 == 1", "assert not 1", "assert [1] == [2] and 'a' == 'b'")


class Inline(Check):
    """The candidate's run reports each test, with a token that it read before the candidate ran."""

    grading = "inline"

    def __init__(self, program: Program) -> None:
        tests, canaries = inline_sources(program.tests, program.test, program.entry_point)
        self.total = len(tests)
        self._token = secrets.token_bytes(16)
        payload = {
            "role": "inline",
            "code": program.code,
            "setup": program.setup,
            "token": self._token,
            "tests": list(tests),
            "canaries": list(canaries),
            "harness": program.harness,
        }
        self.payloads = (encode(payload, TRUSTED),)

    def count(self, candidate: Iterator[Record], tests: Iterator[Record] | None) -> Tally:
        """Count the reports that carry the token."""
        return count_reports(candidate, self.total, self._token)


@lru_cache(maxsize=4096)
def inline_sources(
    tests: tuple[str, ...], test: str = "", entry_point: str = ""
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sources of the tests, and those of the canaries, each of which must raise.

    The canaries are constants, the tests with each expected value replaced by a string made for the purpose,
    and ``check`` given a function that answers NaN or a bare object.
    """
    if tests:
        bait = next(filter(None, map(_bait, tests)), "")
        return tests, (*_NEVER, bait) if bait else _NEVER
    if not test.strip():
        return (), ()
    if not entry_point:
        return (test,), tuple(filter(None, (*_NEVER, _bait(test))))
    call = f"\ncheck({entry_point})"
    wrong = [f"check(lambda *_, **__: {answer})" for answer in ("float('nan')", "object()")]
    bait = _bait(test) + call if _bait(test) else ""
    return (test + call,), tuple(filter(None, (*_NEVER, *wrong, bait)))


def _bait(source: str) -> str:
    """The tests with every asserted equality made false, or nothing where they assert none."""
    baiting = _Baiting()
    tree = baiting.visit(parse(source))
    return ast.unparse(tree) if baiting.found else ""


class _Baiting(ast.NodeTransformer):
    """Gives each equality that is asserted a right side that no honest answer equals."""

    found = False

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        test = node.test
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            test.comparators = [ast.Constant("no honest answer: 5f1d7c")]
            self.found = True
        return node
