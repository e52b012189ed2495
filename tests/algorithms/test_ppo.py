"""PPO in a real Trainer: its gradient, critic, KL terms, and that the reward rises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coderl.algorithms import PPO
from coderl.algorithms.losses import adapted_kl_coefficient
from coderl.algorithms.ppo import AdaptiveKL
from coderl.algorithms.rewards import Reward, Sample
from coderl.algorithms.step import Rollout
from coderl.errors import UsageError
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.types import Execution
from tests.support import tiny
from tests.support.fixed import REWARDS, FixedPPO, Gradients, close, rollout_of, run, stirred, train

CRITICS = pytest.mark.parametrize("own", [False, True], ids=["shared", "own-adapter"])


class Opinionated(FixedPPO):
    """A critic whose head is not zero, so that values differ from token to token."""

    def configure_model(self) -> None:
        super().configure_model()
        assert self.policy.critic is not None
        weight = self.policy.critic.linear.weight
        with torch.no_grad():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))


@pytest.fixture(scope="module")
def rollout(llama: Path) -> Rollout:
    return rollout_of(llama, REWARDS)


def ppo(folder: Path, rollout: Rollout | list[Rollout], steps: int = 1, **options: Any) -> Any:
    settings: dict[str, Any] = {"kind": Opinionated, "inner_epochs": 1} | options
    return run(folder, rollout, steps, **settings)


def discounted(
    rewards: list[float], values: list[float], final: float, gamma: float, lam: float
) -> list[float]:
    """Advantages as the double sum over all later errors of the critic."""
    following = [*values[1:], final]
    errors = [r + gamma * n - v for r, n, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** k * error for k, error in enumerate(errors[t:])) for t in range(len(errors))]


def by_hand(folder: Path, rollout: Rollout, module: PPO) -> Gradients:
    """The gradient of the papers' formulas, sequence by sequence and token by token."""
    policy = stirred(folder)
    policy.add_critic(own_adapter=False)
    assert policy.critic is not None
    known = rollout.rewards.mean()
    head = torch.nn.Linear(64, 1)
    head.load_state_dict(
        {"weight": 0.3 * torch.randn(1, 64, generator=torch.Generator().manual_seed(2)), "bias": known[None]}
    )
    policy.critic.linear = head
    logps, values, advantages, returns = [], [], [], []
    for sample, reward in zip(rollout.samples, rollout.rewards.flatten().tolist(), strict=True):
        prompt, answer = sample.completion.prompt_ids, sample.completion.ids
        row = torch.tensor([[*prompt, *answer]])
        output = policy.net(row, output_hidden_states=True)
        states = head(output.hidden_states[-1][0]).squeeze(-1)
        with torch.no_grad(), policy.net.disable_adapter():
            reference = (policy.net(row).logits[0] / 1.5).log_softmax(-1)
        table = (output.logits[0] / 1.5).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        mine = [table[place, token] for place, token in zip(places, answer, strict=True)]
        theirs = [reference[place, token] for place, token in zip(places, answer, strict=True)]
        paid = [-module.kl_coefficient * float(a.detach() - b) for a, b in zip(mine, theirs, strict=True)]
        paid[-1] += reward
        said = [states[place] for place in places]
        heard = [float(v.detach()) for v in said]
        ended = sample.completion.finished or not module.bootstrap_truncated
        if not ended:  # what the critic expects stands in the place of the verdict
            paid[-1] -= reward
        final = 0.0 if ended else float(states[-1].detach())
        gains = discounted(paid, heard, final, module.gamma, module.lam)
        logps += mine
        values += said
        advantages += gains
        returns += [gain + v for gain, v in zip(gains, heard, strict=True)]
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages))
    if module.whiten_advantages:
        advantages = [(a - mean) / (deviation + 1e-4) for a in advantages]
    losses = [
        -(logp - logp.detach()).exp() * a + module.value_coefficient * 0.5 * (v - r) ** 2
        for logp, a, v, r in zip(logps, advantages, values, returns, strict=True)
    ]
    (sum(losses) / len(losses)).backward()
    return {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.9, "lam": 0.7, "whiten_advantages": False, "value_coefficient": 0.1},
        {"lam": 1.0, "kl_coefficient": 0.0, "value_clip": None},
        {"bootstrap_truncated": True, "lam": 0.5},
    ],
)
def test_the_gradient_is_that_of_the_papers_formula_written_as_loops(
    llama: Path, rollout: Rollout, options: dict[str, Any]
) -> None:
    module = ppo(llama, rollout, **options)
    assert not all(s.completion.finished for s in rollout.samples)
    close(module.gradients[0], by_hand(llama, rollout, module), atol=2e-5)


@CRITICS
def test_the_gradient_does_not_depend_on_the_micro_batch(llama: Path, rollout: Rollout, own: bool) -> None:
    whole = ppo(llama, rollout, critic_adapter=own, micro_batch_size=100)
    for size in (1, 5):
        close(ppo(llama, rollout, critic_adapter=own, micro_batch_size=size).gradients[0], whole.gradients[0])


def test_the_gradient_does_not_depend_on_the_order_of_problems(llama: Path, rollout: Rollout) -> None:
    order, size = [2, 0, 1], rollout.rewards.shape[1]
    samples = [rollout.samples[p * size + g] for p in order for g in range(size)]
    renumbered = [
        replace(s, completion=replace(s.completion, problem=order.index(s.completion.problem)))
        for s in samples
    ]
    shuffled = Rollout(renumbered, rollout.rewards[order])
    close(ppo(llama, shuffled).gradients[0], ppo(llama, rollout).gradients[0])


def test_infrastructure_errors_never_change_a_parameter(llama: Path) -> None:
    rollout = rollout_of(llama, [[1.0, 0.0, math.nan, 0.5]])
    kept = [s for i, s in enumerate(rollout.samples) if i != 2]
    without = Rollout(kept, torch.tensor([[1.0, 0.0, 0.5]]))
    close(ppo(llama, rollout).gradients[0], ppo(llama, without).gradients[0])
    nothing = ppo(llama, rollout_of(llama, [[math.nan] * 4]), steps=2, inner_epochs=2)
    assert nothing.gradients == [{}, {}]


@CRITICS
def test_at_step_0_the_ratio_is_1_the_divergence_0_and_the_critic_expects_the_mean(
    llama: Path, rollout: Rollout, own: bool
) -> None:
    class Fresh(FixedPPO):
        def configure_model(self) -> None:
            super().configure_model()
            with torch.no_grad():
                for name, parameter in self.policy.trainable().items():
                    if "lora_B" in name:
                        parameter.zero_()

    first = ppo(llama, rollout, kind=Fresh, critic_adapter=own).logged[0]
    assert first["policy/ratio"] == 1.0 and first["policy/kl_old"] == 0.0
    assert first["policy/kl"] == 0.0 and first["reward/kl_penalty"] == 0.0
    assert first["policy/clip_fraction"] == first["value/clip_fraction"] == 0.0
    assert first["value/mean"] == pytest.approx(float(rollout.rewards.mean()))


def test_one_optimizer_trains_policy_and_critic_and_nothing_else(llama: Path, rollout: Rollout) -> None:
    module = ppo(llama, rollout, steps=4, inner_epochs=2, critic_adapter=True, critic_learning_rate=5e-2)
    assert module.trainer.global_step == 4
    optimizer = module.optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-2]
    start, after = stirred(llama), dict(module.policy.named_parameters())
    trainable = module.policy.trainable()
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, after[name]) is (name not in trainable), name
    critics = {name for name in trainable if module.policy.is_critics(name)}
    assert {"critic.linear.weight", "critic.linear.bias"} < critics
    assert all(bool(trainable[name].any()) for name in critics)  # they began at 0, or moved off it


def test_there_is_one_base_model_in_memory(llama: Path) -> None:
    policy = tiny.policy(llama, quantization="nf4")
    before = {id(p) for name, p in policy.named_parameters() if "lora_" not in name}
    policy.add_critic(own_adapter=True)
    policy.refresh_reference()
    after = {id(p) for name, p in policy.named_parameters() if "lora_" not in name}
    assert after - before == {id(p) for p in policy.critic.parameters()}  # type: ignore[union-attr]


def test_a_critic_with_its_own_adapter_does_not_change_the_policys_gradient(
    llama: Path, rollout: Rollout
) -> None:
    def policys(module: FixedPPO) -> Gradients:
        return {n: g for n, g in module.gradients[0].items() if not module.policy.is_critics(n)}

    quiet, loud = (
        policys(ppo(llama, rollout, critic_adapter=True, value_coefficient=c)) for c in (1e-6, 10.0)
    )
    close(quiet, loud)
    shared = policys(ppo(llama, rollout, value_coefficient=10.0))
    assert not all(torch.allclose(quiet[name], shared[name], rtol=1e-2) for name in quiet)


def test_a_large_gradient_of_the_critic_does_not_shrink_the_policys_step(
    llama: Path, rollout: Rollout
) -> None:
    """Each is clipped by its own norm: Adam's first step of either would hide it, plain gradients do not."""

    class PolicyLoss(Opinionated):
        after: Gradients

        def step(self) -> torch.Tensor:
            optimizer: Any = self.optimizers()
            step = optimizer.step

            def looking() -> None:
                trainable = self.policy.trainable().items()
                self.after = {n: p.grad.clone() for n, p in trainable if p.grad is not None}
                step()

            optimizer.step = looking
            return super().step()

    quiet, loud = (
        ppo(
            llama, rollout, kind=PolicyLoss, critic_adapter=True, value_coefficient=c, max_grad_norm=1e-3
        ).after
        for c in (1e-6, 10.0)
    )
    policy = stirred(llama).trainable().keys()
    close({n: quiet[n] for n in policy}, {n: loud[n] for n in policy}, atol=1e-8)
    norms = [
        torch.stack([g.norm() for n, g in loud.items() if (n in policy) is own]).norm()
        for own in (True, False)
    ]
    assert [float(norm) for norm in norms] == pytest.approx([1e-3, 1e-3], rel=1e-2)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_bootstrapped_values_do_not_grow_by_themselves(llama: Path, bootstrap: bool) -> None:
    """All samples cut off, all worth 1: with V in the place of the reward there is nothing to chase."""
    cut = rollout_of(llama, [[1.0] * 4] * 2)
    samples = [replace(s, completion=replace(s.completion, finished=False)) for s in cut.samples]
    module = ppo(
        llama,
        Rollout(samples, cut.rewards),
        steps=40,
        kind=FixedPPO,
        kl_coefficient=0.0,
        bootstrap_truncated=bootstrap,
        critic_learning_rate=5e-2,
    )
    assert all(abs(values["value/mean"] - 1.0) < 0.3 for values in module.logged)


@CRITICS
def test_gradient_checkpointing_changes_no_gradient(llama: Path, rollout: Rollout, own: bool) -> None:
    saving = ppo(llama, rollout, critic_adapter=own, policy=stirred(llama, gradient_checkpointing=True))
    close(saving.gradients[0], ppo(llama, rollout, critic_adapter=own).gradients[0])


@CRITICS
def test_only_the_critic_is_trained_during_its_warm_up(llama: Path, rollout: Rollout, own: bool) -> None:
    module = ppo(llama, rollout, steps=4, inner_epochs=2, critic_adapter=own, critic_warmup=2)
    start, after = stirred(llama).trainable(), module.policy.trainable()
    assert all(torch.equal(parameter, after[name]) for name, parameter in start.items())
    assert module.logged[0]["loss/value"] > module.logged[1]["loss/value"]
    module = ppo(llama, rollout, steps=6, inner_epochs=2, critic_adapter=own, critic_warmup=2)
    after = module.policy.trainable()
    assert not any(torch.equal(parameter, after[name]) for name, parameter in start.items())


@pytest.mark.slow
def test_the_critic_learns_the_returns(llama: Path, rollout: Rollout) -> None:
    module = ppo(llama, rollout, steps=60, critic_warmup=60, critic_adapter=True, kl_coefficient=0.0, lam=1.0)
    explained = [values["value/explained_variance"] for values in module.logged]
    assert explained[-1] > 0.6 > explained[0]


def test_inner_epochs_stop_at_target_kl(llama: Path, rollout: Rollout) -> None:
    one = ppo(llama, rollout, steps=1, inner_epochs=1)
    stopped = ppo(llama, rollout, steps=3, inner_epochs=3, target_kl=1e-9)
    free = ppo(llama, rollout, steps=3, inner_epochs=3, target_kl=None)
    assert stopped.trainer.global_step == free.trainer.global_step == 3  # left out, but counted
    assert stopped.gradients[1:] == [{}, {}]
    after = [module.policy.trainable() for module in (one, stopped, free)]
    for name, parameter in after[0].items():
        assert torch.equal(parameter, after[1][name]), name
    assert any(not torch.equal(parameter, after[2][name]) for name, parameter in after[0].items())
    assert stopped.logged[0]["policy/kl_old"] > 1.5e-9


def test_the_adaptive_kl_coefficient_follows_the_divergence(llama: Path, rollout: Rollout) -> None:
    adaptive = AdaptiveKL(target=1e-4, horizon=30)
    module = ppo(llama, rollout, steps=3, adaptive_kl=adaptive)
    seen = [values["kl_coefficient"] for values in module.logged]
    expected = [0.1]
    for values in module.logged:
        kl = values["policy/kl"]
        expected.append(adapted_kl_coefficient(expected[-1], kl, 1e-4, len(rollout.samples), 30))
    assert [*seen, module.kl_coefficient] == pytest.approx(expected)
    assert expected[-1] > expected[0]
    fixed = ppo(llama, rollout, steps=3)
    assert [values["kl_coefficient"] for values in fixed.logged] == [0.1] * 3


def test_the_value_clip_limits_the_critics_change(llama: Path, rollout: Rollout) -> None:
    free, held = (
        ppo(llama, rollout, steps=3, inner_epochs=3, value_clip=clip, critic_learning_rate=1e-1)
        for clip in (None, 1e-3)
    )
    assert held.logged[0]["value/clip_fraction"] > 0 == free.logged[0]["value/clip_fraction"]


class EvenFirstToken(Reward):
    """A bandit with as many arms as tokens; half of them have reward 1."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(s.completion.ids[0] % 2 == 0) for s in samples]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"critic_adapter": True, "inner_epochs": 1},
        {"whiten_advantages": False, "group_size": 1, "batch": 16},
        {"kl_coefficient": 0.005, "lam": 1.0},
    ],
)
def test_a_bandit_is_learned(llama: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batch = options.pop("batch", 1)
    settings: dict[str, Any] = {"group_size": 16, "kl_coefficient": 0.0, "inner_epochs": 2} | options
    module = PPO(
        Policy(str(llama), quantization="none", lora=LoRA(r=4, alpha=8)),
        rewards=[EvenFirstToken()],
        max_new_tokens=2,
        learning_rate=2e-2,
        micro_batch_size=64,
        **settings,
    )
    collect, problems = module.collect, tiny.problems(batch)
    monkeypatch.setattr(module, "collect", lambda batch: collect(problems if len(problems) > 1 else batch))
    monkeypatch.setattr(module.sandbox, "start", lambda: None)
    monkeypatch.setattr(module.sandbox, "run", lambda jobs: [Execution("failed", 0, 1)] * len(jobs))
    means: list[float] = []
    monkeypatch.setattr(module, "report", lambda rollout: means.append(float(rollout.rewards.mean())))
    train(module, steps=25 * settings["inner_epochs"])
    assert sum(means[-5:]) / 5 > 0.9 > sum(means[:3]) / 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 1.5}, "model.gamma"),
        ({"lam": -0.1}, "model.lam"),
        ({"target_kl": 0.0}, "model.target_kl"),
        ({"value_clip": -1.0}, "model.value_clip"),
        ({"clip": 0.0}, "model.clip"),
        ({"critic_warmup": -1}, "model.critic_warmup"),
        ({"critic_learning_rate": -1.0}, "model.critic_learning_rate"),
        ({"value_coefficient": math.inf}, "model.value_coefficient"),
        ({"bootstrap_truncated": True, "truncated": "mask"}, "leave one out"),
        ({"max_grad_norm": 0.0}, "model.max_grad_norm"),
        ({"learning_rate": 0.0}, "model.learning_rate"),
        ({"warmup_steps": -3}, "model.warmup_steps"),
        ({"rewards": []}, "model.rewards"),
        ({"inner_epochs": 0}, "model.inner_epochs"),
        ({"kl_coefficient": 0.0, "adaptive_kl": AdaptiveKL()}, "kl_coefficient"),
        ({"adaptive_kl": AdaptiveKL(target=0.0)}, "model.adaptive_kl"),
    ],
)
def test_the_error_for_a_bad_setting_says_how_to_fix_it(
    llama: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        PPO(Policy(str(llama)), **options)
    assert "\n" not in str(caught.value)


def test_without_adapters_the_critic_shares_the_policys_weights(llama: Path) -> None:
    policy = tiny.policy(llama, lora=None)
    for options, words in [
        ({"critic_adapter": True, "kl_coefficient": 0.0}, "critic_adapter: false"),
        ({}, "kl_coefficient to 0"),
    ]:
        with pytest.raises(UsageError, match=words):
            PPO(policy, **options)  # type: ignore[arg-type]
    policy.add_critic(own_adapter=False)
    assert policy.critic is not None
