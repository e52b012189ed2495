"""The loop that GRPO and PPO share: ``collect -> prepare -> update -> report``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coderl import prompts
from coderl.algorithms.base import PolicyModule
from coderl.algorithms.step import EvaluationSettings, Meter, Rollout
from coderl.batching import pad_rows, spread
from coderl.errors import UsageError
from coderl.evaluation import Evaluation, evaluate, job
from coderl.objectives import LossType, masked_mean, no_signal, token_weights
from coderl.policy import Policy
from coderl.rewards import ExecutionReward, Reward, Sample, total
from coderl.rollout import GenerateEngine, RolloutEngine, Sampling
from coderl.sandbox import Sandbox
from coderl.types import Experience, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class PolicyGradient(PolicyModule, ABC):
    """Sample programs, run them, and make the good ones likelier.

    A subclass gives ``advantages`` and ``loss``; everything else is here.

    Args:
        policy: The model to train.
        rewards: What is rewarded; the weighted sum counts. Null is the mission's execution reward.
        sandbox: Where programs run. Null is one with default limits.
        engine: What samples. Null is transformers' ``generate``.
        group_size: Completions sampled per problem.
        temperature: Of sampling, and of every log-probability that is compared with it.
        max_new_tokens: Longest completion, in tokens.
        inner_epochs: Optimizer steps made on one batch of rollouts.
        kl_coefficient: Weight of the divergence from the reference. 0 skips the reference's forward.
        loss_type: Tokens are averaged per sequence (``grpo``), over all (``dapo``) or by limit (``dr_grpo``).
        evaluation: How held-out pass@k is measured by validate, test and the post-fit evaluation.
        **shared: What every :class:`~coderl.algorithms.PolicyModule` takes.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: list[Reward] | None = None,
        sandbox: Sandbox | None = None,
        engine: RolloutEngine | None = None,
        group_size: int = 8,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        inner_epochs: int = 1,
        kl_coefficient: float = 0.0,
        loss_type: LossType = "grpo",
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008 -- plain values, never changed
        **shared: Any,
    ) -> None:
        super().__init__(policy, **shared)
        for name, value in {"max_new_tokens": max_new_tokens, "inner_epochs": inner_epochs}.items():
            if value < 1:
                raise UsageError(f"{name} is {value}: set model.{name} to 1 or more")
        self.sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens).for_training()
        self.rewards = rewards if rewards is not None else [ExecutionReward()]
        self.sandbox = sandbox if sandbox is not None else Sandbox()
        self.engine = engine if engine is not None else GenerateEngine()
        self.group_size, self.inner_epochs = group_size, inner_epochs
        self.kl_coefficient, self.loss_type = kl_coefficient, loss_type
        self.evaluation = evaluation
        self.rollout: Rollout | None = None
        self._meter = Meter()

    def setup(self, stage: str) -> None:
        """Start the sandbox first: where its isolation is refused, that is said before weights load."""
        self.sandbox.start()
        super().setup(stage)

    # -- what an algorithm adds ------------------------------------------------------------------------------

    @abstractmethod
    def advantages(self, rewards: Tensor) -> Tensor:
        """From rewards ``[P, G]`` (NaN where unknown) to finite advantages ``[P, G]``."""

    @abstractmethod
    def loss(self, logprobs: Tensor, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-token loss ``[B, T]``, and per-token values ``[B, T]`` to be logged as means over the step."""

    def planned_steps(self) -> int:
        """Optimizer steps of the whole fit: ``inner_epochs`` for each batch of problems."""
        limit = self.trainer.max_steps
        steps = super().planned_steps() * self.inner_epochs
        return min(steps, limit) if limit > 0 else steps

    # -- one step --------------------------------------------------------------------------------------------

    def training_step(self, batch: list[Problem], batch_idx: int) -> None:
        """One batch of problems: sample, run, reward, improve."""
        self._meter = Meter()
        rollout = self.rollout = self.collect(batch)
        experience = self.prepare(rollout)
        self.update(experience)
        self.report(rollout)

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
        rewards = torch.tensor(total(self.rewards, samples)).view(len(problems), self.group_size)
        return Rollout(samples, rewards)

    def prepare(self, rollout: Rollout) -> list[Experience]:
        """Scored micro-batches. Rows that cannot move a parameter are left out before their forward."""
        completions = [sample.completion for sample in rollout.samples]
        ids, attention, mask = pad_rows(
            [c.prompt for c in completions],
            [c.ids for c in completions],
            int(self.policy.tokenizer.pad_token_id),
        )
        sampler_logprobs = spread([c.logprobs for c in completions], mask)
        known = ~rollout.rewards.flatten().isnan()
        mask = mask & known[:, None]
        weights = token_weights(mask, self.loss_type, self.sampling.max_new_tokens, self._mean_over_ranks)
        advantages = self.advantages(rollout.rewards).flatten()[:, None] * mask
        whole = Experience(ids, attention, mask, weights, advantages, sampler_logprobs=sampler_logprobs)
        rows = self._rows_with_gradient(rollout.rewards, known)
        batches = [b.to(self.device) for b in self.micro_batches(whole.take(rows))] if len(rows) else []
        with self._meter.time("scoring"), torch.no_grad():
            for batch in batches:
                self.score(batch)
        return batches

    def _rows_with_gradient(self, rewards: Tensor, known: Tensor) -> Tensor:
        """Indices of sequences that can have a gradient; all of them where ranks must keep step."""
        if self.trainer.world_size > 1:
            return torch.arange(known.numel())
        useful = known
        if self.kl_coefficient == 0:
            useful = known & ~no_signal(rewards)[:, None].expand_as(rewards).flatten()
        return useful.nonzero().flatten()

    def score(self, batch: Experience) -> None:
        """Fill in what the loss compares with. The old log-probabilities come from the first inner epoch."""
        if self.kl_coefficient != 0:
            with self.policy.reference():
                batch.ref_logprobs = self._logprobs(batch)[0]

    def update(self, batches: list[Experience]) -> None:
        """``inner_epochs`` optimizer steps on the batch. They count even where nothing has a gradient."""
        with self._meter.time("update"):
            for _ in range(self.inner_epochs):
                sums: Counter[str] = Counter()
                for i, batch in enumerate(batches):
                    with self._backward_sync(last=i == len(batches) - 1):
                        self._accumulate(batch, sums)
                self._meter.values["grad_norm"] = float(self.step())
                self._meter.values |= {
                    k: v / max(sums["tokens"], 1) for k, v in sums.items() if k != "tokens"
                }
            self.engine.sync()

    def _accumulate(self, batch: Experience, sums: Counter[str]) -> None:
        logprobs, entropy = self._logprobs(batch, entropy=True)
        if batch.old_logprobs is None:  # first pass over fresh rollouts: strictly on-policy, the ratio is 1
            batch.old_logprobs = logprobs.detach()
        token_loss, values = self.loss(logprobs, batch)
        loss = (batch.weights * token_loss).sum()
        self.manual_backward(loss)
        assert entropy is not None and batch.sampler_logprobs is not None
        values["policy/entropy"] = entropy
        values["mismatch_kl"] = batch.sampler_logprobs - batch.old_logprobs
        tokens = int(batch.mask.sum())
        sums.update(
            {k: float(masked_mean(v.detach(), batch.mask)) * tokens for k, v in values.items()}
            if tokens
            else {}
        )
        sums["tokens"] += tokens

    def _logprobs(self, batch: Experience, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        return self.policy.logprobs(
            batch.ids, batch.attention, batch.mask, self.sampling.temperature, entropy
        )

    @contextmanager
    def _backward_sync(self, last: bool) -> Iterator[None]:
        """Let ranks exchange gradients on the last micro-batch only."""
        strategy: Any = self.trainer.strategy
        if last or not hasattr(strategy, "block_backward_sync"):
            yield
            return
        with strategy.block_backward_sync():
            yield

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        mean = self.trainer.strategy.reduce(value.float().to(self.device), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean.to(value.device)

    # -- what a step says ------------------------------------------------------------------------------------

    def report(self, rollout: Rollout) -> None:
        """Log the step, under the names that the README explains."""
        metrics = rollout.metrics() | self._meter.values
        seconds = sum(v for k, v in metrics.items() if k.startswith("seconds/"))
        metrics["speed/tokens_per_second"] = rollout.tokens / max(seconds, 1e-9)
        metrics["rollout_step"] = float(self.trainer.fit_loop.total_batch_idx + 1)
        metrics["learning_rate"] = self.current_learning_rate
        shown = {name: metrics.pop(name) for name in ("reward/mean", "reward/passed")}
        self.log_dict(metrics, batch_size=len(rollout.rewards))
        self.log_dict(shown, batch_size=len(rollout.rewards), prog_bar=True)

    # -- evaluation ------------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Hand the loaded policy to the engine; does nothing the second time."""
        self.engine.bind(self.policy)

    def evaluate(self, problems: Sequence[Problem], progress: str | None = None) -> Evaluation:
        """Held-out pass@k of the present weights. Draws from a random stream of its own."""
        self.bind()
        settings = self.evaluation
        sampling = Sampling(
            settings.temperature, settings.top_p, settings.max_new_tokens or self.sampling.max_new_tokens
        )

        def sample(batch: Sequence[Problem], n: int) -> list[list[str]]:
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)
                completions = self.engine.generate(batch, n, sampling, progress=progress)
            return [[c.text for c in completions[i * n : (i + 1) * n]] for i in range(len(batch))]

        return evaluate(
            problems,
            sample,
            self.sandbox,
            n=settings.n,
            ks=sorted({1, *settings.ks}),  # pass@1 is what summaries speak of
            form=self.policy.prompt_form,
            settings=asdict(sampling) | {"seed": settings.seed},
        )

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        """pass@k on the validation split, as ``evaluation`` says."""
        self._log_scores("val", batch)

    def test_step(self, batch: list[Problem], batch_idx: int) -> None:
        """pass@k on the test split, as ``evaluation`` says."""
        self._log_scores("test", batch)

    def _log_scores(self, split: str, batch: list[Problem]) -> None:
        scores = self.evaluate(batch).scores()
        known = {f"{split}/{name}": value for name, value in scores.items() if value is not None}
        self.log_dict(known, batch_size=len(batch), prog_bar=True)

    def teardown(self, stage: str) -> None:
        """Leave no process behind."""
        self.sandbox.close()
