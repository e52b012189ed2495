"""ModelCheckpoint whose files are of whole steps, and whose ``last.ckpt`` is written however a fit ends."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import proxy

from lightning.pytorch.callbacks import ModelCheckpoint

from coderl.callbacks.last_step import VALIDATION_DUE, LastStep
from coderl.data.loops import settle
from coderl.errors import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)

_PLACES = ("best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value")


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which also writes ``last.ckpt`` when the fit ends, in whatever way.

    Every file holds the state after the last whole step, see :class:`~coderl.callbacks.last_step.LastStep`:
    at the end of a fit by ``max_steps``, early stopping or ``max_time``, and after an error in a step too;
    those of weights alone (``save_weights_only``) are of the moment. A file that cannot be written (a full
    disk) is a warning: the one before stays, and the fit goes on.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and write with :class:`~coderl.runs.checkpoint_files.CheckpointFiles`."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            LastStep.of(trainer).begin()

    @property
    def last_path(self) -> str | None:
        """Where ``last.ckpt`` is, a path or URL; None if it was switched off."""
        if not self.save_last or self.dirpath is None:
            return None
        return os.path.join(self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note whether a validation was still to follow the step, and count its epoch."""
        settle(checkpoint["loops"]["fit_loop"], trainer.enable_validation)
        LastStep.of(trainer).validation_due = bool(checkpoint.get(VALIDATION_DUE))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate, where the run was stopped between a step and the validation after it."""
        super().on_train_start(trainer, pl_module)
        last = LastStep.of(trainer)
        if last.validation_due and trainer.enable_validation:
            last.validation_due = False  # there may be several of these callbacks
            # As Lightning's loop does, which takes it for done when it resumes.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Keep the state of the step, and write it when it is due."""
        LastStep.of(trainer).take(trainer)
        super().on_train_batch_end(trainer, *args, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was waiting for the validation, and note that it was made."""
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            LastStep.of(trainer).note_validated(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state after the last step."""
        if self.last_path is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        last = LastStep.of(trainer)
        last.note_callbacks(trainer)
        with self._said_if_not_written(trainer):
            if last.write(trainer, self.last_path):
                self.last_model_path = self._last_checkpoint_saved = self.last_path

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the state after the last whole step."""
        if self.last_path is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            LastStep.of(trainer).write_if_new(trainer, self.last_path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write the last whole step; as in Lightning's, whose state would be that of the moment."""
        last = LastStep.of(trainer)
        if self.save_weights_only or last.batch < 0:
            super()._save_checkpoint(trainer, filepath)
            return
        last.note_callbacks(trainer)
        last.write(trainer, filepath)
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.after_save_checkpoint(proxy(self))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._said_if_not_written(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._said_if_not_written(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    @contextmanager
    def _said_if_not_written(self, trainer: Trainer) -> Iterator[None]:
        """Warn if a file cannot be written in the block; what was written before it counts on."""
        # Only rank 0 writes, and so only its counts go back. Where Lightning's collectives depend on them
        # (`monitor`, `save_weights_only`), the ranks may part after a full disk.
        before = {name: getattr(self, name) for name in _PLACES if hasattr(self, name)}
        before["best_k_models"] = dict(self.best_k_models)
        try:
            yield
        except OSError as error:
            for name, value in before.items():
                setattr(self, name, value)
            where = error.filename or self.dirpath
            log.warning(
                "no checkpoint of step %d at %s (%s): make room there; the one before it stays",
                trainer.global_step,
                where,
                error.strerror or first_line(error),
            )
