"""What of a text of tests is compared outside, what is believed, and what never comes near the program."""

from __future__ import annotations

import pytest

from coderl.sandbox.checks.cut import cut
from coderl.sandbox.checks.sealed import literal

SEALED = [
    "assert f(2) == 4",
    "assert (f(2)) == 4 ",
    "assert 4 == f(2)",
    "assert f(2) is not None",
    "assert f(2)",
    "assert not f(2)",
    "assert ', '.join(f(2)) == 'a'",
    "assert sorted(f(2))[0] == 1",
    "assert f(2).strip().lower() == 'a'",
    "assert f(2, key=lambda x: -x) == 1",
    "assert f(\n [1,\n 2]) == (\n 3)",
    "assert abs(f(2) - 4) <= 1e-6",
    "assert abs(4.0 - f(2)) < 1e-6",
    "import math\nassert math.isclose(f(2), 4.0, rel_tol=1e-6)",
    "import numpy as np\nassert np.allclose(f(2), [4.0])",
    "assert f(2) == {float('inf'), -1j}",
    "assert sum(10, 15) == 6",
    "assert f(1) == 1 and f(2) == 4",
    "assert 1 < f(2) < 5",
    "assert f(2) + 1 == 5",
    "assert 4 in f(2)",
    "assert isinstance(f(2), (int, str))",
    "assert type(f(2)) is int",
    "assert (f(2) == 4) == True",
    "assert max(f(2), 4) == 4",
    "assert f(2).count('a') == 1",
    "assert f(2).__eq__(4)",
    "import operator\nassert operator.eq(f(2), 4)",
    "from decimal import Decimal\nassert f(2) == Decimal('0.5')",
    "assert all(f(x) == y for x, y in ((1, 1), (2, 4)) if x)",
    "for x in (1, 2): assert f(x) == x",
    "for i in range(3):\n    for j in range(i):\n        assert f(i, j) == i * j",
    "xs = [3, 1]\nassert f(xs) is None\nassert xs == [1, 3]",
    "xs = [3, 1]\nassert f(sorted(xs)) == [x + 1 for x in xs]",
    "stack = Stack()\nstack.push(1)\nassert stack.pop() == 1\nassert stack.is_empty()",
    "assert_equal(f(2), 4)",
    "with open('x', 'w') as file:\n    file.write('a')\nassert f('x') == 'a'",
    "while (x := 1) > 2: pass\nassert f(2) == 4",
]
BELIEVED = [
    ("assert f(2) == g(2)", "both"),
    ("assert len(f(2))", "truth"),
    ("assert f(2) is 4", "one of a kind"),
    ("ok = f(2) == 4\nassert ok", "truth"),
    ("ok = f(2) == 4\nassert ok == True", "truth"),
    ("try:\n    assert f(2) == 4\nexcept ValueError:\n    pass", "try"),
    ("for x in f(2): assert x == 1", "for"),
    ("def same(a, b): return a == b\nassert same(f(2), 4)", "truth"),
    ("def test(): assert f(2) == 4\ntest()", "function"),
    ("assert Vector(1) == 1", "object"),
    ("v = Vector(1) + Vector(2)\nassert v == [3]", "object"),
    ("assert (y := f(2)) == 4", "binds"),
    ("assert f(2) or g(2)", "truth"),
    ("assert callable(f(2))", "truth"),
    ("import random\nassert f(2) == random.random()", "both"),
    ("import time\nassert f(2) <= time.time()", "both"),
    ("assert f(2) == open('x').read()", "both"),
    ("xs = [1, 2]\nassert f(xs) == xs.pop()", "changes"),
]


@pytest.mark.parametrize("test", SEALED)
def test_an_assert_with_a_closed_side_is_sealed(test: str) -> None:
    parts = cut((test,))
    assert parts.claims
    assert not parts.believed


@pytest.mark.parametrize(("test", "reason"), BELIEVED)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_an_assert_without_one_is_believed(test: str, reason: str) -> None:
    parts = cut((test,))
    assert not parts.claims
    assert any(reason in why for why in parts.believed), parts.believed


@pytest.mark.parametrize(
    "test",
    [
        "assert f(2 # 12345\n) == 12345",
        "assert 12345 == f(2), '12345'",
        "assert abs(f(2) - 12345) < 1",
        "'''It is 12345.'''\nassert f(2) == 12345",
        "want = 12345\nassert f(2) == want",
        "want = []\nwant.append(12345)\nassert f(2) == want",
        "want = {}\nfor i in range(3):\n    want[i] = 12345\nassert f(2) == want",
        "def reference(x): return 12345\nassert f(2) == reference(2)",
        "expected = 12345\nassert f(2) == 12345",
        "for x, want in ((1, 12345), (2, 12345)): assert f(x) == want",
        "cases = [(1, 12345)]\nfor i, (x, want) in enumerate(cases): assert f(x) == want",
        "assert max(f(2), 12345) == 12345",
        "assert str(f(2) == 12345) == 'True'",
        "assert sorted([f(2), 12345])[0] == 12345",
        "assert (lambda y: y == 12345)(f(2)) == True",
        "assert all(f(x) == y for x, y in ((1, 12345),))",
    ],
)
def test_the_expected_value_is_never_sent(test: str) -> None:
    parts = cut((test,))
    assert not parts.believed
    assert "12345" not in "".join((parts.setup, *parts.tests))
    in_check = "def check(candidate):\n" + "".join(
        f"    {line}\n" for line in test.replace("f(", "candidate(").split("\n")
    )
    parts = cut((), test=in_check, entry_point="f")
    assert "12345" not in "".join(parts.tests)


def test_what_the_program_may_read_is_sent() -> None:
    test = "limit = 7\nassert f(12) == 12 % limit"
    assert "limit" not in cut((test,)).tests[0]
    assert "limit = 7" in cut((test,), reference="def f(x): return x % limit").tests[0]
    assert "LIMIT = 7" in cut((test.replace("limit", "LIMIT"),)).tests[0], "constants are often read"


@pytest.mark.parametrize(
    ("test", "shown"),
    [
        ("assert math.isclose(f(1), 0.5)", "math"),
        ("assert f(4) == sqrt(16)", "sqrt"),
        ("assert np.allclose(f(1), 0.5)", "np"),
        ("assert_equal(f(1), 0.5)", "assert_equal"),
    ],
)
def test_a_name_that_nobody_binds_is_looked_for_where_the_program_is(test: str, shown: str) -> None:
    """For in plain Python it is an error."""
    assert shown in cut((test,)).tests[0].splitlines()


def test_a_well_known_name_is_the_programs_where_its_reference_defines_it() -> None:
    test = "assert f(4) == sqrt(16)"
    assert cut((test,)).claims
    assert not cut((test,), reference="def sqrt(x): ...\ndef f(x): ...").claims


def test_a_capitalized_function_is_told_from_a_class() -> None:
    tests = ("assert Sum(1, 2) == 3", "assert Sum(2, 2) == 4")
    assert not cut(tests).believed
    assert cut(tests[:1]).believed
    assert not cut(tests[:1], reference="def Sum(a, b): return a + b").believed
    assert cut(tests, reference="class Sum: pass").believed


def test_literals_are_what_python_says() -> None:
    import ast

    for source in ("[1, (2, 'x')]", "{1: {2}}", "set()", "float('inf')", "frozenset([1])", "-1j", "None"):
        assert literal(ast.parse(source, mode="eval").body) == eval(source)
