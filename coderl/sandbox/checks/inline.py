"""Inline grading: the tests run beside the candidate, in its own process, as bigcode-evaluation-harness does.

It carries any test, and its verdict can be forged by a program that takes the trouble. Canaries catch the
cheapest way, which is to do away with asserts: they are false whatever the candidate does, and one that
passes fails the run.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from coderl.sandbox.checks.base import Check, Tally, count_reports, parse, tried
from coderl.sandbox.checks.claims import asks_nothing
from coderl.sandbox.inside.codec import TRUSTED, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.sandbox.checks.base import Shared
    from coderl.sandbox.inside.wire import Record
    from coderl.sandbox.program import Program

_NEVER = ("assert False", "assert 0 == 1", "assert not 1", "assert [1] == [2] and 'a' == 'b'")


class Inline(Check):
    """The candidate's run reports each test, with a token that it read before the candidate ran."""

    grading = "inline"

    def __init__(self, program: Program, shared: Shared) -> None:
        tests = inline_sources(program.tests, program.test, program.entry_point)
        if not program.harness and shared.once((Inline, tests), lambda: _ask_nothing(tests)):
            tests = ()
        self.total = len(tests)
        self._token = secrets.token_bytes(16)
        payload = {
            "role": "inline",
            "code": program.code,
            "given": "" if program.harness else program.helpers,
            "setup": program.setup,
            "token": self._token,
            "tests": list(tests),
            # The harness has none, and a program that equals everything passes there.
            "canaries": [] if program.harness else list(_NEVER),
            "harness": program.harness,
        }
        self.payloads = (encode(payload, TRUSTED),)

    def count(self, candidate: Iterator[Record], tests: Iterator[Record] | None) -> Tally:
        """Count the reports that carry the token."""
        return count_reports(candidate, self.total, self._token)


def passes_inline(program: Program, shared: Shared) -> bool:
    """Whether a trusted program passes in plain Python."""
    return tried(Inline(program, shared), shared) == "passed"


def _ask_nothing(tests: tuple[str, ...]) -> bool:
    return all(asks_nothing(parse(test).body) for test in tests)


def inline_sources(tests: tuple[str, ...], test: str = "", entry_point: str = "") -> tuple[str, ...]:
    """The sources of the tests."""
    if tests or not test.strip():
        return tests
    return (f"{test}\ncheck({entry_point})" if entry_point else test,)
