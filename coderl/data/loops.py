"""The state of Lightning's loops, made right for a run that resumes from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def make_up_validation(trainer: Trainer) -> None:
    """Validate as Lightning's loop does, which takes a validation that was cut off for done."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # else it would go on after the batches of the last validation
    trainer.validating = True
    loop.run()
    trainer.training = True
