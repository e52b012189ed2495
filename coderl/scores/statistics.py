"""pass@k: the unbiased estimator, a bootstrap interval and a sign test.

Notation: ``n`` samples of a problem, ``c`` of them correct, ``k`` attempts allowed.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that ``k`` of ``n`` samples, drawn without replacement, include one of the ``c`` correct ones.

    ``1 - C(n - c, k) / C(n, k)``, which is 1 where fewer than ``k`` samples are wrong (Chen et al. 2021,
    arXiv:2107.03374, section 2.1). A problem without samples was not solved: 0.

    Raises:
        ValueError: ``k`` is below 1 or above ``n > 0``, or ``c`` is not within 0 to ``n``.
    """
    if k < 1 or not 0 <= c <= n or (n and k > n):
        raise ValueError(f"pass@{k} is not defined for {c} correct of {n} samples")
    return 1.0 - comb(n - c, k) / comb(n, k) if n else 0.0


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile-bootstrap interval for a mean over problems, drawn with replacement.

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
    data = np.array(values, dtype=np.float64)
    # 32-bit numbers of mt19937 modulo the length are what torch.randint draws. Earlier versions used it: the
    # intervals in older results files come out again. The modulo favours some problems by less than 1e-6.
    numbers = np.random.RandomState(seed).randint(0, 2**32, (resamples, len(data)), dtype=np.uint32)
    tail = (1 - confidence) / 2
    low, high = np.quantile(data[numbers % len(data)].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def sign_test(won: int, lost: int) -> float:
    """p-value of wins against losses: the chance of counts at least this uneven if both were equally likely.

    Exact and two-sided: ``min(1, 2 P(X <= min(won, lost)))`` for X binomial of ``won + lost`` draws with
    chance 1/2. Ties say nothing and do not enter. Where each side has one outcome per problem, right or
    wrong, it is McNemar's test (1947, Psychometrika 12, pages 153 to 157) with exact chances.

    Raises:
        ValueError: A count is negative.
    """
    if min(won, lost) < 0:
        raise ValueError(f"{won} won and {lost} lost are not counts")
    # Whole numbers up to the last division: no rounding, and no overflow with thousands of problems.
    draws, below, ways = won + lost, 0, 1
    for i in range(min(won, lost) + 1):
        below += ways
        ways = ways * (draws - i) // (i + 1)
    return min(1.0, 2 * below / (1 << draws))
