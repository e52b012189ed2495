"""What a run trains on, for whatever it leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coderl.data import CodeDataModule

if TYPE_CHECKING:
    from lightning import Trainer

    from coderl.problems.contamination import TrainingRecord


def trained_on(trainer: Trainer) -> TrainingRecord | None:
    """The run's training problems; None where its data module is none of coderl's and does not tell."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.trained() if isinstance(data, CodeDataModule) else None
