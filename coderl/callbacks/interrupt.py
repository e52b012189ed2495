"""Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from coderl.callbacks.order import run_last
from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from types import FrameType

    from lightning import LightningModule, Trainer


class SaveOnInterrupt(Callback):
    """On Ctrl-C, lets the step end, saves ``checkpoints/last.ckpt`` and stops. A second Ctrl-C stops at once.

    Only between two steps are the data's place, the random generators and the weights of one moment: a
    checkpoint from inside a step would not resume the same run. Wherever it is listed, it saves when the
    others have seen the step, and stops when the step's metrics are written.

    Ctrl-C between two steps waits for the next one: of several processes one may be there already, and would
    wait for the others.
    """

    def __init__(self) -> None:
        self.stepping = self.asked = self.saved = False
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come last: the checkpoint holds what the others count."""
        run_last(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signal (only the main thread may).

        No earlier: Lightning has noted the handlers by now, and gives them back after an interrupt too.
        """
        self.stepping = self.asked = self.saved = False
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
        """A step begins."""
        self._leave(self.saved)
        self.stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step has ended: save if that was asked for on any rank."""
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            trainer.save_checkpoint(RunFolder.of(trainer).last_checkpoint, weights_only=False)
            self.saved = True  # Lightning writes the step's metrics after this hook

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nobody who pressed Ctrl-C waits for a validation."""
        self.stepping = False
        self._leave(self.saved or self.asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step was the fit's last one: the evaluation is left to the resumed run."""
        self.stepping = False
        self._leave(self.saved or self.asked)

    def _leave(self, due: bool) -> None:
        if due:
            self.asked = self.saved = False
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signal back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
