"""Sealed grading: the candidate's process runs the tests, and never sees what their values should be.

The text of the tests is cut in two (:mod:`coderl.sandbox.checks.cut`). The inner program runs beside the
candidate and sends out the value of each assert's open side; the closed sides are worked out once for all
candidates (:func:`plan`) and compared here. Where some asserts have no closed side, :class:`Partly` believes
these and holds the program to the others.
"""

from __future__ import annotations

import ast
import marshal
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from coderl.sandbox.checks.base import Check, Tally, Unsuitable, quiet, safe, show, tried, wrong_answer
from coderl.sandbox.checks.cut import Cut, cut
from coderl.sandbox.checks.inline import passes_inline
from coderl.sandbox.compare import Expectation
from coderl.sandbox.inside import wire
from coderl.sandbox.inside.codec import ANSWER, SENT, TRUSTED, Budget, CodecError, Limits, decode, encode

if TYPE_CHECKING:
    from coderl.sandbox.checks.base import RunInLanes, Shared
    from coderl.sandbox.inside.wire import Record
    from coderl.sandbox.program import Program
    from coderl.types import Execution, Grading, Tier

_WITH_DECIMALS = 512
"""Bytes of the longest integer that is compared with a decimal."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How programs are graded by one text.

    Attributes:
        inner: What the candidate's process gets: bytecode of the setup and of each test (or of one ``check``
            with all of them), and the inputs of loops that do not get them from the text.
        expected: For each test, what its answers must satisfy, in order.
        places: Likewise, where in the text it is asked for.
        answers: Likewise, the very bytes of a right answer, where equality is asked for; else None.
        decimals: Whether an answer is compared with a decimal.
        outer: The outer program, where some answers are to be judged by it; else empty.
        believed: Why asserts are believed.
        sealed: Number of asserts that are not.
    """

    inner: bytes
    expected: tuple[tuple[Expectation, ...], ...]
    places: tuple[tuple[str, ...], ...]
    answers: tuple[tuple[bytes | None, ...], ...]
    decimals: bool
    outer: str
    believed: tuple[str, ...]
    sealed: int

    def budget(self) -> Budget:
        """What decoding all answers may cost: more where right ones are many, or large."""
        sizes = [len(data or b"") for one in self.answers for data in one]
        size, nodes = ANSWER.size + 2 * sum(sizes), ANSWER.nodes + 3 * len(sizes)
        # To compare an integer with a decimal takes time quadratic in its length.
        integer = _WITH_DECIMALS if self.decimals else ANSWER.integer
        return Budget(replace(ANSWER, size=size, nodes=nodes, integer=integer))


def plan(program: Program, shared: Shared) -> Plan:
    """Cut a program's tests and work out their closed sides; those that are no literals in an outer run.

    A right program must pass. Where it does so in plain Python and not here, as when its answer is an object
    that equals what is expected, the asserts in question are believed.

    Raises:
        BadTests: The tests are not Python.
        Unsuitable: They cannot be taken apart.
    """
    spoiled: frozenset[str] = frozenset()
    try:
        while True:
            made, spoiled = _planned(program, shared, spoiled)
            wrong = _wrongly_refused(program, made, shared) if program.reference and made.sealed else set()
            if wrong <= spoiled:
                return made
            spoiled |= wrong
    except (RecursionError, MemoryError, SyntaxError, ValueError):
        # Text that is deeper than the tree can be walked, or that cannot be written anew.
        raise Unsuitable("the tests cannot be taken apart") from None


def _wrongly_refused(program: Program, made: Plan, shared: Shared) -> set[str]:
    """The places where a right program is refused that passes in plain Python."""
    right = replace(program, code=program.reference)
    check = Partly(right, shared, made)
    if tried(check, shared) == "passed" or not check.wrong:
        return set()
    return check.wrong if passes_inline(right, shared) else set()


def _planned(program: Program, shared: Shared, spoiled: frozenset[str]) -> tuple[Plan, frozenset[str]]:
    """A plan, and the places that cannot be compared."""
    while True:
        parts = cut(*program.trusted, spoiled=spoiled)
        literals = _literals(parts) if parts.steady else None
        if literals is not None:
            return _plan(parts, literals, {}), spoiled
        found = _run_outer(shared.run_trusted, parts.outer, None)
        if found["failure"]:
            found["spoiled"] = dict.fromkeys(parts.claims, found["failure"])
        more = spoiled | found["spoiled"].keys()
        if more == spoiled:
            trace = [(place, decode(value, TRUSTED)) for place, value in found["trace"]]
            return _plan(parts, trace, found["inputs"]), spoiled
        spoiled = more


def _plan(
    parts: Cut, trace: Iterable[tuple[str, tuple[Any, ...]]], inputs: dict[str, list[list[bytes]]]
) -> Plan:
    test_of = {place: number for number, places in enumerate(parts.order) for place in places}
    expected: list[list[Expectation]] = [[] for _ in range(parts.total)]
    places: list[list[str]] = [[] for _ in range(parts.total)]
    for place, closed in trace:
        claim = parts.claims[place]
        places[test_of[place]].append(place)
        expected[test_of[place]].append(
            Expectation(claim.kind, closed, claim.operators, claim.hole, claim.keywords, claim.negated)
        )
    setup = _compiled(parts.setup) if parts.setup else b""
    return Plan(
        encode((setup, [_compiled(test) for test in parts.tests], inputs), TRUSTED),
        tuple(map(tuple, expected)),
        tuple(map(tuple, places)),
        tuple(tuple(map(_right_bytes, one)) for one in expected),
        any(one.kind != "judged" and b"D" in encode(one.closed, SENT) for test in expected for one in test),
        parts.outer if any(claim.kind == "judged" for claim in parts.claims.values()) else "",
        parts.believed,
        len(parts.claims),
    )


def _compiled(source: str) -> bytes:
    quiet()
    # Compiled once for all runs: lanes have the very interpreter that this process runs in.
    return marshal.dumps(compile(source, "<test>", "exec", dont_inherit=True))


def _right_bytes(expected: Expectation) -> bytes | None:
    """The bytes that an answer has which equals what is expected; None where more is asked than equality."""
    if expected.kind != "chain" or expected.operators != ("Eq",) or expected.negated:
        return None
    try:
        data = encode(expected.closed[0], SENT)
        # A NaN is not equal to itself, whatever its bytes say.
        return data if decode(data, TRUSTED) == expected.closed[0] else None
    except (CodecError, ValueError, TypeError, ArithmeticError):
        return None


def _literals(parts: Cut) -> list[tuple[str, tuple[Any, ...]]] | None:
    """The closed sides in order, if all of them are literals."""
    try:
        return [
            (place, tuple(map(literal, parts.claims[place].closed)))
            for places in parts.order
            for place in places
        ]
    except Unsuitable:
        return None


_BUILDERS: dict[str, Callable[..., Any]] = {
    **{kind.__name__: kind for kind in (set, frozenset, list, tuple, dict, float, complex, bytes)},
}


def literal(node: ast.expr) -> Any:
    """The value of an expression that is plain data, such as ``[1, (2, 'x')]`` or ``float('inf')``.

    Raises:
        Unsuitable: It is not.
    """
    try:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return _BUILDERS[node.func.id](*map(literal, node.args))
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)](map(literal, node.elts))
        return ast.literal_eval(node)
    except (LookupError, ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError, MemoryError):
        raise Unsuitable("no literal") from None


class Partly(Check):
    """The candidate's run answers each test with the values that the plan asks for.

    Attributes:
        wrong: The places of answers that turned out wrong.
    """

    grading: ClassVar[Grading] = "partly"

    def __init__(self, program: Program, shared: Shared, made: Plan | None = None) -> None:
        self.plan = made = made or shared.once((plan, program.trusted), lambda: plan(program, shared))
        self.total = len(made.expected)
        self.wrong: set[str] = set()
        self._answers: list[tuple[int, str, list[bytes]]] = []  # that are to be judged: test, place, values
        self._refuse()
        self._token = secrets.token_bytes(16)
        payload = {
            "role": "inner",
            "code": program.code,
            "given": program.helpers,
            "inner": made.inner,
            "token": self._token,
        }
        self.payloads = (encode(payload, TRUSTED),)

    def _refuse(self) -> None:
        if not self.plan.sealed:
            raise Unsuitable(self.plan.believed[0] if self.plan.believed else "the tests assert nothing")

    def grade(self, run: RunInLanes, tier: Tier) -> Execution:
        """Run the program, compare its answers, and have the rest of them judged."""
        result = super().grade(run, tier)
        if not self.plan.outer or result.outcome != "passed":
            return result
        answers = [one for _, _, one in self._answers]
        found = _run_outer(run, self.plan.outer, answers)
        if found["failure"] or len(found["verdicts"]) != len(self._answers):
            message = safe(found["failure"] or "its answers were not judged")
            return replace(result, outcome="failed", passed=0, message=message)
        wrong: dict[int, str] = {}
        for (test, place, _), verdict in zip(self._answers, found["verdicts"], strict=True):
            if verdict:
                wrong.setdefault(test, verdict)
                self.wrong.add(place)
        if not wrong:
            return result
        first = min(wrong)
        message = safe(f"test {first + 1}: {wrong[first]}")
        return replace(result, outcome="failed", passed=self.total - len(wrong), message=message)

    def count(self, candidate: Iterator[Record], tests: Iterator[Record] | None) -> Tally:
        """Compare each test's values."""
        tally = Tally()
        budget = self.plan.budget()
        for number in range(self.total):
            record = next(candidate, None)
            if record is None:
                return tally
            if record.kind == "end":
                break
            if record.kind != "values" or record.token != self._token:
                tally.fail(*wrong_answer(number, record))
                self.wrong.update(self.plan.places[number])
            elif (wrong := self._first_wrong(number, record.value, budget)) is None:
                tally.passed += 1
            else:
                tally.fail("failed", f"test {number + 1}: {wrong}")
        tally.ended = True
        return tally

    def _first_wrong(self, test: int, data: Any, budget: Budget) -> str | None:
        """What is wrong with a test's answers; no more of them is decoded than is needed to say so."""
        expected, right = self.plan.expected[test], self.plan.answers[test]
        counts = [one.closed[0] if one.kind == "judged" else 1 for one in expected]
        try:
            answers = decode(data, Limits(SENT.size, nodes=sum(counts) + 1, depth=1))
        except CodecError:
            answers = None
        if (
            type(answers) is not list
            or len(answers) != sum(counts)
            or {type(one) for one in answers} - {bytes}
        ):
            return "it did not answer what it was asked"
        rest = iter(answers)
        for one, place, count, same in zip(expected, self.plan.places[test], counts, right, strict=True):
            mine = list(islice(rest, count))
            if one.kind == "judged":
                self._answers.append((test, place, mine))
                continue
            if mine[0] == same:
                continue
            try:
                value = decode(mine[0], budget=budget)
            except CodecError as error:
                self.wrong.add(place)
                return f"wrong answer, which is not read to its end: {error}"
            if not one.holds(value):
                self.wrong.add(place)
                return f"wrong answer {show(value)}"
        return None


class Sealed(Partly):
    """All of the asserts are compared here, so that a verdict cannot be forged."""

    grading = "sealed"

    def _refuse(self) -> None:
        if self.plan.believed:
            raise Unsuitable(self.plan.believed[0])
        super()._refuse()


def _run_outer(run: RunInLanes, source: str, answers: list[list[bytes]] | None) -> dict[str, Any]:
    """What came of an outer program, with or without answers to judge; a ``failure`` where nothing did."""
    payload = {"role": "outer", "source": source, "answers": answers}
    (done,) = run([encode(payload, TRUSTED)], trusted=True)
    for record in wire.records(done.data):
        if record.kind == "outer":
            return dict(decode(record.value, TRUSTED))
    why = "takes too long" if done.how == wire.TIMED_OUT else "ends without a result"
    failure = f"what the tests compare {why}"
    return {"failure": failure, "trace": [], "inputs": {}, "spoiled": {}, "verdicts": []}
