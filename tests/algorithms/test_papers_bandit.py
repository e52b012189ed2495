"""A two-armed bandit: with every loss and baseline the policy comes to choose the rewarded arm."""

from __future__ import annotations

from typing import NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from coderl.algorithms.advantages import AdvantageScale, Baseline, group_advantages
from coderl.algorithms.grpo import LEGAL_SCALES
from coderl.algorithms.losses import LossType, policy_loss, token_weights

LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
ADVANTAGES = [(baseline, scale) for baseline, scales in LEGAL_SCALES.items() for scale in scales]
PROMPTS, SAMPLES, LIMIT, WORDS = 4, 8, 5, 3
STEPS, EPOCHS = 120, 2


class Answers(NamedTuple):
    """Sampled tokens `[B, T]`, their log-probabilities when they were drawn, and the mask."""

    tokens: Tensor
    old: Tensor
    mask: Tensor


def sample(logits: Tensor, count: int, generator: torch.Generator) -> Answers:
    """Answers of 2 to LIMIT tokens; the length is independent of the tokens."""
    with torch.no_grad():
        chances = logits.softmax(-1)
        tokens = torch.multinomial(chances, count, replacement=True, generator=generator).T
        length = torch.randint(2, LIMIT + 1, (count, 1), generator=generator)
        return Answers(tokens, score(logits, tokens), torch.arange(LIMIT) < length)


def score(logits: Tensor, tokens: Tensor) -> Tensor:
    """`[B, T]` log-probabilities; each position of an answer has its own distribution."""
    return logits.log_softmax(-1)[torch.arange(LIMIT), tokens]


def policy(chance: float) -> Tensor:
    """Logits `[LIMIT, WORDS]`: the rewarded arm, the first word, has this probability at first."""
    logits = torch.zeros(LIMIT, WORDS)
    logits[0, 2] = -30.0  # two arms only
    logits[0, 0] = torch.tensor(chance / (1 - chance)).log()
    return logits.requires_grad_()


def loss_gradient(logits: Tensor, answers: Answers, advantages: Tensor, loss_type: LossType) -> Tensor:
    """Gradient of a step's loss with regard to the policy."""
    gains = advantages.reshape(-1, 1).expand(answers.mask.shape)
    now = score(logits, answers.tokens)
    loss = policy_loss(now, answers.old, gains, answers.mask, loss_type, 0.2, 0.2).loss
    (gradient,) = torch.autograd.grad((token_weights(answers.mask, loss_type, LIMIT) * loss).sum(), logits)
    return gradient


@pytest.mark.parametrize(("baseline", "scale"), ADVANTAGES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_rewarded_arm_is_learned(loss_type: LossType, baseline: Baseline, scale: AdvantageScale) -> None:
    """From 0.3 to above 0.9 within 120 steps of two epochs, one reward in ten lost on the way."""
    generator = torch.Generator().manual_seed(11)
    logits = policy(0.3)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(STEPS):
        answers = sample(logits, PROMPTS * SAMPLES, generator)
        rewards = (answers.tokens[:, 0] == 0).float().view(PROMPTS, SAMPLES)
        lost = torch.rand(rewards.shape, generator=generator) < 0.1
        rewards[lost] = torch.nan
        answers = answers._replace(mask=answers.mask & ~lost.view(-1, 1))
        advantages = group_advantages(rewards, scale, baseline)
        for _ in range(EPOCHS):
            logits.grad = loss_gradient(logits, answers, advantages, loss_type)
            optimizer.step()
    assert float(logits.detach().softmax(-1)[0, 0]) > 0.9


@pytest.mark.parametrize(("baseline", "scale"), ADVANTAGES[:8])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equal_rewards_have_no_gradient_with_a_baseline(
    loss_type: LossType, baseline: Baseline, scale: AdvantageScale
) -> None:
    generator = torch.Generator().manual_seed(12)
    logits = policy(0.3)
    answers = sample(logits, PROMPTS * SAMPLES, generator)
    advantages = group_advantages(torch.full((PROMPTS, SAMPLES), 0.1), scale, baseline)
    gradient = loss_gradient(logits, answers, advantages, loss_type)
    if baseline == "reinforce++":  # a mean over the batch is rounded
        assert gradient.abs().max() < 1e-3
    else:
        assert gradient.eq(0).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equal_rewards_without_a_baseline_have_no_gradient_on_average(loss_type: LossType) -> None:
    """On-policy the mean of A * grad log pi is 0 for a constant A; five standard errors are allowed."""
    count = 40_000
    generator = torch.Generator().manual_seed(13)
    logits = policy(0.3)
    answers = sample(logits, count, generator)
    advantages = group_advantages(torch.full((count // SAMPLES, SAMPLES), 0.5), "none", "none")
    gradient = loss_gradient(logits, answers, advantages / advantages.mean(), loss_type)
    # A token's weight is at most 1/2 over the sequences, and its score's deviation at most 1/2.
    assert gradient.abs().max() < 5 * 0.25 / count**0.5
    paying = group_advantages((answers.tokens[:, 0] == 0).float().view(-1, SAMPLES), "none", "none")
    assert (
        loss_gradient(logits, answers, paying, loss_type)[0, 0] < -0.02
    )  # where one arm pays, the same bound is broken
