"""ModelCheckpoint that also saves the last step of a fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``last.ckpt`` is also written when the fit ends.

    Lightning 2.6 leaves there what ``every_n_train_steps`` wrote last: later steps could not be resumed.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state after the last step."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.dirpath is not None and trainer.global_step:
            name = f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            trainer.save_checkpoint(Path(self.dirpath, name), weights_only=False)
