"""Ctrl-C and the signals of schedulers save a checkpoint that the run can be resumed from."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from coderl.callbacks.checkpoint import last_path
from coderl.callbacks.last_step import LastStep
from coderl.errors import named_line

if TYPE_CHECKING:
    from types import FrameType

    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, a scheduler's or system's end, a closed terminal, and the usual warning of a job's time limit."""


class SaveOnInterrupt(Callback):
    """On Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, finishes the step, saves ``checkpoints/last.ckpt`` and stops.

    A second one stops at once, with the state after the step before. That state is also written as soon as
    any but Ctrl-C arrives: whoever sends it may kill before the step ends. A SIGHUP that is ignored
    (``nohup``) stays ignored. Under SLURM, Lightning's requeueing is then done as well, where its environment
    plugin has it (``auto_requeue``).

    A checkpoint from inside a step would not resume the same run: only between two steps do the data's place,
    the random generators and the weights belong to the same moment. Wherever a config lists it, this callback
    runs last: it saves when the others have counted the step, and stops when the step's metrics are logged.

    A signal between two steps takes effect after the next one: with several processes, another one may be in
    that step already, waiting for this one.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.stepping = self.saved = False
        self._before: dict[int, Any] = {}
        self._trainer: Trainer | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all other callbacks: the checkpoint holds what they count."""
        # A new list, not a changed one: Lightning is iterating over the old one.
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        if stage == "fit":
            LastStep.of(trainer).begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers.

        Not in an earlier hook: by now Lightning has noted the handlers that were there, and restores those
        after an interrupt too.
        """
        self.asked, self.stepping, self.saved = 0, False, False
        self._trainer = trainer
        # Python lets only the main thread set handlers; elsewhere, as in a notebook's worker, signals stay as
        # they are.
        if threading.current_thread() is threading.main_thread():
            for number in {*SIGNALS, _requeue_signal(trainer) or signal.SIGINT}:
                if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        assert self._trainer is not None
        last = LastStep.of(self._trainer)
        if last.busy:  # half a state is in memory or on disk: it is completed first
            self.asked = self.asked or number
            return
        if self.asked or not self.stepping:
            raise KeyboardInterrupt
        self.asked = number
        path = last_path(self._trainer)
        if number != signal.SIGINT and not last.is_saved(path):
            with suppress(OSError):  # it is tried again when the step has ended
                last.write(self._trainer, path)
        with suppress(OSError):  # the terminal may be gone
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            print(
                f"\ncoderl: finishing this step, then saving; {name} again stops at once",
                file=sys.stderr,
                flush=True,
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Complete checkpoints that others write, such as Lightning when SLURM is to start the job again."""
        LastStep.of(trainer).complete(trainer, checkpoint)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop if the step before was saved; else a signal now waits for the step's end."""
        self._stop_if(self.saved)
        self.stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a signal has come to any rank."""
        last = LastStep.of(trainer)
        last.take(trainer)
        if not self._asked_anywhere(trainer):
            return
        last.refresh(trainer)
        last.write_if_new(trainer, last_path(trainer))
        requeue = _requeue_signal(trainer)
        asked = requeue is not None and self.asked == requeue
        if requeue is not None and trainer.strategy.reduce_boolean_decision(asked, all=False):
            # Lightning's handler saves a checkpoint of its own and has SLURM start the job again. It would do
            # so anywhere in a step; here the state is whole.
            handler = self._before.get(requeue)
            if callable(handler):
                try:
                    handler(requeue, None)
                except OSError as error:
                    log.warning("SLURM was not asked to start the job again: %s", named_line(error))
                    trainer.strategy.barrier()  # the other ranks wait there until the file is written
        self.saved = True  # stop in the next hook: Lightning logs the step's metrics only after this one

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before a validation, if a signal came."""
        asked = self._asked_anywhere(trainer)
        self.stepping = False
        self._stop_if(self.saved or asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last step, if a signal came; the resumed run then evaluates."""
        asked = self._asked_anywhere(trainer)
        self.stepping = False
        self._stop_if(self.saved or asked)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the state after the last whole step, where no other callback has."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            LastStep.of(trainer).write_if_new(trainer, last_path(trainer))

    def _asked_anywhere(self, trainer: Trainer) -> bool:
        """Whether a signal has come to any rank: all must stop alike. Collective."""
        return bool(trainer.strategy.reduce_boolean_decision(bool(self.asked), all=False))

    def _stop_if(self, due: bool) -> None:
        if due:
            self.asked, self.saved = 0, False
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the handlers that were there before the fit."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._trainer = {}, None


def _requeue_signal(trainer: Trainer) -> int | None:
    """The signal on which Lightning has SLURM requeue the job; None where it does not."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return int(environment.requeue_signal or signal.SIGUSR1)
    return None
