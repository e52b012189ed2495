"""Metrics of a step: of all of its samples, on all ranks; and which groups are replaced by others."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from coderl.algorithms import GRPO, PolicyGradient
from coderl.algorithms.advantages import AdvantageScale, Baseline, group_advantages
from coderl.algorithms.grpo import LEGAL_SCALES
from coderl.algorithms.rewards import Sample
from coderl.algorithms.schedule import Schedule, rate_factor
from coderl.algorithms.step import Rollout, SampleRecord
from coderl.model.policy import Policy
from coderl.types import Completion, Execution, Outcome, Problem
from tests.support import loops, tiny
from tests.support.fixed import FixedGRPO, rollout_of, run

NAN = math.nan


def sample(
    problem: int, outcome: Outcome = "failed", passed: int = 0, logprobs: Sequence[float] = (-0.5,)
) -> Sample:
    ids = tuple(range(len(logprobs)))
    completion = Completion(problem, (1,), ids, tuple(logprobs), "x", finished=passed != 1)
    return Sample(Problem(f"p/{problem}", "p"), completion, "x", Execution(outcome, passed, 2))


# -- what is measured of samples -----------------------------------------------------------------------------


def test_samples_without_verdict_are_neither_right_nor_wrong() -> None:
    judged = [sample(0, "passed", 2), sample(0, "failed", 1), sample(0, "passed", 2)]
    lost = [sample(0, "infra_error")] * 5
    rewards = torch.tensor([[1.1, 0.0, 1.0] + [NAN] * 5])
    alone, together = Rollout(judged, rewards[:, :3]).metrics(), Rollout([*judged, *lost], rewards).metrics()
    same = [name for name in alone if name.startswith(("reward/", "grading/"))]
    assert {name: alone[name] for name in same} == {name: together[name] for name in same}
    assert alone["reward/passed"] == pytest.approx(2 / 3) and alone["reward/test_pass_rate"] == 5 / 6
    assert together["outcome/infra_error"] == 5 / 8 and together["rollout/samples"] == 8
    assert sum(value for name, value in together.items() if name.startswith("outcome/")) == pytest.approx(1)


def test_a_step_without_any_verdict_has_no_pass_rate() -> None:
    metrics = Rollout([sample(0, "infra_error")] * 2, torch.tensor([[NAN, NAN]])).metrics()
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert {"reward/mean", "reward/std", "reward/passed", "reward/test_pass_rate"} <= undefined
    assert metrics["outcome/infra_error"] == 1


def test_metrics_over_ranks_are_those_of_one_process_with_all_samples() -> None:
    """Ranks have unequally many groups, and of these unequally many verdicts."""
    chance = random.Random(0)
    outcomes: list[tuple[Outcome, int]] = [("passed", 2), ("failed", 1), ("timeout", 0), ("infra_error", 0)]
    for _ in range(20):
        groups, rewards = [], []
        for place in range(7):
            drawn = [chance.choice(outcomes[: 2 + 2 * (place % 2)]) for _ in range(3)]
            logprobs = [-chance.random() for _ in range(1 + place)]
            groups.append([sample(place, outcome, passed, logprobs) for outcome, passed in drawn])
            rewards.append([NAN if outcome == "infra_error" else chance.random() for outcome, _ in drawn])
        cut = chance.randrange(1, 7)
        parts = [
            Rollout(list(itertools.chain(*groups[part])), torch.tensor(rewards[part]))
            for part in (slice(0, cut), slice(cut, 7))
        ]
        whole = Rollout(list(itertools.chain(*groups)), torch.tensor(rewards)).metrics()
        sent: list[list[SampleRecord]] = []

        def exchange(mine: list[SampleRecord], sent: list[list[SampleRecord]] = sent) -> Any:
            sent.append(mine)
            return sent

        parts[0].metrics(exchange)
        assert parts[1].metrics(exchange) == pytest.approx(whole, nan_ok=True)


# -- entropy -------------------------------------------------------------------------------------------------


class Reporting(FixedGRPO):
    """Keeps what it logs, under the names that it is logged by."""

    def report(self, rollout: Rollout) -> None:
        self.logged.append({})
        PolicyGradient.report(self, rollout)

    def log_dict(self, dictionary: Any, *_: Any, **__: Any) -> None:
        self.logged[-1] |= {name: float(value) for name, value in dictionary.items()}


def test_the_logged_entropy_is_of_all_sampled_tokens_also_of_groups_without_signal(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an exact forward over all rows has it; one over the rows of the loss would leave out the surest."""
    monkeypatch.setattr(loops, "TEMPERATURE", 0.2)
    groups, size = 36, 4
    rollout = rollout_of(llama, [[0.0] * size] * groups, temperature=0.2)
    policy = tiny.policy(llama)
    exact = [[float(h.detach()) for h in row.entropy] for row in loops.rows_of(policy, rollout)]
    by_group = [list(itertools.chain(*exact[i : i + size])) for i in range(0, len(exact), size)]
    with_signal = sorted(range(groups), key=lambda place: -fmean(by_group[place]))[: groups // 3]
    rollout.rewards[with_signal, 0] = 1.0
    logged = run(llama, rollout, kind=Reporting, policy=policy, kl_coefficient=0.0, temperature=0.2).logged[0]
    assert logged["groups/no_signal"] == pytest.approx(2 / 3)
    drawn = [-value for s in rollout.samples for value in s.completion.logprobs]
    noise = stdev(drawn) / math.sqrt(len(drawn))
    assert abs(logged["policy/entropy"] - fmean(itertools.chain(*exact))) < 3 * noise
    in_loss = fmean(itertools.chain(*(by_group[place] for place in with_signal)))
    assert in_loss - logged["policy/entropy"] > 3 * noise


# -- learning rate -------------------------------------------------------------------------------------------


class Watching(Reporting):
    """Keeps the rate that the optimizer has at each of its steps, and how far the step moves the weights."""

    used: list[float]
    moved: list[float]

    def configure_optimizers(self) -> Any:
        made: Any = super().configure_optimizers()
        optimizer, self.used, self.moved = made["optimizer"], [], []
        parameters = list(self.policy.trainable().values())
        before: list[torch.Tensor] = []

        def note(*_: Any) -> None:
            self.used.append(optimizer.param_groups[0]["lr"])
            before[:] = [parameter.detach().clone() for parameter in parameters]

        def compare(*_: Any) -> None:
            pairs = zip(parameters, before, strict=True)
            self.moved.append(max(float((now.detach() - then).abs().max()) for now, then in pairs))

        optimizer.register_step_pre_hook(note)
        optimizer.register_step_post_hook(compare)
        return made


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
def test_the_logged_learning_rate_is_that_of_the_step(llama: Path, schedule: Schedule) -> None:
    rollout = rollout_of(llama, [[1.0, 0.0, 0.0, 1.0]] * 2)
    module = run(llama, rollout, steps=6, kind=Watching, warmup_steps=3, schedule=schedule)
    assert [step["learning_rate"] for step in module.logged] == module.used
    assert module.used[:4] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2])
    assert all(moved > 1e-4 for moved in module.moved)  # also the first
    over = module.lr_schedulers().get_last_lr()[0]  # where all planned steps are done
    assert over == pytest.approx(1e-2 if schedule == "constant_with_warmup" else 0.0, abs=1e-9)


def test_of_two_optimizer_steps_the_rate_of_the_last_is_logged(llama: Path) -> None:
    rollout = rollout_of(llama, [[1.0, 0.0, 0.0, 1.0]] * 2)
    module = run(llama, rollout, steps=4, kind=Watching, inner_epochs=2, warmup_steps=4)
    assert [step["learning_rate"] for step in module.logged] == module.used[1::2] == [5e-3, 1e-2]


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "planned"), [(0, 7), (3, 7), (3, 3), (5, 2), (0, 56)])
def test_after_warm_up_the_schedule_is_that_of_transformers(
    schedule: Schedule, warmup: int, planned: int
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    (factor,) = get_scheduler(schedule, optimizer, warmup, planned).lr_lambdas
    for done in range(warmup, planned + 2):
        assert rate_factor(done, schedule, warmup, planned) == factor(done)


# -- refilling -----------------------------------------------------------------------------------------------

LEGAL = [(baseline, scale) for baseline, scales in LEGAL_SCALES.items() for scale in scales]


class Refilling(GRPO):
    """Draws groups of random rewards in place of sampling them."""

    chance: random.Random

    @property
    def datamodule(self) -> Any:
        return self

    def mean_over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def draw(self, count: int, but: set[str]) -> list[Problem]:
        return [Problem(f"more/{len(but) + i}", "p") for i in range(count)]

    def collect(self, problems: Sequence[Problem]) -> Rollout:
        samples = [replace(sample(0), problem=problem) for problem in problems for _ in range(3)]
        return Rollout(samples, torch.tensor([self.random_group() for _ in problems]))

    def random_group(self) -> list[float]:
        levels = self.chance.choice([[0.0], [1.0], [0.5], [NAN], [0.0, 1.0], [0.0, 0.5, 1.0, NAN]])
        return [self.chance.choice(levels) for _ in range(3)]


@pytest.mark.parametrize(("baseline", "scale"), LEGAL)
def test_a_group_with_an_advantage_is_never_refilled(
    llama: Path, baseline: Baseline, scale: AdvantageScale
) -> None:
    module = Refilling(Policy(str(llama)), group_size=3, baseline=baseline, scale=scale, refill_budget=6)
    module.chance = random.Random(1)
    replaced = 0
    for _ in range(60):
        rollout = module.collect([Problem(f"batch/{i}", "p") for i in range(4)])
        if module.chance.random() < 0.3:  # where all of the batch is equal, no baseline leaves an advantage
            rollout.rewards[:] = module.chance.choice([0.0, 1.0])
        learns = (group_advantages(rollout.rewards, scale, baseline) != 0).any(dim=1)
        chosen, *_ = module.refill(rollout)
        kept = torch.tensor([group[0].problem.id.startswith("batch/") for group in chosen.groups])
        assert not (learns & ~kept).any()
        assert torch.equal(chosen.rewards[kept].nan_to_num(9.0), rollout.rewards[kept].nan_to_num(9.0))
        teaches = (group_advantages(chosen.rewards, scale, baseline) != 0).any(dim=1)
        assert (kept | teaches).all()  # what came in their place teaches something
        values = module._meter.values
        assert values["groups/no_signal"] == pytest.approx(1 - float(learns.float().mean()))
        assert values["groups/refilled"] == pytest.approx(1 - float(kept.float().mean()))
        replaced += int((~kept).sum())
    assert replaced > 10
