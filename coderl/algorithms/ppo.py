"""Proximal policy optimization (arXiv:1707.06347) with a critic on the policy's own 4-bit base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from coderl.algorithms.advantages import gae, token_rewards, whiten
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
    """Moves the KL coefficient so that the divergence from the reference stays near a target.

    Args:
        target: Where ``policy/kl`` should be, nats per token.
        horizon: Sequences over which the coefficient may change by 20 %.
    """

    target: float = 0.05
    horizon: int = 10_000


class PPO(PolicyGradient):
    """A critic estimates the return from each token on; a token's advantage is how much better it turned out.

    The critic is a value head on the policy's trunk: there is one base in memory. It starts at the mean
    reward of the first rollout.

    Args:
        policy: The model to train.
        group_size: Completions sampled per problem; 1 suffices.
        inner_epochs: Optimizer steps made on one batch of rollouts.
        clip: The ratio to the policy that sampled is clipped to [1 - clip, 1 + clip].
        target_kl: The remaining inner epochs are left out when the policy is further than 1.5 times this
            from the one that sampled, nats per token. Null never.
        kl_coefficient: Weight of the divergence from the reference, taken off each token's reward. 0 skips
            the reference's forward.
        kl: Its estimator. In a reward ``k1`` is right on average; k2 and k3 are steadier, and biased.
        adaptive_kl: Let the coefficient follow a target. Null keeps it.
        gamma: Discount per token.
        lam: Of generalized advantage estimation: 0 trusts the critic, 1 the rewards that came.
        whiten_advantages: Give a step's advantages mean 0 and deviation 1.
        bootstrap_truncated: For a completion cut off at ``max_new_tokens``, what the critic still expects
            takes the place of its reward (arXiv:1712.00378). Otherwise it ends there, and is judged as it is.
        value_coefficient: Weight of the critic's loss.
        value_clip: The critic's clip (arXiv:2005.12729), in units of reward. Null is none.
        critic_adapter: Let the critic read the base through a LoRA adapter of its own: a second forward and
            backward, and no tug-of-war with the policy.
        critic_learning_rate: Peak rate of what only the critic has. Null is ``learning_rate``.
        critic_warmup: Rollout steps at the start in which only the critic learns.
        **options: What every :class:`~coderl.algorithms.PolicyGradient` takes.
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
        self.reads_values = not critic_adapter
        self.critic_learning_rate = critic_learning_rate
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
        """Read the weights, and put the value head on."""
        super().configure_model()
        self.policy.add_critic(self.critic_adapter)

    def learning_rate_of(self, name: str) -> float:
        """The critic's own parameters have their own rate."""
        own = self.critic_learning_rate is not None and self.policy.is_critics(name)
        return self.critic_learning_rate if own else super().learning_rate_of(name)  # type: ignore[return-value]

    @property
    def warming_up(self) -> bool:
        """Whether only the critic learns at this step."""
        return self._rollout_step <= self.critic_warmup

    def _expect_mean(self, rewards: Tensor) -> None:
        """Start the critic at the base model's mean reward: it need not learn the obvious first."""
        known = rewards[~rewards.isnan()]
        count = self.mean_over_ranks(torch.tensor(float(len(known))))
        if count > 0:
            assert self.policy.critic is not None
            self.policy.critic.linear.bias.data.fill_(float(self.mean_over_ranks(known.sum()) / count))

    # -- credit ----------------------------------------------------------------------------------------------

    def prepare(self, rollout: Rollout) -> list[Experience]:
        """As for every policy gradient; before the first step the critic is set to the mean reward."""
        if self.trainer.global_step == 0:
            self._expect_mean(rollout.rewards)
        return super().prepare(rollout)

    @property
    def reads_old_policy(self) -> bool:
        """Always: values come with the same forward, and divergences are counted before the update."""
        return True

    def score(self, batch: Experience) -> dict[str, Tensor]:
        """Also the values of a critic with an adapter of its own."""
        columns = super().score(batch)
        if self.critic_adapter:
            with self.policy.critic_adapter():
                critic = self.policy.values(batch.ids, batch.attention, batch.mask)
            columns["old_values"], columns["final_values"] = critic
        return columns

    def advantages(self, rewards: Tensor, experience: Experience) -> Credit:
        """Generalized advantage estimates of token rewards, and the returns that the critic is to learn."""
        mask, old = experience.mask, experience.old_logprobs
        assert old is not None and experience.old_values is not None and experience.final_values is not None
        kl = torch.zeros_like(old)
        if experience.ref_logprobs is not None:
            kl = torch.where(mask, kl_divergence(old, experience.ref_logprobs, self.kl), 0.0)
        ended = experience.finished | (not self.bootstrap_truncated)
        verdicts = torch.where(ended, rewards.flatten().nan_to_num(0.0), 0.0)
        final = torch.where(ended, 0.0, experience.final_values)
        paid = token_rewards(verdicts, kl, mask, self.kl_coefficient)
        result = gae(paid, experience.old_values, mask, self.gamma, self.lam, final)
        advantages = result.advantages
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, self.mean_over_ranks)
        return Credit(advantages, result.returns, self._critic_metrics(experience, result.returns, kl))

    def _critic_metrics(self, experience: Experience, returns: Tensor, kl: Tensor) -> dict[str, float]:
        assert experience.old_values is not None
        mask = experience.mask
        if not bool(mask.any()):
            return {}
        returns, values = returns[mask], experience.old_values[mask]
        variance, residual = returns.var(correction=0), (returns - values).var(correction=0)
        return {
            "value/mean": float(values.mean()),
            # Of equal returns there is no variance to explain.
            "value/explained_variance": float(1 - residual / variance) if variance > 1e-8 else float("nan"),
            "reward/kl_penalty": self.kl_coefficient * float(kl[mask].mean()),
        }

    # -- the update ------------------------------------------------------------------------------------------

    def loss(self, scores: Scores, batch: Experience) -> Loss:
        """PolicyLoss surrogate, plus the critic's loss where both come from one forward."""
        assert batch.old_logprobs is not None
        policy = clipped_policy_loss(
            scores.logprobs, batch.old_logprobs, batch.advantages, self.clip, self.clip_high
        )
        values = policy.logged()
        if batch.ref_logprobs is not None:
            values["policy/kl"] = kl_divergence(batch.old_logprobs, batch.ref_logprobs, "k3")
        if scores.critic is None:
            return policy.loss, values
        critic, critic_values = self._value_loss(scores.critic, batch)
        return policy.loss + critic, values | critic_values

    def critic_backward(self, batch: Experience) -> dict[str, Tensor]:
        """The backward of a critic with an adapter of its own."""
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
        """Policy and critic apart: neither's gradient shrinks the other's step."""
        trainable, critics = self.policy.trainable(), self.policy.is_critics
        return [[p for name, p in trainable.items() if critics(name) is own] for own in (False, True)]

    def step(self) -> Tensor:
        """An optimizer step; of the critic alone while it warms up."""
        if self.warming_up:
            for name, parameter in self.policy.trainable().items():
                if not self.policy.is_critics(name):
                    parameter.grad = None
        return super().step()

    def too_far(self, kl: float) -> bool:
        """Whether the policy is more than 1.5 times ``target_kl`` away from the one that sampled."""
        return self.target_kl is not None and kl > 1.5 * self.target_kl

    # -- the divergence's coefficient ------------------------------------------------------------------------

    def update(self, batches: list[Experience]) -> None:
        """The inner epochs; then the coefficient of the next step."""
        super().update(batches)
        values = self._meter.values
        values["kl_coefficient"] = self.kl_coefficient
        if self.adaptive_kl is not None and "policy/kl" in values and not self.warming_up:
            samples = sum(self.gathered(sum(map(len, batches))))
            target, horizon = self.adaptive_kl.target, self.adaptive_kl.horizon
            self.kl_coefficient = adapted_kl_coefficient(
                self.kl_coefficient, values["policy/kl"], target, samples, horizon
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the KL coefficient where it adapts, beside what trains."""
        super().on_save_checkpoint(checkpoint)
        if self.adaptive_kl is not None:
            checkpoint["kl_coefficient"] = self.kl_coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore an adapted KL coefficient."""
        super().on_load_checkpoint(checkpoint)
        if self.adaptive_kl is not None:
            self.kl_coefficient = checkpoint.get("kl_coefficient", self.kl_coefficient)
