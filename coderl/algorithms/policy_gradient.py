"""The training step that GRPO and PPO share: ``collect -> prepare -> update -> report``."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from coderl.algorithms import distributed
from coderl.algorithms.advantages import overlong_penalty
from coderl.algorithms.base import ModuleOptions, PolicyModule, passes_options_on
from coderl.algorithms.losses import (
    KLEstimator,
    LossType,
    SamplerCorrection,
    kl_divergence,
    sampler_correction,
    token_weights,
    top_entropy_mask,
)
from coderl.algorithms.rewards import (
    ExecutionReward,
    Reward,
    Sample,
    measure,
    require_rewards,
    weighted_sum,
)
from coderl.algorithms.step import Meter, Rollout, why_unknown
from coderl.algorithms.trial import MADE_UP, made_up_samples, try_out
from coderl.errors import UsageError, UserError
from coderl.evaluation import Evaluation, EvaluationSettings, Evaluator, Ranks, Task
from coderl.model.logprobs import EntropyMode, Scores
from coderl.model.padding import pad_rows, prompt_numbers, spread
from coderl.model.policy import Policy
from coderl.model.provenance import prior_training
from coderl.problems import prompts
from coderl.problems.sources import SPLITS
from coderl.review import KeptPasses, look, summary_lines
from coderl.rollout.engine import RolloutEngine, Sampling
from coderl.sandbox import Program, ProgramRunner, default_sandbox
from coderl.types import Credit, Experience, Problem

if TYPE_CHECKING:
    from concurrent.futures import Future

    from coderl.data import CodeDataModule
    from coderl.types import Completion, Execution

log = logging.getLogger(__name__)

_LOOKED_AT: dict[str, Sequence[str]] = {"fit": SPLITS, "validate": ["validation"], "test": ["test"]}
"""The splits whose problems are looked at, by Lightning's stage."""

WITHOUT_REWARD = 3
"""Steps in a row in which no sample has a reward, after which a fit ends."""

Loss = tuple[Tensor, dict[str, Tensor]]
"""Per-token loss ``[B, T]``, and per-token metrics ``[B, T]`` that are logged as means over the step."""


class PolicyGradientOptions(ModuleOptions, total=False):
    """Options that GRPO and PPO pass on to :class:`PolicyGradient`; documented there."""

    rewards: list[Reward] | None
    clip_high: float | None
    reference_refresh: int
    entropy_coefficient: float
    top_entropy: float
    truncated: Literal["keep", "mask"]
    overlong_buffer: int
    sampler_correction: SamplerCorrection | None
    sampler_cap: float
    sandbox: ProgramRunner | None
    engine: RolloutEngine | None
    temperature: float
    max_new_tokens: int
    evaluation: EvaluationSettings


class PolicyGradient(PolicyModule, ABC):
    """Samples programs, runs them, and raises the probability of those with a positive advantage.

    A subclass implements ``advantages`` and ``loss``. The module owns the rollout engine and the sandbox, and
    measures held-out pass@k with them too.

    Args:
        policy: The model to train.
        rewards: Reward functions; their weighted sum is used. Null is the original recipe's execution reward.
        group_size: Completions sampled per problem.
        inner_epochs: Optimizer steps on one batch of rollouts.
        clip: The importance ratio to the policy that sampled is clipped to [1 - clip, 1 + clip]. Has an
            effect from the second inner epoch on.
        clip_high: Another upper clip, 1 + clip_high ("clip higher", arXiv:2503.14476). Null is ``clip``.
        kl_coefficient: Weight of the KL divergence from the reference. 0 skips the reference's forward.
        kl: Estimator of that divergence (J. Schulman, 2020). The algorithm says where each is used.
        reference_refresh: Rollout steps after which the current policy becomes the reference; 0 never.
        entropy_coefficient: Weight of an entropy bonus, in reward per nat.
        top_entropy: Share of a step's tokens with an advantage, those of highest entropy, that have a policy
            gradient (arXiv:2506.01939; 0.2 there). 1 is all.
        truncated: Completions cut off at ``max_new_tokens``: ``keep`` them, or ``mask`` their tokens out of
            the loss (arXiv:2503.14476, 3.4); their reward stays in the baseline.
        overlong_buffer: Tokens below ``max_new_tokens`` over which up to 1 is subtracted from the reward,
            linearly (the same paper, eq. 13). 0 is off.
        sampler_correction: Importance weights for an engine whose numerics differ from the trainer's (see
            ``mismatch_kl``): by ``token``, by ``sequence``, or ``mask`` tokens that differ too much.
        sampler_cap: The largest such weight.
        sandbox: Runs the programs. Null is a :class:`~coderl.sandbox.Sandbox` with default limits.
        engine: Samples the completions. Null is :class:`~coderl.rollout.GenerateEngine` with its defaults.
        temperature: Of sampling, and of every log-probability that is compared with it.
        max_new_tokens: Longest completion, in tokens.
        evaluation: How held-out pass@k is measured by validate, test and the post-fit evaluation.
        **options: Options of :class:`~coderl.algorithms.PolicyModule`.
    """

    weighting: LossType = "dapo"
    """How the loss is averaged over tokens, see :func:`~coderl.algorithms.losses.token_weights`."""
    needs_values = False
    """Whether the critic's values come from the policy's own forward."""

    @passes_options_on
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
        sandbox: ProgramRunner | None = None,
        engine: RolloutEngine | None = None,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        evaluation: EvaluationSettings = EvaluationSettings(),  # noqa: B008 -- plain values, never changed
        **options: Unpack[ModuleOptions],
    ) -> None:
        super().__init__(policy, **options)
        from coderl.rollout import default_engine

        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}: model.max_new_tokens must be 1 or more")
        self.sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens).for_training()
        self.sandbox = sandbox if sandbox is not None else default_sandbox()
        self.engine = engine if engine is not None else default_engine()
        self.evaluation = evaluation
        self.rewards = rewards if rewards is not None else [ExecutionReward()]
        self.group_size, self.inner_epochs = group_size, inner_epochs
        self.clip, self.clip_high = clip, clip if clip_high is None else clip_high
        self.kl_coefficient, self.kl, self.reference_refresh = kl_coefficient, kl, reference_refresh
        self.entropy_coefficient, self.top_entropy = entropy_coefficient, top_entropy
        self.truncated, self.overlong_buffer = truncated, overlong_buffer
        self.sampler_correction, self.sampler_cap = sampler_correction, sampler_cap
        self.rollout: Rollout | None = None
        self.refilled: list[Rollout] = []
        self._steps_without_reward = 0
        self._meter = Meter()
        self._bound = False
        self._held_out: list[Problem] = []
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
        require_rewards(self.rewards)
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

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return self.max_prompt_tokens + self.sampling.max_new_tokens

    def batches_line(self) -> str:
        """How much is sampled and computed at a time, and why."""
        self.bind()  # a copy of the weights is to be made before memory is counted
        return f"rollouts: {self.engine.batches_line(self.longest_row)}; {super().batches_line()}"

    # -- for subclasses --------------------------------------------------------------------------------------

    @abstractmethod
    def advantages(self, rewards: Tensor, experience: Experience) -> Credit:
        """The advantage of each token, and the critic's targets where there is a critic.

        Args:
            rewards: ``[P, G]``, NaN where unknown.
            experience: The step's rows in the order of the rewards, with the columns that :meth:`score`
                returned. Not to be changed.
        """

    @abstractmethod
    def loss(self, scores: Scores, batch: Experience) -> Loss:
        """The per-token loss of a micro-batch, and per-token metrics."""

    def score(self, batch: Experience) -> dict[str, Tensor]:
        """Columns of a micro-batch that are needed before the first update, by name; without gradient."""
        columns = {}
        if self.kl_coefficient != 0:
            with self.policy.reference():
                columns["ref_logprobs"] = self._score(batch).logprobs
        if self.needs_old_policy:
            scores = self._score(batch, "value" if self.top_entropy < 1 else "none", self.needs_values)
            columns["old_logprobs"] = scores.logprobs
            if scores.entropy is not None:
                columns["entropy"] = scores.entropy
            if scores.critic is not None:
                columns["old_values"], columns["final_values"] = scores.critic
        return columns

    @property
    def needs_old_policy(self) -> bool:
        """Whether advantages need the policy's log-probs; otherwise the first forward gives them."""
        return self.top_entropy < 1 or self.sampler_correction is not None

    def has_gradient(self, rewards: Tensor) -> Tensor:
        """``[P, G]`` bool, true for samples that have a gradient; others are in no forward."""
        return ~rewards.isnan()

    def critic_backward(self, batch: Experience) -> dict[str, Tensor]:
        """Backward of a critic that has its own forward. Returns per-token metrics. Here there is none."""
        return {}

    def refill(self, rollout: Rollout) -> list[Rollout]:
        """The rollout to train on, then further ones that were sampled for it. Here only the given one."""
        return [rollout]

    def exceeds_target_kl(self, kl: float) -> bool:
        """Whether to stop the inner epochs at ``kl`` nats per token from the policy that sampled."""
        return False

    # -- engine and sandbox ----------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Start the sandbox, check settings, look at the problems (:func:`coderl.review.look`). Collective.

        Before a fit, rewards are tried out first, see :mod:`coderl.algorithms.trial`.

        Training problems at fault are left out. Those of other splits are named and kept, so that scores are
        shares of the same problems for everybody.

        Raises:
            UserError: No training problem is left, the isolation is weak and that is not allowed, or a reward
                cannot be used.
        """
        # First: a machine that allows no isolation is reported before any weights load.
        self.sandbox.start()
        super().setup(stage)
        if (longest := self.evaluation.max_length_generation) is not None:
            fix = "set model.evaluation.max_length_generation to {known} or less"
            self.policy.require_context(0, longest, fix)
        if stage == "fit":
            self._try_rewards()
        if self.datamodule is None:
            return
        faulty: frozenset[str] = frozenset()
        error = ""
        if self.trainer.is_global_zero:
            try:
                faulty = self._faulty(self.datamodule, _LOOKED_AT.get(stage, ()))
            except UserError as problem:  # every process is to end with it, not to wait for this one
                error = str(problem)
        faulty, error = self.trainer.strategy.broadcast((faulty, error))
        if error:
            raise UserError(error)
        if faulty:
            why = "their tests or solutions are at fault (`coderl check FILE` says more)"
            self.datamodule.keep(lambda problem: problem.id not in faulty, why, splits=["train"])

    def _try_rewards(self) -> None:
        """Call the rewards with made-up samples. Collective: all ranks end with an error of one."""
        data = self.datamodule
        problems = data.problems("train") if data is not None and data.has("train") else []
        problem, count = next(iter(problems), MADE_UP), max(2, self.group_size)
        with self.together():
            try_out(self.rewards, made_up_samples(problem, self.policy, self.sandbox, count))

    def _faulty(self, data: CodeDataModule, splits: Sequence[str]) -> frozenset[str]:
        """The ids of training problems at fault; faults are logged."""
        kept, faulty, seen = KeptPasses(), set[str](), set[str]()
        for split in splits:
            problems = data.problems(split) if data.has(split) else []
            some = [problem for problem in problems if problem.id not in seen]  # HumanEval has one split
            seen |= {problem.id for problem in some}
            found = look(some, self.sandbox, self.policy.prompt_form, kept, f"looking at {split} problems")
            for line in summary_lines(found):
                done = "left out of training" if split == "train" else f"kept in {split}, all the same"
                log.warning("%s: %s", done, line)
            if split == "train":
                faulty = {one.problem.id for one in found if one.fault}
        return frozenset(faulty)

    def bind(self) -> None:
        """Give the loaded policy to the rollout engine. Later calls do nothing."""
        if not self._bound:
            self.engine.bind(self.policy)
            self._bound = True

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load as torch does, then sync an engine that samples from a copy of the weights."""
        result = super().load_state_dict(*args, **options)
        if self._bound:
            self.engine.sync()
        return result

    def teardown(self, stage: str) -> None:
        """Stop the sandbox's processes, and release what the engine holds."""
        self.sandbox.close()
        self.engine.close()
        self._bound = False

    # -- one step --------------------------------------------------------------------------------------------

    def planned_steps(self) -> int:
        """Optimizer steps of the whole fit: ``inner_epochs`` for each batch of problems."""
        # Lightning counts optimizer steps against max_steps, and estimates one for each batch.
        limit = self.trainer.max_steps
        steps = super().planned_steps() * self.inner_epochs
        return min(steps, limit) if limit > 0 else steps

    def training_step(self, batch: list[Problem], batch_idx: int) -> None:
        """One rollout step: sample a batch of problems, execute, compute advantages, update the policy."""
        self._meter = Meter()
        with self.together():
            self.rollout = self.collect(batch)  # kept for callbacks, as what it was refilled with
        chosen, *self.refilled = self.refill(self.rollout)
        self._update_curriculum([self.rollout, *self.refilled])
        self._require_a_reward([self.rollout, *self.refilled])
        experience = self.prepare(chosen)
        for rollout in (self.rollout, *self.refilled):
            rollout.take_advantages(chosen)
        self.update(experience)
        # After the update, so that the first step after a refresh has a divergence of 0.
        if self.reference_refresh and self._rollout_step % self.reference_refresh == 0:
            self.policy.refresh_reference()
        self.report(self.rollout)

    def collect(self, problems: Sequence[Problem]) -> Rollout:
        """Sample ``group_size`` completions for each problem, run them as programs, and compute rewards.

        Where the policy is on a GPU, programs run while others are sampled, and ``seconds/execution`` is what
        they take beyond that.
        """
        self.bind()
        form = self.policy.prompt_form
        codes: dict[int, str] = {}
        started: dict[int, Future[Execution]] = {}

        def program(place: int, completion: Completion) -> Program:
            problem = problems[completion.problem]
            codes[place] = prompts.program(problem, completion.text, form)
            return prompts.to_program(problem, codes[place])

        def start(place: int, completion: Completion) -> None:
            if place in started:  # sampled again, in a smaller batch
                started[place].cancel()
            started[place] = self.sandbox.submit(program(place, completion))

        try:
            with self._meter.time("rollout"):
                # On a CPU both would want the same cores: 0.82 s, and 0.39 + 0.20 s one after the other. A
                # runner that does not know how to begin would run each program while decoding waits.
                begins = type(self.sandbox).submit is not ProgramRunner.submit
                told: dict[str, Any] = {"ready": start} if begins and self.device.type != "cpu" else {}
                completions = self.engine.generate(problems, self.group_size, self.sampling, **told)
            with self._meter.time("execution"):
                left = [place for place in range(len(completions)) if place not in started]
                later = [program(place, completions[place]) for place in left]
                runs = dict(zip(left, self.sandbox.run(later) if later else [], strict=True))
                runs |= {place: future.result() for place, future in started.items()}
        finally:
            for future in started.values():
                future.cancel()
        samples = [
            Sample(problems[c.problem], c, codes[place], runs[place]) for place, c in enumerate(completions)
        ]
        self._meter.tokens += sum(len(c.ids) for c in completions)
        rewards, terms = self._compute_rewards(samples)
        return Rollout(samples, rewards.view(len(problems), self.group_size), terms)

    def _compute_rewards(self, samples: list[Sample]) -> tuple[Tensor, dict[str, list[float]]]:
        """The rewards, ``[P * G]`` float32, NaN where unknown, and what each term of them gave."""
        terms = measure(self.rewards, samples)
        rewards = torch.tensor(weighted_sum(self.rewards, terms.values(), len(samples)))
        if rewards.isinf().any():
            raise UserError(
                f"the sum of the rewards ({', '.join(terms)}) is over what float32 holds: let them return "
                "smaller numbers, or lower their weights"
            )
        if self.overlong_buffer:
            lengths = torch.tensor([len(s.completion.ids) for s in samples])
            penalty = overlong_penalty(lengths, self.sampling.max_new_tokens, self.overlong_buffer)
            rewards += penalty
            terms["overlong_penalty"] = penalty.tolist()
        return rewards, terms

    def _require_a_reward(self, rollouts: Sequence[Rollout]) -> None:
        """End a fit in which no sample of any rank has a reward, after three such steps. Collective.

        Raises:
            UserError: It has come to that; with the causes.
        """
        known = sum(int((~rollout.rewards.isnan()).sum()) for rollout in rollouts)
        # A mean over ranks, so that they end together.
        if self.mean_over_ranks(torch.tensor(float(known))) > 0:
            self._steps_without_reward = 0
            return
        self._steps_without_reward += 1
        if self._steps_without_reward == WITHOUT_REWARD:
            causes = why_unknown([one for part in self.gathered(list(rollouts)) for one in part])
            raise UserError(f"no sample has had a reward in {WITHOUT_REWARD} steps in a row: {causes}")

    def prepare(self, rollout: Rollout) -> Experience:
        """The rows that have a gradient, scored and with advantages. Collective."""
        whole = self.experience(rollout)
        rows = (self.has_gradient(rollout.rewards).flatten() & whole.mask.any(dim=1)).nonzero().flatten()
        # Without such rows one row is scored all the same: `advantages` reads the columns, and takes means
        # over ranks, in which every rank must take part.
        scored = rows if len(rows) else torch.tensor([0])
        with self._meter.time("scoring"), torch.no_grad(), self.policy.without_dropout():
            self.in_fitting_parts(lambda: self._score_rows(whole, scored))
        credit = self.advantages(rollout.rewards, whole)
        whole.advantages = self._adjusted(credit.advantages, whole)
        whole.returns = credit.returns
        means = whole.advantages.sum(dim=1) / whole.mask.sum(dim=1).clamp(min=1)
        rollout.advantages = means.view_as(rollout.rewards).where(~rollout.rewards.isnan(), torch.nan)
        self._meter.values |= credit.metrics
        # Only now are rows dropped: weights, baselines and whitening above are of the whole step.
        return whole.take(rows)

    def _score_rows(self, whole: Experience, rows: Tensor) -> None:
        """Set the columns of :meth:`score` in these rows."""
        for portion in self.portions(whole, rows):
            with self.policy.reading(portion.prompts):
                for chunk, batch in zip(portion.rows, portion.batches, strict=True):
                    whole.put(chunk, **self.score(batch))

    def experience(self, rollout: Rollout) -> Experience:
        """The rollout as tensors on the CPU, not yet scored; rows in the order of the samples."""
        completions = [sample.completion for sample in rollout.samples]
        ids, attention, mask = pad_rows(
            [c.prompt_ids for c in completions],
            [c.ids for c in completions],
            int(self.policy.tokenizer.pad_token_id),
        )
        sampler_logprobs = spread([c.logprobs for c in completions], mask)
        finished = torch.tensor([c.finished for c in completions])
        # A row of unknown reward, or one that is cut off and masked, is out of the loss as a whole.
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
            prompt_numbers([c.prompt_ids for c in completions]),
            sampler_logprobs=sampler_logprobs,
        )

    def _adjusted(self, advantages: Tensor, whole: Experience) -> Tensor:
        """The advantages after sampler correction and entropy mask, zero outside the mask. Collective."""
        advantages = torch.where(whole.mask, advantages, 0.0)
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
            # Rows without advantage may not have been scored: their entropies, zeros, must not count in the
            # share.
            learning = whole.mask & (advantages != 0).any(dim=1, keepdim=True)
            advantages = advantages * top_entropy_mask(
                whole.entropy, learning, self.top_entropy, lambda values: torch.cat(self.gathered(values))
            )
        return advantages

    def update(self, step: Experience) -> None:
        """``inner_epochs`` optimizer steps on the rows of a step. Collective."""
        # Each epoch makes its step, even without a gradient or too far off-policy: schedules and max_steps
        # count them, and other ranks wait in the exchange of gradients.
        with self._meter.time("update"):
            stopped = False
            for _ in range(self.inner_epochs):
                if not stopped:
                    meter = self.in_fitting_parts(lambda: self._accumulate_gradients(step))
                    means = {"policy/kl_old": 0.0} | meter.means(self.gathered)
                    # The mean is that of all ranks, so that they stop together.
                    if stopped := self.exceeds_target_kl(means["policy/kl_old"]):
                        self.zero_grad()  # so far off-policy, these gradients mislead
                    self._meter.values |= means
                norm = float(self.step())
                if not stopped:
                    self._meter.values["grad_norm"] = norm
            self.engine.sync()  # the next rollout samples from the new weights

    def _accumulate_gradients(self, step: Experience) -> Meter:
        """Gradients of all micro-batches, summed; returns the metrics of their tokens."""
        meter, first = Meter(), []
        for portion in self.portions(step):
            with self.policy.reading(portion.prompts):
                for rows, batch in zip(portion.rows, portion.batches, strict=True):
                    meter.add(self._backward(batch), batch.mask)
                    first.append((rows, batch.old_logprobs))
        if step.old_logprobs is None:  # they are from this first epoch's forward, for the later epochs
            for rows, logprobs in first:
                assert logprobs is not None
                step.put(rows, old_logprobs=logprobs)
        return meter

    def _backward(self, batch: Experience) -> dict[str, Tensor]:
        """Forward and backward of a micro-batch; returns per-token metrics."""
        scores = self._score(batch, "gradient" if self.entropy_coefficient else "none", self.needs_values)
        logprobs = scores.logprobs
        assert batch.sampler_logprobs is not None
        # First inner epoch: on-policy, so the same forward gives the old log-probabilities, and the ratio is
        # exactly 1 with the gradient of the policy.
        if batch.old_logprobs is None:
            batch.old_logprobs = logprobs.detach()
        token_loss, values = self.loss(scores, batch)
        if self.entropy_coefficient:
            assert scores.entropy is not None
            token_loss = token_loss - self.entropy_coefficient * scores.entropy
        # A sum: weights are those of the whole step, so that gradients add up over micro-batches of any size.
        self.manual_backward((batch.weights * token_loss).sum())
        return (
            values
            | self.critic_backward(batch)
            | {
                "policy/kl_old": kl_divergence(batch.old_logprobs, logprobs, "k3"),
                # Tokens are the sampler's, so the mean of this estimates KL(sampler || trainer).
                "mismatch_kl": batch.sampler_logprobs - batch.old_logprobs,
            }
        )

    def _score(self, batch: Experience, entropy: EntropyMode = "none", values: bool = False) -> Scores:
        return self.policy.score(
            batch.ids, batch.attention, batch.mask, self.sampling.temperature, entropy, values
        )

    @property
    def _rollout_step(self) -> int:
        """Number of the current rollout step, from 1."""
        return self.trainer.fit_loop.total_batch_idx + 1

    # -- after a step ----------------------------------------------------------------------------------------

    def _update_curriculum(self, rollouts: list[Rollout]) -> None:
        """Report to the data module how many samples of each problem passed. Collective."""
        if self.datamodule is not None:
            problems = [problem for rollout in rollouts for problem in rollout.problems]
            passed, judged = zip(
                *[counts for rollout in rollouts for counts in rollout.verdicts], strict=True
            )
            self.datamodule.observe(problems, passed, judged)

    def report(self, rollout: Rollout) -> None:
        """Log the metrics of the step, of all ranks; the README explains each. Collective."""
        own = dict(self._meter.values)
        seconds = sum(v for k, v in own.items() if k.startswith("seconds/"))
        own["speed/tokens_per_second"] = self._meter.tokens / max(seconds, 1e-9)
        # Only seconds and speed differ from rank to rank; the meter's other values are of all ranks already.
        metrics = rollout.metrics(self.gathered) | distributed.mean_of_each(self.gathered(own))
        metrics["speed/tokens_per_second"] *= self.trainer.world_size  # of all ranks, not of the mean one
        metrics["rollout_step"] = float(self._rollout_step)
        metrics["global_step"] = float(self.trainer.global_step)
        metrics["learning_rate"] = self.step_learning_rate
        shown = {name: metrics.pop(name) for name in ("reward/mean", "reward/passed")}
        self.log_dict(metrics, batch_size=len(rollout.rewards))
        self.log_dict(shown, batch_size=len(rollout.rewards), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save a refreshed reference adapter, beside what trains."""
        super().on_save_checkpoint(checkpoint)
        if self.policy.reference_refreshed:
            checkpoint["reference"] = self.policy.reference_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore a refreshed reference adapter."""
        super().on_load_checkpoint(checkpoint)
        if "reference" in checkpoint:
            self.policy.refresh_reference(checkpoint["reference"])

    # -- held-out pass@k -------------------------------------------------------------------------------------

    def evaluator(self) -> Evaluator:
        """An evaluator of the current weights, with ``evaluation``'s settings and the module's own engine."""
        self.bind()
        # `_trainer`, because Lightning's `trainer` raises where the module has none.
        several = self._trainer is not None and self.trainer.world_size > 1
        return Evaluator(
            self.engine,
            self.sandbox,
            self.evaluation,
            self.sampling.max_new_tokens,
            self.policy.prompt_form,
            Ranks(self.trainer.global_rank, self.trainer.world_size, self.gathered) if several else Ranks(),
        )

    def evaluate(
        self,
        problems: Sequence[Problem],
        progress: str | None = None,
        contaminated: Sequence[str] | None = None,
    ) -> Evaluation:
        """Held-out pass@k of the current weights on any problems. Collective: all ranks get the scores.

        Args:
            problems: At least one. The scores are named after the source of the first.
            progress: Label of a progress bar; None shows none.
            contaminated: Ids of problems that the policy was trained on. None: not known.
        """
        task = Task.of(problems, self.sandbox.timeout)
        return self.evaluator().run(task, progress=progress, contaminated=contaminated)[task.name]

    def validation_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Collect the batch's problems; they are sampled together when the epoch ends."""
        self._held_out += batch

    def test_step(self, batch: list[Problem], batch_idx: int) -> None:
        """Collect the batch's problems; they are sampled together when the epoch ends."""
        self._held_out += batch

    def on_validation_epoch_end(self) -> None:
        """Log pass@k on the validation split."""
        if self.trainer.sanity_checking:  # on two batches, pass@k would say nothing
            self._held_out = []
            return
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log pass@k on the test split."""
        self._log_held_out("test")

    def _log_held_out(self, split: str) -> None:
        """Evaluate the collected problems and log the scores as ``split/...``. Collective."""
        # Undo Lightning's distributed sampler, which gives problem i to rank i % ranks, and repeats some so
        # that all ranks get equally many.
        by_rank = self.gathered(self._held_out)
        problems = list({p.id: p for turn in zip_longest(*by_rank) for p in turn if p is not None}.values())
        self._held_out = []
        # In a fit, or from one's checkpoint, the weights have also been trained on the data module's
        # problems.
        trained_here = self.trainer.state.fn == TrainerFn.FITTING or self.trainer.ckpt_path is not None
        record = self.training_record() if trained_here else prior_training(self.policy)
        contaminated = None if record is None else record.among(problems)
        if contaminated:
            log.warning(
                "%s: NOT HELD OUT: %d of %d problems were in the training data",
                split,
                len(contaminated),
                len(problems),
            )
        evaluation = self.evaluate(problems, f"pass@k {split}", contaminated)
        rates = {name: getattr(evaluation, name) for name in ("accuracy", "success_rate", "test_pass_rate")}
        known = {name: value for name, value in (evaluation.scores() | rates).items() if value is not None}
        self.log_dict({f"{split}/{name}": value for name, value in known.items()}, prog_bar=True)
