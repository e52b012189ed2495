"""Each option of the GRPO family inside a real Trainer: what it does, that it does it, and nothing else.

Gradients are held against loops over the model's own logits (`tests.support.loops`), advantages against the
papers' formulas over lists (`tests.support.papers`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coderl.algorithms.grpo import LEGAL_SCALES
from coderl.algorithms.step import Rollout
from tests.support import loops, papers
from tests.support.fixed import REWARDS, FixedGRPO, Gradients, close, rollout_of, run, stirred

pytestmark = pytest.mark.slow

TWICE: dict[str, Any] = {"inner_epochs": 2}
LOSSES = ["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
PAIRS = [(baseline, scale) for baseline, scales in LEGAL_SCALES.items() for scale in scales]


@pytest.fixture(scope="module")
def rollout(llama: Path) -> Rollout:
    return loops.ragged(rollout_of(llama, REWARDS))


def plain_advantages(rollout: Rollout, scale: str = "group", baseline: str = "group") -> list[float]:
    return loops.flat(papers.advantages(rollout.rewards.tolist(), scale, baseline))


def moved(one: Gradients, other: Gradients) -> bool:
    """Whether the gradients differ by more than rounding."""
    shift = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return shift > 1e-4 * sum(float(value.square().sum()) for value in one.values())


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gspo": ({"loss_type": "gspo"} | TWICE, TWICE),
    "cispo": ({"loss_type": "cispo"} | TWICE, {"loss_type": "dapo"} | TWICE),
    "dapo": ({"loss_type": "dapo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {}),
    "clip_high": ({"clip_high": 0.8} | TWICE, TWICE),
    "k1": ({"kl": "k1", "kl_coefficient": 0.1, "scale": "none"}, {"kl_coefficient": 0.0, "scale": "none"}),
    "k2": ({"kl": "k2", "kl_coefficient": 0.1}, {"kl_coefficient": 0.0}),
    "k3": ({"kl": "k3", "kl_coefficient": 0.1}, {"kl_coefficient": 0.0}),
    "k1, not k2": (
        {"kl": "k1", "kl_coefficient": 0.1, "scale": "none"},
        {"kl": "k2", "kl_coefficient": 0.1, "scale": "none"},
    ),
    "k2, not k3": ({"kl": "k2", "kl_coefficient": 0.1}, {"kl": "k3", "kl_coefficient": 0.1}),
    "rloo": ({"baseline": "rloo", "scale": "none"}, {"scale": "none"}),
    "reinforce++": ({"baseline": "reinforce++", "scale": "batch"}, {"scale": "batch"}),
    "no baseline": ({"baseline": "none", "scale": "none"}, {"scale": "none"}),
    "scale none": ({"scale": "none"}, {}),
    "scale batch": ({"scale": "batch"}, {}),
    "truncated": ({"truncated": "mask"}, {}),
    "top_entropy": ({"top_entropy": 0.3}, {}),
    "entropy_coefficient": ({"entropy_coefficient": 0.1}, {}),
    "correction by token": ({"sampler_correction": "token"}, {}),
    "correction by sequence": ({"sampler_correction": "sequence"}, {}),
    "correction by mask": ({"sampler_correction": "mask"}, {}),
    "token, not sequence": ({"sampler_correction": "token"}, {"sampler_correction": "sequence"}),
    "sampler_cap": (
        {"sampler_correction": "token", "sampler_cap": 1.1},
        {"sampler_correction": "token", "sampler_cap": 3.0},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_the_gradient_whatever_the_micro_batch_and_order(
    llama: Path, rollout: Rollout, name: str
) -> None:
    options, without = OPTIONS[name]
    whole = run(llama, rollout, micro_batch_size=100, **options).gradients[-1]
    assert moved(run(llama, rollout, micro_batch_size=100, **without).gradients[-1], whole)
    close(run(llama, rollout, micro_batch_size=5, **options).gradients[-1], whole, 1e-5)
    other = loops.reordered(rollout, [2, 0, 1])
    close(run(llama, other, micro_batch_size=1, **options).gradients[-1], whole, 1e-5)


# -- surrogates: from the second inner epoch on --------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("high", [0.05, 0.6])
def test_ratios_of_the_second_epoch_are_to_the_policy_before_the_first(
    llama: Path, rollout: Rollout, kind: str, high: float
) -> None:
    options: dict[str, Any] = {"loss_type": kind, "kl_coefficient": 0.0, "clip": 0.05, "clip_high": high}
    module = run(llama, rollout, inner_epochs=2, **options)
    start, after = stirred(llama), run(llama, rollout, **options).policy
    before = [row.old for row in loops.rows_of(start, rollout)]
    expected, clipped = [], set()
    for row, old, value in zip(loops.rows_of(after, rollout), before, plain_advantages(rollout), strict=True):
        expected.append(loops.surrogate(row, old, [value] * len(old), kind, 0.05, high))
        clipped |= {losses.requires_grad for losses in expected[-1]}
    assert clipped == ({True} if kind == "cispo" else {True, False})  # both branches were taken
    close(module.gradients[1], loops.gradient(after, loops.averaged(expected, kind)), 1e-5)


# -- the divergence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_added_to_the_loss(llama: Path, rollout: Rollout, kind: str) -> None:
    policy, expected = stirred(llama), []
    for row, value in zip(loops.rows_of(policy, rollout), plain_advantages(rollout), strict=True):
        losses = loops.surrogate(row, row.old, [value] * len(row.logp), "grpo")
        expected.append(loops.plus(losses, 0.3, loops.divergence(row, kind)))
    got = run(llama, rollout, kl=kind, kl_coefficient=0.3).gradients[0]
    close(got, loops.gradient(policy, loops.averaged(expected, "grpo")))


def test_k1_is_subtracted_from_the_reward_of_the_sample(llama: Path, rollout: Rollout) -> None:
    policy = stirred(llama)
    rows = loops.rows_of(policy, rollout)
    paid = [sum(row.old) - sum(row.ref) for row in rows]
    rewards = rollout.rewards - 0.3 * torch.tensor(paid).view(3, 4)
    advantages = loops.flat(papers.advantages(rewards.tolist(), "batch", "group"))
    expected = [
        loops.surrogate(row, row.old, [value] * len(row.logp), "grpo")
        for row, value in zip(rows, advantages, strict=True)
    ]
    module = run(llama, rollout, kl="k1", scale="batch", kl_coefficient=0.3)
    close(module.gradients[0], loops.gradient(policy, loops.averaged(expected, "grpo")))


# -- baselines and scales ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("baseline", "scale"), PAIRS)
def test_baselines_and_scales_match_the_papers(
    llama: Path, rollout: Rollout, baseline: str, scale: str
) -> None:
    policy, advantages = stirred(llama), plain_advantages(rollout, scale, baseline)
    expected = [
        loops.surrogate(row, row.old, [value] * len(row.logp), "dapo")
        for row, value in zip(loops.rows_of(policy, rollout), advantages, strict=True)
    ]
    options: dict[str, Any] = {"baseline": baseline, "scale": scale, "loss_type": "dapo"}
    got = run(llama, rollout, kl_coefficient=0.0, **options).gradients[0]
    close(got, loops.gradient(policy, loops.averaged(expected, "dapo")))


# -- which tokens count --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_masked_completions_are_out_of_the_loss_and_in_the_baseline(
    llama: Path, rollout: Rollout, kind: str
) -> None:
    policy, expected = stirred(llama), []
    for row, value in zip(loops.rows_of(policy, rollout), plain_advantages(rollout), strict=True):
        if row.finished:
            losses = loops.surrogate(row, row.old, [value] * len(row.logp), kind)
            expected.append(loops.plus(losses, 0.1, loops.divergence(row, "k3")))
    assert 0 < len(expected) < len(rollout.samples)
    got = run(llama, rollout, truncated="mask", loss_type=kind).gradients[0]
    close(got, loops.gradient(policy, loops.averaged(expected, kind)))


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_a_step_of_only_masked_completions_changes_no_parameter(llama: Path, kl: str) -> None:
    rollout = rollout_of(llama, REWARDS)
    cut_off = [replace(s, completion=replace(s.completion, finished=False)) for s in rollout.samples]
    rollout = Rollout(cut_off, rollout.rewards)
    options: dict[str, Any] = {"truncated": "mask", "entropy_coefficient": 0.1, "top_entropy": 0.5, "kl": kl}
    options |= {"scale": "none"}
    module = run(llama, rollout, steps=2, **options)
    assert not any(value.any() for step in module.gradients for value in step.values())
    start = stirred(llama).trainable()
    assert all(torch.equal(start[name], value) for name, value in module.policy.trainable().items())


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("fraction", "coefficient"), [(0.1, 0.1), (0.5, 0.0)])
def test_only_the_tokens_of_highest_entropy_have_a_policy_gradient(
    llama: Path, rollout: Rollout, kind: str, fraction: float, coefficient: float
) -> None:
    policy = stirred(llama)
    rows = loops.rows_of(policy, rollout)
    advantages = plain_advantages(rollout)
    learning = [row for row, value in zip(rows, advantages, strict=True) if value]  # others rank nowhere
    forks = loops.top([[float(value.detach()) for value in row.entropy] for row in learning], fraction)
    assert 0 < sum(map(sum, forks)) == math.ceil(fraction * sum(map(len, forks)))
    of_row, expected = iter(forks), []
    for row, value in zip(rows, advantages, strict=True):
        chosen = next(of_row) if value else [False] * len(row.logp)
        losses = [-value * here * logp for here, logp in zip(chosen, row.logp, strict=True)]
        expected.append(loops.plus(losses, coefficient, loops.divergence(row, "k3")))
    options: dict[str, Any] = {"loss_type": kind, "top_entropy": fraction, "kl_coefficient": coefficient}
    got = run(llama, rollout, **options).gradients[0]
    close(got, loops.gradient(policy, loops.averaged(expected, kind)))


# -- the entropy bonus ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "most"),  # all logits at once; two tokens at a time
    [(kind, 2**25) for kind in LOSSES] + [("grpo", 2500), ("cispo", 2500)],
)
def test_the_entropy_bonus_adds_the_gradient_of_the_entropy(
    llama: Path, rollout: Rollout, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coderl.model.logprobs.MOST_LOGITS", most)
    even = Rollout(rollout.samples, torch.zeros(3, 4))
    module = run(llama, even, kl_coefficient=0.0, entropy_coefficient=0.5, loss_type=kind)
    policy = stirred(llama)
    bonus = loops.averaged([row.entropy for row in loops.rows_of(policy, even)], kind)
    close(module.gradients[0], loops.gradient(policy, -0.5 * bonus))


# -- samplers of other numerics ------------------------------------------------------------------------------


def importance(old: list[float], sampled: tuple[float, ...], mode: str, cap: float) -> list[float]:
    """Truncated importance weights of one completion's tokens."""
    shifts = [a - b for a, b in zip(old, sampled, strict=True)]
    if mode == "sequence":
        return [min(math.exp(sum(shifts) / len(shifts)), cap)] * len(shifts)
    if mode == "token":
        return [min(math.exp(shift), cap) for shift in shifts]
    return [float(1 / cap <= math.exp(shift) <= cap) for shift in shifts]


@pytest.mark.parametrize("mode", ["token", "sequence", "mask"])
@pytest.mark.parametrize("cap", [1.2, 3.0])
def test_sampler_correction_applies_the_importance_weights(
    llama: Path, rollout: Rollout, mode: str, cap: float
) -> None:
    policy, expected, weights = stirred(llama), [], []
    rows = loops.rows_of(policy, rollout)
    for row, value, sample in zip(rows, plain_advantages(rollout), rollout.samples, strict=True):
        weights.append(importance(row.old, sample.completion.logprobs, mode, cap))
        losses = loops.surrogate(row, row.old, [value * weight for weight in weights[-1]], "grpo")
        expected.append(loops.plus(losses, 0.1, loops.divergence(row, "k3")))
    assert len({weight for row in weights for weight in row}) > 1
    got = run(llama, rollout, sampler_correction=mode, sampler_cap=cap).gradients[0]
    close(got, loops.gradient(policy, loops.averaged(expected, "grpo")))


# -- what need not be computed -------------------------------------------------------------------------------


class Everything(FixedGRPO):
    """Leaves no row out of the forward."""

    def has_gradient(self, rewards: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(rewards, dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [{"loss_type": kind} for kind in LOSSES]
    + [{"loss_type": "gspo", "top_entropy": 0.3}, {"sampler_correction": "mask"}, {"truncated": "mask"}],
    ids=str,
)
def test_skipping_rows_without_signal_changes_no_gradient(
    llama: Path, rollout: Rollout, options: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"kl_coefficient": 0.0, "inner_epochs": 2} | options
    every = run(llama, rollout, kind=Everything, **settings).gradients
    for one, other in zip(run(llama, rollout, **settings).gradients, every, strict=True):
        close(one, other, 1e-5)


def test_rows_are_skipped_only_where_they_have_no_gradient(llama: Path, rollout: Rollout) -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5], [math.nan, 0.0]])
    known = ~rewards.isnan()

    def has_gradient(**options: Any) -> Any:
        made = run(llama, rollout, **({"kl_coefficient": 0.0} | options))
        return made.has_gradient(rewards)

    assert has_gradient().tolist() == [[True, True], [False, False], [False, False]]
    for options in ({"kl_coefficient": 0.1}, {"entropy_coefficient": 0.1}):
        assert has_gradient(**options).equal(known)


# -- failures of the infrastructure --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"loss_type": kind} for kind in LOSSES]
    + [{"baseline": baseline, "scale": scale} for baseline, scale in PAIRS]
    + [
        {"kl": "k1", "scale": "none"},
        {"top_entropy": 0.3},
        {"sampler_correction": "token"},
        {"entropy_coefficient": 0.1},
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
class TestUnknownRewards:
    def test_do_not_change_the_gradient_of_the_others(
        self, llama: Path, rollout: Rollout, options: dict[str, Any]
    ) -> None:
        rewards, lost = rollout.rewards.clone(), [1, 4, 11]  # one of each group
        rewards.view(-1)[lost] = math.nan
        kept = [sample for i, sample in enumerate(rollout.samples) if i not in lost]
        left = Rollout(kept, rewards[~rewards.isnan()].view(3, 3))
        module = run(llama, Rollout(rollout.samples, rewards), **options)
        close(module.gradients[0], run(llama, left, **options).gradients[0])

    def test_change_no_parameter_where_all_are_unknown(
        self, llama: Path, rollout: Rollout, options: dict[str, Any]
    ) -> None:
        lost = Rollout(rollout.samples, torch.full((3, 4), math.nan))
        module = run(llama, lost, steps=2, **options)
        assert module.gradients == [{}, {}]
        start = stirred(llama).trainable()
        assert all(torch.equal(start[name], value) for name, value in module.policy.trainable().items())
