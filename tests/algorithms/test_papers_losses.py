"""Losses of whole steps, and their gradients, against the papers' plain loops in `tests.support.papers`."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coderl.algorithms.losses import (
    KLEstimator,
    LossType,
    SamplerCorrection,
    adapted_kl_coefficient,
    clipped_policy_loss,
    kl_divergence,
    policy_loss,
    sampler_correction,
    token_weights,
    top_entropy_mask,
    value_loss,
)
from tests.support import papers
from tests.support.papers import Token
from tests.support.ragged import Places, Side, flat, laid, mask_at, places, taken, width_of

LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
LIMIT = 10
logp = st.floats(-12, -0.001)
shift = st.one_of(st.just(0.0), st.floats(-0.4, 0.4), st.floats(-8, 8))  # mostly about the clip's bounds
gain = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-50, 50).map(lambda x: round(x, 3)))
bounds = st.tuples(st.floats(0.05, 0.5), st.floats(0.05, 3.0))
layouts = st.tuples(st.sampled_from(["left", "right", "holes"]), st.integers(0, 99))
Layout = tuple[Side, int]


@st.composite
def steps(draw: st.DrawFn) -> list[list[Token]]:
    """Ragged sequences, some without a token; the advantage is the sequence's own."""
    result = []
    for _ in range(draw(st.integers(1, 5))):
        advantage = draw(gain)
        pairs = draw(st.lists(st.tuples(logp, shift), max_size=6))
        result.append([Token(now, now - moved, advantage) for now, moved in pairs])
    return result


def clear_of(step: list[list[Token]], low: float, high: float) -> bool:
    """Whether no ratio, of a token or a sequence, is so near a clip bound that rounding would decide."""
    for sequence in step:
        shifts = [token.logp - token.old for token in sequence]
        for x in [*shifts, papers.mean(shifts) if shifts else 0.0]:
            if min(abs(math.exp(x) - (1 - low)), abs(math.exp(x) - (1 + high))) < 1e-4:
                return False
    return True


def columns_of(step: list[list[Token]], layout: Layout) -> Places:
    return places([len(sequence) for sequence in step], layout[0], seed=layout[1])


def tensors(step: list[list[Token]], columns: Places) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones, advantages and mask; padding holds absurd values on purpose."""
    now = laid([[t.logp for t in s] for s in step], columns, fill=-1e4).requires_grad_()
    old = laid([[t.old for t in s] for s in step], columns, fill=-3.0)
    # A sequence's advantage stands in every column of it, as the algorithms lay it out.
    gains = torch.tensor([s[0].advantage if s else 7.0 for s in step])[:, None].repeat(1, width_of(columns))
    return now, old, gains, mask_at(columns)


def agree(got: Tensor, gradient: Tensor | None, columns: Places, expected: papers.Step) -> None:
    """The loss and its gradient are those expected, within float32's rounding; padding has no gradient."""
    assert gradient is not None
    size = 1e3 + sum(abs(slope) for slopes in expected.gradient for slope in slopes)
    assert float(got.detach()) == pytest.approx(expected.loss, rel=1e-4, abs=1e-6 * size)
    torch.testing.assert_close(flat(taken(gradient, columns)), flat(expected.gradient), rtol=1e-3, atol=1e-4)
    assert gradient[~mask_at(columns)].eq(0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@settings(deadline=None)
@given(step=steps(), layout=layouts, clip=bounds)
def test_the_loss_of_a_step_matches_the_paper(
    step: list[list[Token]], layout: Layout, clip: tuple[float, float], loss_type: LossType
) -> None:
    assume(clear_of(step, *clip))
    columns = columns_of(step, layout)
    now, old, gains, mask = tensors(step, columns)
    weights = token_weights(mask, loss_type, LIMIT)
    loss = (weights * policy_loss(now, old, gains, mask, loss_type, *clip).loss).sum()
    loss.backward()
    agree(loss, now.grad, columns, papers.LOSSES[loss_type](step, *clip, LIMIT))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@settings(deadline=None, max_examples=40)
@given(step=steps(), clip=bounds)
def test_at_the_first_step_every_loss_is_the_policy_gradient(
    step: list[list[Token]], clip: tuple[float, float], loss_type: LossType
) -> None:
    """On-policy all ratios are 1: the slope is -advantage times the weight of the token, whatever clips."""
    columns = columns_of(step, ("holes", 3))
    now, _, gains, mask = tensors(step, columns)
    weights = token_weights(mask, loss_type, LIMIT)
    result = policy_loss(now, now.detach(), gains, mask, loss_type, *clip)
    (weights * result.loss).sum().backward()
    assert result.ratio[mask].eq(1).all() and not result.clipped[mask].any()
    torch.testing.assert_close(now.grad, -gains * weights)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_absurd_ratios_stay_finite(loss_type: LossType) -> None:
    """The loss of a policy far from the old one may be large, but it and its gradient are finite."""
    far = [
        [Token(-1e3, -1.0, 1.0), Token(-1.0, -1e3, -1.0)],
        [Token(-1.0, -1e3, -50.0)],
        [Token(-1e3, 0.0, -50.0)],
    ]
    columns = columns_of(far, ("holes", 1))
    now, old, gains, mask = tensors(far, columns)
    result = policy_loss(now, old, gains, mask, loss_type, 0.2, 0.2)
    (token_weights(mask, loss_type, LIMIT) * result.loss).sum().backward()
    assert result.loss[mask].isfinite().all()
    assert now.grad is not None and now.grad.isfinite().all()


@settings(deadline=None)
@given(step=steps(), clip=bounds)
def test_clipped_tokens_are_those_without_a_gradient(
    step: list[list[Token]], clip: tuple[float, float]
) -> None:
    """PPO with an advantage of each token's own, which GAE gives it."""
    assume(clear_of(step, *clip))
    own = [[t._replace(advantage=t.advantage + i) for i, t in enumerate(s)] for s in step]
    columns = columns_of(own, ("holes", 5))
    now, old, _, mask = tensors(own, columns)
    gains = laid([[t.advantage for t in s] for s in own], columns)
    result = clipped_policy_loss(now, old, gains, *clip)
    (token_weights(mask, "dapo", LIMIT) * result.loss).sum().backward()
    expected = papers.dapo(own, *clip, LIMIT)
    assert now.grad is not None
    torch.testing.assert_close(flat(taken(now.grad, columns)), flat(expected.gradient), rtol=1e-3, atol=1e-4)
    for sequence, slopes, flags in zip(own, expected.gradient, taken(result.clipped, columns), strict=True):
        for token, slope, flag in zip(sequence, slopes, flags, strict=True):
            assert bool(flag) == (slope == 0 and token.advantage != 0)


critic = st.tuples(st.floats(-20, 20), st.floats(-20, 20), st.floats(-20, 20))


@settings(deadline=None)
@given(st.lists(critic, min_size=1, max_size=8), st.one_of(st.none(), st.floats(0.05, 3.0)))
def test_the_value_loss_is_the_larger_of_the_plain_and_the_clipped_error(
    triples: list[tuple[float, float, float]], bound: float | None
) -> None:
    for value, old, target in triples:  # at a tie either branch's slope is right
        held = papers.clip(value, old - (bound or 0), old + (bound or 0))
        assume(bound is None or abs((value - target) ** 2 - (held - target) ** 2) > 1e-3 or held == value)
    values = torch.tensor([[t[0] for t in triples]], requires_grad=True)
    old_values, returns = (torch.tensor([[t[i] for t in triples]]) for i in (1, 2))
    result = value_loss(values, old_values, returns, bound)
    result.loss.sum().backward()
    expected = [papers.value_loss(*t, bound) for t in triples]
    assert values.grad is not None
    for got, which in ((result.loss, 0), (values.grad, 1)):
        torch.testing.assert_close(
            got.detach().double()[0], flat([[e[which] for e in expected]]), rtol=1e-3, atol=1e-3
        )
    assert result.clipped[0].tolist() == [e[2] for e in expected]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@settings(deadline=None)
@given(pairs=st.lists(st.tuples(logp, st.floats(-8, 8)), min_size=1, max_size=6))
def test_kl_estimators_match_schulmans(pairs: list[tuple[float, float]], estimator: KLEstimator) -> None:
    now = torch.tensor([[p for p, _ in pairs]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[p - moved for p, moved in pairs]], dtype=torch.float64)
    got = kl_divergence(now, ref, estimator)
    got.sum().backward()
    expected = [papers.kl(p, p - moved, estimator) for p, moved in pairs]
    assert now.grad is not None
    assert got[0].tolist() == pytest.approx([value for value, _ in expected], rel=1e-6, abs=1e-9)
    assert now.grad[0].tolist() == pytest.approx([slope for _, slope in expected], rel=1e-6, abs=1e-9)


def test_which_kl_estimators_are_unbiased_in_value_and_in_gradient() -> None:
    """Over every outcome of a small policy: k1 and k3 are KL; as a loss k2 has its gradient, k1 has none."""
    generator = torch.Generator().manual_seed(4)
    logits, ref = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    now, ref = logits.log_softmax(-1), ref.log_softmax(-1)
    chance = now.detach().exp()
    exact = (now.exp() * (now - ref)).sum()
    (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    slopes = {}
    for estimator in get_args(KLEstimator):
        expected = (chance * kl_divergence(now, ref, estimator)).sum()
        if estimator != "k2":
            torch.testing.assert_close(expected.detach(), exact.detach())
        (slopes[estimator],) = torch.autograd.grad(expected, logits, retain_graph=True)
    torch.testing.assert_close(slopes["k2"], slope)
    torch.testing.assert_close(slopes["k1"], torch.zeros_like(slope))
    torch.testing.assert_close(slopes["k3"], chance - ref.exp())  # the gradient of KL(reference || policy)


@pytest.mark.parametrize("mode", get_args(SamplerCorrection))
@settings(deadline=None)
@given(step=steps(), layout=layouts, cap=st.floats(1.0, 10.0))
def test_sampler_corrections_are_truncated_importance_weights(
    step: list[list[Token]], layout: Layout, cap: float, mode: SamplerCorrection
) -> None:
    ratios = [math.exp(t.logp - t.old) for s in step for t in s]
    assume(all(min(abs(r - cap), abs(r - 1 / cap)) > 1e-4 for r in ratios))
    columns = columns_of(step, layout)
    now, sampler, _, mask = tensors(step, columns)
    got = sampler_correction(now, sampler, mask, mode, cap)
    old = [[t.logp for t in s] for s in step]
    sampled = [[t.old for t in s] for s in step]
    expected = [papers.sampler_correction(*pair, mode, cap) for pair in zip(old, sampled, strict=True)]
    torch.testing.assert_close(flat(taken(got, columns)), flat(expected), rtol=1e-4, atol=1e-5)
    assert not got.requires_grad and got[~mask].eq(0).all()


entropies = st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5, 1.0, 2.0, 7.0]), max_size=6), min_size=1, max_size=5
)


@settings(deadline=None)
@given(entropies, layouts, st.sampled_from([0.01, 0.125, 0.2, 0.5, 0.8, 1.0]))
def test_the_top_entropy_mask_keeps_the_tokens_of_highest_entropy(
    rows: papers.Rows, layout: Layout, fraction: float
) -> None:
    columns = places([len(row) for row in rows], layout[0], seed=layout[1])
    got = top_entropy_mask(laid(rows, columns, fill=99.0), mask_at(columns), fraction)
    expected = [[float(kept) for kept in row] for row in papers.top_entropy(rows, fraction)]
    assert taken(got, columns) == expected
    assert not got[~mask_at(columns)].any()


@given(
    st.floats(1e-4, 10),
    st.floats(-1, 50),
    st.floats(0.1, 20),
    st.integers(1, 512),
    st.integers(1000, 20000),
)
def test_the_kl_coefficient_follows_the_divergence(
    beta: float, divergence: float, target: float, samples: int, horizon: int
) -> None:
    got = adapted_kl_coefficient(beta, divergence, target, samples, horizon)
    assert got == pytest.approx(papers.adapted(beta, divergence, target, samples, horizon))
    assert (got - beta) * (divergence - target) >= 0  # towards the target, never past a fifth at once
    assert abs(got - beta) <= 0.2 * beta * samples / horizon + 1e-12
