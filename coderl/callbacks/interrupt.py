"""Ctrl-C saves a checkpoint that the run can be resumed from."""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from types import FrameType

    from lightning import LightningModule, Trainer


class SaveOnInterrupt(Callback):
    """On Ctrl-C, finishes the step, saves ``checkpoints/last.ckpt`` and stops. A second Ctrl-C stops at once.

    A checkpoint from inside a step would not resume the same run: only between two steps do the data's place,
    the random generators and the weights belong to the same moment. Wherever a config lists it, this callback
    runs last: it saves when the others have counted the step, and stops when the step's metrics are logged.

    Ctrl-C between two steps takes effect after the next one: with several processes, another one may be in
    that step already, waiting for this one.
    """

    def __init__(self) -> None:
        self.stepping = self.asked = self.saved = False
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all other callbacks: the checkpoint holds what they count."""
        # A new list, not a changed one: Lightning is iterating over the old one.
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handler of SIGINT.

        Not in an earlier hook: by now Lightning has noted the handlers that were there, and restores those
        after an interrupt too.
        """
        self.stepping = self.asked = self.saved = False
        # Python lets only the main thread set handlers; elsewhere, as in a notebook's worker, Ctrl-C stays as
        # it is.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.stepping:
            raise KeyboardInterrupt
        self.asked = True
        print("\ncoderl: finishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop if the step before was saved; else Ctrl-C now waits for the step's end."""
        self._stop_if(self.saved)
        self.stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if Ctrl-C was pressed on any rank."""
        # Saving is collective: all ranks must decide alike, though the signal may have reached only one.
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            trainer.save_checkpoint(RunFolder.of(trainer).last_checkpoint, weights_only=False)
            self.saved = True  # stop in the next hook: Lightning logs the step's metrics only after this one

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation, if Ctrl-C was pressed."""
        self.stepping = False
        self._stop_if(self.saved or self.asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last step, if Ctrl-C was pressed; the resumed run then evaluates."""
        self.stepping = False
        self._stop_if(self.saved or self.asked)

    def _stop_if(self, due: bool) -> None:
        if due:
            self.asked = self.saved = False
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the handler that was there before the fit."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
