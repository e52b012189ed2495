"""A call across processes behaves as a direct one would, and gives nothing away."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.errors import UserError
from coderl.sandbox import Program, Sandbox
from coderl.sandbox.checks.base import Unsuitable
from coderl.sandbox.checks.choose import choose
from coderl.sandbox.checks.rpc import rpc_plan
from coderl.sandbox.inside.rpc import Client, Gone, Named, Server, Unfit, _become

CODE = """
import dataclasses
limit = 7
def square(x): return x * x
def numbers(n):
    for i in range(n): yield i
def endless():
    i = 0
    while True:
        yield i
        i += 1
def fail(kind, *args): raise {'value': ValueError, 'own': Own, 'exit': SystemExit}[kind](*args)
class Own(LookupError): pass
def sort(items): items.sort()
def grow(table): table['new'] = [1]; table['old'].append(2); return table
def same(x): return x
@dataclasses.dataclass
class Point:
    x: int
    y: int = 0
    def moved(self, by): return Point(self.x + by, self.y)
def adder(n): return lambda m: n + m
def total(*args, start=0, **more): return start + sum(args) + sum(more.values())
def apply(f, x): return f(x)
def leave(): import os; os._exit(0)
def hang():
    while True: pass
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[Sandbox]:
    with Sandbox(workers=1, timeout=3.0, grading="rpc", allow_weak_isolation=True) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    "test",
    [
        "assert all(square(i) == i * i for i in range(5))",
        "assert list(map(square, [1, 2])) == [1, 4] and limit == 7",
        "assert list(numbers(3)) == [0, 1, 2] and sum(numbers(4)) == 6",
        "it = iter(endless()); assert [next(it) for _ in range(3)] == [0, 1, 2] and 5 in it",
        "try:\n fail('value', 'no', 3)\nexcept ValueError as e: assert e.args == ('no', 3)\nelse: assert 0",
        "try:\n fail('own', 'x')\nexcept LookupError: pass\nelse: assert False",
        "try:\n fail('exit', 3)\nexcept SystemExit as e: assert e.code == 3\nelse: assert False",
        "a = [3, 1]; b = a\nassert sort(a) is None and a == b == [1, 3]",
        "inner = [1]; t = {'old': inner}\nassert grow(t) is t and inner == [1, 2] and t['new'] == [1]",
        "x = [1]; assert same(x) is x and same((1, [2])) == (1, [2])",
        "p = Point(1); assert p.x == 1 and p.moved(2) == Point(3) != p and str(p) == 'Point(x=1, y=0)'",
        "p = Point(1); p.y = 5; assert p.y == 5 and same(p) is p and [same(p)] == [p]",
        "assert adder(2)(3) == 5 and adder(1)(adder(2)(3)) == 6",
        "assert total(1, 2, start=3, other=4) == 10 and total() == 0",
        "assert apply(len, [1, 2]) == 2 and apply(square, 3) == 9 and apply(str, 4) == '4'",
        "assert isinstance(square(2), int) and type(square(2.0)) is float and square(2) != '4'",
        "import math\nassert math.isclose(math.sqrt(square(2)), 2)",
        "assert same(range(3)) == range(3) and same({1: (2, {3})}) == {1: (2, {3})}",
    ],
)
def test_a_call_across_processes_behaves_as_a_direct_one(test: str, pool: Sandbox) -> None:
    exec(CODE + test, {})
    (result,) = pool.run([Program(CODE, (test,))])
    assert (result.outcome, result.grading) == ("passed", "rpc"), result


@pytest.mark.parametrize(
    ("test", "outcome"),
    [
        ("assert square(2) == 5 or square(3) == 8", "failed"),
        ("assert nothing(2) == 4 and True", "failed"),
        ("assert leave() and True", "error"),
        ("assert hang() and True", "timeout"),
        ("assert list(endless()) and True", "timeout"),
        ("try: leave()\nexcept BaseException: pass\nassert 1 < square(2)", "error"),
        ("assert square([]) and True", "failed"),
    ],
)
def test_outcomes_in_rpc_grading(test: str, outcome: str) -> None:
    with Sandbox(workers=1, timeout=0.7, grading="rpc", allow_weak_isolation=True) as sandbox:
        results = sandbox.run([Program(CODE, ("assert square(1) == 1 and True", test))])
    assert (results[0].outcome, results[0].passed, results[0].total) == (outcome, 1, 2), results


def test_all_calls_share_one_time_budget() -> None:
    code = "import time\ndef f(x):\n time.sleep(0.3)\n return x"
    with Sandbox(workers=1, timeout=1.0, grading="rpc", allow_weak_isolation=True) as sandbox:
        (result,) = sandbox.run([Program(code, ("assert [f(i) for i in range(9)] == list(range(9))",))])
    assert result.outcome == "timeout"
    assert result.seconds < 2.0


def test_the_candidate_cannot_redefine_helpers() -> None:
    prompt = "def double(x): return 2 * x\ndef half(x):\n    '''Undoes double.'''\n"
    cheat = "def double(x): return 0\ndef half(x): return 0"
    test = "def check(candidate):\n    assert all(double(candidate(2 * i)) == 2 * i for i in range(3))\n"
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        right, wrong = sandbox.run(
            [
                Program(code, test=test, entry_point="half", helpers=prompt)
                for code in (f"{prompt}    return x // 2", cheat)
            ]
        )
    assert (right.outcome, wrong.outcome) == ("passed", "failed")
    assert right.grading == wrong.grading == "rpc"


def test_tests_that_hand_over_their_own_functions_run_inline_from_then_on() -> None:
    tests = ("assert apply(lambda x: x + 1, 2) == 3 and True",)
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        assert [r.grading for r in sandbox.run([Program(CODE, tests)] * 2)] == ["inline", "inline"]
        assert sandbox.inline_reasons == {"rpc: the tests pass a function": 2}
        assert sandbox.run([Program("def apply(f, x): return 0", tests)])[0].outcome == "failed"
    with (
        Sandbox(workers=1, grading="rpc", allow_weak_isolation=True) as sandbox,
        pytest.raises(UserError, match="use grading: auto"),
    ):
        sandbox.run([Program(CODE, tests)])


def test_why_tests_run_inline_is_counted() -> None:
    own = ("try: fail('own')\nexcept Own: pass",)
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        sandbox.run([Program(CODE, own), Program(CODE, ("assert square(2) == 4",)), Program(CODE, own)])
        ((reason, number),) = sandbox.inline_reasons.items()
    assert number == 2
    assert "the tests need Own itself" in reason
    with Sandbox(workers=1, grading="inline", allow_weak_isolation=True) as sandbox:
        sandbox.run([Program(CODE, own)])
        assert not sandbox.inline_reasons, "it was asked for"


@pytest.mark.parametrize("answer", ["object()", "lambda: 0", "type('T', (), {})", "iter([])", "print"])
def test_the_candidate_cannot_choose_inline(answer: str) -> None:
    test = "def check(candidate):\n    for x in (1, 2):\n        assert candidate(candidate(x)) == x\n"
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        program = Program(f"def f(x): return {answer}", test=test, entry_point="f")
        assert [(r.outcome, r.grading) for r in sandbox.run([program])] == [("failed", "rpc")]


@pytest.mark.parametrize("tests", [("assert f(2) == 987654321",), ("assert f(2) == 987654321 and True",)])
def test_no_expected_value_reaches_the_candidate(tests: tuple[str, ...]) -> None:
    number = (987654321).to_bytes(4, "big")
    check, _ = choose(Program("def f(x): pass", tests, setup=""), "auto")
    candidate, *of_tests = check.payloads
    assert number not in candidate
    assert b"987654321" not in candidate
    assert all(b"987654321" in payload for payload in of_tests)


def test_names_in_tests_become_stubs_values_or_modules() -> None:
    plan = rpc_plan(("assert f(g(2)) == string.capwords(word) and len(list(map(h, [1])))",), "", "", "", "")
    assert (plan.names, plan.values, plan.modules) == (("f", "g"), ("h", "word"), ("string",))
    builtin = rpc_plan(("assert sum(10, 15) == 25 and True",), "", "", "", "")
    assert builtin.names == ("sum",), "what is asked for has a builtin's name"
    with pytest.raises(Unsuitable):
        rpc_plan(("assert 1 == 1 and True",), "", "", "", "")


def serving(namespace: dict[str, Any]) -> tuple[Client, threading.Thread, socket.socket]:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=Server(theirs.detach(), namespace).serve)
    thread.start()
    return Client(ours.fileno()), thread, ours


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False) | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(PLAIN, max_size=3))
def test_plain_data_crosses_unchanged(values: list[Any]) -> None:
    client, thread, ours = serving({"f": lambda *args: list(args)})
    try:
        assert Named(client, "f")(*values) == values
    finally:
        ours.close()
        thread.join(5)
    assert not thread.is_alive(), "the server ends with the link"


@settings(max_examples=100, deadline=None)
@given(old=st.lists(PLAIN), new=st.lists(PLAIN))
def test_an_argument_becomes_what_the_callee_made_of_it(old: list[Any], new: list[Any]) -> None:
    kept = old
    _become(old, new)
    assert old is kept
    assert old == new


@pytest.mark.parametrize("reply", [b"", b"\0\0\0\1x", b"\xff\xff\xff\xff", b"\0\0\0\5n\0\0\0\0"])
def test_malformed_replies_end_the_link(reply: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(reply)
        theirs.shutdown(socket.SHUT_WR)
        client = Client(ours.fileno())
        for _ in range(2):
            with pytest.raises(Gone):
                client.ask("name", "f", (), {})
        assert client.failure


class Evasive:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def __getitem__(self, key: Any) -> Any:
        return key


@pytest.mark.parametrize(
    "use",
    [
        lambda answer: answer.sort(key=lambda item: item),
        lambda answer: answer[...],
        lambda answer: answer.extend(map(int, "12")),
        lambda answer: setattr(answer, "name", object()),
        lambda answer: Named(answer._client, "f")(type(answer)),
        lambda answer: Named(answer._client, "f")(answer.__dict__),
        lambda answer: Named(answer._client, "f")(answer.__str__),
    ],
)
def test_an_answer_does_not_choose_the_grading(use: Callable[[Any], object]) -> None:
    client, thread, ours = serving({"f": Evasive})
    try:
        answer = Named(client, "f")()
        with pytest.raises(Gone):
            use(answer)
        assert isinstance(client.failure, Gone)
    finally:
        ours.close()
        thread.join(5)


def test_slices_can_be_passed() -> None:
    client, thread, ours = serving({"f": Evasive})
    try:
        answer = Named(client, "f")()
        assert answer[1:] == slice(1, None)
        assert answer[::2, 0] == (slice(None, None, 2), 0)
    finally:
        ours.close()
        thread.join(5)


def test_an_object_of_the_tests_own_cannot_be_passed() -> None:
    client, thread, ours = serving({"f": os.path.join})
    try:
        with pytest.raises(Unfit):
            Named(client, "f")(object())
    finally:
        ours.close()
        thread.join(5)
