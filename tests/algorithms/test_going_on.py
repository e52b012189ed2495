"""A fit that ended, failed or was given other settings goes on where it was, and loses no step."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from coderl.algorithms import PPO
from coderl.algorithms.resuming import in_order
from coderl.algorithms.rewards import Reward, Sample
from coderl.callbacks import Checkpoint
from coderl.data import CodeDataModule
from coderl.errors import UserError
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.problems import JSONLProblems
from tests.algorithms import test_resume as resume
from tests.algorithms.test_resume import EvenTokens, Idle, differences, module

pytestmark = pytest.mark.slow

CONSTANT: dict[str, Any] = {"schedule": "constant_with_warmup"}


def last(folder: Path) -> Checkpoint:
    """Writes only where a fit ends."""
    return Checkpoint(dirpath=folder, save_last=True, every_n_train_steps=1000)


def fit(made: Any, folder: Path, again: bool = False, **options: Any) -> list[dict[str, Any]]:
    """Fit, or go on from ``last.ckpt``; returns the trace."""
    return resume.fit(
        made,
        folder,
        seed=999 if again else 1,
        resume=folder / "last.ckpt" if again else None,
        cadence=1000,
        callbacks=[last(folder)],
        **options,
    )


@pytest.mark.parametrize("stop", [1, 3, 4])  # in mid-epoch, at an epoch's end, in the next one
def test_last_ckpt_of_a_fit_that_ended_goes_on_as_if_it_had_not(
    llama: Path, tmp_path: Path, stop: int
) -> None:
    whole = fit(module(llama, **CONSTANT), tmp_path / "whole")
    first = fit(module(llama, **CONSTANT), tmp_path / "part", max_steps=stop)
    rest = fit(module(llama, **CONSTANT), tmp_path / "part", again=True, max_steps=6)
    for got, expected in zip([*first, *rest], whole, strict=True):
        assert not differences(got, expected)


def test_a_schedule_that_had_ended_follows_the_new_end(llama: Path, tmp_path: Path) -> None:
    linear: dict[str, Any] = {"schedule": "linear", "warmup_steps": 0}
    whole = fit(module(llama, **linear), tmp_path / "whole", max_steps=6)
    fit(module(llama, **linear), tmp_path / "part", max_steps=3)
    rest = fit(module(llama, **linear), tmp_path / "part", again=True, max_steps=6)
    assert [step["rate"] for step in rest] == [step["rate"] for step in whole[3:]]
    assert rest[0]["rate"] > 0


class Breaks(EvenTokens):
    """Raises in the step after so many."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        if not self.left:
            raise ZeroDivisionError
        self.left -= 1
        return super().__call__(samples)


class UpdateBreaks:
    """Makes the second update of an inner epoch fail: half of the step is done by then."""

    def __init__(self, made: Any, step: int) -> None:
        self.made, self.left, self.inner = made, 2 * (step - 1) + 2, made.step
        made.step = self

    def __call__(self) -> Any:
        self.left -= 1
        if not self.left:
            raise ZeroDivisionError
        return self.inner()


@pytest.mark.parametrize("where", ["reward", "update"])
@pytest.mark.parametrize("stop", [2, 3])
def test_an_error_in_a_step_loses_only_that_step(llama: Path, tmp_path: Path, where: str, stop: int) -> None:
    whole = fit(module(llama, inner_epochs=2), tmp_path / "whole")
    made, folder = module(llama, inner_epochs=2), tmp_path / "part"
    if where == "reward":
        made.rewards = list[Reward]([Breaks(stop + 1)])  # the first call is the trial before the fit
    else:
        UpdateBreaks(made, stop + 1)
    with pytest.raises((ZeroDivisionError, UserError)):
        fit(made, folder)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2 * stop
    rest = fit(module(llama, inner_epochs=2), folder, again=True)
    for got, expected in zip(rest, whole[stop:], strict=True):
        assert not differences(got, expected)


def write_rows(folder: Path, numbers: Sequence[int]) -> None:
    rows = [
        {"task_id": i, "text": f"Return {i}.", "code": "", "test_list": [f"assert f() == {i}"]}
        for i in numbers
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("batch", "numbers", "steps"),
    [
        (2, range(10), 5),  # as it was
        (4, range(10), 4),
        (1, range(10), 7),
        (3, range(4, 14), 5),  # others in place of some
        (2, range(6), 3),
    ],
)
def test_an_epoch_that_is_resumed_with_other_data_or_batches_has_every_problem_once(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    batch: int,
    numbers: range,
    steps: int,
) -> None:
    def data(size: int, rows: Sequence[int]) -> Any:
        def made(folder: Path, **options: Any) -> Any:
            write_rows(folder, rows)
            return CodeDataModule(JSONLProblems(str(folder / "problems.jsonl")), batch_size=size)

        return made

    monkeypatch.setattr(resume, "EPOCHS", 1)
    monkeypatch.setattr(resume, "data", data(2, range(10)))
    first = fit(module(llama, **CONSTANT), tmp_path / "run", max_steps=3)
    monkeypatch.setattr(resume, "EPOCHS", 2)
    monkeypatch.setattr(resume, "data", data(batch, numbers))
    with caplog.at_level(logging.WARNING):
        rest = fit(module(llama, **CONSTANT), tmp_path / "run", again=True)
    had = [problem for step in first for problem in step["problems"]]
    left = {f"problems/{i}" for i in numbers} - set(had)
    in_epoch = rest[: -(-len(left) // batch)]
    assert sorted(problem for step in in_epoch for problem in step["problems"]) == sorted(left)
    following = [problem for step in rest[len(in_epoch) :] for problem in step["problems"]]
    assert sorted(following) == sorted(f"problems/{i}" for i in numbers)
    changed = (batch, numbers) != (2, range(10))
    assert changed == any("that it has not had" in r.message for r in caplog.records)


def ppo(llama: Path, **options: Any) -> PPO:
    return PPO(
        Policy(str(llama), quantization="none", lora=LoRA(r=4, alpha=8)),
        rewards=[EvenTokens()],
        sandbox=Idle(allow_weak_isolation=True),
        group_size=2,
        max_new_tokens=6,
        kl_coefficient=0.05,
        **options,
    )


def test_settings_given_on_resuming_win_over_those_of_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    before = {"learning_rate": 1e-2, "weight_decay": 0.0}
    after = {"learning_rate": 3e-3, "weight_decay": 0.1, "critic_learning_rate": 7e-4}
    first = fit(ppo(llama, **before), tmp_path, max_steps=2)
    made = ppo(llama, **after)
    rest = fit(made, tmp_path, again=True, max_steps=4)
    optimizer: Any = made.optimizers()
    seen = {(group["lr"], group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert seen == {(3e-3, 3e-3, 0.1), (7e-4, 7e-4, 0.1), (7e-4, 7e-4, 0.0)}
    # Each parameter goes on with its own moments, though it has another number now.
    names = in_order(made.optimizer_groups())
    state = optimizer.state_dict()["state"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["optimizer_parameters"] == names and len(first) == len(rest) == 1
    assert {int(moments["step"]) for moments in state.values()} == {4}
    assert [state[n]["exp_avg"].shape for n in sorted(state)] == [
        made.policy.trainable()[names[n]].shape for n in sorted(state)
    ]


def test_a_patience_given_on_resuming_wins_over_the_checkpoints(llama: Path, tmp_path: Path) -> None:
    def stopping(patience: int) -> EarlyStopping:
        return EarlyStopping("reward/mean", patience=patience, check_on_train_epoch_end=True)

    def go(again: bool, patience: int, epochs: int) -> EarlyStopping:
        made = stopping(patience)
        resume.fit(
            module(llama, **CONSTANT),
            tmp_path,
            seed=1,
            resume=tmp_path / "last.ckpt" if again else None,
            cadence=1000,
            callbacks=[made, last(tmp_path)],
            max_steps=3 * epochs,
        )
        return made

    go(False, 3, 1)
    assert go(True, 7, 2).patience == 7


def played(llama: Path, folder: Path, what: str) -> str:
    """What :mod:`tests.support.killed` prints."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.killed", str(llama), str(folder), what]
    made = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert made.returncode == 0, f"{what}: {made.stdout[-3000:]} {made.stderr[-3000:]}"
    return made.stdout


def test_a_fit_killed_at_random_points_and_resumed_equals_one_that_was_not(
    llama: Path, tmp_path: Path
) -> None:
    """SIGKILL, ten times: while sampling, executing, updating, writing, evaluating."""
    seed = str(random.SystemRandom().randrange(10**6))
    print(f"seed {seed}")
    assert played(llama, tmp_path, seed).count(" after step ") == 10


def test_one_of_two_ranks_that_fails_dies_or_hangs_ends_the_other_with_the_step_before_saved(
    llama: Path, tmp_path: Path
) -> None:
    assert len(played(llama, tmp_path, "faults").splitlines()) == 4
