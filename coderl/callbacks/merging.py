"""Saves the merged model after each epoch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from coderl.algorithms import PolicyModule
from coderl.errors import UserError
from coderl.publish.export import save_merged
from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


class MergedCheckpoints(Callback):
    """Saves the merged model after each epoch, in ``{run folder}-merged/epoch-{n}``.

    Args:
        every_n_epochs: Epochs between two models.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        self.every_n_epochs = every_n_epochs

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the model of the epoch that has ended."""
        assert isinstance(pl_module, PolicyModule), "MergedCheckpoints needs a coderl algorithm"
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs == 0:
            run = RunFolder.of(trainer)
            try:
                save_merged(
                    pl_module.policy, run.merged_epoch(epoch), pl_module.training_record(), run=run.path
                )
            except UserError as error:  # such as a full disk: the fit itself can go on
                log.warning("no merged model of epoch %d: %s", epoch, error)
