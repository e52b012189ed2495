"""A fit that was stopped and resumed equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from coderl.algorithms import GRPO, PolicyGradient
from coderl.algorithms.rewards import Reward, Sample
from coderl.callbacks import Checkpoint, SaveOnInterrupt
from coderl.data import CodeDataModule, Curriculum
from coderl.errors import UserError
from coderl.model.adapters import LoRA
from coderl.model.policy import Policy
from coderl.problems import JSONLProblems
from coderl.sandbox import Program, Sandbox
from coderl.types import Execution
from tests.support import tiny

pytestmark = pytest.mark.slow

PROBLEMS, BATCH, EPOCHS = 5, 2, 2
STEPS = 6  # three batches an epoch, the last one short


class EvenTokens(Reward):
    """Rewards even token ids, plus noise from all three random generators, so that their states matter."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return [
            sum(i % 2 == 0 for i in s.completion.ids) + noise * (s.completion.ids[0] % 3) for s in samples
        ]


class Idle(Sandbox):
    def run(self, programs: Sequence[Program], progress: Any = False) -> list[Execution]:
        return [Execution("failed", 0, 1)] * len(programs)


class Killed(Exception):
    pass


@dataclass
class Trace(Callback):
    """The problems, rewards and resulting state of each rollout step.

    Dies when the step after ``kill_after`` begins; presses Ctrl-C in step ``press_after``.
    """

    kill_after: int = -1
    press_after: int = -1
    steps: list[dict[str, Any]] = field(default_factory=list)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if len(self.steps) == self.kill_after:
            raise Killed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyGradient) and pl_module.rollout is not None
        self.steps.append(
            {
                "step": trainer.global_step,
                "problems": [problem.id for problem in batch],
                "ids": [sample.completion.ids for sample in pl_module.rollout.samples],
                "rewards": pl_module.rollout.rewards.tolist(),
                "rate": pl_module.step_learning_rate,
                "kl_coefficient": pl_module.kl_coefficient,
                "history": trainer.datamodule.state_dict(),  # type: ignore[attr-defined]
                "weights": {n: p.detach().clone() for n, p in pl_module.policy.trainable().items()}
                | moments(pl_module),
            }
        )
        if len(self.steps) == self.press_after:
            os.kill(os.getpid(), signal.SIGINT)


def moments(made: PolicyGradient) -> dict[str, torch.Tensor]:
    """The optimizer's state."""
    optimizer: Any = made.optimizers()
    return {
        f"{key} of {number}": value.clone()
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not bit-identical in two steps."""
    before, after = one["weights"], other["weights"]
    moved = [n for n in before.keys() | after.keys() if not torch.equal(before[n], after[n])]
    return [k for k in one if k != "weights" and one[k] != other[k]] + moved


def data(folder: Path, **options: Any) -> CodeDataModule:
    path = folder / "problems.jsonl"
    rows = [
        {"task_id": i, "text": f"Return {i}.", "code": "", "test_list": [f"assert f() == {i}"]}
        for i in range(PROBLEMS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CodeDataModule(JSONLProblems(str(path)), batch_size=BATCH, **options)


def module(llama: Path, inner_epochs: int = 1, rank: int = 4, **options: Any) -> GRPO:
    settings: dict[str, Any] = {"warmup_steps": 2, "schedule": "cosine", "kl_coefficient": 0.05} | options
    return GRPO(
        Policy(str(llama), quantization="none", lora=LoRA(r=rank, alpha=8)),
        rewards=[EvenTokens()],
        sandbox=Idle(allow_weak_isolation=True),
        group_size=4,
        max_new_tokens=6,
        learning_rate=2e-2,
        inner_epochs=inner_epochs,
        **settings,
    )


def fit(
    made: PolicyGradient,
    folder: Path,
    seed: int,
    resume: Path | None = None,
    cadence: int = 1,
    kill_after: int = -1,
    press_after: int = -1,
    callbacks: Sequence[Callback] = (),
    curriculum: Curriculum | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Fit from global generators seeded with ``seed``, and return the trace."""
    trace = Trace(kill_after, press_after)
    saver = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=cadence, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer = tiny.trainer(
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        callbacks=[*callbacks, trace, saver],
        default_root_dir=folder,
        **options,
    )
    folder.mkdir(exist_ok=True)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    stops = Killed if kill_after > 0 else SystemExit if press_after > 0 else None
    with pytest.raises(stops) if stops else nullcontext():
        trainer.fit(made, data(folder, curriculum=curriculum), ckpt_path=resume, weights_only=True)
    return trace.steps


@pytest.mark.parametrize("inner_epochs", [1, 2])
def test_a_resumed_fit_equals_an_uninterrupted_one_bit_for_bit(
    llama: Path, tmp_path: Path, inner_epochs: int
) -> None:
    whole = fit(module(llama, inner_epochs), tmp_path / "whole", seed=1)
    assert [s["step"] for s in whole] == [inner_epochs * (i + 1) for i in range(STEPS)]
    for stop in (2, 3, 5):  # in mid-epoch, at an epoch's end, in the last epoch
        folder = tmp_path / f"stopped-{stop}"
        first = fit(module(llama, inner_epochs), folder, seed=1, kill_after=stop)
        checkpoint = folder / f"{stop * inner_epochs}.ckpt"
        rest = fit(module(llama, inner_epochs), folder, seed=999, resume=checkpoint)
        assert len(first) == stop
        for i, (got, expected) in enumerate(zip([*first, *rest], whole, strict=True)):
            assert not differences(got, expected), f"stopped after {stop}, step {i + 1}"


@pytest.mark.parametrize("stop", [2, 3, 6])  # in mid-epoch, at an epoch's end, at the fit's end
def test_a_fit_stopped_by_ctrl_c_and_resumed_equals_an_uninterrupted_one(
    llama: Path, tmp_path: Path, stop: int
) -> None:
    whole = fit(module(llama), tmp_path / "whole", seed=1)
    folder = tmp_path / "stopped"
    first = fit(module(llama), folder, seed=1, press_after=stop, callbacks=[SaveOnInterrupt()])
    rest = fit(module(llama), folder, seed=999, resume=folder / "checkpoints/last.ckpt")
    assert len(first) == stop
    for i, (got, expected) in enumerate(zip([*first, *rest], whole, strict=True)):
        assert not differences(got, expected), f"step {i + 1}"


@pytest.mark.parametrize("limits", [{}, {"max_steps": 6}, {"limit_train_batches": 2}], ids=str)
def test_a_fit_stopped_after_every_step_equals_an_uninterrupted_one(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, limits: dict[str, Any]
) -> None:
    """Epochs end in between, twice: each run goes on from the checkpoint of one that had gone on itself."""
    whole = fit(module(llama), tmp_path / "whole", seed=1, **limits)
    got: list[dict[str, Any]] = []
    last = tmp_path / "stopped/checkpoints/last.ckpt"
    for start in range(len(whole)):
        resume = last if start else None
        got += fit(
            module(llama),
            tmp_path / "stopped",
            seed=1 + 998 * start,
            resume=resume,
            press_after=1,
            callbacks=[SaveOnInterrupt()],
            **limits,
        )
    for i, (one, expected) in enumerate(zip(got, whole, strict=True)):
        assert not differences(one, expected), f"step {i + 1}"
    assert not fit(module(llama), tmp_path / "stopped", seed=7, resume=last, **limits)
    assert "since the checkpoint" not in caplog.text


def test_a_fit_stopped_by_its_limit_can_be_resumed_with_a_higher_one(llama: Path, tmp_path: Path) -> None:
    constant: dict[str, Any] = {
        "schedule": "constant_with_warmup"
    }  # the other schedules depend on where the fit will end
    whole = fit(module(llama, **constant), tmp_path / "whole", seed=1)
    first = fit(module(llama, **constant), tmp_path / "part", seed=1, max_steps=2)
    rest = fit(
        module(llama, **constant), tmp_path / "part", seed=999, resume=tmp_path / "part/2.ckpt", max_steps=5
    )
    for got, expected in zip([*first, *rest], whole[:5], strict=True):
        assert not differences(got, expected)


@pytest.mark.parametrize(("inner_epochs", "limit"), [(1, -1), (2, -1), (2, 8)])
def test_the_schedule_ends_with_the_fit(llama: Path, tmp_path: Path, inner_epochs: int, limit: int) -> None:
    made = module(llama, inner_epochs)
    rates = [s["rate"] for s in fit(made, tmp_path, seed=1, max_steps=limit)]
    scheduler: Any = made.lr_schedulers()
    assert rates[-1] > 0 == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)  # of a step after the last
    peak = 1 if inner_epochs == 1 else 0  # the second optimizer step, after two of warm-up
    assert rates[peak] == pytest.approx(2e-2) and rates[:peak] == [1e-2][:peak]
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_a_checkpoint_holds_what_trains_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    made = module(llama)
    fit(made, tmp_path, seed=1, max_steps=1)
    checkpoint = torch.load(tmp_path / "1.ckpt", weights_only=True)
    state, trainable = checkpoint["state_dict"], made.policy.trainable()
    assert set(state) == {f"policy.{name}" for name in trainable} and all("lora_" in name for name in state)
    assert all(torch.equal(state[f"policy.{name}"], p) for name, p in trainable.items())


def test_a_checkpoint_of_another_policy_is_a_one_line_error(llama: Path, tmp_path: Path) -> None:
    fit(module(llama), tmp_path, seed=1, max_steps=1)
    with pytest.raises(UserError, match=r"checkpoint is of another policy.*config\.yaml") as caught:
        fit(module(llama, rank=2), tmp_path, seed=1, resume=tmp_path / "1.ckpt")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_weights_alone_is_a_one_line_error(llama: Path, tmp_path: Path) -> None:
    weights = Checkpoint(tmp_path, "weights", save_weights_only=True, every_n_train_steps=1)
    fit(module(llama), tmp_path, seed=1, max_steps=1, callbacks=[weights])
    with pytest.raises(UserError, match=r"holds weights alone.*--ckpt_path") as caught:
        fit(module(llama), tmp_path, seed=1, resume=tmp_path / "weights.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inner_epochs", "cadence", "steps"),
    [
        (1, 1, {1, 2, 3, 4, 5, 6}),
        (1, 2, {2, 4, 6}),
        (2, 1, {2, 4, 6, 8, 10, 12}),  # never inside a step: the optimizer steps of a batch belong together
        (2, 4, {4, 8, 12}),
        (2, 3, {6, 12}),
    ],
)
def test_checkpoints_are_written_every_n_train_steps(
    llama: Path, tmp_path: Path, inner_epochs: int, cadence: int, steps: set[int]
) -> None:
    fit(module(llama, inner_epochs, kl_coefficient=0.0), tmp_path, seed=1, cadence=cadence)
    assert {int(path.stem) for path in tmp_path.glob("*.ckpt")} == steps
