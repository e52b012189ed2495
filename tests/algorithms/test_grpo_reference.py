"""A reference policy that is refreshed every few steps, in a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coderl.algorithms import GRPO
from coderl.algorithms.step import Rollout
from coderl.model import adapters
from coderl.model.policy import Policy
from coderl.publish.export import save_adapter
from tests.algorithms.test_resume import STEPS, differences, fit, module
from tests.support import loops, papers
from tests.support.fixed import REWARDS, close, rollout_of, run, stirred

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rollout(llama: Path) -> Rollout:
    return rollout_of(llama, REWARDS)


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_adapter(stirred(llama), tmp_path_factory.mktemp("warm") / "adapter"))


def options_of(start: str, adapter: str) -> dict[str, Any]:
    return {"fresh": {}, "nf4": {"quantization": "nf4"}, "warm": {"adapter": adapter}}[start]


@pytest.mark.parametrize("start", ["fresh", "nf4", "warm"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_divergence_is_0_after_each_refresh_and_only_then(
    llama: Path, rollout: Rollout, adapter: str, start: str, every: int
) -> None:
    policy = stirred(llama, **options_of(start, adapter))
    names = policy.trainable().keys()
    logged = run(llama, rollout, steps=5, policy=policy, reference_refresh=every).logged
    assert [step["policy/kl"] == 0.0 for step in logged] == [i > 0 and i % every == 0 for i in range(5)]
    assert policy.trainable().keys() == names
    still = stirred(llama, **options_of(start, adapter))
    logged = run(llama, rollout, steps=5, policy=still).logged
    assert all(step["policy/kl"] > 0 for step in logged)


@pytest.mark.parametrize("start", ["fresh", "nf4", "warm"])
def test_the_reference_is_the_policy_of_the_refresh(
    llama: Path, rollout: Rollout, adapter: str, start: str
) -> None:
    options = options_of(start, adapter)
    then = run(llama, rollout, steps=2, policy=stirred(llama, **options), reference_refresh=2).policy
    after = run(llama, rollout, steps=3, policy=stirred(llama, **options), reference_refresh=2).policy
    policy, reference = adapters.weights(then.net, adapters.POLICY), after.reference_weights()
    assert reference.keys() == policy.keys()
    assert all(torch.equal(reference[name], value) for name, value in policy.items())
    moved = adapters.weights(after.net, adapters.POLICY)
    assert not any(torch.equal(reference[name], value) for name, value in moved.items())


def test_the_kl_term_is_to_the_refreshed_reference(llama: Path, rollout: Rollout) -> None:
    module = run(llama, rollout, steps=4, reference_refresh=2, kl="k2", kl_coefficient=0.5)
    policy = run(llama, rollout, steps=3, reference_refresh=2, kl="k2", kl_coefficient=0.5).policy
    expected = []
    advantages = loops.flat(papers.advantages(rollout.rewards.tolist(), "group", "group"))
    for row, value in zip(loops.rows_of(policy, rollout), advantages, strict=True):
        losses = [-value * logp for logp in row.logp]
        expected.append(loops.plus(losses, 0.5, loops.divergence(row, "k2")))
    close(module.gradients[3], loops.gradient(policy, loops.averaged(expected, "grpo")), 1e-5)
    still = run(llama, rollout, steps=4, kl="k2", kl_coefficient=0.5)
    assert any(not torch.allclose(still.gradients[3][n], g) for n, g in module.gradients[3].items())


def refreshing(llama: Path, options: dict[str, Any], every: int = 2) -> GRPO:
    made = module(llama, reference_refresh=every)
    settings: dict[str, Any] = {"quantization": "none", "lora": adapters.LoRA(r=4, alpha=8)} | options
    made.policy = Policy(str(llama), **settings)
    return made


@pytest.mark.parametrize(("start", "stop"), [("fresh", 1), ("fresh", 2), ("nf4", 3), ("warm", 3)])
def test_a_resumed_fit_equals_an_uninterrupted_one_bit_for_bit(
    llama: Path, tmp_path: Path, adapter: str, start: str, stop: int
) -> None:
    options = options_of(start, adapter)
    whole = fit(refreshing(llama, options), tmp_path / "whole", seed=1)
    folder = tmp_path / "stopped"
    first = fit(refreshing(llama, options), folder, seed=1, kill_after=stop)
    rest = fit(refreshing(llama, options), folder, seed=999, resume=folder / f"{stop}.ckpt")
    assert len(first) == stop and len(first) + len(rest) == STEPS
    for i, (got, expected) in enumerate(zip([*first, *rest], whole, strict=True)):
        assert not differences(got, expected), f"step {i + 1}"


def test_a_fit_resumed_without_refresh_keeps_its_last_reference(llama: Path, tmp_path: Path) -> None:
    fit(refreshing(llama, {}), tmp_path, seed=1, max_steps=2)
    made = refreshing(llama, {}, every=0)
    fit(made, tmp_path, seed=1, max_steps=4, resume=tmp_path / "2.ckpt")
    again = refreshing(llama, {}, every=0)
    fit(again, tmp_path, seed=1, max_steps=5, resume=tmp_path / "4.ckpt")
    before, after = made.policy.reference_weights(), again.policy.reference_weights()
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_checkpoint_holds_the_reference_beside_what_trains(llama: Path, tmp_path: Path) -> None:
    made = refreshing(llama, {})
    fit(made, tmp_path, seed=1, max_steps=2)
    kept = [torch.load(tmp_path / f"{step}.ckpt", weights_only=True) for step in (1, 2)]
    assert "reference" not in kept[0] and set(kept[0]["state_dict"]) == set(kept[1]["state_dict"])
    assert not any(f".{adapters.REFERENCE}." in name for name in kept[1]["state_dict"])
    weights = made.policy.reference_weights()
    assert all(torch.equal(kept[1]["reference"][name], value) for name, value in weights.items())
