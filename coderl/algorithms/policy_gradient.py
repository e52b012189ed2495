"""The loop that GRPO and PPO share: ``collect -> prepare -> update -> report``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from coderl.algorithms import distributed
from coderl.algorithms.advantages import overlong_penalty
from coderl.algorithms.losses import (
    KLEstimator,
    LossType,
    SamplerCorrection,
    kl_divergence,
    sampler_correction,
    token_weights,
    top_entropy_mask,
)
from coderl.algorithms.rewards import ExecutionReward, Reward, Sample, total
from coderl.algorithms.sampled import SampledPolicy
from coderl.algorithms.step import Meter, Rollout
from coderl.errors import UsageError, UserError
from coderl.evaluation import job
from coderl.model.logprobs import EntropyMode, Scores
from coderl.model.padding import pad_rows, spread
from coderl.model.policy import Policy
from coderl.problems import prompts
from coderl.types import Experience, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

Loss = tuple[Tensor, dict[str, Tensor]]
"""Per-token loss ``[B, T]``, and per-token values ``[B, T]`` to be logged as means over the step."""


class PolicyGradient(SampledPolicy, ABC):
    """Sample programs, run them, and make the good ones likelier.

    A subclass gives ``advantages`` and ``loss``; everything else is here.

    Args:
        policy: The model to train.
        rewards: What is rewarded; the weighted sum counts. Null is the original recipe's execution reward.
        group_size: Completions sampled per problem.
        inner_epochs: Optimizer steps made on one batch of rollouts.
        clip: The ratio to the policy that sampled is clipped below at 1 - clip, and above at 1 + clip. Acts
            from the second inner epoch on.
        clip_high: Another clip above ("clip higher", arXiv:2503.14476). Null is ``clip``.
        kl_coefficient: Weight of the divergence from the reference. 0 skips the reference's forward.
        kl: Its estimator (J. Schulman, 2020): see the algorithm for which goes where.
        reference_refresh: Rollout steps after which the policy of the day becomes the reference; 0 never.
        entropy_coefficient: Weight of an entropy bonus, in reward per nat.
        top_entropy: Of a step's tokens that have an advantage only this share, the least certain, has a
            policy gradient (arXiv:2506.01939; 0.2 there). 1 is all.
        truncated: Completions cut off at ``max_new_tokens``: ``keep`` them, or ``mask`` their tokens out of
            the loss (arXiv:2503.14476, 3.4); their reward stays in the baseline.
        overlong_buffer: Tokens below ``max_new_tokens`` over which up to 1 is taken off the reward, linearly
            (the same paper, eq. 13). 0 is off.
        sampler_correction: Importance weights for an engine whose numerics are not the trainer's (see
            ``mismatch_kl``): by ``token``, by ``sequence``, or ``mask`` tokens that are too far off.
        sampler_cap: The largest such weight.
        **shared: What every :class:`~coderl.algorithms.sampled.SampledPolicy` takes.
    """

    weighting: LossType = "dapo"
    """How tokens are averaged."""
    reads_values = False
    """Whether a critic speaks in the policy's own forward."""

    def __init__(
        self,
        policy: Policy,
        rewards: list[Reward] | None = None,
        group_size: int = 8,
        inner_epochs: int = 1,
        clip: float = 0.2,
        clip_high: float | None = None,
        kl_coefficient: float = 0.0,
        kl: KLEstimator = "k3",
        reference_refresh: int = 0,
        entropy_coefficient: float = 0.0,
        top_entropy: float = 1.0,
        truncated: Literal["keep", "mask"] = "keep",
        overlong_buffer: int = 0,
        sampler_correction: SamplerCorrection | None = None,
        sampler_cap: float = 2.0,
        **shared: Any,
    ) -> None:
        super().__init__(policy, **shared)
        self.rewards = rewards if rewards is not None else [ExecutionReward()]
        self.group_size, self.inner_epochs = group_size, inner_epochs
        self.clip, self.clip_high = clip, clip if clip_high is None else clip_high
        self.kl_coefficient, self.kl, self.reference_refresh = kl_coefficient, kl, reference_refresh
        self.entropy_coefficient, self.top_entropy = entropy_coefficient, top_entropy
        self.truncated, self.overlong_buffer = truncated, overlong_buffer
        self.sampler_correction, self.sampler_cap = sampler_correction, sampler_cap
        self.rollout: Rollout | None = None
        self._meter = Meter()
        self._check_settings()

    def _check_settings(self) -> None:
        limit = self.sampling.max_new_tokens
        self.require(
            group_size=(self.group_size >= 1, "1 or more"),
            inner_epochs=(self.inner_epochs >= 1, "1 or more"),
            clip=(0 < self.clip < 1, "between 0 and 1"),
            clip_high=(self.clip_high > 0, "above 0"),
            kl_coefficient=(0 <= self.kl_coefficient < math.inf, "0 or more"),
            entropy_coefficient=(math.isfinite(self.entropy_coefficient), "a finite number"),
            reference_refresh=(self.reference_refresh >= 0, "0 or more"),
            top_entropy=(0 < self.top_entropy <= 1, "above 0, up to 1"),
            overlong_buffer=(0 <= self.overlong_buffer < limit, f"0 or more, below max_new_tokens {limit}"),
            sampler_cap=(self.sampler_cap >= 1, "1 or more"),
        )
        if not self.rewards:
            raise UsageError("rewards is empty: nothing would be learned; list one in model.rewards")
        if self.kl_coefficient and self.policy.trains_all:
            raise UsageError(
                "all weights train, so there is no reference left: set model.kl_coefficient to 0, or use "
                "policy.lora"
            )
        if self.reference_refresh and self.kl_coefficient == 0:
            raise UsageError(
                f"reference_refresh is {self.reference_refresh}, but nothing is compared with a reference: "
                "set model.kl_coefficient above 0, or model.reference_refresh to 0"
            )

    # -- what an algorithm adds ------------------------------------------------------------------------------

    @abstractmethod
    def advantages(self, rewards: Tensor, experience: Experience) -> Tensor:
        """From rewards ``[P, G]`` (NaN where unknown) to finite advantages ``[B, T]``.

        ``experience`` holds the step's rows in the order of the rewards, with what :meth:`score` gave.
        """

    @abstractmethod
    def loss(self, scores: Scores, batch: Experience) -> Loss:
        """The loss of a micro-batch, token by token, and what is to be logged of it."""

    def score(self, batch: Experience) -> dict[str, Tensor]:
        """Columns of a micro-batch that must be known before its first update (without gradient)."""
        columns = {}
        if self.kl_coefficient != 0:
            with self.policy.reference():
                columns["ref_logprobs"] = self._score(batch).logprobs
        if self.reads_old_policy:
            scores = self._score(batch, "value" if self.top_entropy < 1 else "none", self.reads_values)
            columns["old_logprobs"] = scores.logprobs
            if scores.entropy is not None:
                columns["entropy"] = scores.entropy
            if scores.critic is not None:
                columns["old_values"], columns["final_values"] = scores.critic
        return columns

    @property
    def reads_old_policy(self) -> bool:
        """Whether credit needs the policy's own scores before the update, which the first pass gives else."""
        return self.top_entropy < 1 or self.sampler_correction is not None

    def has_gradient(self, rewards: Tensor) -> Tensor:
        """``[P, G]`` bool: samples that can move a parameter. The others are spared their forwards."""
        return ~rewards.isnan()

    def critic_backward(self, batch: Experience) -> dict[str, Tensor]:
        """A second backward on a micro-batch, and what is to be logged of it. Here: none."""
        return {}

    def refill(self, rollout: Rollout) -> list[Rollout]:
        """The rollout to learn from, and those sampled beside it. Here: what was collected."""
        return [rollout]

    def too_far(self, kl: float) -> bool:
        """Whether a policy that has left the one that sampled by ``kl`` nats a token needs no more epochs."""
        return False

    # -- one step --------------------------------------------------------------------------------------------

    def planned_steps(self) -> int:
        """Optimizer steps of the whole fit: ``inner_epochs`` for each batch of problems."""
        limit = self.trainer.max_steps
        steps = super().planned_steps() * self.inner_epochs
        return min(steps, limit) if limit > 0 else steps

    def training_step(self, batch: list[Problem], batch_idx: int) -> None:
        """One batch of problems: sample, run, reward, improve."""
        self._meter = Meter()
        self.rollout = self.collect(batch)
        chosen, *rest = self.refill(self.rollout)
        self._remember([self.rollout, *rest])
        experience = self.prepare(chosen)
        self.update(experience)
        self._refresh_reference()
        self.report(self.rollout)

    def collect(self, problems: Sequence[Problem]) -> Rollout:
        """Sample a group for each problem, run the programs, and reward them."""
        self.bind()
        with self._meter.time("rollout"):
            completions = self.engine.generate(problems, self.group_size, self.sampling)
        form = self.policy.prompt_form
        programs = [prompts.program(problems[c.problem], c.text, form) for c in completions]
        with self._meter.time("execution"):
            runs = self.sandbox.run(
                [job(problems[c.problem], code) for c, code in zip(completions, programs, strict=True)]
            )
        samples = [
            Sample(problem=problems[c.problem], completion=c, program=code, execution=run)
            for c, code, run in zip(completions, programs, runs, strict=True)
        ]
        self._meter.tokens += sum(len(c.ids) for c in completions)
        return Rollout(samples, self._rewarded(samples).view(len(problems), self.group_size))

    def _rewarded(self, samples: list[Sample]) -> Tensor:
        rewards = torch.tensor(total(self.rewards, samples))
        if rewards.isinf().any():
            raise UserError(
                "a reward is infinite: let it return finite numbers, or NaN where nothing is known"
            )
        if self.overlong_buffer:
            lengths = torch.tensor([len(s.completion.ids) for s in samples])
            rewards += overlong_penalty(lengths, self.sampling.max_new_tokens, self.overlong_buffer)
        return rewards

    def prepare(self, rollout: Rollout) -> list[Experience]:
        """Scored and credited micro-batches; rows that cannot move a parameter are spared their forwards."""
        whole = self.experience(rollout)
        live = self.has_gradient(rollout.rewards).flatten() & whole.mask.any(dim=1)
        rows = live.nonzero().flatten()
        # Credit asks for columns, if only of zeros, and on every rank: the others wait there.
        scored = rows if len(rows) else torch.tensor([0])
        with self._meter.time("scoring"), torch.no_grad(), self.policy.without_dropout():
            for chunk in whole.chunks(scored, self.micro_batch_size):
                whole.put(chunk, **self.score(whole.take(chunk).to(self.device)))
        whole.advantages = self._credit(rollout.rewards, whole)
        return list(self.micro_batches(whole.take(rows))) if len(rows) else []

    def experience(self, rollout: Rollout) -> Experience:
        """The rollout as tensors on the CPU, not yet scored, rows in the order of its samples."""
        completions = [sample.completion for sample in rollout.samples]
        ids, attention, mask = pad_rows(
            [c.prompt_ids for c in completions],
            [c.ids for c in completions],
            int(self.policy.tokenizer.pad_token_id),
        )
        sampler_logprobs = spread([c.logprobs for c in completions], mask)
        finished = torch.tensor([c.finished for c in completions])
        counts = ~rollout.rewards.flatten().isnan()
        if self.truncated == "mask":
            counts = counts & finished
        mask = mask & counts[:, None]
        weights = token_weights(mask, self.weighting, self.sampling.max_new_tokens, self.mean_over_ranks)
        return Experience(
            ids,
            attention,
            mask,
            weights,
            torch.zeros_like(weights),
            finished,
            sampler_logprobs=sampler_logprobs,
        )

    def _credit(self, rewards: Tensor, whole: Experience) -> Tensor:
        advantages = torch.where(whole.mask, self.advantages(rewards, whole), 0.0)
        if self.sampler_correction is not None and whole.old_logprobs is not None:
            assert whole.sampler_logprobs is not None
            advantages = advantages * sampler_correction(
                whole.old_logprobs,
                whole.sampler_logprobs,
                whole.mask,
                self.sampler_correction,
                self.sampler_cap,
            )
        if whole.entropy is not None:
            # Rows without advantage rank nowhere, whether or not they were scored.
            learning = whole.mask & (advantages != 0).any(dim=1, keepdim=True)
            advantages = advantages * top_entropy_mask(
                whole.entropy, learning, self.top_entropy, lambda values: torch.cat(self.gathered(values))
            )
        return advantages

    def update(self, batches: list[Experience]) -> None:
        """``inner_epochs`` optimizer steps on the batch. They count even where nothing has a gradient."""
        with self._meter.time("update"):
            stopped = False
            for _ in range(self.inner_epochs):
                if not stopped:
                    means = self._pass_over(batches)
                    if stopped := self.too_far(means["policy/kl_old"]):
                        self.zero_grad()  # the policy left the samples behind: what they say is out of date
                    self._meter.values |= means
                norm = float(self.step())
                if not stopped:
                    self._meter.values["grad_norm"] = norm
            self.engine.sync()

    def _pass_over(self, batches: list[Experience]) -> dict[str, float]:
        """Gradients of the whole step, and the means of what is logged over its tokens."""
        meter = Meter()
        for batch in batches:
            meter.add(self._accumulate(batch), batch.mask)
        return {"policy/kl_old": 0.0} | meter.means(self.gathered)

    def _accumulate(self, batch: Experience) -> dict[str, Tensor]:
        scores = self._score(batch, "gradient" if self.entropy_coefficient else "value", self.reads_values)
        logprobs, entropy = scores.logprobs, scores.entropy
        assert entropy is not None and batch.sampler_logprobs is not None
        if batch.old_logprobs is None:  # first pass over fresh rollouts: strictly on-policy, the ratio is 1
            batch.old_logprobs = logprobs.detach()
        token_loss, values = self.loss(scores, batch)
        if self.entropy_coefficient:
            token_loss = token_loss - self.entropy_coefficient * entropy
        self.manual_backward((batch.weights * token_loss).sum())
        return (
            values
            | self.critic_backward(batch)
            | {
                "policy/entropy": entropy,
                "policy/kl_old": kl_divergence(batch.old_logprobs, logprobs, "k3"),
                "mismatch_kl": batch.sampler_logprobs - batch.old_logprobs,
            }
        )

    def _score(self, batch: Experience, entropy: EntropyMode = "none", values: bool = False) -> Scores:
        return self.policy.score(
            batch.ids, batch.attention, batch.mask, self.sampling.temperature, entropy, values
        )

    def _refresh_reference(self) -> None:
        if self.reference_refresh and self._rollout_step % self.reference_refresh == 0:
            self.policy.refresh_reference()

    @property
    def _rollout_step(self) -> int:
        """Number of the step that is being made, from 1."""
        return self.trainer.fit_loop.total_batch_idx + 1

    # -- what a step leaves ----------------------------------------------------------------------------------

    def _remember(self, rollouts: list[Rollout]) -> None:
        """Tell the data module how its problems fared: a curriculum draws by that."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "observe"):
            problems = [problem for rollout in rollouts for problem in rollout.problems]
            passed, known = zip(*[counts for rollout in rollouts for counts in rollout.verdicts], strict=True)
            datamodule.observe(problems, passed, known)

    def report(self, rollout: Rollout) -> None:
        """Log the step, under the names that the README explains; of several ranks, the means of theirs."""
        metrics = rollout.metrics() | self._meter.values
        seconds = sum(v for k, v in metrics.items() if k.startswith("seconds/"))
        metrics["speed/tokens_per_second"] = self._meter.tokens / max(seconds, 1e-9)
        metrics = distributed.mean_of_each(self.gathered(metrics))
        metrics["speed/tokens_per_second"] *= self.trainer.world_size
        metrics["rollout_step"] = float(self._rollout_step)
        metrics["global_step"] = float(self.trainer.global_step)
        metrics["learning_rate"] = self.current_learning_rate
        shown = {name: metrics.pop(name) for name in ("reward/mean", "reward/passed")}
        self.log_dict(metrics, batch_size=len(rollout.rewards))
        self.log_dict(shown, batch_size=len(rollout.rewards), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside what trains: a reference that was refreshed."""
        super().on_save_checkpoint(checkpoint)
        if self.policy.reference_renewed:
            checkpoint["reference"] = self.policy.reference_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The reference of the day."""
        super().on_load_checkpoint(checkpoint)
        if "reference" in checkpoint:
            self.policy.refresh_reference(checkpoint["reference"])
