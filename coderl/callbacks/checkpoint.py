"""Checkpoints that end where the fit ends, and the one that validated best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import ModelCheckpoint

from coderl.data import CodeDataModule
from coderl.errors import UsageError

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``last.ckpt`` is also written when the fit ends.

    Lightning 2.6 leaves there what ``every_n_train_steps`` wrote last: later steps could not be resumed.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last state, between two steps like all others."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.dirpath is not None and trainer.global_step:
            name = f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            trainer.save_checkpoint(Path(self.dirpath, name), weights_only=False)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights that validated best, in ``checkpoints/best.ckpt``; the fit ends with them.

    :class:`PostFit` saves and measures these, where there are any, instead of the last ones.

    Args:
        monitor: What validation measures: ``val/pass@1``, ``val/test_pass_rate``, ``val/success_rate`` ...
        mode: Whether more of it is better (``max``) or less (``min``).
    """

    def __init__(self, monitor: str = "val/pass@1", mode: str = "max") -> None:
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename="best",
            save_top_k=1,
            every_n_epochs=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write where the other checkpoints are. Refuses a fit that validates nothing.

        Raises:
            UsageError: Validation is switched off.
            UserError: There are no problems to validate on.
        """
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir, "checkpoints"))
        if stage == "fit" and trainer.limit_val_batches == 0:
            raise UsageError(
                "BestCheckpoint: nothing is validated while trainer.limit_val_batches is 0: set it to 1.0"
            )
        data = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and isinstance(data, CodeDataModule):
            data.problems("validation")
        super().setup(trainer, pl_module, stage)
