"""A model and data for the command line's tests: they train in milliseconds and need no weights."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torchdata.stateful_dataloader import StatefulDataLoader

from coderl.data import CodeDataModule
from coderl.errors import UserError
from coderl.problems import ProblemSource
from coderl.types import Problem


class Policy:
    """Fake policy.

    Args:
        model: Hub id or path.
    """

    def __init__(self, model: str = "org/Tiny-Model-hf") -> None:
        self.model = model


class Tiny(LightningModule):
    """Fake algorithm.

    Args:
        policy: Fake policy.
        group_size: Completions per problem.
        interrupt_at: Step that is interrupted by a signal.
        interrupt_by: Its number; by default Ctrl-C's.
        pause: Seconds per step; the first one leaves a file ``stepped``.
        fail: Whether the weights are missing.
    """

    def __init__(
        self,
        policy: Policy,
        group_size: int = 8,
        interrupt_at: int | None = None,
        interrupt_by: int = 2,
        pause: float = 0.0,
        fail: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["policy"])
        self.policy, self.group_size, self.pause = policy, group_size, pause
        self.interrupt_at, self.interrupt_by = interrupt_at, interrupt_by
        if fail:
            raise UserError("the weights are missing")
        self.layer = torch.nn.Linear(1, 1)
        self.steps: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.interrupt_at:
            os.kill(os.getpid(), self.interrupt_by)
        if self.pause:
            time.sleep(self.pause)
            if batch_idx == 2:
                Path("stepped").touch()
        self.steps.append(batch_idx)
        loss: torch.Tensor = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        """Nothing is held out."""

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NoProblems(ProblemSource):
    """A source that is never asked for more than an empty split."""

    def load(self, split: str) -> list[Problem]:
        return []


class TinyData(CodeDataModule):
    """Fake data.

    Args:
        size: Number of samples.
    """

    def __init__(self, size: int = 2) -> None:
        super().__init__(NoProblems())
        self.size = size

    def train_dataloader(self) -> StatefulDataLoader[torch.Tensor]:
        return StatefulDataLoader(torch.ones(self.size, 1))

    test_dataloader = train_dataloader
