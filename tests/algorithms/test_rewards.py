from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coderl.algorithms.rewards import ExecutionReward, Reward, Sample, quality, total
from coderl.errors import UsageError
from coderl.types import Completion, Execution, Outcome, Problem

SOLUTION = """def f(a, b):
    result = []
    for x in a:
        if x in b:
            result.append(x)
    return result
"""
PADDING = [
    "# a comment",
    "pass",
    "x = 0",
    '"""Text."""',
    "",
    "if False:\n    y = 1",
    "    ",
    "def g(): return None",
]
texts = st.text(st.sampled_from("abx01 \n\t#()[]=:._\"'"), max_size=200) | st.just(SOLUTION)


def sample(
    text: str = SOLUTION, outcome: Outcome = "passed", finished: bool = True, solution: str = SOLUTION
) -> Sample:
    problem = Problem("p", "", tests=("assert f([1], [1]) == [1]",), solution=solution)
    return Sample(problem, Completion(0, (), (), (), text, finished), text, Execution(outcome))


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_default_reward_of_each_outcome(outcome: Outcome) -> None:
    expected = {"passed": 1.1, "syntax_error": -0.2, "no_code": -0.2, "infra_error": math.nan}.get(
        outcome, 0.0
    )
    (value,) = ExecutionReward()([sample(outcome=outcome)])
    assert value == pytest.approx(expected, nan_ok=True)


@given(texts, st.sampled_from([o for o in get_args(Outcome) if o != "passed"]))
def test_quality_needs_a_pass(text: str, outcome: Outcome) -> None:
    assert quality(sample(text, outcome)) == 0.0


@given(texts, st.booleans())
def test_the_reward_of_a_pass_is_between_1_and_1_1(text: str, finished: bool) -> None:
    (value,) = ExecutionReward()([sample(text, finished=finished)])
    assert 1.0 <= value <= 1.1


@given(texts, st.text(max_size=30), st.integers(0, 200))
def test_inserting_code_never_raises_quality(text: str, extra: str, at: int) -> None:
    """Anything on lines of its own; a text that was unclean before stays so."""
    lines = text.split("\n")
    at = min(at, len(lines))
    padded = "\n".join([*lines[:at], extra, *lines[at:]])
    assert quality(sample(padded)) <= quality(sample(text))


@given(st.lists(st.tuples(st.sampled_from(PADDING), st.integers(0, 10)), min_size=1, max_size=8))
def test_padding_never_raises_quality(pads: list[tuple[str, int]]) -> None:
    lines, last = SOLUTION.split("\n"), 1.0
    for pad, at in pads:
        lines.insert(at, pad)
        now = quality(sample("\n".join(lines)))
        assert now <= last
        last = now


def test_length_is_compared_with_the_reference_solution() -> None:
    assert quality(sample(SOLUTION)) == 1.0
    assert quality(sample("def f(a, b): return [x for x in a if x in b]")) == 1.0, (
        "shorter earns nothing more"
    )
    assert 0.0 < quality(sample(SOLUTION + "# " + "word " * 10)) < 1.0
    assert quality(sample(SOLUTION * 3)) == 0.0
    assert quality(sample("x " * 40, solution="")) == 1.0
    assert quality(sample("x " * 400, solution="")) == 0.0
    assert quality(sample("x" * 30_000)) == 0.0


def test_completions_that_were_cut_off_have_no_quality() -> None:
    assert quality(sample(finished=False)) == 0.0


@pytest.mark.parametrize(
    "trick",
    [
        "try: pass\nexcept: pass",
        "try: pass\nexcept (BaseException): pass",
        "exec ('1')",
        "import sys; sys._getframe()",
        "import os; os._exit(0)",
        "class E:\n  def __eq__(self, o): return True",
        "assert True",
        "(exec)(bytes.fromhex('78'))",
        "e = exec\ne('1')",
        "list(map(exec, ['1']))",
        "\uff45\uff58\uff45\uff43('1')",
    ],
)
def test_constructs_that_honest_solutions_do_not_need_have_no_quality(trick: str) -> None:
    assert quality(sample(trick)) == 0.0
    assert quality(sample("x = 1")) == 1.0


def test_honest_programs_with_similar_words_keep_their_quality() -> None:
    for text in (
        "try: pass\nexcept ValueError: pass",
        "executor(1)",
        "evaluate(x)",
        "s.compiled",
        "exits = 1",
        "import re\nre.compile('a')",
    ):
        assert quality(sample(text)) == 1.0, text


class Fixed(Reward):
    def __init__(self, values: Sequence[float], weight: float) -> None:
        self.values, self.weight = list(values), weight

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return self.values


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), max_size=5), st.floats(-3, 3), st.floats(-3, 3)
)
def test_total_is_the_weighted_sum(values: list[tuple[float, float]], u: float, v: float) -> None:
    rewards = [Fixed([a for a, _ in values], u), Fixed([b for _, b in values], v)]
    assert total(rewards, [sample()] * len(values)) == pytest.approx([u * a + v * b for a, b in values])


def test_total_carries_nan() -> None:
    mixed = total([Fixed([1.0, math.nan], 0.0), Fixed([1.0, 1.0], 1.0)], [sample()] * 2)
    assert mixed[0] == 1.0
    assert math.isnan(mixed[1])


@pytest.mark.parametrize(
    "settings",
    [{"max_reward": 0.0}, {"syntax_penalty": 0.5}, {"quality_bonus": -0.1}, {"min_reward": math.nan}],
)
def test_settings_that_do_not_favour_passing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ExecutionReward(**settings)


def test_the_quality_bonus_can_be_turned_off() -> None:
    assert ExecutionReward(quality_bonus=0.0)(
        [sample(), replace(sample(), execution=Execution("failed"))]
    ) == [1.0, 0.0]
