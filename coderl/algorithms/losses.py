"""KL estimates, importance weights and losses, as pure functions of tensors. No trainer, no model, no state.

Notation:
    B sequences, T columns.
    Per-token tensors are ``[B, T]``; column t belongs to token t. Masks are bool, true on completion tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from coderl.algorithms.advantages import single_process

if TYPE_CHECKING:
    from collections.abc import Callable

KLEstimator = Literal["k1", "k2", "k3"]
LossType = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
SamplerCorrection = Literal["token", "sequence", "mask"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before ``exp``, which overflows at 88 in float32."""


def token_weights(
    mask: Tensor,
    loss_type: LossType,
    max_new_tokens: int,
    mean_over_ranks: Callable[[Tensor], Tensor] = single_process,
) -> Tensor:
    """Weight of each token in the loss of an optimizer step: ``loss = (weights * token_loss).sum()``.

    Computed once over the whole step, so that micro-batch size, order and padding do not change the gradient.

    Args:
        mask: ``[B, T]``, true on the completion tokens of this rank's whole step.
        loss_type: ``grpo`` and ``gspo`` average over a sequence's tokens, then over sequences; ``dapo``
            (arXiv:2503.14476) and ``cispo`` over all tokens; ``dr_grpo`` divides by sequences times
            ``max_new_tokens`` (arXiv:2503.20783).
        max_new_tokens: The length limit of completions.
        mean_over_ranks: Averages a count over ranks. Gradients are averaged over ranks, so dividing by the
            mean count gives the gradient of one process that holds all sequences.

    Returns:
        ``[B, T]`` float32, zero outside the mask. All zero where the mask is empty.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    sequences = mean_over_ranks((lengths > 0).sum().float())
    tokens = mean_over_ranks(lengths.sum().float())
    by_sequence, by_token = lengths * sequences, tokens.expand(lengths.shape)
    divisor = {
        "grpo": by_sequence,
        "gspo": by_sequence,
        "dapo": by_token,
        "cispo": by_token,
        "dr_grpo": (sequences * max_new_tokens).expand(lengths.shape),
    }[loss_type]
    # An empty mask has the divisor 0: 0 / tiny is 0, where 0 / 0 would be NaN.
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
    # expm1: near d = 0, where most tokens are, exp(d) - 1 would lose all digits.
    return torch.expm1(d) - d


class PolicyLoss(NamedTuple):
    """Per-token results of a policy loss, each ``[B, T]``; only ``loss`` has a gradient."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor

    def logged(self) -> dict[str, Tensor]:
        """The per-token values by name of metric."""
        return {
            "loss/policy": self.loss,
            "policy/ratio": self.ratio,
            "policy/clip_fraction": self.clipped.float(),
        }


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), negated: ``-min(ratio·A, clip(ratio)·A)``.

    Args:
        logprobs: ``[B, T]`` under the policy, with gradient.
        old_logprobs: ``[B, T]`` under the policy before the update.
        advantages: ``[B, T]``.
        clip_low: The ratio is clipped below at ``1 - clip_low``.
        clip_high: And above at ``1 + clip_high``.

    Returns:
        The loss, the ratio, and the tokens without a gradient because of clipping.
    """
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    # Where the minimum is the clipped term, which is constant in the policy, the token has no gradient. A
    # ratio out of bounds alone does not say so: with the other sign of the advantage the minimum is the plain
    # term.
    clipped = (bounded * advantages < ratio * advantages).detach()
    return PolicyLoss(loss, ratio.detach(), clipped)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss_type: LossType,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """The surrogate loss of ``loss_type``, per token; :func:`token_weights` averages over tokens.

    ``grpo``, ``dapo`` and ``dr_grpo`` clip each token's ratio. ``gspo`` (arXiv:2507.18071) clips the
    sequence's, the geometric mean of its tokens' ratios; its gradient is written token by token (eq. 14), so
    that each may have an advantage of its own. ``cispo`` (arXiv:2506.13585, eq. 4) clips the ratio only as a
    weight, so that no token loses its gradient: ``-sg(clip(ratio))·A·logp``.

    Args:
        logprobs: ``[B, T]`` under the policy, with gradient.
        old_logprobs: ``[B, T]`` under the policy before the update.
        advantages: ``[B, T]``.
        mask: ``[B, T]``, the tokens in the loss.
        loss_type: Which surrogate.
        clip_low: Ratios are clipped below at ``1 - clip_low``.
        clip_high: And above at ``1 + clip_high``.
    """
    if loss_type == "gspo":
        shift = torch.where(mask, logprobs - old_logprobs, 0.0).sum(dim=1, keepdim=True)
        mean = (shift / mask.sum(dim=1, keepdim=True).clamp(min=1)).detach()
        # 0 in value: it only gives each token its own gradient, pi / sg(pi) in eq. 14. The sequence's ratio
        # stands in `mean`, which is a constant, so the old log-probabilities are 0 below.
        own = logprobs - logprobs.detach()
        return clipped_policy_loss(
            mean + own, torch.zeros_like(old_logprobs), advantages, clip_low, clip_high
        )
    result = clipped_policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high)
    if loss_type != "cispo":
        return result
    # A constant, as in eq. 4: `result.ratio` is detached. The gradient goes through logprobs alone.
    weight = result.ratio.clamp(1 - clip_low, 1 + clip_high)
    return PolicyLoss(-weight * advantages * logprobs, result.ratio, weight != result.ratio)


def sampler_correction(
    old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, mode: SamplerCorrection, cap: float
) -> Tensor:
    """Truncated importance weights for a rollout engine whose numerics differ from the trainer's.

    The samples are from the engine's distribution, the gradient is the one for samples of the trainer's. The
    ratio of both corrects that; truncating it bounds the variance ("Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training", F. Yao et al., 2025).

    Args:
        old_logprobs: ``[B, T]`` by the trainer, before the update.
        sampler_logprobs: ``[B, T]`` as the engine reported them.
        mask: ``[B, T]``.
        mode: ``token`` weights each token by its own ratio; ``sequence`` all tokens of a sequence by their
            ratios' geometric mean (the *mean* log-ratio: the sum would grow with length); ``mask`` weights
            tokens whose ratio lies within ``1 / cap`` and ``cap`` by 1, others by 0.
        cap: Largest weight.

    Returns:
        ``[B, T]``, zero outside the mask, without gradient.
    """
    # Detached: the weights are constants of the loss.
    shift = torch.where(mask, old_logprobs - sampler_logprobs, 0.0).detach()
    if mode == "sequence":
        shift = (shift.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(mask)
    ratio = shift.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weights = ((ratio >= 1 / cap) & (ratio <= cap)).float() if mode == "mask" else ratio.clamp(max=cap)
    return torch.where(mask, weights, 0.0)


def top_entropy_mask(
    entropy: Tensor, mask: Tensor, fraction: float, gathered: Callable[[Tensor], Tensor] = single_process
) -> Tensor:
    """The tokens with the highest entropy, "forking tokens" (arXiv:2506.01939).

    Args:
        entropy: ``[B, T]`` nats.
        mask: ``[B, T]``, the tokens of a whole step.
        fraction: The share of them to keep, over 0 and up to 1.
        gathered: From a rank's entropies ``[N]`` to those of all ranks: the share is of all ranks' tokens.

    Returns:
        ``[B, T]`` bool; tokens with the same entropy as the last one kept are kept too.
    """
    values = gathered(entropy[mask])
    if not len(values):
        return mask
    kept = math.ceil(fraction * len(values))
    return mask & (entropy >= values.topk(kept).values[-1])


class ValueLoss(NamedTuple):
    """Results of :func:`value_loss`, each ``[B, T]``."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> ValueLoss:
    """PPO's clipped value loss: ``max((V - R)², (clip(V, V_old ± clip) - R)²) / 2``.

    (Appendix of arXiv:2005.12729, "Implementation matters in deep policy gradients".)

    Args:
        values: ``[B, T]``, with gradient.
        old_values: ``[B, T]``, before the update.
        returns: ``[B, T]``, the targets.
        clip: The largest change of a value from its old one, in units of reward; None is the plain square.

    Returns:
        The loss, and the tokens without a gradient because of clipping.
    """
    plain = (values - returns).square()
    if clip is None:
        return ValueLoss(0.5 * plain, torch.zeros_like(plain, dtype=torch.bool))
    bounded = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return ValueLoss(0.5 * torch.maximum(plain, bounded), (bounded > plain).detach())


def adapted_kl_coefficient(beta: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The KL coefficient for the next step, by a proportional controller (arXiv:1909.08593, section 2.2).

    Args:
        beta: The coefficient of this step.
        kl: This step's divergence from the reference, in the unit of ``target``.
        target: The intended divergence.
        samples: Sequences in the step.
        horizon: Sequences over which the coefficient may change by 20 %, which is also the most for a step.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * min(samples / horizon, 1.0))
