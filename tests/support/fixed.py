"""Algorithms inside a real Trainer on rollouts that were given beforehand: what gradients they take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from coderl.algorithms import GRPO, PPO, PolicyGradient
from coderl.algorithms.rewards import Sample
from coderl.algorithms.step import Rollout
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.rollout import GenerateEngine, Sampling
from coderl.types import Execution, Problem
from tests.support import tiny

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-0.2, 1.0, 1.1, 0.0]]
Gradients = dict[str, torch.Tensor]


class Fixed(PolicyGradient):
    """Takes its rollouts from a list, the last one again and again, and keeps the gradients of each step."""

    given: list[Rollout]
    gradients: list[Gradients]
    logged: list[dict[str, float]]

    def setup(self, stage: str) -> None:
        pass  # no program runs here

    def collect(self, problems: Sequence[Problem]) -> Rollout:
        return self.given[min(len(self.logged), len(self.given) - 1)]

    def step(self) -> torch.Tensor:
        self.gradients.append(
            {n: p.grad.clone() for n, p in self.policy.trainable().items() if p.grad is not None}
        )
        return super().step()

    def report(self, rollout: Rollout) -> None:
        self.logged.append(dict(self._meter.values))


class FixedGRPO(Fixed, GRPO):
    pass


class FixedPPO(Fixed, PPO):
    pass


def rollout_of(
    folder: Path,
    rewards: list[list[float]],
    seed: int = 3,
    limit: int = 9,
    temperature: float = 1.5,
    family: str = "llama",
) -> Rollout:
    """Completions of a fresh policy, with rewards given."""
    policy = tiny.policy(folder, family)
    problems = tiny.problems(len(rewards))
    engine = GenerateEngine()
    engine.bind(policy)
    torch.manual_seed(seed)
    size = len(rewards[0])
    completions = engine.generate(problems, size, Sampling(temperature=temperature, max_new_tokens=limit))
    samples = [
        Sample(problem=problems[c.problem], completion=c, program=c.text, execution=Execution("failed", 0, 1))
        for c in completions
    ]
    return Rollout(samples, torch.tensor(rewards))


def stirred(folder: Path, **options: Any) -> Policy:
    """The policy that :func:`run` starts from."""
    settings: dict[str, Any] = {"quantization": "none", "lora": LoRA(r=4, alpha=8)} | options
    policy = Policy(str(folder), **settings)
    torch.manual_seed(5)  # the adapter's start
    policy.load(torch.device("cpu"))
    tiny.stir(policy)
    return policy


def train(module: PolicyGradient, steps: int = 1, **options: Any) -> None:
    """Fit for so many optimizer steps."""
    trainer = tiny.trainer(max_steps=steps, max_epochs=-1, **options)
    problems = tiny.problems(len(REWARDS))
    trainer.fit(module, DataLoader(problems, batch_size=len(problems), collate_fn=list))  # type: ignore[arg-type]


def run(
    folder: Path,
    rollout: Rollout | list[Rollout],
    steps: int = 1,
    kind: type[Fixed] = FixedGRPO,
    policy: Policy | None = None,
    **options: Any,
) -> Any:
    """A module of ``kind`` after so many optimizer steps on the rollouts."""
    given = rollout if isinstance(rollout, list) else [rollout]
    settings: dict[str, Any] = {
        "group_size": given[0].rewards.shape[1],
        "max_new_tokens": 9,
        "temperature": 1.5,
        "kl_coefficient": 0.1,
        "learning_rate": 1e-2,
    } | options
    module = kind(policy=policy or stirred(folder), **settings)
    module.given, module.gradients, module.logged = given, [], []
    train(module, steps)
    return module


def close(one: Gradients, other: Gradients, atol: float = 2e-6) -> None:
    """Whether two gradients are the same but for rounding."""
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=atol, rtol=2e-4, msg=partial("{}: {}".format, name)
        )
