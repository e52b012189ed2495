"""From rewards to advantages, as pure functions of tensors. No trainer, no model, no state.

Notation:
    P prompts, G samples of each, B = P * G sequences, T columns.
    Per-token tensors are ``[B, T]``; column t belongs to token t. Masks are bool, true on completion tokens.
    V_t is the value of the state in which token t is chosen: prompt and tokens before t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from coderl.model.padding import last_token

if TYPE_CHECKING:
    from collections.abc import Callable

Baseline = Literal["group", "rloo", "reinforce++", "none"]
AdvantageScale = Literal["group", "batch", "none"]

EPS = 1e-4
"""Added to standard deviations."""
ROUNDING = 1e-6
"""A standard deviation below this share of the mean's magnitude is rounding error, and counts as 0."""


def single_process(value: Tensor) -> Tensor:
    """The mean over ranks where there is only one: the value itself."""
    return value


def group_advantages(
    rewards: Tensor,
    scale: AdvantageScale = "group",
    baseline: Baseline = "group",
    mean_over_ranks: Callable[[Tensor], Tensor] = single_process,
    contrast: float = 0.0,
) -> Tensor:
    """Group-relative advantages: rewards minus a baseline, divided by a standard deviation.

    NaN rewards (infrastructure errors) are left out of means and deviations, and get advantage 0.

    Args:
        rewards: ``[P, G]``, NaN where unknown.
        scale: Divide by the standard deviation of the ``group`` (GRPO, arXiv:2402.03300, section 4.1.2), of
            the whole ``batch``, or not at all (``none``, Dr. GRPO, arXiv:2503.20783).
        baseline: What is subtracted: the mean of the ``group``, of its *other* samples (``rloo``,
            arXiv:2402.14740), of the whole batch (``reinforce++``, arXiv:2501.03262), or nothing (``none``).
            With the first two, groups whose rewards are all equal get exactly 0.
        mean_over_ranks: Averages a value over ranks, so that the batch is that of all ranks.
        contrast: What a right program is worth beyond a wrong one. A group of n samples is never divided by
            less than ``contrast / sqrt(n)``, the deviation of one right program among wrong ones. Groups with
            both have at least that, so for them nothing changes; where all pass, or none, the small
            differences that are left stay small beside right and wrong. 0 divides by the deviation as it is.

    Returns:
        ``[P, G]`` float32, finite.
    """
    rewards = rewards.float()
    known = ~rewards.isnan()
    values = rewards.nan_to_num(0.0)
    count = known.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    # Equal rewards are set to 0 by comparison, not by subtraction: the mean of equal floats may differ from
    # them by rounding, and division by as small a deviation would make that an advantage of about 1.
    within = torch.where(known & ~all_equal(rewards)[:, None], rewards - mean, 0.0)
    batch_mean, batch_std = moments(values, known, mean_over_ranks)
    centred = {
        "group": within,
        "rloo": within * count / (count - 1).clamp(min=1),
        "reinforce++": torch.where(known & (batch_std > 0), values - batch_mean, 0.0),
        "none": values,
    }[baseline]
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (batch_std + EPS)
    # Around the group's mean for leave-one-out too, whose differences are larger by n / (n - 1).
    variance = within.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    least = contrast / count.clamp(min=1).float().sqrt()
    return centred / (torch.maximum(variance.sqrt(), least) + EPS)


def all_equal(rewards: Tensor) -> Tensor:
    """Groups whose known rewards are all equal (compared exactly), or that have none.

    Args:
        rewards: ``[P, G]``, NaN where unknown.

    Returns:
        ``[P]`` bool.
    """
    low = rewards.nan_to_num(nan=float("inf")).amin(dim=1)
    high = rewards.nan_to_num(nan=float("-inf")).amax(dim=1)
    return low >= high  # ">" where a group has no known reward at all


def moments(
    values: Tensor, mask: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] = single_process
) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation under the mask, over all ranks; 0 where it is empty."""
    # Ranks average sums and counts, never means: they may hold unequally many values. The number of ranks
    # cancels.
    count = mean_over_ranks(mask.sum().float()).clamp(min=torch.finfo(torch.float32).tiny)
    mean = mean_over_ranks(torch.where(mask, values, 0.0).sum()) / count
    std = (mean_over_ranks(torch.where(mask, values - mean, 0.0).square().sum()) / count).sqrt()
    # Equal values may have a tiny deviation by rounding; whitening would blow it up to 1.
    return mean, torch.where(std > ROUNDING * mean.abs(), std, 0.0)


def whiten(
    values: Tensor, mask: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] = single_process
) -> Tensor:
    """``(x - mean) / (std + 1e-4)`` over the values under the mask, of all ranks; 0 elsewhere."""
    mean, std = moments(values, mask, mean_over_ranks)
    return torch.where(mask & (std > 0), (values - mean) / (std + EPS), 0.0)


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).

    Args:
        lengths: Tokens of each completion, any shape.
        limit: The longest completion allowed.
        buffer: Number of tokens before ``limit`` over which the penalty grows, at least 1.

    Returns:
        0 up to ``limit - buffer`` tokens, then linearly down to -1 at ``limit``.
    """
    return -((lengths - (limit - buffer)) / buffer).clamp(0.0, 1.0)


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """PPO's per-token rewards: ``-beta * kl_t``, plus the sequence's reward at its last token.

    Args:
        rewards: ``[B]``, one for each sequence.
        kl: ``[B, T]`` estimate of the divergence from the reference, nats.
        mask: ``[B, T]``, the completion's tokens.
        beta: KL coefficient.

    Returns:
        ``[B, T]`` float32, zero outside the mask.
    """
    return torch.where(mask, -beta * kl, 0.0) + torch.where(last_token(mask), rewards.float()[:, None], 0.0)


class GAE(NamedTuple):
    """Results of :func:`gae`, each ``[B, T]`` float32, zero outside the mask."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    final_values: Tensor | None = None,
) -> GAE:
    """Generalized advantage estimation (arXiv:1506.02438, eq. 16), over the tokens under the mask.

    Tokens outside the mask are no time steps: the recursion skips them.

    Args:
        rewards: ``[B, T]``.
        values: ``[B, T]``, V_t.
        mask: ``[B, T]``.
        gamma: Discount per token.
        lam: 0 uses the critic's estimates alone (little variance), 1 the rewards alone (no bias).
        final_values: ``[B]``, the value after the last token; 0 where the sequence has ended. None: 0.

    Returns:
        Advantages, and the critic's targets ``advantages + values``.
    """
    # Float32, whatever comes in: the recursion would add up 16-bit rounding errors over hundreds of tokens.
    rewards, values = rewards.float(), values.float()
    advantage = torch.zeros_like(values[:, 0])
    following = advantage if final_values is None else final_values.float()
    columns = []
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        following = torch.where(here, values[:, t], following)
        # `advantage` itself is kept outside the mask: the next token to the left still needs it.
        columns.append(torch.where(here, advantage, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    return GAE(advantages, advantages + torch.where(mask, values, 0.0))
