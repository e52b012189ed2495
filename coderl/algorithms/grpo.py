"""Group relative policy optimization (DeepSeekMath, arXiv:2402.03300)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from coderl.algorithms.policy_gradient import PolicyGradient
from coderl.errors import UsageError
from coderl.objectives import AdvantageScale, clipped_policy_loss, group_advantages, kl_divergence
from coderl.policy import Policy
from coderl.types import Experience


class GRPO(PolicyGradient):
    """A sample's advantage is how much better it was than the other samples of its problem; no critic.

    Args:
        policy: The model to train.
        group_size: Completions sampled per problem, at least 2.
        kl_coefficient: Weight of the divergence from the reference, in the loss. 0 skips its forward.
        clip: The ratio's gradient ends outside [1 - clip, 1 + clip]. Matters from the second inner epoch on.
        scale: Divide advantages by the deviation of the ``group``, of the ``batch``, or not (``none``).
        **shared: What every :class:`~coderl.algorithms.PolicyGradient` takes.
    """

    def __init__(
        self,
        policy: Policy,
        group_size: int = 8,
        kl_coefficient: float = 0.02,
        clip: float = 0.2,
        scale: AdvantageScale = "group",
        **shared: Any,
    ) -> None:
        super().__init__(policy, group_size=group_size, kl_coefficient=kl_coefficient, **shared)
        if group_size < 2:
            raise UsageError(
                f"group_size {group_size}: GRPO compares samples of one problem and needs at least 2; "
                "set model.group_size, 8 is usual"
            )
        self.clip, self.scale = clip, scale

    def advantages(self, rewards: Tensor) -> Tensor:
        """``(r - mean) / (std + 1e-4)`` over each problem's own samples."""
        return group_advantages(rewards, self.scale)

    def loss(self, logprobs: Tensor, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate plus ``kl_coefficient`` times k3."""
        assert batch.old_logprobs is not None
        policy = clipped_policy_loss(logprobs, batch.old_logprobs, batch.advantages, self.clip, self.clip)
        values = {
            "loss/policy": policy.loss,
            "policy/ratio": policy.ratio,
            "policy/clip_fraction": policy.clipped.float(),
        }
        if batch.ref_logprobs is None:
            return policy.loss, values
        kl = kl_divergence(logprobs, batch.ref_logprobs, "k3")
        return policy.loss + self.kl_coefficient * kl, values | {"policy/kl": kl}
