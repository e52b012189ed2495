"""pass@k: the unbiased estimator, a metric that gathers it over ranks, an interval and a test.

Notation: ``n`` samples of a problem, ``c`` of them correct, ``k`` attempts allowed.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

import torch
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that ``k`` of ``n`` samples, drawn without return, hold at least one of the ``c`` correct ones.

    ``1 - C(n - c, k) / C(n, k)``, which is 1 where fewer than ``k`` samples are wrong (Chen et al. 2021,
    arXiv:2107.03374, section 2.1). A problem without samples was not solved: 0.

    Raises:
        ValueError: ``k`` is below 1 or above ``n > 0``, or ``c`` is not within 0 to ``n``.
    """
    if k < 1 or not 0 <= c <= n or (n and k > n):
        raise ValueError(f"pass@{k} cannot be told from {c} correct of {n} samples")
    return 1.0 - comb(n - c, k) / comb(n, k) if n else 0.0


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile-bootstrap interval for the mean of ``values`` (one per problem), problems drawn with return.

    It says how the score would vary with other problems of the same kind, not with other samples of a model.

    Args:
        values: One number per problem, at least one.
        confidence: Share of resampled means that lie inside, 0 to 1.
        resamples: Number of resampled means.
        seed: Seed of the draws; the same seed gives the same interval.

    Returns:
        Lower and upper end.
    """
    if not values:
        raise ValueError("no interval without values")
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(data), (resamples, len(data)), generator=generator)
    tail = (1 - confidence) / 2
    ends = torch.quantile(data[draws].mean(dim=1), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def sign_test(won: int, lost: int) -> float:
    """Chance of wins and losses at least this uneven, either way, if each were as likely: the p-value.

    Exact and two-sided: ``min(1, 2 P(X <= min(won, lost)))`` for X binomial of ``won + lost`` draws with
    chance 1/2. Ties say nothing and do not enter. Where each side has one outcome per problem, right or
    wrong, it is McNemar's test (1947, Psychometrika 12, pages 153 to 157) with exact chances.

    Raises:
        ValueError: A count is negative.
    """
    if min(won, lost) < 0:
        raise ValueError(f"{won} won and {lost} lost are no counts")
    draws, below, ways = won + lost, 0, 1
    for i in range(min(won, lost) + 1):
        below += ways
        ways = ways * (draws - i) // (i + 1)
    return min(1.0, 2 * below / (1 << draws))


class PassAtK(Metric):
    """Mean pass@k over problems, summed over batches and ranks.

    Where some problem has fewer than ``k`` samples (but any at all), pass@k cannot be told and is NaN.

    Args:
        ks: Attempts allowed, each at least 1.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    total: Tensor
    short: Tensor
    problems: Tensor

    def __init__(self, ks: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.ks = tuple(ks)
        self.add_state("total", torch.zeros(len(ks), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("short", torch.zeros(len(ks), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, n: Tensor, c: Tensor) -> None:
        """Add problems.

        Args:
            n: ``[P]`` integer, samples per problem.
            c: ``[P]`` integer, correct ones among them.
        """
        for samples, correct in zip(n.tolist(), c.tolist(), strict=True):
            for column, k in enumerate(self.ks):
                if 0 < samples < k:
                    self.short[column] += 1
                else:
                    self.total[column] += pass_at_k(samples, correct, k)
            self.problems += 1

    def compute(self) -> dict[str, Tensor]:
        """``{"pass@1": x, ...}``, scalars from 0 to 1; NaN where it cannot be told, or nothing was added."""
        means = torch.where(self.short > 0, torch.nan, self.total / self.problems)
        return {f"pass@{k}": mean for k, mean in zip(self.ks, means, strict=True)}
