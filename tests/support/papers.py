"""The papers' estimators and losses written out as plain loops over lists of floats.

A second, independent reading of the equations, to hold `coderl.algorithms.advantages` and
`coderl.algorithms.losses` against. A sequence is the list of its action tokens: padding and masked holes are
not known here at all. A loss comes with its gradient with regard to each token's log-probability, derived by
hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

EPS = 1e-4
Rows = list[list[float]]


class Token(NamedTuple):
    """One action: its log-probability now and when it was sampled, and its advantage."""

    logp: float
    old: float
    advantage: float


class Step(NamedTuple):
    """A whole step's loss and its derivative with regard to every token's log-probability."""

    loss: float
    gradient: Rows


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values: list[float]) -> float:
    """Standard deviation with Bessel's correction; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((x - centre) ** 2 for x in values) / (len(values) - 1))


def spread(values: list[float]) -> float:
    """Standard deviation of a whole batch over its own count, as in OpenRLHF, the code of arXiv:2501.03262.

    Ranks that can only average would have no count to take 1 from.
    """
    return math.sqrt(mean([(x - mean(values)) ** 2 for x in values])) if values else 0.0


def known(values: list[float]) -> list[float]:
    """The rewards that are not NaN."""
    return [x for x in values if not math.isnan(x)]


# --- Advantages -------------------------------------------------------------------------------------------


def centred_on_group(rewards: Rows) -> Rows:
    """GRPO, arXiv:2402.03300, section 4.1.2: r_i - mean(r); the same in Dr. GRPO, arXiv:2503.20783, 3.2."""
    result = []
    for row in rewards:
        rest = known(row)
        flat = len(set(rest)) <= 1
        result.append([0.0 if math.isnan(r) or flat else r - mean(rest) for r in row])
    return result


def leave_one_out(rewards: Rows) -> Rows:
    """RLOO, arXiv:2402.14740, section 2.3: R(y_i) - 1/(k-1) * sum of R(y_j) over j != i."""
    result = []
    for row in rewards:
        flat = len(set(known(row))) <= 1
        advantages = []
        for i, r in enumerate(row):
            others = known([other for j, other in enumerate(row) if j != i])
            advantages.append(0.0 if math.isnan(r) or flat else r - mean(others))
        result.append(advantages)
    return result


def centred_on_batch(rewards: Rows) -> Rows:
    """REINFORCE++, arXiv:2501.03262, global normalisation: A - mean over the whole batch."""
    everything = known([r for row in rewards for r in row])
    return [[0.0 if math.isnan(r) else r - mean(everything) for r in row] for row in rewards]


def rewards_themselves(rewards: Rows) -> Rows:
    """REINFORCE without a baseline."""
    return [[0.0 if math.isnan(r) else r for r in row] for row in rewards]


BASELINES: dict[str, Callable[[Rows], Rows]] = {
    "group": centred_on_group,
    "rloo": leave_one_out,
    "reinforce++": centred_on_batch,
    "none": rewards_themselves,
}


def advantages(rewards: Rows, scale: str, baseline: str) -> Rows:
    """Advantages over the std of the group (GRPO), of the batch (REINFORCE++), or as they are (Dr. GRPO)."""
    result = []
    batch = spread(known([r for row in rewards for r in row]))
    for row, centred in zip(rewards, BASELINES[baseline](rewards), strict=True):
        divisor = {"group": deviation(known(row)) + EPS, "batch": batch + EPS, "none": 1.0}[scale]
        result.append([a / divisor for a in centred])
    return result


def k_step(rewards: list[float], values: list[float], final: float, gamma: float, t: int, k: int) -> float:
    """arXiv:1506.02438, equation 14: -V(s_t) + r_t + ... + gamma^(k-1) r_(t+k-1) + gamma^k V(s_(t+k))."""
    after = [*values, final]
    total = -values[t] + gamma**k * after[t + k]
    for step in range(k):
        total += gamma**step * rewards[t + step]
    return total


def gae_from_k_steps(
    rewards: list[float], values: list[float], final: float, gamma: float, lam: float
) -> list[float]:
    """arXiv:1506.02438, equation 16's first line: (1-lam) * (A(1) + lam A(2) + lam^2 A(3) + ...).

    An estimator that looks past the end is the one that looks right to the end, so the tail of the geometric
    sum, lam^(K-1) in all, belongs to the longest one.
    """
    result = []
    for t in range(len(rewards)):
        longest = len(rewards) - t
        total = lam ** (longest - 1) * k_step(rewards, values, final, gamma, t, longest)
        for k in range(1, longest):
            total += (1 - lam) * lam ** (k - 1) * k_step(rewards, values, final, gamma, t, k)
        result.append(total)
    return result


def gae_from_deltas(
    rewards: list[float], values: list[float], final: float, gamma: float, lam: float
) -> list[float]:
    """arXiv:1506.02438, equation 16's last line: the sum of (gamma lam)^l delta_(t+l)."""
    result = []
    for t in range(len(rewards)):
        total = 0.0
        for later in range(t, len(rewards)):
            following = values[later + 1] if later + 1 < len(values) else final
            delta = rewards[later] + gamma * following - values[later]
            total += (gamma * lam) ** (later - t) * delta
        result.append(total)
    return result


def whitened(rows: Rows) -> Rows:
    """Every value of the batch less their mean, over their std."""
    everything = [x for row in rows for x in row]
    return [[(x - mean(everything)) / (spread(everything) + EPS) for x in row] for row in rows]


def token_rewards(reward: float, kl: list[float], beta: float) -> list[float]:
    """arXiv:1909.08593, equation 2, by token: -beta * KL at each action, the score added at the last one."""
    return [-beta * k + (reward if t == len(kl) - 1 else 0.0) for t, k in enumerate(kl)]


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """DAPO, arXiv:2503.14476, equation 13."""
    if length <= limit - buffer:
        return 0.0
    if length <= limit:
        return ((limit - buffer) - length) / buffer
    return -1.0


# --- Losses -----------------------------------------------------------------------------------------------


def clip(x: float, low: float, high: float) -> float:
    """`x` held between two bounds."""
    return min(max(x, low), high)


def surrogate(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """PPO, arXiv:1707.06347, equation 7, as a loss: -min(rA, clip(r)A), and its derivative by log r."""
    free = ratio * advantage
    held = clip(ratio, 1 - low, 1 + high) * advantage
    return (-free, -free) if free <= held else (-held, 0.0)


def filled(step: list[list[Token]]) -> int:
    """Sequences that have any token in the loss; 1 where none has, so that an empty step costs 0."""
    return max(sum(1 for sequence in step if sequence), 1)


def by_token(step: list[list[Token]], low: float, high: float, share: Callable[[int], float]) -> Step:
    """The sum of PPO's surrogate over every token, each weighed by its sequence's `share(length)`."""
    loss, gradient = 0.0, []
    for sequence in step:
        slopes = []
        for token in sequence:
            cost, slope = surrogate(math.exp(token.logp - token.old), token.advantage, low, high)
            loss += share(len(sequence)) * cost
            slopes.append(share(len(sequence)) * slope)
        gradient.append(slopes)
    return Step(loss, gradient)


def grpo(step: list[list[Token]], low: float, high: float, limit: int) -> Step:
    """GRPO, arXiv:2402.03300, equation 3: 1/G sum_i 1/|o_i| sum_t, the KL term apart."""
    return by_token(step, low, high, lambda length: 1 / (filled(step) * length))


def dapo(step: list[list[Token]], low: float, high: float, limit: int) -> Step:
    """DAPO, arXiv:2503.14476, equation 8: 1/(sum_i |o_i|) sum_i sum_t, the two bounds apart."""
    tokens = sum(len(sequence) for sequence in step)
    return by_token(step, low, high, lambda length: 1 / tokens)


def dr_grpo(step: list[list[Token]], low: float, high: float, limit: int) -> Step:
    """Dr. GRPO, arXiv:2503.20783, section 3.2: a constant, the generation budget, in place of |o_i|."""
    return by_token(step, low, high, lambda length: 1 / (filled(step) * limit))


def gspo(step: list[list[Token]], low: float, high: float, limit: int) -> Step:
    """GSPO, arXiv:2507.18071, equations 5 and 7: s_i = (pi(y_i)/pi_old(y_i))^(1/|y_i|), clipped as one."""
    loss, gradient = 0.0, []
    for sequence in step:
        slopes = []
        if sequence:
            s = math.exp(sum(token.logp - token.old for token in sequence) / len(sequence))
            cost, slope = surrogate(s, sequence[0].advantage, low, high)
            loss += cost / filled(step)
            slopes = [slope / len(sequence) / filled(step)] * len(sequence)
        gradient.append(slopes)
    return Step(loss, gradient)


def cispo(step: list[list[Token]], low: float, high: float, limit: int) -> Step:
    """CISPO, arXiv:2506.13585, equations 4 and 5: sg(clip(r)) A log pi over all tokens of the step."""
    tokens = sum(len(sequence) for sequence in step)
    loss, gradient = 0.0, []
    for sequence in step:
        slopes = []
        for token in sequence:
            weight = clip(math.exp(token.logp - token.old), 1 - low, 1 + high)
            loss -= weight * token.advantage * token.logp / tokens
            slopes.append(-weight * token.advantage / tokens)
        gradient.append(slopes)
    return Step(loss, gradient)


LOSSES = {"grpo": grpo, "dapo": dapo, "dr_grpo": dr_grpo, "gspo": gspo, "cispo": cispo}


def value_loss(value: float, old: float, target: float, bound: float | None) -> tuple[float, float, bool]:
    """PPO's critic: half the worse of two squared errors, its derivative by V, and whether the held one won.

    arXiv:1707.06347, equation 9, has the squared error alone; the clipping is that of its published code,
    written down in arXiv:2005.12729, section 3, point 1.
    """
    free = (value - target) ** 2
    held_value = value if bound is None else clip(value, old - bound, old + bound)
    held = (held_value - target) ** 2
    if held > free:
        return 0.5 * held, 0.0, True
    return 0.5 * free, value - target, False


def kl(logp: float, ref: float, estimator: str) -> tuple[float, float]:
    """Schulman, "Approximating KL Divergence" (2020); k3 is arXiv:2402.03300, equation 4. With derivative."""
    r = ref - logp
    if estimator == "k1":
        return -r, 1.0
    if estimator == "k2":
        return 0.5 * r * r, -r
    return math.exp(r) - r - 1, 1 - math.exp(r)


def sampler_correction(old: list[float], sampler: list[float], mode: str, cap: float) -> list[float]:
    """Truncated importance sampling (Ionides 2008): min(pi_old/pi_sampler, C), by token or by sequence.

    The sequence's ratio is length-normalised as in arXiv:2507.18071, equation 7; `mask` leaves out the tokens
    whose ratio lies outside [1/C, C] and weighs the others alike.
    """
    ratios = [math.exp(a - b) for a, b in zip(old, sampler, strict=True)]
    if mode == "token":
        return [min(r, cap) for r in ratios]
    if mode == "mask":
        return [1.0 if 1 / cap <= r <= cap else 0.0 for r in ratios]
    whole = 1.0
    for r in ratios:
        whole *= r ** (1 / len(ratios))
    return [min(whole, cap)] * len(ratios)


def top_entropy(entropies: Rows, fraction: float) -> list[list[bool]]:
    """arXiv:2506.01939, section 5: the tokens at or above the batch's (1 - fraction) quantile of entropy."""
    ranked = sorted((h for row in entropies for h in row), reverse=True)
    if not ranked:
        return [[] for _ in entropies]
    threshold = ranked[math.ceil(fraction * len(ranked)) - 1]
    return [[h >= threshold for h in row] for row in entropies]


def adapted(beta: float, divergence: float, target: float, samples: int, horizon: int) -> float:
    """arXiv:1909.08593, section 2.2: e = clip((KL - target)/target, -0.2, 0.2), beta * (1 + K e)."""
    error = clip((divergence - target) / target, -0.2, 0.2)
    return beta * (1 + error * samples / horizon)
