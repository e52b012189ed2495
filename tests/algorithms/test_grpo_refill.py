"""Dynamic sampling in a real Trainer: groups without signal are replaced by groups of other problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from coderl.algorithms import GRPO
from coderl.algorithms.step import Rollout
from coderl.data import CodeDataModule, Curriculum
from coderl.errors import UsageError
from coderl.model.policy import Policy
from coderl.problems import ProblemSource
from coderl.sandbox import Sandbox
from coderl.types import Problem
from tests.support import tiny
from tests.support.fixed import FixedGRPO, close, rollout_of, run, stirred, train

COUNT, BATCH = 10, 4
NO_SIGNAL, WITH_SIGNAL, LOST = [0.5, 0.5, 0.5], [1.0, 0.0, 0.5], [float("nan")] * 3
SOME = [WITH_SIGNAL if i in (1, 4, 6, 7) else LOST if i == 3 else NO_SIGNAL for i in range(COUNT)]


class Pool(ProblemSource):
    name = "pool"

    def load(self, split: str) -> list[Problem]:
        return tiny.problems(COUNT) if split == "train" else []


class Drawing(FixedGRPO):
    """Answers each problem with its group from one large rollout, and records the problems."""

    asked: list[list[str]]
    seen: list[str]

    def collect(self, problems: Sequence[Problem]) -> Rollout:
        self.asked.append([problem.id for problem in problems])
        return picked(self.given[0], self.asked[-1])

    def report(self, rollout: Rollout) -> None:
        super().report(rollout)
        self.shown = rollout.metrics()


def picked(rollout: Rollout, names: list[str]) -> Rollout:
    """The groups of these problems."""
    places = [[problem.id for problem in rollout.problems].index(name) for name in names]
    samples = [sample for place in places for sample in rollout.groups[place]]
    return Rollout(samples, rollout.rewards[places])


def fit(
    llama: Path, rollout: Rollout, budget: int, curriculum: Curriculum | None = None, **options: Any
) -> Any:
    """A module after one step."""
    settings: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.5, "kl_coefficient": 0.1} | options
    module = Drawing(stirred(llama), group_size=3, refill_budget=budget, **settings)
    module.given, module.gradients, module.logged, module.asked = [rollout], [], [], []
    module.seen = []
    data = CodeDataModule(Pool(), batch_size=BATCH, curriculum=curriculum)

    def observe(problems: Sequence[Problem], passed: Sequence[int], known: Sequence[int]) -> None:
        module.seen.extend(problem.id for problem in problems)

    data.observe = observe  # type: ignore[method-assign]
    tiny.trainer(max_steps=1, max_epochs=-1).fit(module, datamodule=data)
    return module


def refilled(batch: list[str], draws: list[list[str]], with_signal: set[str]) -> list[str]:
    """The groups that a step learns from: all with signal, and enough of those without to be as many."""
    came = [name for draw in draws for name in draw if name in with_signal]
    kept = [name for name in batch if name in with_signal]
    no_signal = [name for name in batch if name not in with_signal]
    return [*kept, *came, *no_signal[: len(batch) - len(kept) - len(came)]]


@pytest.mark.parametrize("budget", [0, 1, 3, 100])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_groups_without_signal_are_replaced_by_others(llama: Path, budget: int, coefficient: float) -> None:
    rollout = rollout_of(llama, SOME)
    module = fit(llama, rollout, budget, kl_coefficient=coefficient)
    batch, *draws = module.asked
    with_signal = {f"tiny/{i}" for i, row in enumerate(SOME) if row is WITH_SIGNAL}
    no_signal = [name for name in batch if name not in with_signal]
    assert 2 <= len(no_signal) < BATCH  # or nothing is tested
    left, spent, names = len(no_signal), 0, list(batch)
    for draw in draws:
        assert len(draw) == min(left, budget - spent, COUNT - len(names))
        left, spent, names = left - len(with_signal & {*draw}), spent + len(draw), [*names, *draw]
    assert left == 0 or spent == budget or len(names) == COUNT
    assert len(names) == len(set(names))
    chosen = picked(rollout, refilled(batch, draws, with_signal))
    close(module.gradients[0], run(llama, chosen, kl_coefficient=coefficient).gradients[0])
    if budget:
        assert module.logged[0]["groups/refilled"] == pytest.approx((len(no_signal) - left) / BATCH)


def test_refilling_changes_the_gradient_but_not_the_logged_rollout(llama: Path) -> None:
    rollout = rollout_of(llama, SOME)
    one, other = fit(llama, rollout, 0), fit(llama, rollout, 100)
    assert len(other.asked) > 1
    assert any(not torch.allclose(one.gradients[0][n], g) for n, g in other.gradients[0].items())
    assert other.shown == pytest.approx(one.shown, nan_ok=True)
    assert other.shown["reward/mean"] == pytest.approx(
        float(picked(rollout, other.asked[0]).rewards.nanmean())
    )
    assert [problem.id for problem in other.rollout.problems] == other.asked[0]
    assert other.seen == [name for draw in other.asked for name in draw]  # a curriculum learns of all


@pytest.mark.parametrize("curriculum", [None, Curriculum()])
def test_refilling_ends_when_no_problem_is_left(llama: Path, curriculum: Curriculum | None) -> None:
    rollout = rollout_of(llama, [NO_SIGNAL] * COUNT)
    module = fit(llama, rollout, 100, curriculum, kl_coefficient=0.0)
    assert sorted(name for draw in module.asked for name in draw) == sorted(f"tiny/{i}" for i in range(COUNT))
    assert module.gradients == [{}]
    assert module.logged[0]["groups/refilled"] == 0.0


def test_nothing_is_refilled_where_every_group_has_signal(llama: Path) -> None:
    module = fit(llama, rollout_of(llama, [WITH_SIGNAL] * COUNT), 100)
    assert len(module.asked) == 1


def test_the_error_without_a_data_module_says_how_to_fix_it(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sandbox, "start", lambda self: None)
    with pytest.raises(UsageError, match=r"model\.refill_budget to 0"):
        train(GRPO(Policy(str(llama)), refill_budget=2))
