"""What tests catch, against counting by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coderl.problems.mutants import mutants
from coderl.review import look, measure
from coderl.review.strength import change, trivial_programs
from coderl.sandbox import Sandbox
from coderl.types import Problem
from tests.review.test_look import in_humaneval_form, problem

SIGN = "def f(x):\n    if x > 0:\n        return 1\n    return -1"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2, timeout=2.0, allow_weak_isolation=True) as pool:
        yield pool


def passes(code: str, tests: tuple[str, ...]) -> bool:
    space: dict[str, object] = {}
    try:
        exec("\n".join([code, *tests]), space)
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    "tests", [["assert f(3) == 1"], ["assert f(3) == 1", "assert f(-3) == -1", "assert f(0) == -1"]]
)
def test_changes_are_counted_as_plain_python_judges_them(tests: list[str], sandbox: Sandbox) -> None:
    made = problem(code=SIGN, test_list=tests)
    (strength,) = measure(look([made], sandbox), sandbox, 100)
    changed = mutants(made.prompt + SIGN, 100)
    survivors = [code for code in changed if passes(code, made.tests)]
    assert list(strength.survivors) == survivors
    assert (strength.caught, strength.total) == (len(changed) - len(survivors), len(changed))
    trivial = [name for name, code in trivial_programs(made).items() if passes(code, made.tests)]
    assert list(strength.trivial) == trivial


def test_one_test_lets_a_constant_through_and_two_do_not(sandbox: Sandbox) -> None:
    one = problem(code=SIGN, test_list=["assert f(3) == 1"])
    two = problem(2, code=SIGN, test_list=["assert f(3) == 1", "assert f(-3) == -1"])
    first, second = measure(look([one, two], sandbox), sandbox, 3)
    assert (first.trivial, second.trivial) == (("return 1",), ())
    assert first.weak


NONE_AND_ARGUMENT = ["pass", "return None", "return the argument"]


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (problem(), ["pass", "return None", "return the argument", "return 2"]),
        (in_humaneval_form(), ["pass", "return None", "return the argument", "return 2"]),
        (problem(test_list=["assert f(2)"]), ["pass", "return None", "return the argument", "return True"]),
        (problem(code=""), ["pass", "return None", "return the argument", "return 2"]),
        (
            problem(test_list=["import math\nassert math.isclose(f(1), 2.5)"]),
            [*NONE_AND_ARGUMENT, "return 2.5"],
        ),
        (problem(test_list=["assert 1 == 1"]), ["pass"]),
    ],
)
def test_trivial_programs_are_made_of_the_functions_that_the_tests_call(
    made: Problem, names: list[str]
) -> None:
    assert list(trivial_programs(made)) == names


def test_what_the_prompt_defines_is_not_changed(sandbox: Sandbox) -> None:
    helper = "def unused(x):\n    return x * 2 + 1 - 3\n\n\n"
    made = in_humaneval_form(prompt=f'{helper}def f(x):\n    """One more."""\n')
    (strength,) = measure(look([made], sandbox), sandbox, 100)
    assert (strength.caught, strength.survivors) == (6, ())


def test_statements_of_a_solution_that_continues_a_prompt_are_left_out_in_turn() -> None:
    prompt, solution = "def f(x):\n    'Words.'\n", "    x = x + 0\n    y = x\n    return y\n"
    changed = mutants(prompt + solution, 100, first_line=3)
    assert sum("y = x" not in code for code in changed) == 1
    assert sum("return" not in code for code in changed) == 1
    assert all("Words." in code for code in changed)


def test_what_runs_only_as_a_script_is_not_changed() -> None:
    source = "def f(x):\n    return x\n\nif __name__ == '__main__':\n    print(f(1) + 2)"
    assert all("print(f(1) + 2)" in code for code in mutants(source, 50))


def test_a_problem_at_fault_is_not_tried(sandbox: Sandbox) -> None:
    (strength,) = measure(look([problem(test_list=[""])], sandbox), sandbox, 5)
    assert (strength.total, strength.trivial) == (0, ())


def test_docstrings_are_not_changed() -> None:
    for code in mutants('"""Words."""\ndef f(x):\n    """More words."""\n    return x + 1', 50):
        assert '"""Words."""' in code and '"""More words."""' in code


def test_the_change_is_shown() -> None:
    assert (
        change("def f(x):\n    return x+1", "def f(x):\n    return x - 1") == "return x + 1 -> return x - 1"
    )


def test_of_a_long_line_the_part_is_shown_that_was_changed() -> None:
    right, changed = (f"x = [{', '.join(map(str, range(100)))}, {last}]" for last in (5, 6))
    old, new = change(right, changed).split(" -> ")
    assert old.startswith("...") and old.endswith("98, 99, 5]") and new.endswith("98, 99, 6]")
