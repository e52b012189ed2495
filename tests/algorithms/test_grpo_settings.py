"""Settings that GRPO refuses, with a one-line error that says how to fix them; and the overlong penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from coderl.algorithms import GRPO
from coderl.algorithms.advantages import AdvantageScale, Baseline
from coderl.algorithms.grpo import LEGAL_SCALES
from coderl.algorithms.rewards import Reward, Sample
from coderl.algorithms.step import Rollout
from coderl.errors import UsageError
from coderl.model.policy import Policy
from coderl.rollout import RolloutEngine, Sampling
from coderl.types import Completion, Execution, Problem
from tests.support.fixed import REWARDS, close, rollout_of, run, stirred, train
from tests.support.loops import LIMIT, flat, ragged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 0}, "1 or more"),
        ({"inner_epochs": 0}, "1 or more"),
        ({"clip": 0.0}, "between 0 and 1"),
        ({"clip": 1.0}, "between 0 and 1"),
        ({"clip_high": 0.0}, "above 0"),
        ({"kl_coefficient": -0.1}, "0 or more"),
        ({"kl_coefficient": math.nan}, "0 or more"),
        ({"reference_refresh": -1}, "0 or more"),
        ({"reference_refresh": 2, "kl_coefficient": 0.0}, "model.kl_coefficient above 0"),
        ({"kl_coefficient": math.inf}, "0 or more"),
        ({"entropy_coefficient": math.nan}, "a finite"),
        ({"top_entropy": 0.0}, "above 0, up to 1"),
        ({"top_entropy": 1.1}, "above 0, up to 1"),
        ({"overlong_buffer": -1}, "max_new_tokens"),
        ({"overlong_buffer": 16}, "max_new_tokens"),
        ({"sampler_cap": 0.5}, "1 or more"),
        ({"refill_budget": -1}, "0 or more problems"),
        ({"temperature": 0.0}, "above 0"),
        ({"max_new_tokens": 0}, "1 or more"),
        ({"micro_batch_size": 0}, "1 or more"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_a_one_line_error(llama: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        GRPO(Policy(str(llama)), **({"max_new_tokens": 16} | options))
    message = str(caught.value)
    assert f"model.{next(iter(options))} " in message and words in message and "\n" not in message


@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("scale", get_args(AdvantageScale))
def test_only_scales_that_go_with_the_baseline_are_accepted(
    llama: Path, baseline: Baseline, scale: AdvantageScale
) -> None:
    legal = {
        "group": {"group", "batch", "none"},
        "rloo": {"group", "batch", "none"},
        "reinforce++": {"batch", "none"},
        "none": {"none"},
    }[baseline]
    if scale in legal:
        GRPO(Policy(str(llama)), baseline=baseline, scale=scale)
        return
    with pytest.raises(UsageError) as caught:
        GRPO(Policy(str(llama)), baseline=baseline, scale=scale)
    message = str(caught.value)
    assert f"set model.scale to {' or '.join(LEGAL_SCALES[baseline])}" in message and "\n" not in message
    assert set(LEGAL_SCALES[baseline]) == legal


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, False),
        ({"baseline": "rloo", "scale": "none"}, False),
        ({"baseline": "reinforce++", "scale": "batch"}, True),
        ({"baseline": "none", "scale": "none"}, True),
    ],
    ids=str,
)
def test_one_sample_a_problem_needs_a_baseline_beyond_the_group(
    llama: Path, options: dict[str, Any], fits: bool
) -> None:
    if fits:
        GRPO(Policy(str(llama)), group_size=1, **options)
        return
    with pytest.raises(UsageError, match=r"at least 2; set model\.group_size"):
        GRPO(Policy(str(llama)), group_size=1, **options)


# -- the soft punishment of long completions -----------------------------------------------------------------


class Canned(RolloutEngine):
    """Answers every batch with the same completions."""

    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    def bind(self, policy: Policy) -> None:
        pass

    def sync(self) -> None:
        pass

    def generate(
        self,
        problems: Sequence[Problem],
        n: int,
        sampling: Sampling,
        *,
        seed: int | None = None,
        ready: Any = None,
    ) -> list[Completion]:
        assert len(problems) * n == len(self.completions)
        return self.completions


class Listed(Reward):
    """Gives the rewards in `REWARDS`; one of them is unknown."""

    try_out = False

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [math.nan, *flat(REWARDS)[1:]]


class Collecting(GRPO):
    """Keeps its first gradient."""

    def step(self) -> torch.Tensor:
        trainable = self.policy.trainable()
        self.gradient = {n: p.grad.clone() for n, p in trainable.items() if p.grad is not None}
        return super().step()


@pytest.mark.parametrize("buffer", [0, 1, 4, LIMIT - 1])
def test_the_overlong_penalty_lowers_the_reward_within_the_buffer(
    llama: Path, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = ragged(rollout_of(llama, REWARDS))
    completions = [sample.completion for sample in rollout.samples]
    whole = replace(rollout_of(llama, REWARDS).samples[1].completion, finished=True)
    completions[1] = whole  # at the limit, finished or not
    module = Collecting(
        stirred(llama),
        rewards=[Listed()],
        engine=Canned(completions),
        group_size=4,
        max_new_tokens=LIMIT,
        temperature=1.5,
        kl_coefficient=0.1,
        overlong_buffer=buffer,
        learning_rate=1e-2,
    )
    monkeypatch.setattr(module.sandbox, "start", lambda: None)
    monkeypatch.setattr(module.sandbox, "run", lambda jobs: [Execution("failed", 0, 1)] * len(jobs))
    train(module)
    assert module.rollout is not None
    expected = []
    for completion, reward in zip(completions, flat(REWARDS), strict=True):
        over = len(completion.ids) - (LIMIT - buffer)
        expected.append(reward - (over / buffer if buffer and over > 0 else 0.0))
    got = module.rollout.rewards.flatten().tolist()
    assert math.isnan(got[0]) and got[1:] == pytest.approx(expected[1:])
    assert (got[1] == flat(REWARDS)[1]) is (buffer == 0)
    samples = [replace(s, completion=c) for s, c in zip(rollout.samples, completions, strict=True)]
    given = Rollout(samples, torch.tensor([math.nan, *expected[1:]]).view(3, 4))
    close(module.gradient, run(llama, given, rewards=[Listed()]).gradients[0])
