"""ModelCheckpoint whose files are of whole steps, and whose ``last.ckpt`` is written however a fit ends."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from weakref import proxy

from lightning.pytorch.callbacks import ModelCheckpoint

from coderl.callbacks.last_step import LastStep
from coderl.data.loops import resume_at_first_batch, settle
from coderl.errors import first_line, named_line
from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)

_PLACES = (
    "best_model_path",
    "best_model_score",
    "best_k_models",
    "kth_best_model_path",
    "kth_value",
    "last_model_path",
)


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
        settle(checkpoint["loops"]["fit_loop"])
        LastStep.of(trainer).load(checkpoint)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Complete checkpoints that others write, such as Lightning when SLURM is to start the job again."""
        LastStep.of(trainer).complete(trainer, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate and end the epoch, where the run was stopped between a step and that."""
        super().on_train_start(trainer, pl_module)
        LastStep.of(trainer).catch_up(trainer)
        resume_at_first_batch(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Keep the state of the step, and write it when it is due."""
        LastStep.of(trainer).take(trainer)
        super().on_train_batch_end(trainer, *args, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation was made, and write what was waiting for it."""
        if not trainer.sanity_checking:
            last = LastStep.of(trainer)
            last.validation_due = False
            last.refresh(trainer)
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch's end was made, and write what was waiting for it."""
        last = LastStep.of(trainer)
        last.epoch_end_due = False
        last.refresh(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state after the last step."""
        last = LastStep.of(trainer)
        if self.last_path is None or trainer.fast_dev_run or last.batch < 0:  # type: ignore[attr-defined]
            return
        last.stopped_early = trainer.should_stop
        with self._said_if_not_written(trainer):
            self.last_model_path = self.last_path
            self._save_checkpoint(trainer, self.last_path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the state after the last whole step."""
        if self.last_path is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            LastStep.of(trainer).write_if_new(trainer, self.last_path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Write the last whole step; as in Lightning's, whose state would be that of the moment."""
        last = LastStep.of(trainer)
        moment = self.save_weights_only or last.batch < 0
        found = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only) if moment else None
        with _failing_together(trainer):
            if found is not None:
                trainer.strategy.save_checkpoint(found, filepath)
            else:
                last.refresh(trainer)
                last.write(trainer, filepath)
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.after_save_checkpoint(proxy(self))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._said_if_not_written(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._said_if_not_written(trainer):
            # Else Lightning takes a file that the run it resumes has left for another run's, and writes
            # last-v1.ckpt.
            self.last_model_path = self.last_path or ""
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Remove a file that another one has replaced."""
        try:
            super()._remove_checkpoint(trainer, filepath)
        except OSError as error:
            log.warning("%s stays beside the one that replaces it: %s", filepath, named_line(error))

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Make ``last.ckpt`` a link, as Lightning does, but never without one that is there."""
        with _failing_together(trainer):
            if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
                partial = f"{linkpath}.partial"
                with suppress(FileNotFoundError):
                    os.remove(partial)
                os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), partial)
                os.replace(partial, linkpath)

    @contextmanager
    def _said_if_not_written(self, trainer: Trainer) -> Iterator[None]:
        """Warn if a file cannot be written in the block; what was written before it counts on."""
        before = {name: getattr(self, name) for name in _PLACES if hasattr(self, name)}
        before["best_k_models"] = dict(self.best_k_models)
        try:
            yield
        except OSError as error:
            for name, value in before.items():
                setattr(self, name, value)
            if trainer.is_global_zero:
                log.warning(
                    "no checkpoint of step %d at %s (%s): make room there; the one before it stays",
                    trainer.global_step,
                    error.filename or self.dirpath,
                    error.strerror or first_line(error),
                )


@contextmanager
def _failing_together(trainer: Trainer) -> Iterator[None]:
    """Raise an OSError of one rank in the block on all of them. Collective.

    Only rank 0 writes. The others count files as it does, and Lightning's collectives depend on these counts.
    """
    failed: OSError | None = None
    try:
        yield
    except OSError as error:
        failed = error
    if trainer.strategy.reduce_boolean_decision(failed is not None, all=False):
        raise failed or OSError("rank 0 could not write")


def last_path(trainer: Trainer) -> str:
    """Where a trainer writes ``last.ckpt``: as its :class:`Checkpoint` says, or in the run folder."""
    callbacks = trainer.checkpoint_callbacks
    found = [one.last_path for one in callbacks if isinstance(one, Checkpoint) and one.last_path]
    return found[0] if found else str(RunFolder.of(trainer).last_checkpoint)
