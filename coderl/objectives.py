"""Advantages, divergences and losses as pure functions of tensors. No trainer, no model, no state.

Notation:
    P prompts, G samples of each, B = P * G sequences, T columns.
    Per-token tensors are ``[B, T]``; column t belongs to token t. Masks are bool and come from generation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

KLEstimator = Literal["k1", "k2", "k3"]
LossType = Literal["grpo", "dapo", "dr_grpo"]
AdvantageScale = Literal["group", "batch", "none"]

EPS = 1e-4
"""Added to standard deviations."""
MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before they are exponentiated."""


def group_advantages(rewards: Tensor, scale: AdvantageScale = "group") -> Tensor:
    """How much better each sample was than its group (GRPO, arXiv:2402.03300, section 4.1.2).

    ``(r - mean) / (std + 1e-4)`` over the prompt's own samples. NaN rewards (infrastructure failures) take
    part in no mean and no deviation, and get advantage 0.

    Args:
        rewards: ``[P, G]``, NaN where unknown.
        scale: Divide by the ``group``'s deviation, by the whole ``batch``'s, or not at all
            (``none``, Dr. GRPO, arXiv:2503.20783).

    Returns:
        ``[P, G]`` float32, finite.
    """
    rewards = rewards.float()
    known = ~rewards.isnan()
    count = known.sum(dim=1, keepdim=True).clamp(min=1)
    mean = rewards.nan_to_num(0.0).sum(dim=1, keepdim=True) / count
    centred = torch.where(known & ~no_signal(rewards)[:, None], rewards - mean, 0.0)
    if scale == "none":
        return centred
    if scale == "batch":
        spread = rewards[known].std() if int(known.sum()) > 1 else rewards.new_zeros(())
        return centred / (spread + EPS)
    variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
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


def token_weights(
    mask: Tensor,
    loss_type: LossType,
    max_new_tokens: int,
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda count: count,
) -> Tensor:
    """What each token counts in the loss of one optimizer step; ``loss = (weights * token_loss).sum()``.

    Computed once over the whole step, so that no micro-batch size, order or padding can change the gradient.

    Args:
        mask: ``[B, T]``, true on the completion tokens of this rank's whole step.
        loss_type: ``grpo`` averages over a sequence's tokens, then over sequences; ``dapo`` over all tokens
            (arXiv:2503.14476); ``dr_grpo`` divides by sequences times ``max_new_tokens`` (arXiv:2503.20783).
        max_new_tokens: The length limit of completions.
        mean_over_ranks: Averages a count over ranks. DDP averages gradients, so dividing by the mean count
            gives the gradient of one process that holds all sequences.

    Returns:
        ``[B, T]`` float32, zero outside the mask. All zero where the mask is empty.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    sequences = mean_over_ranks((lengths > 0).sum().float())
    tokens = mean_over_ranks(lengths.sum().float())
    divisor = {
        "grpo": lengths * sequences,
        "dapo": tokens.expand(lengths.shape),
        "dr_grpo": (sequences * max_new_tokens).expand(lengths.shape),
    }[loss_type]
    return mask / divisor.float().clamp(min=torch.finfo(torch.float32).tiny)


def kl_divergence(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) (J. Schulman, "Approximating KL divergence", 2020).

    With d = ref - policy, clamped to ±20: k1 = -d, k2 = d²/2, k3 = exp(d) - 1 - d. k1 and k3 estimate the
    value without bias. As a *loss*, on-policy, only k2 has the gradient of KL(policy || reference): k1's is
    zero in expectation and k3's is that of KL(reference || policy). The GRPO paper puts k3 in its loss.

    Args:
        logprobs: ``[B, T]``, with gradient.
        ref_logprobs: ``[B, T]``.
        estimator: k1, k2 or k3.

    Returns:
        ``[B, T]``; exactly 0 where both are equal.
    """
    d = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * d.square()
    return torch.expm1(d) - d


class Clipped(NamedTuple):
    """Per-token results of :func:`clipped_policy_loss`, each ``[B, T]``."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Clipped:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), negated: ``-min(ratio·A, clip(ratio)·A)``.

    Args:
        logprobs: ``[B, T]`` under the policy, with gradient.
        old_logprobs: ``[B, T]`` under the policy that is being improved.
        advantages: ``[B, T]``.
        clip_low: The ratio is clipped below at ``1 - clip_low``.
        clip_high: And above at ``1 + clip_high``.

    Returns:
        The loss, the ratio, and where clipping took the gradient away.
    """
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    clipped = (bounded * advantages < ratio * advantages).detach()
    return Clipped(loss, ratio.detach(), clipped)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is true; NaN where it never is. Padding never counts."""
    return (
        torch.where(mask, values, 0.0).sum() / mask.sum()
        if bool(mask.any())
        else values.new_full((), torch.nan)
    )
