from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.scores.statistics import PassAtK, bootstrap_interval, pass_at_k


def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


@given(st.data())
def test_pass_at_k_agrees_with_the_product_form_of_the_harness(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 400))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    product = 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0
    assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)


def test_no_samples_solve_nothing() -> None:
    assert pass_at_k(0, 0, 5) == 0.0


@pytest.mark.parametrize(("n", "c", "k"), [(3, 0, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0), (0, 1, 1)])
def test_what_cannot_be_told_is_no_number(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="cannot be told"):
        pass_at_k(n, c, k)


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(300):
        sample = (torch.rand(60, generator=generator) < 0.3).double().tolist()
        low, high = bootstrap_interval(sample, 0.9, resamples=400, seed=seed)
        hits += low <= 0.3 <= high
    assert 0.83 < hits / 300 < 0.96


def test_bootstrap_interval_is_seeded_ordered_and_within_the_values() -> None:
    values = [0.0, 0.25, 1.0, 0.5, 0.0, 0.31, 0.77]
    low, high = bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) == (low, high) != bootstrap_interval(values, seed=2)
    assert 0.0 <= low <= sum(values) / 7 <= high <= 1.0
    narrow = bootstrap_interval(values, confidence=0.5, seed=1)
    assert low <= narrow[0] <= narrow[1] <= high
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no interval"):
        bootstrap_interval([])


counts = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda nc: (max(nc), min(nc))), min_size=1
)


@settings(deadline=None, max_examples=40)
@given(problems=counts, cut=st.integers(0, 9))
def test_metric_is_the_mean_over_problems_however_they_are_batched(
    problems: list[tuple[int, int]], cut: int
) -> None:
    metric = PassAtK((1, 3))
    for batch in (problems[:cut], problems[cut:]):
        if batch:
            n, c = torch.tensor(batch).T
            metric.update(n, c)
    result = metric.compute()
    for k in (1, 3):
        if any(0 < n < k for n, _ in problems):
            assert result[f"pass@{k}"].isnan()
        else:
            mean = sum(pass_at_k(n, c, k) for n, c in problems) / len(problems)
            assert result[f"pass@{k}"].item() == pytest.approx(mean)


def test_metric_states_sum_over_ranks() -> None:
    ranks = [PassAtK((1,)), PassAtK((1,))]
    ranks[0].update(torch.tensor([4, 4]), torch.tensor([4, 0]))
    ranks[1].update(torch.tensor([4]), torch.tensor([1]))
    both = PassAtK((1,))
    for name, reduce in both._reductions.items():
        states = torch.stack([getattr(rank, name) for rank in ranks])
        setattr(both, name, reduce(states))  # type: ignore[operator, misc]
    both._update_count = 2
    assert both.compute()["pass@1"].item() == pytest.approx((1 + 0 + 0.25) / 3)


def test_reset_metric_starts_from_nothing() -> None:
    metric = PassAtK()
    metric.update(torch.tensor([2]), torch.tensor([2]))
    assert metric.compute()["pass@1"] == 1
    metric.reset()
    metric.update(torch.tensor([2]), torch.tensor([0]))
    assert metric.compute()["pass@1"] == 0
