"""What a resumed fit restores beside the policy: critic, KL coefficient, warm-up, curriculum, refills."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coderl.algorithms import GRPO, PPO, PolicyGradient
from coderl.algorithms.ppo import AdaptiveKL
from coderl.algorithms.rewards import Reward, Sample
from coderl.algorithms.step import Rollout
from coderl.callbacks import SaveOnInterrupt
from coderl.data import Curriculum
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.sandbox import Program, Sandbox
from coderl.types import Execution
from tests.algorithms.test_resume import STEPS, EvenTokens, Idle, differences, fit

pytestmark = pytest.mark.slow

Make = Callable[[], PolicyGradient]


def ppo(llama: Path, **options: Any) -> PPO:
    settings: dict[str, Any] = {
        "warmup_steps": 2,
        "schedule": "cosine",
        "group_size": 3,
        "weight_decay": 0.01,
        "kl_coefficient": 0.05,
        "adaptive_kl": AdaptiveKL(target=1e-4, horizon=50),
        "critic_learning_rate": 5e-2,
        "target_kl": None,
    } | options
    return PPO(
        Policy(str(llama), quantization="none", lora=LoRA(r=4, alpha=8)),
        rewards=[EvenTokens()],
        sandbox=Idle(allow_weak_isolation=True),
        max_new_tokens=6,
        learning_rate=2e-2,
        **settings,
    )


class Passing(Reward):
    """Rewards a pass by a random amount from all three generators; groups without signal occur."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [
            random.random() + np.random.rand() + float(torch.rand(()))
            if s.execution.outcome == "passed"
            else 0.0
            for s in samples
        ]


class ByText(Sandbox):
    """Lets programs pass by their text, so that some problems have mixed outcomes and some have none.

    Those that only raise, with which problems are looked at before a fit, do not.
    """

    def run(self, programs: Sequence[Program], progress: Any = False) -> list[Execution]:
        return [
            Execution("passed", 1, 1)
            if len(program.code) % 3 == 0 and "raise Nothing" not in program.code
            else Execution("failed", 0, 1)
            for program in programs
        ]


class Refilled(GRPO):
    """Records the problems that it drew beyond its batch."""

    drawn: list[str]

    def refill(self, rollout: Rollout) -> list[Rollout]:
        chosen, *more = super().refill(rollout)
        self.drawn += [problem.id for other in more for problem in other.problems]
        return [chosen, *more]


def refilled(llama: Path, drawn: list[str]) -> Refilled:
    made = Refilled(
        Policy(str(llama), quantization="none", lora=LoRA(r=4, alpha=8)),
        rewards=[Passing()],
        sandbox=ByText(allow_weak_isolation=True),
        group_size=2,
        refill_budget=2,
        max_new_tokens=4,
        kl_coefficient=0.0,
        learning_rate=2e-2,
    )
    made.drawn = drawn
    return made


def pieces(make: Make, folder: Path, stop: int, epochs: int, press: bool, **options: Any) -> list[Any]:
    """The trace of a fit stopped after a step, by a kill or by Ctrl-C, and resumed with other generators."""
    if press:
        first = fit(make(), folder, seed=1, press_after=stop, callbacks=[SaveOnInterrupt()], **options)
        checkpoint = folder / "checkpoints" / "last.ckpt"
    else:
        first = fit(make(), folder, seed=1, kill_after=stop, **options)
        checkpoint = folder / f"{stop * epochs}.ckpt"
    assert len(first) == stop
    return [*first, *fit(make(), folder, seed=999, resume=checkpoint, **options)]


def assert_uninterrupted(got: list[Any], whole: list[Any]) -> None:
    assert len(got) == len(whole) == STEPS
    for i, (piece, expected) in enumerate(zip(got, whole, strict=True)):
        assert not differences(piece, expected), f"step {i + 1}"


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        # In mid-epoch, at an epoch's end, in the last epoch; True is Ctrl-C.
        ({"inner_epochs": 2}, [(2, False), (3, True), (5, False)]),
        (
            {"inner_epochs": 1, "critic_adapter": True, "critic_warmup": 4},
            [(2, True), (3, False), (5, True)],
        ),
    ],
)
def test_a_resumed_ppo_fit_equals_an_uninterrupted_one_bit_for_bit(
    llama: Path, tmp_path: Path, options: dict[str, Any], stops: list[tuple[int, bool]]
) -> None:
    make, epochs = partial(ppo, llama, **options), options["inner_epochs"]
    whole = fit(make(), tmp_path / "whole", seed=1)
    assert [s["step"] for s in whole] == [epochs * (i + 1) for i in range(STEPS)]
    moving = STEPS - options.get("critic_warmup", 0)  # while the critic warms up, it waits
    assert len({s["kl_coefficient"] for s in whole}) > moving // 2
    for stop, press in stops:
        folder = tmp_path / f"{stop}-{press}"
        assert_uninterrupted(pieces(make, folder, stop, epochs, press), whole)


def test_the_critics_warm_up_is_counted_across_a_resume(llama: Path, tmp_path: Path) -> None:
    make = partial(ppo, llama, inner_epochs=1, critic_warmup=3, kl_coefficient=0.0, adaptive_kl=None)
    steps = pieces(make, tmp_path, stop=2, epochs=1, press=False)
    policys = [n for n in steps[0]["weights"] if ".default." in n]
    still = [
        all(torch.equal(a["weights"][n], b["weights"][n]) for n in policys)
        for a, b in itertools.pairwise(steps)
    ]
    assert policys and still[:2] == [True, True] and not any(still[2:])


def test_a_checkpoint_holds_the_critic_and_its_optimizer_state(llama: Path, tmp_path: Path) -> None:
    made = ppo(llama, critic_adapter=True)
    fit(made, tmp_path, seed=1, max_steps=2)
    checkpoint = torch.load(tmp_path / "2.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names == {f"policy.{name}" for name in made.policy.trainable()}
    assert any(".critic." in name and "lora_A" in name for name in names)
    assert checkpoint["state_dict"]["policy.critic.linear.bias"].abs() > 0
    assert checkpoint["kl_coefficient"] == made.kl_coefficient != 0.05
    (optimizer,) = checkpoint["optimizer_states"]
    assert len(optimizer["state"]) == len(names)
    assert len({group["initial_lr"] for group in optimizer["param_groups"]}) == 2


@pytest.mark.parametrize("curriculum", [None, Curriculum(decay=0.8)])
def test_refills_of_a_resumed_fit_equal_those_of_an_uninterrupted_one(
    llama: Path, tmp_path: Path, curriculum: Curriculum | None
) -> None:
    drawn: list[str] = []
    make = partial(refilled, llama, drawn)
    whole = fit(make(), tmp_path / "whole", seed=1, curriculum=curriculum)
    assert any(step["history"] for step in whole) == (curriculum is not None)
    assert drawn  # further problems, by some steps
    for stop, press in ((2, False), (3, False), (4, True)):
        folder = tmp_path / f"{stop}-{press}"
        assert_uninterrupted(pieces(make, folder, stop, 1, press, curriculum=curriculum), whole)
