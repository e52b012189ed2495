"""GRPO in a real Trainer: its gradient, invariances, and that the reward rises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coderl.algorithms import GRPO
from coderl.algorithms.advantages import AdvantageScale, group_advantages
from coderl.algorithms.losses import LossType
from coderl.algorithms.rewards import Reward, Sample
from coderl.algorithms.step import Rollout
from coderl.errors import UsageError, UserError
from coderl.model.adapters import LoRA
from coderl.model.logprobs import Scores
from coderl.model.policy import Policy
from coderl.types import Execution, Problem
from tests.support import tiny
from tests.support.fixed import REWARDS, FixedGRPO, close, rollout_of, run, stirred, train


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_gradient_does_not_depend_on_the_micro_batch(llama: Path, loss_type: str) -> None:
    rollout = rollout_of(llama, REWARDS)
    whole = run(llama, rollout, micro_batch_size=100, loss_type=loss_type).gradients[0]
    for size in (1, 5):
        close(run(llama, rollout, micro_batch_size=size, loss_type=loss_type).gradients[0], whole)


def test_the_gradient_does_not_depend_on_the_order_of_problems(llama: Path) -> None:
    rollout = rollout_of(llama, REWARDS)
    order = [2, 0, 1]
    size = rollout.rewards.shape[1]
    samples = [rollout.samples[p * size + g] for p in order for g in range(size)]
    renumbered = [
        replace(s, completion=replace(s.completion, problem=order.index(s.completion.problem)))
        for s in samples
    ]
    shuffled = Rollout(renumbered, rollout.rewards[order])
    close(run(llama, shuffled).gradients[0], run(llama, rollout).gradients[0])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_gradient_is_that_of_the_papers_formula_written_as_loops(llama: Path, loss_type: str) -> None:
    rollout = rollout_of(llama, REWARDS)
    module = run(llama, rollout, loss_type=loss_type, scale="group", kl_coefficient=0.1)
    policy = stirred(llama)
    advantages = group_advantages(rollout.rewards).flatten().tolist()
    terms: list[list[torch.Tensor]] = []
    for sample, advantage in zip(rollout.samples, advantages, strict=True):
        prompt, answer = sample.completion.prompt_ids, sample.completion.ids
        row = torch.tensor([[*prompt, *answer]])
        table = (policy.net(row).logits[0] / 1.5).log_softmax(-1)
        with torch.no_grad(), policy.net.disable_adapter():
            reference = (policy.net(row).logits[0] / 1.5).log_softmax(-1)
        losses = []
        for t, token in enumerate(answer):
            place = len(prompt) + t - 1
            logp, ref = table[place, token], reference[place, token]
            ratio = (logp - logp.detach()).exp()
            k3 = (ref - logp).exp() - 1 - (ref - logp)
            losses.append(-ratio * advantage + 0.1 * k3)
        terms.append(losses)
    if loss_type == "grpo":
        loss = sum(sum(losses) / len(losses) for losses in terms) / len(terms)
    elif loss_type == "dapo":
        loss = sum(itertools.chain(*terms)) / sum(map(len, terms))
    else:
        loss = sum(itertools.chain(*terms)) / (len(terms) * 9)
    loss.backward()  # type: ignore[union-attr]
    expected = {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}
    close(module.gradients[0], expected)


def test_at_step_0_the_ratio_is_exactly_1_and_the_divergence_exactly_0(llama: Path) -> None:
    rollout = rollout_of(llama, REWARDS)

    class Fresh(FixedGRPO):
        def configure_model(self) -> None:
            with torch.no_grad():
                for name, parameter in self.policy.trainable().items():
                    if "lora_B" in name:
                        parameter.zero_()

    first = run(llama, rollout, kind=Fresh).logged[0]
    assert first["policy/ratio"] == 1.0
    assert first["policy/kl"] == 0.0
    assert first["policy/clip_fraction"] == 0.0


def test_skipping_groups_without_signal_changes_no_gradient(llama: Path) -> None:
    rollout = rollout_of(llama, REWARDS)

    class All(FixedGRPO):
        def has_gradient(self, rewards: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(rewards, dtype=torch.bool)

    skipped = run(llama, rollout, kl_coefficient=0.0)
    close(skipped.gradients[0], run(llama, rollout, kl_coefficient=0.0, kind=All).gradients[0])
    assert skipped.has_gradient(rollout.rewards).tolist() == [[True] * 4, [False] * 4, [True] * 4]


def test_infrastructure_errors_never_change_a_parameter(llama: Path) -> None:
    rewards = [[1.0, 0.0, math.nan, 0.5]]
    rollout = rollout_of(llama, rewards)
    kept = [s for i, s in enumerate(rollout.samples) if i != 2]
    without = Rollout(kept, torch.tensor([[1.0, 0.0, 0.5]]))
    close(run(llama, rollout).gradients[0], run(llama, without).gradients[0])


@pytest.mark.parametrize("value", [math.nan, 0.25])
def test_a_step_without_any_signal_changes_no_parameter(llama: Path, value: float) -> None:
    rollout = rollout_of(llama, [[value] * 4] * 2)
    module = run(llama, rollout, steps=2, kl_coefficient=0.0)
    assert module.gradients == [{}, {}]  # the steps count, or a fit without signal would never end
    fresh = tiny.policy(llama)
    tiny.stir(fresh)
    names = [n for n in module.policy.trainable() if "lora_B" in n]
    assert all(torch.equal(module.policy.trainable()[n], fresh.trainable()[n]) for n in names)


def test_every_trainable_parameter_changes_and_no_other(llama: Path) -> None:
    rollout = rollout_of(llama, REWARDS)
    module = run(llama, rollout, steps=1)
    start = stirred(llama)
    trainable = module.policy.trainable().keys()
    after = dict(module.policy.named_parameters())
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, after[name]) is (name not in trainable), name


@pytest.mark.parametrize("epochs", [2, 3])
def test_gradients_that_are_not_finite_change_no_parameter_and_three_in_a_row_end_the_fit(
    llama: Path, epochs: int
) -> None:
    class Broken(FixedGRPO):
        def loss(self, scores: Scores, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return scores.logprobs * math.inf, {}

    torch.manual_seed(5)
    policy = Policy(str(llama), quantization="none", lora=LoRA(r=4, alpha=8))
    policy.load(torch.device("cpu"))
    start = {name: p.detach().clone() for name, p in policy.trainable().items()}
    rollout = rollout_of(llama, REWARDS)
    options: dict[str, Any] = {"policy": policy, "kl_coefficient": 0.0, "inner_epochs": epochs}
    if epochs == 2:
        run(llama, rollout, kind=Broken, **options)
    else:
        with pytest.raises(UserError, match="not finite, and was left out, as 2 before it: set policy"):
            run(llama, rollout, kind=Broken, **options)
    assert all(torch.equal(start[name], p) for name, p in policy.trainable().items())


def test_ratios_of_all_inner_epochs_are_to_the_policy_before_the_first(llama: Path) -> None:
    rollout = rollout_of(llama, REWARDS)
    module = run(llama, rollout, inner_epochs=3, clip=0.01)
    assert len(module.gradients) == 3
    assert module.logged[0]["policy/ratio"] != 1.0
    assert module.logged[0]["policy/clip_fraction"] > 0


def test_a_step_encodes_each_prompt_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, problems = tiny.policy(llama), tiny.problems(3)
    module = GRPO(policy, group_size=2, max_new_tokens=4)
    encode, seen = policy.encode, list[str]()

    def noting(problem: Problem) -> list[int]:
        seen.append(problem.id)
        return encode(problem)

    monkeypatch.setattr(policy, "encode", noting)
    monkeypatch.setattr(module.sandbox, "run", lambda jobs: [Execution("failed", 0, 1)] * len(jobs))
    samples = module.collect(problems).samples
    assert seen == [problem.id for problem in problems]
    assert [list(s.completion.prompt_ids) for s in samples] == [encode(s.problem) for s in samples]


class EvenFirstToken(Reward):
    """A bandit with as many arms as tokens; half of them have reward 1."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(s.completion.ids[0] % 2 == 0) for s in samples]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_bandit_is_learned(
    llama: Path, loss_type: LossType, scale: AdvantageScale, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = GRPO(
        Policy(str(llama), quantization="none", lora=LoRA(r=4, alpha=8)),
        rewards=[EvenFirstToken()],
        group_size=16,
        kl_coefficient=0.0,
        scale=scale,
        loss_type=loss_type,
        max_new_tokens=1,
        learning_rate=2e-2,
        micro_batch_size=64,
    )
    monkeypatch.setattr(module.sandbox, "start", lambda: None)
    monkeypatch.setattr(module.sandbox, "run", lambda jobs: [Execution("failed", 0, 1)] * len(jobs))
    means: list[float] = []
    monkeypatch.setattr(module, "report", lambda rollout: means.append(float(rollout.rewards.mean())))
    train(module, steps=25)
    assert sum(means[-5:]) / 5 > 0.9 > sum(means[:3]) / 3


def test_the_error_for_a_bad_setting_says_how_to_fix_it(llama: Path) -> None:
    policy = Policy(str(llama))
    for options, words in [
        ({"group_size": 1}, "at least 2"),
        ({"temperature": 0.0}, "temperature"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ]:
        with pytest.raises(UsageError, match=words):
            GRPO(policy, **options)  # type: ignore[arg-type]
