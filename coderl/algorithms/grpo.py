"""Group relative policy optimization (DeepSeekMath, arXiv:2402.03300) and its family."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from coderl.algorithms.advantages import AdvantageScale, Baseline, group_advantages, no_signal
from coderl.algorithms.base import passes_options_on
from coderl.algorithms.losses import KLEstimator, LossType, kl_divergence, policy_loss
from coderl.algorithms.policy_gradient import Loss, PolicyGradient, PolicyGradientOptions
from coderl.algorithms.step import Rollout
from coderl.errors import UsageError
from coderl.model.logprobs import Scores
from coderl.model.policy import Policy
from coderl.types import Credit, Experience

LEGAL_SCALES: dict[Baseline, tuple[AdvantageScale, ...]] = {
    "group": ("group", "batch", "none"),
    "rloo": ("group", "batch", "none"),
    "reinforce++": ("batch", "none"),
    "none": ("none",),
}
"""Deviations that rewards are divided by, by what was taken off them."""


class GRPO(PolicyGradient):
    """A sample's advantage is how much better it was than the other samples of its problem; no critic.

    Args:
        policy: The model to train.
        group_size: Completions sampled per problem, at least 2.
        inner_epochs: Optimizer steps made on one batch of rollouts.
        clip: The ratio to the policy that sampled is clipped below at 1 - clip, and above at 1 + clip. Acts
            from the second inner epoch on.
        kl_coefficient: Weight of the divergence from the reference. 0 skips its forward.
        kl: Its estimator. ``k3`` (the paper's) and ``k2`` stand in the loss; on-policy, k2's gradient is
            that of the divergence. ``k1`` has none of use there: its sum is taken off a sample's reward
            (arXiv:2402.14740), with scale batch or none.
        loss_type: What is clipped and how tokens are averaged. ``grpo``: ratios of tokens, averaged per
            sequence; ``dapo``: over all tokens of the step (arXiv:2503.14476); ``dr_grpo``: over sequences
            times ``max_new_tokens`` (arXiv:2503.20783); ``gspo``: the ratio of the whole sequence
            (arXiv:2507.18071); ``cispo``: clipped weights that leave every token its gradient
            (arXiv:2506.13585).
        baseline: What a reward is compared with: the mean of its ``group``, of the group's others (``rloo``,
            arXiv:2402.14740), of the whole batch (``reinforce++``, arXiv:2501.03262), or nothing (``none``).
        scale: Divide advantages by the deviation of the ``group``, of the ``batch``, or not (``none``).
        refill_budget: Problems that a step may sample beyond its batch, to take the place of groups whose
            rewards are all equal (dynamic sampling, arXiv:2503.14476, 3.2). 0 is off.
        **options: What every :class:`~coderl.algorithms.PolicyGradient` takes.
    """

    @passes_options_on
    def __init__(
        self,
        policy: Policy,
        group_size: int = 8,
        inner_epochs: int = 1,
        clip: float = 0.2,
        kl_coefficient: float = 0.02,
        kl: KLEstimator = "k3",
        loss_type: LossType = "grpo",
        baseline: Baseline = "group",
        scale: AdvantageScale = "group",
        refill_budget: int = 0,
        **options: Unpack[PolicyGradientOptions],
    ) -> None:
        super().__init__(
            policy,
            group_size=group_size,
            inner_epochs=inner_epochs,
            clip=clip,
            kl_coefficient=kl_coefficient,
            kl=kl,
            **options,
        )
        if group_size < 2 and (baseline in ("group", "rloo") or scale == "group"):
            raise UsageError(
                f"group_size {group_size}: GRPO compares samples of one problem and needs at least 2; "
                "set model.group_size, 8 is usual"
            )
        if self._kl_in_reward and scale == "group":
            raise UsageError(
                "kl k1 is part of the reward, and scale group would blow it up in groups that differ in "
                "little else: set model.scale to batch or none"
            )
        if refill_budget and group_size < 2:
            raise UsageError("refill_budget looks for groups that differ: set model.group_size to 2 or more")
        if scale not in LEGAL_SCALES[baseline]:
            raise UsageError(
                f"scale {scale} does not go with baseline {baseline}, which does not take the mean off it: "
                f"set model.scale to {' or '.join(LEGAL_SCALES[baseline])}"
            )
        if refill_budget < 0:
            raise UsageError(
                f"refill_budget is {refill_budget}: set model.refill_budget to 0 or more problems"
            )
        self.weighting = self.loss_type = loss_type
        self.baseline, self.scale, self.refill_budget = baseline, scale, refill_budget

    def setup(self, stage: str) -> None:
        """Where nothing can be drawn to refill with, that is reported before weights load."""
        if stage == "fit" and self.refill_budget and self.datamodule is None:
            raise UsageError(
                f"refill_budget {self.refill_budget} needs a data module to draw further problems from, and "
                "this fit has none: fit with a CodeDataModule, or set model.refill_budget to 0"
            )
        super().setup(stage)

    @property
    def _kl_in_reward(self) -> bool:
        return self.kl == "k1" and self.kl_coefficient != 0

    @property
    def reads_old_policy(self) -> bool:
        """Also where the divergence is part of the reward."""
        return super().reads_old_policy or self._kl_in_reward

    def has_gradient(self, rewards: Tensor) -> Tensor:
        """Without divergence and entropy bonus, a sample without advantage has no gradient."""
        known = super().has_gradient(rewards)
        if self.kl_coefficient != 0 or self.entropy_coefficient != 0:
            return known
        return known & (self._sample_advantages(rewards) != 0)

    def advantages(self, rewards: Tensor, experience: Experience) -> Credit:
        """The sample's advantage on each of its tokens."""
        if self._kl_in_reward:
            assert experience.old_logprobs is not None and experience.ref_logprobs is not None
            kl = kl_divergence(experience.old_logprobs, experience.ref_logprobs, "k1")
            paid = torch.where(experience.mask, kl, 0.0).sum(dim=1).view_as(rewards)
            counts = experience.mask.any(dim=1).view_as(rewards)
            # A truncated sample that is masked has no divergence: with its bare reward it would spoil the
            # baseline.
            rewards = torch.where(counts, rewards - self.kl_coefficient * paid, torch.nan)
        return Credit(self._sample_advantages(rewards).flatten()[:, None].expand_as(experience.mask))

    def _sample_advantages(self, rewards: Tensor) -> Tensor:
        return group_advantages(rewards, self.scale, self.baseline, self.mean_over_ranks)

    def loss(self, scores: Scores, batch: Experience) -> Loss:
        """The surrogate of ``loss_type``, plus ``kl_coefficient`` times k2 or k3."""
        assert batch.old_logprobs is not None
        policy = policy_loss(
            scores.logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            self.loss_type,
            self.clip,
            self.clip_high,
        )
        values = policy.logged()
        if batch.ref_logprobs is None:
            return policy.loss, values
        kl = kl_divergence(scores.logprobs, batch.ref_logprobs, self.kl)
        values["policy/kl"] = kl
        return (policy.loss if self._kl_in_reward else policy.loss + self.kl_coefficient * kl), values

    def refill(self, rollout: Rollout) -> list[Rollout]:
        """Replace groups without signal by groups of other problems, as far as the budget goes."""
        if not self.refill_budget:
            return [rollout]
        assert self.datamodule is not None  # see setup
        empty = no_signal(rollout.rewards).nonzero().flatten().tolist()
        count, chosen, more, budget = len(empty), rollout, [], self.refill_budget
        sampled = {problem.id for problem in rollout.problems}
        while empty and budget > 0:
            problems = self.datamodule.draw(min(len(empty), budget), sampled)
            if not problems:
                break
            sampled |= {problem.id for problem in problems}
            budget -= len(problems)
            more.append(self.collect(problems))
            for group in (~no_signal(more[-1].rewards)).nonzero().flatten().tolist():
                chosen = chosen.replaced(empty.pop(), more[-1], group)
        self._meter.values["groups/refilled"] = (count - len(empty)) / len(rollout.rewards)
        return [chosen, *more]
