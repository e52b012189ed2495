"""Credit: from rewards to advantages, as pure functions of tensors. No trainer, no model, no state.

Notation:
    P prompts, G samples of each, B = P * G sequences, T columns.
    Per-token tensors are ``[B, T]``; column t belongs to token t. Masks are bool and come from generation.
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
"""A batch that deviates by less than this part of its mean does not deviate."""


def single_process(value: Tensor) -> Tensor:
    """The mean over ranks where there is one."""
    return value


def group_advantages(
    rewards: Tensor,
    scale: AdvantageScale = "group",
    baseline: Baseline = "group",
    mean_over_ranks: Callable[[Tensor], Tensor] = single_process,
) -> Tensor:
    """How much better each sample was than its baseline, in units of a deviation.

    NaN rewards (infrastructure failures) take part in no mean and no deviation, and get advantage 0.

    Args:
        rewards: ``[P, G]``, NaN where unknown.
        scale: Divide by the ``group``'s deviation (GRPO, arXiv:2402.03300, section 4.1.2), by the whole
            ``batch``'s, or not at all (``none``, Dr. GRPO, arXiv:2503.20783).
        baseline: What is subtracted: the mean of the ``group``, of its *other* samples (``rloo``,
            arXiv:2402.14740), of the whole batch (``reinforce++``, arXiv:2501.03262), or nothing (``none``).
            Under the first two, groups without signal get exactly 0.
        mean_over_ranks: Averages a value over ranks, so that the batch is that of all of them.

    Returns:
        ``[P, G]`` float32, finite.
    """
    rewards = rewards.float()
    known = ~rewards.isnan()
    values = rewards.nan_to_num(0.0)
    count = known.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    within = torch.where(known & ~no_signal(rewards)[:, None], rewards - mean, 0.0)
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
    variance = within.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt() + EPS)


def no_signal(rewards: Tensor) -> Tensor:
    """Groups whose known rewards are all equal, by exact comparison: rounding gives equal floats a deviation.

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
    """Mean and population deviation of ``values`` where ``mask`` is true, over all ranks; 0 of nothing.

    Ranks average sums and counts, never means: they may hold unequally many values.
    """
    count = mean_over_ranks(mask.sum().float()).clamp(min=torch.finfo(torch.float32).tiny)
    mean = mean_over_ranks(torch.where(mask, values, 0.0).sum()) / count
    std = (mean_over_ranks(torch.where(mask, values - mean, 0.0).square().sum()) / count).sqrt()
    return mean, torch.where(std > ROUNDING * mean.abs(), std, 0.0)


def whiten(
    values: Tensor, mask: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] = single_process
) -> Tensor:
    """``(x - mean) / (std + 1e-4)`` over all values under the mask, those of every rank; 0 elsewhere."""
    mean, std = moments(values, mask, mean_over_ranks)
    return torch.where(mask & (std > 0), (values - mean) / (std + EPS), 0.0)


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).

    Args:
        lengths: Tokens of each completion, any shape.
        limit: The longest completion allowed.
        buffer: Tokens before ``limit`` over which the penalty grows, at least 1.

    Returns:
        0 up to ``limit - buffer`` tokens, then linearly down to -1 at ``limit``.
    """
    return -((lengths - (limit - buffer)) / buffer).clamp(0.0, 1.0)


def token_rewards(rewards: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """PPO's reward of each token: ``-beta * kl_t``, and the sequence's own at its last token.

    Args:
        rewards: ``[B]``, of whole sequences.
        kl: ``[B, T]`` estimate of the divergence from the reference, nats.
        mask: ``[B, T]``, the completion's tokens.
        beta: Weight of the divergence.

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

    Tokens outside the mask are no time steps: the recursion passes over them.

    Args:
        rewards: ``[B, T]``.
        values: ``[B, T]``, V_t.
        mask: ``[B, T]``.
        gamma: Discount per token.
        lam: 0 trusts the critic, 1 the rewards that came.
        final_values: ``[B]``, the value after the last token; 0 where the sequence is at its end. None: 0.

    Returns:
        Advantages, and the returns ``advantages + values`` that the critic is to learn.
    """
    rewards, values = rewards.float(), values.float()
    advantage = torch.zeros_like(values[:, 0])
    following = advantage if final_values is None else final_values.float()
    columns = []
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(here, delta + gamma * lam * advantage, advantage)
        following = torch.where(here, values[:, t], following)
        columns.append(torch.where(here, advantage, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    return GAE(advantages, advantages + torch.where(mask, values, 0.0))
