"""The state of Lightning's loops in a checkpoint, made right for a run that resumes from it."""

from __future__ import annotations

from typing import Any

BATCHES = "epoch_loop.batch_progress"
"""Key of the batches that are done, in the state of the fit loop."""


def settle(loop: dict[str, Any], validates: bool) -> None:
    """Where a checkpoint is of an epoch's last step, begin the next epoch in it.

    Lightning 2.6 ends the epoch itself when it resumes, but then takes the next one for the rest of it and
    does not count it: checkpoints of the resumed run are not seen to be in mid-epoch any more.

    Args:
        loop: The state of the fit loop. States of other moments stay as they are.
        validates: Whether the resumed run validates.
    """
    epoch, batches = loop["epoch_progress"]["current"], loop[BATCHES]
    if batches["is_last_batch"] and epoch["processed"] < epoch["ready"]:
        begin_next_epoch(loop, validates)


def begin_next_epoch(loop: dict[str, Any], validates: bool) -> None:
    """End the epoch of a state in which it has been begun, and begin the next one at its first batch."""
    for count in (loop["epoch_progress"]["current"], loop["epoch_progress"]["total"]):
        count["processed"] = count["completed"] = count["ready"]
        count["ready"] = count["started"] = count["ready"] + 1
    batches = loop[BATCHES]
    batches["total"] = dict.fromkeys(batches["total"], batches["total"]["ready"])
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    if not validates:
        # Before its first batch Lightning makes a turn in which a validation that was made is skipped. It
        # counts the step there, and without validation nowhere.
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
