"""Group relative policy optimization (GRPO, arXiv:2402.03300) and its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from coderl.algorithms.advantages import AdvantageScale, Baseline, group_advantages, single_process
from coderl.algorithms.base import passes_options_on
from coderl.algorithms.losses import KLEstimator, LossType, kl_divergence, policy_loss
from coderl.algorithms.policy_gradient import Loss, PolicyGradient, PolicyGradientOptions
from coderl.algorithms.rewards import total_contrast
from coderl.algorithms.step import Rollout
from coderl.errors import UsageError
from coderl.model.logprobs import Scores
from coderl.model.policy import Policy
from coderl.types import Credit, Experience

if TYPE_CHECKING:
    from collections.abc import Callable

LEGAL_SCALES: dict[Baseline, tuple[AdvantageScale, ...]] = {
    "group": ("group", "batch", "none"),
    "rloo": ("group", "batch", "none"),
    "reinforce++": ("batch", "none"),
    "none": ("none",),
}
"""The scales that go with each baseline."""


class GRPO(PolicyGradient):
    """Group relative policy optimization, without a critic.

    A sample's advantage is its reward relative to the other samples of its problem.

    Args:
        policy: The model to train.
        group_size: Completions sampled per problem, at least 2.
        inner_epochs: Optimizer steps on one batch of rollouts.
        clip: The importance ratio to the policy that sampled is clipped to [1 - clip, 1 + clip]. Has an
            effect from the second inner epoch on.
        kl_coefficient: Weight of the KL divergence from the reference. 0 skips the reference's forward.
        kl: Estimator of that divergence. ``k3`` (the paper's) and ``k2`` are added to the loss; on-policy,
            k2's gradient is that of the divergence. The gradient of ``k1`` is 0 on average: its sum is
            subtracted from a sample's reward instead (arXiv:2402.14740), with scale batch or none.
        loss_type: Which ratio is clipped, and how tokens are averaged. ``grpo``: ratios of tokens, averaged
            per sequence; ``dapo``: over all tokens of the step (arXiv:2503.14476); ``dr_grpo``: over
            sequences times ``max_new_tokens`` (arXiv:2503.20783); ``gspo``: the ratio of the whole sequence
            (arXiv:2507.18071); ``cispo``: clipped weights that leave every token its gradient
            (arXiv:2506.13585).
        baseline: What is subtracted from a reward: the mean of its ``group``, of the group's other samples
            (``rloo``, arXiv:2402.14740), of the whole batch (``reinforce++``, arXiv:2501.03262), or nothing
            (``none``).
        scale: Divide advantages by the standard deviation of the ``group``, of the ``batch``, or not at all
            (``none``).
        refill_budget: Problems that a step may sample beyond its batch, to replace groups without an
            advantage: with baseline group or rloo, those whose rewards are all equal (dynamic sampling,
            arXiv:2503.14476, 3.2). 0 is off.
        **options: Options of :class:`~coderl.algorithms.PolicyGradient`.
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
        """Check that there is a data module to refill from, before weights load.

        Raises:
            UsageError: There is none.
        """
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
    def needs_old_policy(self) -> bool:
        """True also where the divergence is part of the reward."""
        return super().needs_old_policy or self._kl_in_reward

    def has_gradient(self, rewards: Tensor) -> Tensor:
        """Samples of known reward; without KL term and entropy bonus, only those with an advantage."""
        known = super().has_gradient(rewards)
        if self.kl_coefficient != 0 or self.entropy_coefficient != 0:
            return known
        return known & (self._sample_advantages(rewards, self.mean_over_ranks) != 0)

    def advantages(self, rewards: Tensor, experience: Experience) -> Credit:
        """Each token has its sample's advantage. Collective."""
        if self._kl_in_reward:
            assert experience.old_logprobs is not None and experience.ref_logprobs is not None
            kl = kl_divergence(experience.old_logprobs, experience.ref_logprobs, "k1")
            penalty = torch.where(experience.mask, kl, 0.0).sum(dim=1).view_as(rewards)
            counts = experience.mask.any(dim=1).view_as(rewards)
            # A truncated sample that is masked out has no penalty, so its reward must not enter the baseline
            # of samples that have one.
            rewards = torch.where(counts, rewards - self.kl_coefficient * penalty, torch.nan)
        advantages = self._sample_advantages(rewards, self.mean_over_ranks)
        return Credit(advantages.flatten()[:, None].expand_as(experience.mask))

    def _sample_advantages(self, rewards: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        # A penalty on long answers may leave less between right and wrong than the rewards say.
        contrast = 0.0 if self.overlong_buffer else total_contrast(self.rewards)
        return group_advantages(rewards, self.scale, self.baseline, mean_over_ranks, contrast)

    def loss(self, scores: Scores, batch: Experience) -> Loss:
        """The surrogate loss of ``loss_type``, plus ``kl_coefficient`` times the divergence by k2 or k3."""
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
        """Replace groups without an advantage by groups of other problems, within the budget. Collective."""
        empty = self._without_advantage(rollout.rewards, self.mean_over_ranks)
        values, count = self._meter.values, len(rollout.rewards)
        values["groups/no_signal"] = self._share_of_groups(len(empty), count)
        if not self.refill_budget:
            return [rollout]
        with self.together():
            chosen, more, replaced = self._refilled(rollout, empty)
        values["groups/refilled"] = self._share_of_groups(replaced, count)
        return [chosen, *more]

    def _refilled(self, rollout: Rollout, empty: list[int]) -> tuple[Rollout, list[Rollout], int]:
        """The rollout with other groups at the places in ``empty``, the rollouts drawn, and how many are new.

        Nothing in here is collective: each rank refills as often as its own groups need it, and compares
        further groups with its own.
        """
        assert self.datamodule is not None  # see setup
        chosen, more, budget, replaced = rollout, list[Rollout](), self.refill_budget, 0
        sampled = {problem.id for problem in rollout.problems}
        while empty and budget > 0:
            problems = self.datamodule.draw(min(len(empty), budget), sampled)
            if not problems:
                break
            sampled |= {problem.id for problem in problems}
            budget -= len(problems)
            more.append(self.collect(problems))
            for group in range(len(problems)):
                if not empty:
                    break
                tried = chosen.replaced(empty[-1], more[-1], group)
                left = self._without_advantage(tried.rewards, single_process)
                if empty[-1] not in left:
                    # With a baseline over the batch, the new group may have given others an advantage.
                    chosen, replaced, empty = tried, replaced + 1, [place for place in empty if place in left]
        return chosen, more, replaced

    def _without_advantage(self, rewards: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]) -> list[int]:
        """The places of groups of which no sample has an advantage, before any divergence is subtracted."""
        without = (self._sample_advantages(rewards, mean_over_ranks) == 0).all(dim=1)
        return [place for place, here in enumerate(without.tolist()) if here]

    def _share_of_groups(self, some: int, count: int) -> float:
        """``some`` of ``count`` groups of this rank, as a share of those of all ranks. Collective."""
        part, whole = self.mean_over_ranks(torch.tensor([some, count], dtype=torch.float32)).tolist()
        return float(part / whole)
