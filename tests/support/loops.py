"""One step of the GRPO family from the model's own logits, as plain loops over tokens.

Nothing of `coderl.algorithms.advantages`, `coderl.algorithms.losses` or `coderl.model.logprobs` is used here,
nor any padding.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coderl.algorithms.step import Rollout
from coderl.model.policy import Policy
from tests.support.fixed import Gradients

TEMPERATURE, LIMIT = 1.5, 9
"""What `tests.support.fixed.run` samples with."""


@dataclass
class Row:
    """What the model says of one completion: a number, with its gradient, for each token."""

    logp: list[Tensor]
    entropy: list[Tensor]
    ref: list[float]
    finished: bool

    @property
    def old(self) -> list[float]:
        """The log-probabilities, as what was before an update."""
        return [float(value.detach()) for value in self.logp]


def rows_of(policy: Policy, rollout: Rollout) -> list[Row]:
    """Every completion, read alone."""
    rows = []
    for sample in rollout.samples:
        prompt, answer = sample.completion.prompt_ids, sample.completion.ids
        ids = torch.tensor([[*prompt, *answer]])
        table = (policy.net(ids).logits[0] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad(), policy.reference():
            reference = (policy.net(ids).logits[0] / TEMPERATURE).log_softmax(-1)
        places = [(len(prompt) + t - 1, token) for t, token in enumerate(answer)]
        rows.append(
            Row(
                [table[place, token] for place, token in places],
                [-(table[place].exp() * table[place]).sum() for place, _ in places],
                [float(reference[place, token]) for place, token in places],
                sample.completion.finished,
            )
        )
    return rows


def surrogate(
    row: Row, old: list[float], advantages: Sequence[float], kind: str, low: float = 0.2, high: float = 0.2
) -> list[Tensor]:
    """The policy's loss, token by token, with the case distinctions of the papers written as branches."""
    ratios = [(logp - before).exp() for logp, before in zip(row.logp, old, strict=True)]
    if kind == "gspo":
        shift = [logp - before for logp, before in zip(row.logp, old, strict=True)]
        ratios = [(sum(shift[1:], shift[0]) / len(shift)).exp()] * len(shift)
    losses = []
    for logp, ratio, advantage in zip(row.logp, ratios, advantages, strict=True):
        now = float(ratio.detach())
        bounded = min(max(now, 1 - low), 1 + high)
        if kind == "cispo":
            losses.append(-bounded * advantage * logp)
        elif bounded * advantage < now * advantage:
            losses.append(torch.tensor(-bounded * advantage))  # clipped: a constant
        else:
            losses.append(-ratio * advantage)
    return losses


def divergence(row: Row, kind: str) -> list[Tensor]:
    """Schulman's estimators."""
    terms = []
    for logp, ref in zip(row.logp, row.ref, strict=True):
        ratio = torch.exp(ref - logp)
        terms.append({"k1": logp - ref, "k2": (logp - ref) ** 2 / 2, "k3": ratio - 1 - (ref - logp)}[kind])
    return terms


def plus(one: list[Tensor], factor: float, other: list[Tensor]) -> list[Tensor]:
    """Token by token."""
    return [a + factor * b for a, b in zip(one, other, strict=True)]


def averaged(losses: list[list[Tensor]], kind: str) -> Tensor:
    """One number of a step's tokens. A completion that does not count is not in the list."""
    tokens = list(itertools.chain(*losses))
    if kind in ("grpo", "gspo"):
        return torch.stack([torch.stack(row).mean() for row in losses]).mean()
    if kind in ("dapo", "cispo"):
        return torch.stack(tokens).mean()
    return torch.stack(tokens).sum() / (len(losses) * LIMIT)


def gradient(policy: Policy, loss: Tensor) -> Gradients:
    """Of every parameter that trains."""
    policy.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}


def ragged(rollout: Rollout, seed: int = 0) -> Rollout:
    """Completions of different lengths, two in three of them at their end; sampled in other numerics."""
    rng = random.Random(seed)
    samples = []
    for i, sample in enumerate(rollout.samples):
        keep = rng.randint(2, len(sample.completion.ids))
        completion = replace(
            sample.completion,
            ids=sample.completion.ids[:keep],
            logprobs=tuple(value + rng.gauss(0, 0.5) for value in sample.completion.logprobs[:keep]),
            finished=i % 3 != 2,
        )
        samples.append(replace(sample, completion=completion))
    return Rollout(samples, rollout.rewards)


def reordered(rollout: Rollout, order: list[int]) -> Rollout:
    """The problems in another order."""
    groups = rollout.groups
    samples = [
        replace(sample, completion=replace(sample.completion, problem=place))
        for place, problem in enumerate(order)
        for sample in groups[problem]
    ]
    return Rollout(samples, rollout.rewards[order])


def flat(rewards: list[list[float]]) -> list[float]:
    """One number for each completion."""
    return [value for row in rewards for value in row]


def top(values: list[list[float]], fraction: float) -> list[list[bool]]:
    """Where the largest of all values stand: this share of them, rounded up."""
    ranked = sorted(itertools.chain(*values), reverse=True)
    least = ranked[math.ceil(fraction * len(ranked)) - 1]
    return [[value >= least for value in row] for row in values]
