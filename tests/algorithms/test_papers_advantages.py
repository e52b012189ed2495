"""Rewards and advantages against the papers' plain loops in `tests.support.papers`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coderl.algorithms.advantages import (
    EPS,
    AdvantageScale,
    Baseline,
    gae,
    group_advantages,
    overlong_penalty,
    token_rewards,
    whiten,
)
from tests.support import papers
from tests.support.ragged import Side, by_ranks, flat, laid, mask_at, places, taken

# A group's std divides group baselines only: a baseline from elsewhere may not be 0 where that std is.
LEGAL: list[tuple[Baseline, AdvantageScale]] = [
    ("group", "group"),
    ("group", "batch"),
    ("group", "none"),
    ("rloo", "group"),
    ("rloo", "batch"),
    ("rloo", "none"),
    ("reinforce++", "batch"),
    ("reinforce++", "none"),
    ("none", "batch"),
    ("none", "none"),
]
number = st.floats(-100, 100, width=32).map(lambda x: round(x, 3))
reward = st.one_of(st.sampled_from([-0.2, 0.0, 0.1, 1.0, 1.1, math.nan]), number)


@st.composite
def reward_tables(draw: st.DrawFn) -> papers.Rows:
    """Rewards of groups of one size, in some of them all equal or all unknown."""
    size = draw(st.integers(1, 6))
    flat_row = reward.map(lambda r: [r] * size)
    return draw(
        st.lists(st.one_of(st.lists(reward, min_size=size, max_size=size), flat_row), min_size=1, max_size=5)
    )


def distinct(table: papers.Rows) -> bool:
    """Whether the batch has two different known rewards, and so a standard deviation above 0."""
    return len(set(papers.known([r for row in table for r in row]))) > 1


@pytest.mark.parametrize(("baseline", "scale"), LEGAL)
@settings(deadline=None, max_examples=60)
@given(table=reward_tables())
def test_advantages_match_the_papers(table: papers.Rows, baseline: Baseline, scale: AdvantageScale) -> None:
    got = group_advantages(torch.tensor(table), scale=scale, baseline=baseline)
    assert got.isfinite().all() and got.dtype == torch.float32
    assume(scale != "batch" or distinct(table))
    expected = papers.advantages(table, scale, baseline)
    torch.testing.assert_close(flat(got.tolist()), flat(expected), rtol=2e-3, atol=2e-4)


@settings(deadline=None)
@given(table=reward_tables())
def test_groups_of_equal_rewards_have_advantage_exactly_0(table: papers.Rows) -> None:
    for baseline, scale in LEGAL[:6]:
        got = group_advantages(torch.tensor(table), scale=scale, baseline=baseline)
        for row, result in zip(table, got.tolist(), strict=True):
            if len(set(papers.known(row))) <= 1:
                assert result == [0.0] * len(row)


@settings(deadline=None)
@given(table=reward_tables())
def test_leave_one_out_is_the_group_baseline_times_k_over_k_minus_1(table: papers.Rows) -> None:
    """R - mean of the k - 1 others = k/(k-1) * (R - mean of all): arXiv:2402.14740's identity."""
    assume(not any(math.isnan(r) for row in table for r in row) and len(table[0]) > 1)
    rewards, size = torch.tensor(table), len(table[0])
    group = group_advantages(rewards, scale="none", baseline="group")
    rloo = group_advantages(rewards, scale="none", baseline="rloo")
    torch.testing.assert_close(rloo, group * size / (size - 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("baseline", "scale"), LEGAL)
@settings(deadline=None, max_examples=20)
@given(table=reward_tables(), cut=st.integers(1, 4))
def test_advantages_on_two_ranks_equal_those_on_one(
    table: papers.Rows, cut: int, baseline: Baseline, scale: AdvantageScale
) -> None:
    assume(cut < len(table))
    parts = [torch.tensor(table[:cut]), torch.tensor(table[cut:])]
    got = by_ranks(2, lambda rank, mean: group_advantages(parts[rank], scale, baseline, mean))
    whole = group_advantages(torch.tensor(table), scale, baseline)
    assume(scale != "batch" or distinct(table))
    torch.testing.assert_close(torch.cat(got), whole, rtol=2e-3, atol=2e-4)


@st.composite
def episodes(draw: st.DrawFn) -> tuple[list[list[tuple[float, float]]], Side, int]:
    """Ragged episodes of (reward, value), some without a token, and their layout in a tensor."""
    step = st.tuples(number, number)
    rows = draw(st.lists(st.lists(step, max_size=7), min_size=1, max_size=4))
    return rows, draw(st.sampled_from(["left", "right", "holes"])), draw(st.integers(0, 99))


discounts = st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.99, 1.0])


@settings(deadline=None)
@given(episodes(), discounts, discounts, st.booleans(), st.sampled_from([0.0, -7.0, 1e4]))
def test_gae_is_the_weighted_sum_of_k_step_estimators(
    drawn: tuple[list[list[tuple[float, float]]], Side, int],
    gamma: float,
    lam: float,
    truncated: bool,
    fill: float,
) -> None:
    rows, side, seed = drawn
    columns = places([len(row) for row in rows], side, seed=seed)
    rewards, values = [[r for r, _ in row] for row in rows], [[v for _, v in row] for row in rows]
    finals = [5.0 * i - 3.0 for i in range(len(rows))] if truncated else [0.0] * len(rows)
    # What stands outside the mask is fill: it may not leak in.
    got = gae(
        laid(rewards, columns, fill),
        laid(values, columns, fill),
        mask_at(columns),
        gamma,
        lam,
        torch.tensor(finals) if truncated else None,
    )
    for method in (papers.gae_from_k_steps, papers.gae_from_deltas):
        expected = [method(r, v, f, gamma, lam) for r, v, f in zip(rewards, values, finals, strict=True)]
        torch.testing.assert_close(flat(taken(got.advantages, columns)), flat(expected), rtol=1e-4, atol=2e-3)
        returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(expected, values, strict=True)]
        torch.testing.assert_close(flat(taken(got.returns, columns)), flat(returns), rtol=1e-4, atol=2e-3)
    assert got.advantages[~mask_at(columns)].eq(0).all() and got.returns[~mask_at(columns)].eq(0).all()
    assert got.advantages.dtype == got.returns.dtype == torch.float32


@settings(deadline=None)
@given(episodes(), discounts)
def test_full_lambda_gives_discounted_returns_less_the_value(
    drawn: tuple[list[list[tuple[float, float]]], Side, int], gamma: float
) -> None:
    rows, side, seed = drawn
    columns = places([len(row) for row in rows], side, seed=seed)
    rewards, values = [[r for r, _ in row] for row in rows], [[v for _, v in row] for row in rows]
    got = gae(laid(rewards, columns), laid(values, columns), mask_at(columns), gamma, 1.0)
    for row, returns in zip(rewards, taken(got.returns, columns), strict=True):
        for t, value in enumerate(returns):
            discounted = sum(gamma ** (later - t) * row[later] for later in range(t, len(row)))
            assert value == pytest.approx(discounted, rel=1e-4, abs=2e-3)


def test_gae_of_half_precision_is_computed_in_float32() -> None:
    rewards = torch.full((1, 400), 0.125, dtype=torch.bfloat16)
    values = torch.zeros(1, 400, dtype=torch.bfloat16)
    got = gae(rewards, values, torch.ones(1, 400, dtype=torch.bool), 1.0, 1.0)
    assert got.returns.dtype == torch.float32
    assert float(got.returns[0, 0]) == 50.0  # bfloat16's sum stands still at 32


@st.composite
def tables(draw: st.DrawFn) -> tuple[papers.Rows, Side, int]:
    rows = draw(st.lists(st.lists(number, max_size=6), min_size=2, max_size=5))
    return rows, draw(st.sampled_from(["left", "right", "holes"])), draw(st.integers(0, 99))


@settings(deadline=None)
@given(tables(), st.integers(1, 4))
def test_whitening_is_over_the_whole_batch_and_all_ranks(
    drawn: tuple[papers.Rows, Side, int], cut: int
) -> None:
    rows, side, seed = drawn
    everything = [x for row in rows for x in row]
    assume(papers.spread(everything) == 0 or papers.spread(everything) > 0.01)
    columns = places([len(row) for row in rows], side, seed=seed)
    values, mask = laid(rows, columns, fill=1e4), mask_at(columns)
    got = whiten(values, mask)
    assert got[~mask].eq(0).all()
    torch.testing.assert_close(flat(taken(got, columns)), flat(papers.whitened(rows)), rtol=2e-3, atol=2e-3)
    split = min(cut, len(rows) - 1)
    parts = [(values[:split], mask[:split]), (values[split:], mask[split:])]
    halves = by_ranks(2, lambda rank, mean: whiten(*parts[rank], mean))
    torch.testing.assert_close(torch.cat(halves), got, rtol=2e-3, atol=2e-3)


@settings(deadline=None)
@given(tables(), st.sampled_from([0.0, 0.02, 0.5]), st.sampled_from([0.0, 9.0, -1e4]))
def test_the_reward_is_given_to_the_last_token(
    drawn: tuple[papers.Rows, Side, int], beta: float, fill: float
) -> None:
    rows, side, seed = drawn
    columns = places([len(row) for row in rows], side, seed=seed)
    rewards = [1.5 * i - 2.0 for i in range(len(rows))]
    got = token_rewards(torch.tensor(rewards), laid(rows, columns, fill), mask_at(columns), beta)
    expected = [papers.token_rewards(r, row, beta) for r, row in zip(rewards, rows, strict=True)]
    torch.testing.assert_close(flat(taken(got, columns)), flat(expected), rtol=1e-5, atol=1e-5)
    assert got[~mask_at(columns)].eq(0).all()  # never one past the end of sequence


def test_the_unknown_reward_of_a_masked_row_has_no_effect() -> None:
    mask = torch.tensor([[False, False], [True, True]])
    got = token_rewards(torch.tensor([math.nan, 1.0]), torch.zeros(2, 2), mask, 0.1)
    assert got.tolist() == [[0.0, 0.0], [0.0, 1.0]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.integers(1, 40), st.data())
def test_overlong_penalty_is_equation_13(lengths: list[int], limit: int, data: st.DataObject) -> None:
    buffer = data.draw(st.integers(1, limit))
    got = overlong_penalty(torch.tensor(lengths), limit, buffer)
    expected = [papers.overlong_penalty(n, limit, buffer) for n in lengths]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_reference_and_the_code_add_the_same_amount_to_a_std() -> None:
    assert EPS == papers.EPS
