"""The data of one policy-gradient step: its rollout and its metrics."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

import torch

from coderl.algorithms.advantages import no_signal
from coderl.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from coderl.algorithms.rewards import Sample
    from coderl.types import Problem


@dataclass
class Rollout:
    """The samples of a batch of problems with their rewards.

    Attributes:
        samples: Samples in the order of the problems, ``G`` for each of ``P`` problems.
        rewards: ``[P, G]``, NaN where unknown.
    """

    samples: list[Sample]
    rewards: Tensor

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
        return Rollout([sample for row in groups for sample in row], rewards)

    def metrics(self) -> dict[str, float]:
        """Metrics of the samples, by name; padding and unknown rewards are left out of the means."""
        runs, count = [s.execution for s in self.samples], len(self.samples)
        known = self.rewards[~self.rewards.isnan()].float()
        outcomes = Counter(run.outcome for run in runs)
        return {
            "reward/mean": float(known.mean()),  # NaN where there is none
            # Of the population: a step's samples are all there is, and one alone has deviation 0, not NaN.
            "reward/std": float(known.std(correction=0)) if len(known) else float("nan"),
            "reward/passed": outcomes["passed"] / count,
            "reward/test_pass_rate": sum(r.passed for r in runs) / max(sum(r.total for r in runs), 1),
            "groups/no_signal": float(no_signal(self.rewards).float().mean()),
            "completion/length": self.tokens / count,
            "completion/clipped": sum(not s.completion.finished for s in self.samples) / count,
            "grading/partly": sum(run.grading == "partly" for run in runs) / count,
            "grading/inline": sum(run.grading == "inline" for run in runs) / count,
        } | {f"outcome/{name}": outcomes[name] / count for name in get_args(Outcome)}


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
