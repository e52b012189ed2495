"""Proximal policy optimization (PPO, arXiv:1707.06347) with a critic that shares the policy's base model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from coderl.algorithms.advantages import gae, moments, token_rewards, whiten
from coderl.algorithms.base import passes_options_on
from coderl.algorithms.losses import (
    KLEstimator,
    adapted_kl_coefficient,
    clipped_policy_loss,
    kl_divergence,
    value_loss,
)
from coderl.algorithms.policy_gradient import Loss, PolicyGradient, PolicyGradientOptions
from coderl.algorithms.step import Rollout
from coderl.errors import UsageError
from coderl.model.logprobs import Scores, Values
from coderl.model.policy import Policy
from coderl.types import Credit, Experience


@dataclass
class AdaptiveKL:
    """Adapts the KL coefficient so that the divergence from the reference stays near a target.

    Args:
        target: Intended value of ``policy/kl``, nats per token.
        horizon: Sequences over which the coefficient may change by 20 %.
    """

    target: float = 0.05
    horizon: int = 10_000


class PPO(PolicyGradient):
    """Policy gradient with a critic: per-token advantages by generalized advantage estimation.

    The critic is a value head on the policy's hidden states, so that there is one base model in memory. It
    starts at the mean reward of the first rollout.

    Args:
        policy: The model to train.
        group_size: Completions sampled per problem; 1 suffices.
        inner_epochs: Optimizer steps on one batch of rollouts.
        clip: The importance ratio to the policy that sampled is clipped to [1 - clip, 1 + clip].
        target_kl: The remaining inner epochs are skipped when the policy is further than 1.5 times this from
            the one that sampled, nats per token. Null: never.
        kl_coefficient: Weight of the KL divergence from the reference, subtracted from each token's reward. 0
            skips the reference's forward.
        kl: Estimator of that divergence. In a reward ``k1`` is unbiased; k2 and k3 have less variance, and
            are biased.
        adaptive_kl: Adapt the coefficient to a target. Null: constant.
        gamma: Discount per token.
        lam: Lambda of generalized advantage estimation: 0 uses the critic's estimates alone, 1 the rewards.
        whiten_advantages: Give a step's advantages mean 0 and deviation 1.
        bootstrap_truncated: For a completion cut off at ``max_new_tokens``, the critic's value of its last
            state replaces its reward (arXiv:1712.00378). Otherwise it gets its reward like any other.
        value_coefficient: Weight of the critic's loss.
        value_clip: Clip of the critic's values (arXiv:2005.12729), in units of reward. Null: none.
        critic_adapter: Give the critic its own LoRA adapter: a second forward and backward, and no gradient
            of the critic in the policy's adapter.
        critic_learning_rate: Peak learning rate of the critic's own parameters. Null is ``learning_rate``.
        critic_warmup: Rollout steps at the start in which only the critic is trained.
        **options: Options of :class:`~coderl.algorithms.PolicyGradient`.
    """

    @passes_options_on
    def __init__(
        self,
        policy: Policy,
        group_size: int = 1,
        inner_epochs: int = 2,
        clip: float = 0.15,
        target_kl: float | None = 0.3,
        kl_coefficient: float = 0.02,
        kl: KLEstimator = "k1",
        adaptive_kl: AdaptiveKL | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_advantages: bool = True,
        bootstrap_truncated: bool = False,
        value_coefficient: float = 0.5,
        value_clip: float | None = 0.2,
        critic_adapter: bool = False,
        critic_learning_rate: float | None = None,
        critic_warmup: int = 0,
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
        self.target_kl, self.adaptive_kl = target_kl, adaptive_kl
        self.gamma, self.lam, self.whiten_advantages = gamma, lam, whiten_advantages
        self.bootstrap_truncated = bootstrap_truncated
        self.value_coefficient, self.value_clip = value_coefficient, value_clip
        self.critic_adapter, self.critic_warmup = critic_adapter, critic_warmup
        self.needs_values = not critic_adapter
        self.prompt_readings = 2 if critic_adapter else 1
        self.critic_learning_rate = critic_learning_rate
        self._given_kl_coefficient = kl_coefficient
        self._check_critic()

    def _check_critic(self) -> None:
        rate = self.critic_learning_rate
        self.require(
            gamma=(0 <= self.gamma <= 1, "between 0 and 1"),
            lam=(0 <= self.lam <= 1, "between 0 and 1"),
            target_kl=(self.target_kl is None or self.target_kl > 0, "above 0, or null"),
            value_coefficient=(0 < self.value_coefficient < float("inf"), "above 0"),
            value_clip=(self.value_clip is None or self.value_clip > 0, "above 0, or null"),
            critic_learning_rate=(rate is None or rate > 0, "above 0, or null"),
            critic_warmup=(self.critic_warmup >= 0, "0 or more steps"),
        )
        if self.bootstrap_truncated and self.truncated == "mask":
            raise UsageError(
                "truncated: mask takes out of the loss what bootstrap_truncated is about: leave one out"
            )
        if self.critic_adapter and self.policy.trains_all:
            raise UsageError(
                "all weights train, so the critic has no adapter of its own: set model.critic_adapter: false"
            )
        adaptive = self.adaptive_kl
        if adaptive is not None and (
            adaptive.target <= 0 or adaptive.horizon < 1 or self.kl_coefficient == 0
        ):
            raise UsageError(
                "adaptive_kl needs a target above 0, a horizon of 1 or more sequences, and a kl_coefficient "
                "above 0 to start from: fix model.adaptive_kl or model.kl_coefficient"
            )

    # -- the critic ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the weights and add the value head."""
        super().configure_model()
        self.policy.add_critic(self.critic_adapter)

    def learning_rate_of(self, name: str) -> float:
        """``critic_learning_rate`` for the critic's own parameters, where it is set."""
        own = self.critic_learning_rate is not None and self.policy.is_critics(name)
        return self.critic_learning_rate if own else super().learning_rate_of(name)  # type: ignore[return-value]

    @property
    def warming_up(self) -> bool:
        """Whether only the critic is trained at this step."""
        return self._rollout_step <= self.critic_warmup

    def _init_value_bias(self, rewards: Tensor) -> None:
        """Set the value head's bias to the mean reward of all ranks, which the critic then need not learn."""
        known = rewards[~rewards.isnan()]
        count = self.mean_over_ranks(torch.tensor(float(len(known))))
        if count > 0:
            assert self.policy.critic is not None
            self.policy.critic.linear.bias.data.fill_(float(self.mean_over_ranks(known.sum()) / count))

    # -- advantages ------------------------------------------------------------------------------------------

    def prepare(self, rollout: Rollout) -> Experience:
        """Rows with advantages; before the first step the critic is set to the mean reward."""
        if self.trainer.global_step == 0:
            self._init_value_bias(rollout.rewards)
        return super().prepare(rollout)

    @property
    def needs_old_policy(self) -> bool:
        """Where rewards hold the divergence, or dropout would make the first forward another policy's."""
        return super().needs_old_policy or self.kl_coefficient != 0 or self.policy.train_dropout

    def score(self, batch: Experience) -> dict[str, Tensor]:
        """The columns of every policy gradient, and the critic's values."""
        columns = super().score(batch)
        if "old_values" not in columns:  # they come with log-probabilities only where these are needed
            with self.policy.critic_adapter() if self.critic_adapter else nullcontext():
                critic = self.policy.values(batch.ids, batch.attention, batch.mask)
            columns["old_values"], columns["final_values"] = critic
        return columns

    def advantages(self, rewards: Tensor, experience: Experience) -> Credit:
        """Generalized advantage estimates, and the critic's targets. Collective."""
        mask, old = experience.mask, experience.old_logprobs
        assert experience.old_values is not None and experience.final_values is not None
        kl = torch.zeros_like(experience.old_values)
        if experience.ref_logprobs is not None:
            assert old is not None
            kl = torch.where(mask, kl_divergence(old, experience.ref_logprobs, self.kl), 0.0)
        ended = experience.finished | (not self.bootstrap_truncated)
        # The reward of a truncated completion is one of its end, which has not come. Unknown rewards may
        # become 0: their rows are masked.
        final_rewards = torch.where(ended, rewards.flatten().nan_to_num(0.0), 0.0)
        final = torch.where(ended, 0.0, experience.final_values)
        per_token = token_rewards(final_rewards, kl, mask, self.kl_coefficient)
        # The returns are taken before whitening: the critic learns in units of reward.
        result = gae(per_token, experience.old_values, mask, self.gamma, self.lam, final)
        advantages = result.advantages
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, self.mean_over_ranks)
        return Credit(advantages, result.returns, self._critic_metrics(experience, result.returns, kl))

    def _critic_metrics(self, experience: Experience, returns: Tensor, kl: Tensor) -> dict[str, float]:
        """Of the tokens of all ranks. Collective."""
        mask, values = experience.mask, experience.old_values
        assert values is not None
        mean, _ = moments(values, mask, self.mean_over_ranks)
        _, deviation = moments(returns, mask, self.mean_over_ranks)
        _, residual = moments(returns - values, mask, self.mean_over_ranks)
        penalty, _ = moments(kl, mask, self.mean_over_ranks)
        if self.mean_over_ranks(mask.any().float()) == 0:
            return {}
        explained = float(1 - (residual / deviation).square())
        return {
            "value/mean": float(mean),
            # Equal returns have no variance to explain.
            "value/explained_variance": explained if deviation > 1e-4 else float("nan"),
            "reward/kl_penalty": self.kl_coefficient * float(penalty),
        }

    # -- the update ------------------------------------------------------------------------------------------

    def loss(self, scores: Scores, batch: Experience) -> Loss:
        """The clipped surrogate loss, plus the critic's loss where both come from one forward."""
        assert batch.old_logprobs is not None
        policy = clipped_policy_loss(
            scores.logprobs, batch.old_logprobs, batch.advantages, self.clip, self.clip_high
        )
        values = policy.logged()
        if batch.ref_logprobs is not None:
            # By k3, which has little variance, whatever the reward uses: adaptive_kl goes by this.
            values["policy/kl"] = kl_divergence(batch.old_logprobs, batch.ref_logprobs, "k3")
        if scores.critic is None:
            return policy.loss, values
        critic, critic_values = self._value_loss(scores.critic, batch)
        return policy.loss + critic, values | critic_values

    def critic_backward(self, batch: Experience) -> dict[str, Tensor]:
        """Forward and backward of a critic with its own adapter. Returns per-token metrics."""
        if not self.critic_adapter:
            return {}
        with self.policy.critic_adapter():
            values = self.policy.values(batch.ids, batch.attention, batch.mask)
            loss, logged = self._value_loss(values, batch)
            self.manual_backward((batch.weights * loss).sum())
        return logged

    def _value_loss(self, critic: Values, batch: Experience) -> Loss:
        assert batch.old_values is not None and batch.returns is not None
        result = value_loss(critic.values, batch.old_values, batch.returns, self.value_clip)
        logged = {"loss/value": result.loss, "value/clip_fraction": result.clipped.float()}
        return self.value_coefficient * result.loss, logged

    def clip_groups(self) -> list[list[torch.nn.Parameter]]:
        """Policy and critic separately: a large gradient of one does not shrink the other's step."""
        trainable, critics = self.policy.trainable(), self.policy.is_critics
        return [[p for name, p in trainable.items() if critics(name) is own] for own in (False, True)]

    def step(self) -> Tensor:
        """An optimizer step; while the critic warms up, of the critic alone."""
        # None, not 0: Adam's momentum would move parameters with a gradient of 0.
        if self.warming_up:
            for name, parameter in self.policy.trainable().items():
                if not self.policy.is_critics(name):
                    parameter.grad = None
        return super().step()

    def exceeds_target_kl(self, kl: float) -> bool:
        """Whether the policy is more than 1.5 times ``target_kl`` away from the one that sampled."""
        return self.target_kl is not None and kl > 1.5 * self.target_kl

    # -- the KL coefficient ----------------------------------------------------------------------------------

    def update(self, step: Experience) -> None:
        """The inner epochs, then the KL coefficient of the next step. Collective."""
        super().update(step)
        values = self._meter.values
        values["kl_coefficient"] = self.kl_coefficient
        if self.adaptive_kl is not None and "policy/kl" in values and not self.warming_up:
            # From figures of all ranks, so that the coefficient stays the same on each.
            samples = sum(self.gathered(len(step)))
            target, horizon = self.adaptive_kl.target, self.adaptive_kl.horizon
            self.kl_coefficient = adapted_kl_coefficient(
                self.kl_coefficient, values["policy/kl"], target, samples, horizon
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the KL coefficient where it adapts, beside what trains."""
        super().on_save_checkpoint(checkpoint)
        if self.adaptive_kl is not None:
            checkpoint["kl_coefficient"] = self.kl_coefficient
            checkpoint["kl_coefficient_given"] = self._given_kl_coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore an adapted KL coefficient, unless another one to start from is given now."""
        super().on_load_checkpoint(checkpoint)
        given = checkpoint.get("kl_coefficient_given", self._given_kl_coefficient)  # not in older ones
        if self.adaptive_kl is not None and given == self._given_kl_coefficient:
            self.kl_coefficient = checkpoint.get("kl_coefficient", self.kl_coefficient)
