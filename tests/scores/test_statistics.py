from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.scores.statistics import bootstrap_interval, pass_at_k


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
def test_pass_at_k_of_impossible_counts_is_an_error(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="is not defined"):
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


def interval_of_torch(
    values: list[float], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """The same interval as earlier versions computed it, with torch's generator and quantiles."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(data), (resamples, len(data)), generator=generator)
    tail = (1 - confidence) / 2
    ends = torch.quantile(data[draws].mean(dim=1), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=300),
    st.sampled_from([0.5, 1.0]),
    st.integers(0, 60),
    seeds,
)
def test_bootstrap_draws_and_ranks_are_those_of_torch_to_the_bit(
    eighths: list[int], confidence: float, quarters: int, seed: int
) -> None:
    """Nothing here rounds: sums of eighths are exact, and these quantiles are single means."""
    values, resamples = [eighth / 8 for eighth in eighths], 4 * quarters + 1
    expected = interval_of_torch(values, confidence, resamples, seed)
    assert bootstrap_interval(values, confidence, resamples, seed) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=300), st.floats(0.5, 0.99), st.integers(1, 300), seeds)
def test_bootstrap_intervals_are_those_of_torch_up_to_rounding(
    values: list[float], confidence: float, resamples: int, seed: int
) -> None:
    expected = interval_of_torch(values, confidence, resamples, seed)
    assert bootstrap_interval(values, confidence, resamples, seed) == pytest.approx(
        expected, rel=0, abs=2e-15
    )
