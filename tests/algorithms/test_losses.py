"""Advantages, weights, divergences and losses against identities and plain-loop references."""

from __future__ import annotations

import math
import statistics
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coderl.algorithms.advantages import AdvantageScale, all_equal, group_advantages
from coderl.algorithms.losses import KLEstimator, LossType, clipped_policy_loss, kl_divergence, token_weights

rewards = st.lists(
    st.lists(st.sampled_from([-0.2, 0.0, 1.0, 1.1, math.nan]), min_size=4, max_size=4), min_size=1, max_size=5
)


@settings(deadline=None)
@given(rewards)
def test_group_advantages_match_a_plain_loop(rows: list[list[float]]) -> None:
    got = group_advantages(torch.tensor(rows))
    for row, result in zip(rows, got.tolist(), strict=True):
        known = [r for r in row if not math.isnan(r)]
        flat = len(set(known)) <= 1
        for reward, advantage in zip(row, result, strict=True):
            if math.isnan(reward) or flat:
                assert advantage == 0.0
            else:
                expected = (reward - statistics.mean(known)) / (statistics.stdev(known) + 1e-4)
                assert advantage == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_sum_to_zero_in_each_group(scale: AdvantageScale) -> None:
    values = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    advantages = group_advantages(values, scale)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(6), atol=1e-5, rtol=0)


def test_scales_divide_as_their_papers_say() -> None:
    values = torch.tensor([[0.0, 1.0], [0.0, 10.0]])
    first, second = group_advantages(values, "group")[:, 1].tolist()
    assert first == pytest.approx(second, rel=1e-3)
    assert group_advantages(values, "none").tolist() == [[-0.5, 0.5], [-5.0, 5.0]]
    first, second = group_advantages(values, "batch")[:, 1].tolist()
    assert second / first == pytest.approx(10.0)


def test_group_order_does_not_matter() -> None:
    values = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(group_advantages(values)[order], group_advantages(values[order]))


def test_equal_rewards_have_no_signal_even_if_they_are_no_binary_fractions() -> None:
    values = torch.full((1, 7), 0.1)  # their mean, summed up, is not 0.1
    assert bool(all_equal(values)[0])
    assert group_advantages(values).eq(0).all()


def test_nearly_equal_rewards_have_a_signal() -> None:
    values = torch.tensor([[1.0, 1.0 + 1e-6]])
    assert not bool(all_equal(values)[0])
    assert group_advantages(values)[0, 1] > 0


def test_the_last_thousandth_of_a_bonus_does_not_pull_right_programs_apart() -> None:
    group = torch.tensor([[1.1] * 7 + [1.099]])
    assert group_advantages(group)[0].abs().max() > 1.9, "as far as right and wrong"
    assert group_advantages(group, contrast=1.0)[0].abs().max() < 0.01


right, wrong = st.floats(1.0, 1.1), st.sampled_from([-0.2, 0.0])


@settings(deadline=None)
@given(st.lists(right, min_size=1, max_size=7), st.lists(wrong, min_size=1, max_size=7))
def test_in_a_group_with_right_and_wrong_programs_the_contrast_changes_nothing(
    passing: list[float], failing: list[float]
) -> None:
    group = torch.tensor([passing + failing])
    torch.testing.assert_close(group_advantages(group, contrast=1.0), group_advantages(group))


@settings(deadline=None)
@given(st.lists(st.one_of(right, wrong), min_size=2, max_size=8))
def test_programs_with_the_same_outcome_differ_by_no_more_than_their_share_of_the_contrast(
    values: list[float],
) -> None:
    advantages = group_advantages(torch.tensor([values]), contrast=1.0)[0].tolist()
    for one, first in zip(values, advantages, strict=True):
        for other, second in zip(values, advantages, strict=True):
            assert abs(first - second) <= abs(one - other) * math.sqrt(len(values)) + 1e-4


def test_an_infrastructure_error_does_not_change_the_other_advantages() -> None:
    with_nan = group_advantages(torch.tensor([[0.0, 1.0, 1.0, math.nan]]))
    without = group_advantages(torch.tensor([[0.0, 1.0, 1.0]]))
    torch.testing.assert_close(with_nan[:, :3], without)
    assert with_nan[0, 3] == 0


def test_groups_without_known_reward_have_no_signal() -> None:
    values = torch.full((2, 3), math.nan)
    assert all_equal(values).all()
    assert group_advantages(values).eq(0).all()


def mask_of(*lengths: int, width: int = 6) -> torch.Tensor:
    return torch.tensor([[t < n for t in range(width)] for n in lengths])


def test_token_weights_average_as_named() -> None:
    mask = mask_of(2, 6, 0)
    values = torch.arange(18.0).view(3, 6)
    means = [values[0, :2].mean(), values[1].mean()]
    cases: dict[LossType, torch.Tensor] = {
        "grpo": torch.stack(means).sum() / 2,
        "dapo": values[mask].mean(),
        "dr_grpo": values[mask].sum() / (2 * 10),
    }
    for name, expected in cases.items():
        got = (token_weights(mask, name, 10) * values).sum()
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_two_ranks_that_average_gradients_equal_one_process(loss_type: LossType) -> None:
    mask = mask_of(2, 6, 3, 1)
    values = torch.rand(4, 6, generator=torch.Generator().manual_seed(2))
    whole = (token_weights(mask, loss_type, 10) * values).sum()
    halves = [mask[:1], mask[1:]]  # unequal on purpose

    def mean_of(count_of_rank: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(count_of_rank).mean()

    sequences = mean_of([(h.any(1)).sum().float() for h in halves])
    tokens = mean_of([h.sum().float() for h in halves])
    parts = []
    for half, part in zip(halves, [values[:1], values[1:]], strict=True):
        answers = iter([sequences, tokens])
        weights = token_weights(half, loss_type, 10, partial(lambda given, _: next(given), answers))
        parts.append((weights * part).sum())
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_empty_masks_have_weight_0() -> None:
    for name in ("grpo", "dapo", "dr_grpo"):
        weights = token_weights(mask_of(0, 0), name, 10)
        assert weights.eq(0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence_from_oneself_is_exactly_zero(estimator: KLEstimator) -> None:
    logprobs = -torch.rand(2, 5) * 10
    assert kl_divergence(logprobs, logprobs.clone(), estimator).eq(0).all()


def test_k1_and_k3_are_unbiased_and_k3_never_negative() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2]).log()
    reference = torch.tensor([0.2, 0.3, 0.5]).log()
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        estimate = (policy.exp() * kl_divergence(policy, reference, estimator)).sum()
        torch.testing.assert_close(estimate, exact)
    assert kl_divergence(policy, reference, "k3").ge(0).all()


def test_gradients_of_the_estimators_are_what_the_docstring_says() -> None:
    logits = torch.tensor([0.4, -0.3, 0.1], requires_grad=True)
    reference = torch.tensor([0.2, 0.3, 0.5]).log()

    def expected_gradient(estimator: KLEstimator) -> torch.Tensor:
        logprobs = logits.log_softmax(0)
        loss = (logprobs.detach().exp() * kl_divergence(logprobs, reference, estimator)).sum()
        return torch.autograd.grad(loss, logits)[0]

    logprobs = logits.log_softmax(0)
    to_reference = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits)[0]
    logprobs = logits.log_softmax(0)
    from_reference = torch.autograd.grad((reference.exp() * (reference - logprobs)).sum(), logits)[0]
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(expected_gradient("k2"), to_reference)
    torch.testing.assert_close(expected_gradient("k3"), from_reference)


def test_huge_log_ratios_stay_finite() -> None:
    far = kl_divergence(torch.tensor([[-500.0, 0.0]]), torch.tensor([[0.0, -500.0]]), "k3")
    assert far.isfinite().all()


@settings(deadline=None)
@given(st.floats(-1, 1), st.floats(-2, 2), st.floats(0.05, 0.3), st.floats(0.05, 0.5))
def test_clipped_loss_matches_its_equation(
    log_ratio: float, advantage: float, low: float, high: float
) -> None:
    result = clipped_policy_loss(
        torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage]), low, high
    )
    ratio = math.exp(log_ratio)
    expected = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    assert float(result.loss) == pytest.approx(expected, abs=1e-5)


def test_only_tokens_reported_as_clipped_have_no_gradient() -> None:
    logprobs = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    result = clipped_policy_loss(logprobs, torch.zeros(5), advantages, 0.2, 0.2)
    result.loss.sum().backward()
    assert result.clipped.tolist() == [True, False, False, True, False]
    assert logprobs.grad is not None
    assert logprobs.grad.eq(0).tolist() == result.clipped.tolist()


def test_on_policy_gradient_is_reinforce() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([0.7, -0.3])
    clipped_policy_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2).loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)
