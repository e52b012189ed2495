"""A step does not depend on the order of rows, padding, micro-batches, or the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coderl.algorithms.advantages import AdvantageScale, Baseline, group_advantages, single_process, whiten
from coderl.algorithms.losses import LossType, kl_divergence, policy_loss, sampler_correction, token_weights
from tests.support.ragged import Side, by_ranks, laid, mask_at, places

LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
LIMIT, CLIP, BETA = 12, (0.2, 0.28), 0.1
Mean = Callable[[Tensor], Tensor]


class Rows(NamedTuple):
    """A step's rows in float64: log-probabilities, old, reference and sampler's, advantages, mask."""

    now: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    gains: Tensor
    mask: Tensor

    def at(self, index: Tensor | slice) -> Rows:
        return Rows(*(value[index] for value in self))


lengths = st.lists(st.integers(0, 7), min_size=2, max_size=7)


def step_of(
    sizes: list[int], side: Side = "right", seed: int = 0, extra: int = 2, fill: float = -50.0
) -> Rows:
    """Rows of these lengths whose numbers do not depend on where in the tensor they lie."""
    columns = places(sizes, side, extra, seed)
    generator = torch.Generator().manual_seed(len(sizes))
    kept = []
    for size in sizes:
        now = -3 * torch.rand(size, generator=generator)
        moves = 0.3 * torch.randn(3, size, generator=generator)
        kept.append([now, *(now + move for move in moves)])
    gains = torch.randn(len(sizes), generator=generator, dtype=torch.float64)
    width = max(sizes) + extra
    filled = fill + torch.arange(4.0, dtype=torch.float64)[:, None, None].repeat(1, len(sizes), width)
    for i, (row, where) in enumerate(zip(kept, columns, strict=True)):
        filled[:, i, where] = torch.stack(row).double()
    now, old, ref, sampler = filled
    return Rows(now, old, ref, sampler, gains[:, None].repeat(1, width), mask_at(columns, extra))


def token_losses(rows: Rows, now: Tensor, loss_type: LossType) -> Tensor:
    """The per-token loss with all its terms: surrogate, sampler correction and KL divergence."""
    surrogate = policy_loss(now, rows.old, rows.gains, rows.mask, loss_type, *CLIP).loss
    correction = sampler_correction(rows.old, rows.sampler, rows.mask, "sequence", 2.0)
    return correction * surrogate + BETA * kl_divergence(now, rows.ref, "k3")


def cost(
    rows: Rows, loss_type: LossType, size: int = 99, mean: Mean = single_process, trim: bool = False
) -> tuple[Tensor, Tensor]:
    """The step's loss and gradient, worked out by micro-batches of `size` rows."""
    weights = token_weights(rows.mask, loss_type, LIMIT, mean)
    gradient, loss = torch.zeros_like(rows.now), torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows.now), size):
        part = rows.at(slice(start, start + size))
        used = part.mask.any(dim=0) if trim else torch.ones_like(part.mask[0])
        part = Rows(*(value[:, used] for value in part))
        now = part.now.clone().requires_grad_()
        share = (weights[start : start + size][:, used] * token_losses(part, now, loss_type)).sum()
        (slope,) = torch.autograd.grad(share, now)
        gradient[start : start + size, used] = slope
        loss = loss + share.detach()
    return loss, gradient


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@settings(deadline=None, max_examples=30)
@given(
    sizes=lengths, side=st.sampled_from(["left", "right", "holes"]), micro=st.integers(1, 7), data=st.data()
)
def test_a_step_does_not_depend_on_order_padding_or_micro_batches(
    sizes: list[int], side: Side, micro: int, data: st.DataObject, loss_type: LossType
) -> None:
    plain = step_of(sizes)
    loss, gradient = cost(plain, loss_type)
    assert loss.isfinite()
    order = torch.tensor(data.draw(st.permutations(range(len(sizes)))))
    moved = step_of(sizes, side, seed=micro, extra=data.draw(st.integers(0, 5)), fill=-7.0)
    again, slopes = cost(moved.at(order), loss_type, micro, trim=data.draw(st.booleans()))
    torch.testing.assert_close(again, loss)
    restored = torch.zeros_like(slopes)
    restored[order] = slopes
    torch.testing.assert_close(restored[moved.mask], gradient[plain.mask])
    assert restored[~moved.mask].eq(0).all() and gradient[~plain.mask].eq(0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@settings(deadline=None, max_examples=15)
@given(sizes=lengths, data=st.data())
def test_ranks_that_average_gradients_take_the_step_of_one_process(
    sizes: list[int], data: st.DataObject, loss_type: LossType
) -> None:
    """Also where a rank holds nothing but masked rows."""
    cut = data.draw(st.integers(1, len(sizes) - 1))
    whole = step_of(sizes)
    loss, gradient = cost(whole, loss_type)
    parts = [whole.at(slice(None, cut)), whole.at(slice(cut, None))]
    got = by_ranks(2, lambda rank, mean: cost(parts[rank], loss_type, 2, mean))
    torch.testing.assert_close((got[0][0] + got[1][0]) / 2, loss)
    torch.testing.assert_close(torch.cat([slope for _, slope in got]) / 2, gradient)


def test_three_ranks_share_one_batch_mean_and_deviation() -> None:
    rewards = torch.rand(7, 4, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    rewards[2, 1] = rewards[5] = torch.nan
    cuts = [rewards[:1], rewards[1:5], rewards[5:]]  # one rank's known rewards are few
    shared: list[tuple[Baseline, AdvantageScale]] = [
        ("reinforce++", "batch"),
        ("group", "batch"),
        ("reinforce++", "none"),
    ]
    for baseline, scale in shared:
        got = by_ranks(3, lambda rank, mean: group_advantages(cuts[rank], scale, baseline, mean))  # noqa: B023
        torch.testing.assert_close(torch.cat(got), group_advantages(rewards, scale, baseline))
    filled = rewards.nan_to_num(-1e3)
    known = ~rewards.isnan()
    shares = [slice(0, 1), slice(1, 5), slice(5, 7)]
    white = by_ranks(3, lambda rank, mean: whiten(filled[shares[rank]], known[shares[rank]], mean))
    torch.testing.assert_close(torch.cat(white), whiten(filled, known))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_wholly_masked_step_has_no_gradient(loss_type: LossType) -> None:
    loss, gradient = cost(step_of([0, 0, 0]), loss_type)
    assert float(loss) == 0 and gradient.eq(0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_advantage_may_be_left_out_of_the_forward_pass(loss_type: LossType) -> None:
    """Weights are the whole step's, so skipping what has no gradient changes nothing."""
    rows = step_of([3, 5, 7, 2])
    rows.gains[1] = 0.0
    weights = token_weights(rows.mask, loss_type, LIMIT)
    slopes = []
    for kept in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 3])):
        part = rows.at(kept)
        now = part.now.clone().requires_grad_()
        loss = policy_loss(now, part.old, part.gains, part.mask, loss_type, *CLIP).loss
        (slope,) = torch.autograd.grad((weights[kept] * loss).sum(), now)
        full = torch.zeros_like(rows.now)
        full[kept] = slope
        slopes.append(full)
    torch.testing.assert_close(*slopes)


def test_the_layouts_of_these_tests_put_every_token_back() -> None:
    """The helpers themselves: what is laid out is found again, in order, whatever the side."""
    for side in ("left", "right", "holes"):
        columns = places([2, 0, 4], side, seed=9)
        values = laid([[1.0, 2.0], [], [3.0, 4.0, 5.0, 6.0]], columns, fill=-1.0)
        assert values[mask_at(columns)].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        assert all(row == sorted(row) for row in columns)
