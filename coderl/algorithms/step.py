"""The data of one policy-gradient step: its rollout and its metrics."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch

from coderl.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from coderl.algorithms.rewards import Sample
    from coderl.types import Execution, Problem


class SampleRecord(NamedTuple):
    """What the metrics of a step need of a sample.

    Attributes:
        reward: NaN where unknown.
        execution: The sandbox's verdict.
        tokens: Number of its tokens.
        logprob: Sum of their log-probabilities under the sampling distribution, nats.
        finished: False where the completion was cut off.
        terms: What each reward gave, NaN where unknown.
    """

    reward: float
    execution: Execution
    tokens: int
    logprob: float
    finished: bool
    terms: tuple[float, ...]


Gathered = Callable[[list[SampleRecord]], list[list[SampleRecord]]]


@dataclass
class Rollout:
    """The samples of a batch of problems with their rewards.

    Attributes:
        samples: Samples in the order of the problems, ``G`` for each of ``P`` problems.
        rewards: ``[P, G]``, NaN where unknown.
        terms: What each reward gave for each sample, by the reward's name; before weights, NaN where unknown.
        advantages: ``[P, G]``, the mean over a sample's tokens of what it was trained on with; 0 for samples
            that no gradient came from, NaN for those of unknown reward. None: not computed.
    """

    samples: list[Sample]
    rewards: Tensor
    terms: dict[str, list[float]] = field(default_factory=dict)
    advantages: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(len(s.completion.ids) for s in self.samples)

    @property
    def groups(self) -> list[list[Sample]]:
        """The samples of each problem: ``P`` lists of ``G``."""
        size = self.rewards.shape[1]
        return [self.samples[i : i + size] for i in range(0, len(self.samples), size)]

    @property
    def problems(self) -> list[Problem]:
        """The problem of each group."""
        return [group[0].problem for group in self.groups]

    @property
    def verdicts(self) -> list[tuple[int, int]]:
        """For each problem, how many of its samples passed, and how many got a verdict."""
        outcomes = [[sample.execution.outcome for sample in group] for group in self.groups]
        return [(row.count("passed"), len(row) - row.count("infra_error")) for row in outcomes]

    def replaced(self, place: int, other: Rollout, group: int) -> Rollout:
        """A copy with the group at ``place`` taken from another rollout."""
        groups, rewards = self.groups, self.rewards.clone()
        groups[place], rewards[place] = other.groups[group], other.rewards[group]
        size = self.rewards.shape[1]
        here, there = (slice(at * size, (at + 1) * size) for at in (place, group))
        terms = {name: list(values) for name, values in self.terms.items()}
        for name, values in terms.items():
            values[here] = other.terms[name][there]
        return Rollout([sample for row in groups for sample in row], rewards, terms)

    def take_advantages(self, trained: Rollout) -> None:
        """Take the advantages of those samples that are in the rollout trained on; others have had none."""
        assert trained.advantages is not None
        # Refilling moves samples and copies none.
        found = dict(zip(map(id, trained.samples), trained.advantages.flatten().tolist(), strict=True))
        known = torch.zeros_like(self.rewards).where(~self.rewards.isnan(), math.nan)
        mine = [
            found.get(id(s), left) for s, left in zip(self.samples, known.flatten().tolist(), strict=True)
        ]
        self.advantages = torch.tensor(mine).view_as(self.rewards)

    def metrics(self, gathered: Gathered = lambda records: [records]) -> dict[str, float]:
        """Metrics of the samples of all ranks, by name; NaN where there is nothing to take a mean of.

        Samples without a verdict (infrastructure errors) count among the outcomes, and with their lengths and
        entropy; elsewhere they are left out, as they are neither right nor wrong. Collective.

        Args:
            gathered: From the records of this rank to those of every rank; by default this is the only one.
        """
        terms = list(zip(*self.terms.values(), strict=True)) or [()] * len(self.samples)
        mine = [
            SampleRecord(
                reward,
                s.execution,
                len(s.completion.logprobs),
                sum(s.completion.logprobs),
                s.completion.finished,
                each,
            )
            for s, reward, each in zip(self.samples, self.rewards.flatten().tolist(), terms, strict=True)
        ]
        # Records are exchanged, not means: ranks may have unequally many samples, and of them verdicts.
        records = [record for part in gathered(mine) for record in part]
        judged = [record.execution for record in records if record.execution.outcome != "infra_error"]
        rewards = [record.reward for record in records if not math.isnan(record.reward)]
        outcomes = Counter(record.execution.outcome for record in records)
        count, tests = len(records), sum(run.total for run in judged)
        # One reward's mean is `reward/mean`.
        each_reward = {}
        for place, name in enumerate(self.terms if len(self.terms) > 1 else ()):
            known = [record.terms[place] for record in records if not math.isnan(record.terms[place])]
            each_reward[f"reward/{name}/mean"] = fmean(known) if known else math.nan
        tokens = sum(record.tokens for record in records)
        return {
            "rollout/samples": float(count),
            "reward/mean": fmean(rewards) if rewards else math.nan,
            # Of the population: a step's samples are all there is, and one alone has deviation 0, not NaN.
            "reward/std": pstdev(rewards) if rewards else math.nan,
            "reward/passed": _ratio(outcomes["passed"], len(judged)),
            "reward/test_pass_rate": _ratio(sum(run.passed for run in judged), tests),
            # Of tokens drawn from p, the mean of -log p estimates the entropy of p without bias. A forward
            # would give it with less noise, but there is none over groups without signal: these have the
            # least entropy, and a mean without them would hide a collapse.
            "policy/entropy": _ratio(-sum(record.logprob for record in records), tokens),
            "completion/length": _ratio(tokens, count),
            "completion/clipped": _ratio(sum(not record.finished for record in records), count),
            "grading/partly": _ratio(sum(run.grading == "partly" for run in judged), len(judged)),
            "grading/inline": _ratio(sum(run.grading == "inline" for run in judged), len(judged)),
            **each_reward,
        } | {f"outcome/{name}": _ratio(outcomes[name], count) for name in get_args(Outcome)}


def why_unknown(rollouts: Sequence[Rollout]) -> str:
    """Why samples have no reward, as a sentence: verdicts that are missing, and rewards that said nothing."""
    samples = [sample for rollout in rollouts for sample in rollout.samples]
    lost = [s.execution.message for s in samples if s.execution.outcome == "infra_error"]
    silent: Counter[str] = Counter()
    for rollout in rollouts:
        for name, values in rollout.terms.items():
            judged = zip(values, rollout.samples, strict=True)
            silent[name] += sum(math.isnan(v) and s.execution.outcome != "infra_error" for v, s in judged)
    causes = []
    if lost:
        message, _ = Counter(lost).most_common(1)[0]
        causes.append(
            f"{len(lost)} of {len(samples)} programs have no verdict, most often for the reason: "
            f"{message or 'not known'} (coderl doctor looks at the sandbox)"
        )
    causes += [
        f"{name} gave None or NaN for {count} of the {len(samples) - len(lost)} that have a verdict"
        for name, count in silent.most_common()
        if count
    ]
    return "; ".join(causes) or "all rewards are NaN"


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


@dataclass
class Meter:
    """Collects the metrics of a step: seconds of each part, means over tokens, single values.

    Attributes:
        values: Metrics by name.
        tokens: Number of tokens sampled in the step.
    """

    values: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, columns: dict[str, Tensor], mask: Tensor) -> None:
        """Add a micro-batch's per-token values ``[B, T]`` to the means."""
        self._sums["tokens"] += int(mask.sum())
        for name, column in columns.items():
            self._sums[name] += float(torch.where(mask, column.detach(), 0.0).sum())

    def means(self, gathered: Callable[[dict[str, float]], list[dict[str, float]]]) -> dict[str, float]:
        """Means over the tokens of all ranks; empty if there are none. Collective.

        Args:
            gathered: From the sums of this rank to those of every rank.
        """
        # Sums and counts are exchanged, not means: ranks have unequally many tokens, and some have none.
        sums: dict[str, float] = defaultdict(float)
        for part in gathered(dict(self._sums)):
            for name, value in part.items():
                sums[name] += value
        tokens = sums.pop("tokens", 0.0)
        return {name: value / tokens for name, value in sums.items()} if tokens else {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the wall time of the block to ``seconds/part``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds/{part}"
            self.values[key] = self.values.get(key, 0.0) + time.perf_counter() - start
