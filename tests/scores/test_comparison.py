from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.scores.compare import compare_task
from coderl.scores.statistics import bootstrap_interval, pass_at_k, sign_test
from coderl.scores.table import text


def task(
    correct: Sequence[int], n: int = 1, ks: Sequence[int] = (1,), ids: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    ids = list(ids) or [f"mbpp/{i}" for i in range(len(correct))]
    counts = {"n": n, "ids": ids, "correct": list(correct), "counted": [n] * len(ids)}
    return {f"pass@{k}": None for k in ks} | counts | more


# --- the test


def test_sign_test_is_the_share_of_coin_tosses_as_uneven() -> None:
    for won, lost in itertools.product(range(7), range(7)):
        tosses = list(itertools.product([0, 1], repeat=won + lost))
        far = sum(abs(2 * sum(toss) - len(toss)) >= abs(won - lost) for toss in tosses)
        assert sign_test(won, lost) == pytest.approx(far / len(tosses), abs=1e-15)


@given(st.integers(0, 400), st.integers(0, 400))
def test_sign_test_agrees_with_binomial_sums(won: int, lost: int) -> None:
    n = won + lost
    tail = math.fsum(math.comb(n, i) / 2**n for i in range(max(won, lost), n + 1))
    assert sign_test(won, lost) == pytest.approx(min(1, 2 * tail), rel=1e-9)
    assert sign_test(won, lost) == sign_test(lost, won)


def test_sign_test_of_chance_alone_is_significant_no_more_often_than_it_says() -> None:
    for n, level in itertools.product((1, 5, 20, 101), (0.01, 0.05, 0.3)):
        chance = sum(math.comb(n, i) / 2**n for i in range(n + 1) if sign_test(i, n - i) <= level)
        assert chance <= level


def test_sign_test_of_many_problems_and_of_none() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(2000, 1000) < 1e-70
    assert sign_test(0, 5000) == 0.0  # below the least float
    with pytest.raises(ValueError, match="not counts"):
        sign_test(-1, 3)


# --- the comparison

rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)


@settings(max_examples=30, deadline=None)
@given(rows)
def test_swapping_the_sides_mirrors_everything(pairs: list[tuple[int, int]]) -> None:
    x, y = (task(side, 4, (1, 2)) for side in zip(*pairs, strict=True))
    there, back = compare_task("mbpp", x, y), compare_task("mbpp", y, x)
    assert there.difference == -back.difference
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), abs=1e-12)
    assert (there.won, there.lost, there.tied) == (back.lost, back.won, back.tied)
    assert (there.p_value, there.test) == (back.p_value, back.test)
    assert {there.better, back.better} in ({"A", "B"}, {""})


@settings(max_examples=30, deadline=None)
@given(rows)
def test_scores_follow_from_the_counts(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    result = compare_task("mbpp", task(x, 4, (1, 3)), task(y, 4, (1, 2, 3)))
    assert list(result.scores) == [1, 3]
    for k, score in result.scores.items():
        values = [(pass_at_k(4, a, k), pass_at_k(4, b, k)) for a, b in pairs]
        assert score.a == pytest.approx(fmean(a for a, _ in values))
        assert score.b == pytest.approx(fmean(b for _, b in values))
        assert score.difference == pytest.approx(fmean(b - a for a, b in values))
        assert score.interval == bootstrap_interval([b - a for a, b in values])
        assert (score.interval_a, score.problems) == (bootstrap_interval([a for a, _ in values]), len(pairs))
    assert result.difference == result.rate_b - result.rate_a
    assert set(result.won) == {f"mbpp/{i}" for i, (a, b) in enumerate(pairs) if b > a}
    assert set(result.lost) == {f"mbpp/{i}" for i, (a, b) in enumerate(pairs) if b < a}
    assert len(result.won) + len(result.lost) + result.tied == result.problems == len(pairs)
    assert result.p_value == sign_test(len(result.won), len(result.lost))


def test_problems_are_paired_by_id_whatever_their_order() -> None:
    ids = [f"mbpp/{i}" for i in range(12)]
    x = task([1, 0, 1] * 4, ids=ids)
    y = task([1, 1, 0] * 4, ids=ids)
    order = random.Random(0).sample(range(12), 12)
    mixed = task([y["correct"][i] for i in order], ids=[ids[i] for i in order])
    assert compare_task("mbpp", x, mixed) == compare_task("mbpp", x, y)
    assert compare_task("mbpp", mixed, x).won == tuple(ids[2::3])  # mbpp/2 before mbpp/11


def test_the_same_counts_differ_in_nothing() -> None:
    same = task([0, 1, 3, 2], 3)
    result = compare_task("mbpp", same, same)
    assert (result.difference, result.interval, result.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert (result.won, result.lost, result.tied, result.better) == ((), (), 4, "")
    assert "no difference" in result.verdict
    assert result.warnings == []


def test_shares_count_where_the_numbers_of_samples_differ() -> None:
    x = task([2, 1, 0], 6) | {"counted": [6, 5, 6]}
    result = compare_task("mbpp", x, task([1, 1, 1], 3))
    assert result.won == ("mbpp/1", "mbpp/2")  # 1 of 3 is more than 1 of 5, and like 2 of 6
    assert result.lost == ()
    assert any("n differs: 6 for A, 3 for B" in line for line in result.warnings)


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_pairing_narrows_the_interval_of_files_that_go_together_and_not_of_others() -> None:
    generator = random.Random(0)
    hard = [generator.random() < 0.5 for _ in range(200)]
    near = [int(x != (generator.random() < 0.05)) for x in hard]
    far = [int(generator.random() < 0.5) for _ in hard]
    x = task(list(map(int, hard)))
    paired, apart = compare_task("mbpp", x, task(near)), compare_task("mbpp", x, task(far))
    for result, least, most in ((paired, 0.2, 0.5), (apart, 0.85, 1.15)):
        score = result.scores[1]
        unpaired = math.hypot(width(score.interval_a), width(score.interval_b))
        assert least < width(score.interval) / unpaired < most


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    generator = random.Random(1)
    repetitions, problems, hits = 250, 80, 0
    for _ in range(repetitions):
        # Half of the problems are easy; B passes 0.1 more often on each: that is the truth.
        chances = [generator.choice((0.1, 0.7)) for _ in range(problems)]
        x = task([int(generator.random() < p) for p in chances])
        y = task([int(generator.random() < p + 0.1) for p in chances])
        low, high = compare_task("mbpp", x, y).interval
        hits += low <= 0.1 <= high
    assert 0.91 < hits / repetitions < 0.985


@pytest.mark.parametrize(
    ("won", "lost", "tied", "verdict"),
    [
        (20, 3, 100, "B is better: the interval excludes 0"),
        (3, 20, 100, "A is better: the interval excludes 0"),
        (4, 4, 492, "no difference that 500 problems could show"),
        (5, 0, 100, "B may be better: the interval excludes 0, but wins and losses could be chance"),
        (0, 1, 0, "no difference that 1 problem could show"),
        (5, 0, 0, "no difference that 5 problems could show"),
        (6, 0, 0, "B is better by as much on every problem"),
        (0, 0, 9, "no difference: the same share passes on every problem"),
    ],
)
def test_verdicts_in_words(won: int, lost: int, tied: int, verdict: str) -> None:
    x = task([0] * won + [1] * lost + [1] * tied)
    y = task([1] * won + [0] * lost + [1] * tied)
    result = compare_task("mbpp", x, y)
    assert result.verdict == verdict
    assert result.test == "McNemar exact"


def test_many_small_wins_against_few_large_losses_are_not_called_a_better_mean() -> None:
    x, y = task([0] * 20 + [10] * 2, 10), task([1] * 20 + [0] * 2, 10)
    result = compare_task("mbpp", x, y)
    assert result.better == ""
    assert result.p_value < 0.001
    assert result.test == "sign test"
    assert result.verdict.endswith("could show in the mean, though B does better on more of them")


# --- what is left out, and warned of


def test_problems_in_one_file_only_or_without_a_verdict_are_counted_as_left_out() -> None:
    x = task([1, 0, 1, 1, 0], ids=["a", "b", "c", "d", "g"]) | {"counted": [1, 1, 1, 1, 0]}
    y = task([0, 1, 0, 0, 1, 1], ids=["b", "c", "d", "e", "f", "g"]) | {"counted": [1, 1, 0, 1, 1, 1]}
    result = compare_task("mbpp", x, y)
    assert result.ids == ("b", "c")
    assert (result.only_a, result.only_b, result.unjudged) == (("a",), ("e", "f"), ("d", "g"))
    assert result.rate_a == result.rate_b == 0.5
    head = "mbpp: 2 problems compared; left out: 1 only in A, 2 only in B, 2 without a verdict\n"
    assert head in text([result])


def test_problems_without_samples_count_as_unsolved() -> None:
    result = compare_task("mbpp", task([0, 0], n=0), task([1, 0]))
    assert (result.problems, result.rate_a, result.won) == (2, 0.0, ("mbpp/0",))


def test_a_k_that_only_some_problems_allow_is_a_warning() -> None:
    x = task([1, 2, 3], 3, (1, 3, 5))
    y = task([1, 2, 2], 3, (1, 3, 5)) | {"counted": [3, 3, 2]}
    result = compare_task("mbpp", x, y)
    assert list(result.scores) == [1, 3]
    assert result.scores[3].problems == 2
    assert "mbpp: pass@3 rests on 2 problems: 1 have fewer than 3 judged samples" in result.warnings
    assert "mbpp: pass@5 is missing: no problem has 5 judged samples on both sides" in result.warnings


def test_settings_that_differ_are_named_and_those_that_agree_are_not() -> None:
    noted = {"temperature": 0.2, "top_p": 0.95, "form": "completion", "tier": ["B"], "model": "x", "seed": 1}
    x = task([1], settings=noted | {"grading": {"inline": 498, "sealed": 2}, "max_length": 512})
    y = task([1], settings=noted | {"temperature": 0.0, "model": "y", "seed": 1.0, "tier": ["A", "B"]})
    y["settings"]["grading"] = {"inline": 3, "sealed": 497}
    assert sorted(compare_task("mbpp", x, y).warnings) == [
        "mbpp: max_length differs: 512 for A, not noted for B",
        "mbpp: temperature differs: 0.2 for A, 0 for B",
        "mbpp: tier differs: B for A, A, B for B",
    ]


def test_contamination_and_lost_samples_are_warnings() -> None:
    x = task([1, 1, 0], contaminated=["mbpp/2", "mbpp/0", "other/9"])
    y = task([1, 0, 0], infra_errors=2)
    assert compare_task("mbpp", x, y).warnings == [
        "mbpp: A met 2 of the 3 problems in training (mbpp/0, mbpp/2)",
        "mbpp: B has samples without a verdict, lost to infrastructure errors: 2",
    ]
