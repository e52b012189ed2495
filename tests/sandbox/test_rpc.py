"""Rpc grading: tests in a process of their own behave as they would beside the program."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.sandbox import Program, Sandbox
from coderl.sandbox.checks.base import Unsuitable
from coderl.sandbox.checks.rpc import rpc_plan
from coderl.sandbox.inside.rpc import Client, Function, Gone, Server, _become

CODE = """
def square(x): return x * x
def sort(items): items.sort()
def grow(table): table['new'] = [1]; table['old'].append(2); return table
def fail(x): raise ValueError('no', x)
def leave(x): import os; os._exit(0)
def hang(x):
    while True: pass
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[Sandbox]:
    with Sandbox(workers=1, timeout=3.0, grading="rpc", allow_weak_isolation=True) as sandbox:
        yield sandbox


def check(body: str, name: str = "square", before: str = "") -> Program:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return Program(CODE, test=f"{before}\ndef check(candidate):\n{lines}", entry_point=name)


CLOSE = (
    "def close(out, want, tolerance):\n    assert type(out) == type(want) and abs(out - want) <= tolerance\n"
)


@pytest.mark.parametrize(
    "program",
    [
        check(
            "import random\nfor _ in 'ab':\n    x = random.randint(0, 9)\n    assert candidate(x) == x * x"
        ),
        check("for x, want in ((2, 4), (3, 9)):\n    close(candidate(x), want, 0)", before=CLOSE),
        check("for x in range(3):\n    got = candidate(x)\n    assert got == x * x and 0 <= got < 9"),
        check("assert all(candidate(x) == x * x for x in range(5))"),
        check(
            "for n in (1, 2):\n    xs = [n, 0]\n    got = candidate(xs)\n    assert xs == [0, n]",
            "sort",
        ),
        check(
            "for n in (1, 2):\n    t = {'old': [n]}\n    assert candidate(t) == t and t['new'] == [1]", "grow"
        ),
    ],
)
def test_tests_in_a_process_of_their_own_pass(program: Program, pool: Sandbox) -> None:
    exec(f"{program.code}\n{program.test}\ncheck({program.entry_point})", {})
    (result,) = pool.run([program])
    assert (result.outcome, result.grading) == ("passed", "rpc"), result


@pytest.mark.parametrize(
    ("name", "outcome"), [("sort", "failed"), ("fail", "failed"), ("leave", "error"), ("hang", "timeout")]
)
def test_outcomes_in_rpc_grading(name: str, outcome: str) -> None:
    program = check("for x in range(2):\n    assert candidate(x) == x * x", name)
    with Sandbox(workers=1, timeout=0.7, grading="rpc", allow_weak_isolation=True) as sandbox:
        assert sandbox.run([program])[0].outcome == outcome


def test_all_calls_share_one_time_budget() -> None:
    code = "import time\ndef f(x):\n time.sleep(0.3)\n return x"
    tests = ("for i in range(9):\n    assert f(i) == i",)
    with Sandbox(workers=1, timeout=1.0, grading="rpc", allow_weak_isolation=True) as sandbox:
        (result,) = sandbox.run([Program(code, tests)])
    assert result.outcome == "timeout"
    assert result.seconds < 2.0


def test_the_candidate_cannot_redefine_helpers() -> None:
    prompt = "def double(x): return 2 * x\ndef half(x):\n    '''Undoes double.'''\n"
    cheat = "def double(x): return 0\ndef half(x): return 0"
    test = "import random\ndef check(candidate):\n    for _ in range(3):\n        x = random.random()\n"
    test += "        assert double(candidate(x)) == x\n"
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        right, wrong = sandbox.run(
            [
                Program(code, test=test, entry_point="half", helpers=prompt)
                for code in (f"{prompt}    return x / 2", cheat)
            ]
        )
    assert (right.outcome, wrong.outcome) == ("passed", "failed")
    assert right.grading == wrong.grading == "rpc"


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("assert f(2) == 4", "no loop"),
        ("for x in (1, 2):\n    assert f(g(x)) == x", "more than one|other than one"),
        ("for x in (1, 2):\n    assert f(f(x)) == x", "what it answered|plain data"),
        ("for x in (1, 2):\n    y = f(x)\n    y.append(1)\n    assert y == [1]", "otherwise"),
        ("for x in (1, 2):\n    assert f(lambda: x) == x", "plain data"),
        ("for x in (1, 2):\n    assert isinstance(f(x), int)", "otherwise"),
        ("for x in (1, 2):\n    assert f(x) is f(x)", "identity"),
        ("import io\nfor x in (1, 2):\n    assert f(x) == 1", "io"),
        ("for x in (1, 2):\n    try:\n        f(x)\n    except ValueError:\n        pass", "try"),
        ("import random\nfor x in (1, 2):\n    random.seed(1)\n    assert f(x) == 1", "seed"),
        ("for x in (1, 2):\n    assert V(x) == V(x)", "objects"),
        ("class A: pass\nfor x in (1, 2):\n    assert f(x) == 1", "class"),
        ("def g(x): return f(x)\nfor x in (1, 2):\n    assert g(x) == 1", "calls the program"),
    ],
)
def test_tests_of_another_kind_are_not_run_apart(tests: str, reason: str) -> None:
    with pytest.raises(Unsuitable, match=reason):
        rpc_plan((tests,), "", "", "", "", "")


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
        assert Function(client, "f")(*values) == values
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
                client.call("f", (), {})
        assert client.failure
