"""The state of Lightning's loops, made right for a run that resumes from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer import call

if TYPE_CHECKING:
    from lightning import Trainer

BATCHES = "epoch_loop.batch_progress"
"""Key of the batches that are done, in the state of the fit loop."""


def settle(loop: dict[str, Any]) -> None:
    """Where a checkpoint is of an epoch's last step, begin the next epoch in it.

    Lightning 2.6 ends the epoch itself when it resumes, but then takes the next one for the rest of it and
    does not count it: checkpoints of the resumed run are not seen to be in mid-epoch any more.

    Args:
        loop: The state of the fit loop. States of other moments stay as they are.
    """
    epoch, batches = loop["epoch_progress"]["current"], loop[BATCHES]
    if batches["is_last_batch"] and epoch["processed"] < epoch["ready"]:
        begin_next_epoch(loop)
    if batches["current"]["ready"] == 0:
        epoch["completed"] = epoch["processed"]  # a checkpoint of within catch_up


def begin_next_epoch(loop: dict[str, Any]) -> None:
    """End the epoch of a state in which it has been begun, and begin the next one at its first batch."""
    for count in (loop["epoch_progress"]["current"], loop["epoch_progress"]["total"]):
        count["processed"] = count["completed"] = count["ready"]
        count["ready"] = count["started"] = count["ready"] + 1
    batches = loop[BATCHES]
    batches["total"] = dict.fromkeys(batches["total"], batches["total"]["ready"])
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False


def resume_at_first_batch(trainer: Trainer) -> None:
    """Have an epoch that is at its first batch begun as any other; to be called when training starts.

    Lightning would take it for one that was stopped in its validation, and, by the interval of validations,
    make a turn without a batch, which counts as a step in the loggers.
    """
    loop = trainer.fit_loop.epoch_loop
    if loop.restarting and loop.batch_progress.current.ready == 0:
        loop.restarting = False
        # The number under which metrics are logged. The checkpoint is of just before it counted the step.
        loop._batches_that_stepped += 1


def catch_up(trainer: Trainer, validation: bool, epoch_end: bool) -> None:
    """Do what was still to follow the last step of the run that is resumed, under that step's epoch.

    Args:
        trainer: Its loops have been restored.
        validation: Validate, as Lightning's loop does, which takes a validation that was cut off for done.
        epoch_end: Call the hooks at an epoch's end, where the step was the last of one.
    """
    loop, at_first = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0
    epoch = loop.epoch_progress.current
    epoch.completed -= at_first  # the next epoch has been begun: see settle
    if validation:
        validate = loop.epoch_loop.val_loop
        validate.restarting = False  # else it would go on after the batches of the last validation
        trainer.validating = True
        validate.run()
        trainer.training = True
    if epoch_end and at_first:
        # As the loop does: those that monitor come last.
        call._call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=False)
        call._call_lightning_module_hook(trainer, "on_train_epoch_end")
        call._call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=True)
    epoch.completed += at_first
