"""The state after the last whole step of a fit, kept in memory so that any way out of the fit can save it."""

from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.trainer.call import _call_callbacks_state_dict

from coderl.data import loops
from coderl.errors import named_line
from coderl.model import memory
from coderl.runs.checkpoint_files import CheckpointFiles, is_remote

if TYPE_CHECKING:
    from pathlib import Path

    from lightning import Trainer
    from torch import Tensor

log = logging.getLogger(__name__)

SHARE = 4
"""The state is copied where it takes at most this part, one in so many, of the memory that is free."""
TO_FOLLOW = "to_follow"
"""Key in a checkpoint: what was still to follow the step, and what it needs."""


class LastStep:
    """What a checkpoint after the last whole step holds.

    An exception in the middle of a step finds the data one batch on, generators that have drawn, and perhaps
    weights of half the step's updates: no state that a run could go on from. The state at the end of the step
    before is one. So every checkpoint of a fit is this state, and is resumed in the same way.

    Weights and optimizer state are copied to the CPU's memory after each step. Where they do not fit, the
    live tensors are kept instead, which have those values until the next update.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        self.batch = -1
        self.busy = False
        # What is still to follow the last step, of this run or of the one that it resumes.
        self.validation_due = self.epoch_end_due = False
        self.stopped_early = False
        self._metrics: dict[str, float] = {}  # with these
        self.saved: tuple[str, int] | None = None  # the file that was written last, and its step
        self._written: dict[str, tuple[int, int]] = {}
        self._counted = 0  # how often callbacks' states have been taken over
        self._pinned = False
        self._copies: bool | None = None
        self._buffers: dict[str, Tensor] = {}
        self._live: list[tuple[Tensor, int]] = []

    @classmethod
    def of(cls, trainer: Trainer) -> LastStep:
        """The last step of a trainer, which writes with :class:`CheckpointFiles` from now on."""
        if trainer not in _LAST:
            _LAST[trainer] = cls()
        # A plugin of the user's own stays.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        return _LAST[trainer]

    def begin(self) -> None:
        """Forget an earlier fit."""
        self.__init__()  # type: ignore[misc]

    @property
    def step(self) -> int | None:
        """Optimizer steps after which the state was; None before the first step of this process."""
        return None if self.state is None else int(self.state["global_step"])

    def is_saved(self, path: str | Path) -> bool:
        """Whether a file holds the state already."""
        return self.step is not None and self._written.get(_known_as(path)) == self._version()

    def release_if_saved(self) -> None:
        """Give back the memory where the state is in a file; to be called when no step follows."""
        if self.saved is not None and self.saved[1] == self.step:
            self.state, self._buffers, self._live = None, {}, []

    def take(self, trainer: Trainer) -> None:
        """Keep the state. To be called at the end of a step, when all other callbacks have counted it."""
        loop = trainer.fit_loop
        if self.batch == loop.total_batch_idx:
            return
        self.busy = True  # a signal's handler may not write what is half copied
        try:
            fetcher = loop._data_fetcher
            self.validation_due = bool(fetcher and loop.epoch_loop._should_check_val_fx(fetcher))
            self.epoch_end_due = loop.epoch_loop._num_ready_batches_reached()
            self._metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            found = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            self.complete(trainer, found)
            self._decide_on_copies(found)
            self.state, self._live = None, []
            if trainer.is_global_zero:
                kept = self._kept(found, "")
                if self._pinned:
                    torch.cuda.synchronize()  # copies from the GPU run beside Python
                self.state = kept
            self.batch = loop.total_batch_idx
        finally:
            self.busy = False

    def complete(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Add to a checkpoint, whoever has it written, what a run that resumes from it needs to know."""
        checkpoint[TO_FOLLOW] = self._to_follow()
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            _drop_ended_loaders(checkpoint["loops"]["fit_loop"]["state_dict"])

    def _to_follow(self) -> dict[str, Any]:
        return {
            "validation": self.validation_due,
            "epoch_end": self.epoch_end_due,
            "metrics": self._metrics,
            "stopped_early": self.stopped_early,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Note what :meth:`complete` has added to the checkpoint that a run resumes from."""
        found = checkpoint.get(TO_FOLLOW, {})
        self.validation_due, self.epoch_end_due = (bool(found.get(k)) for k in ("validation", "epoch_end"))
        self._metrics = found.get("metrics", {})

    def catch_up(self, trainer: Trainer) -> None:
        """Do what was still to follow the step that the run resumes from; later calls do nothing."""
        validation, epoch_end = self.validation_due and trainer.enable_validation, self.epoch_end_due
        if validation or epoch_end:
            # What was logged in the step: callbacks may ask for it when the epoch ends.
            known = {name: torch.tensor(value) for name, value in self._metrics.items()}
            trainer._logger_connector._callback_metrics.update(known)
            loops.catch_up(trainer, validation, epoch_end)
        self.validation_due = self.epoch_end_due = False

    def refresh(self, trainer: Trainer) -> None:
        """Take over what callbacks have counted since the step, and what is still to follow it."""
        if self.state is not None:
            self.state[TO_FOLLOW] = self._to_follow()
            self.state["callbacks"] = copy.deepcopy(_call_callbacks_state_dict(trainer))
            self._counted += 1

    def write(self, trainer: Trainer, path: str | Path) -> bool:
        """Write the state as a checkpoint, on rank 0, without waiting for other ranks.

        Returns:
            False if there is no such state: before the first step, or where it was not copied and the weights
            have changed since.

        Raises:
            OSError: It cannot be written. The file that was there is as it was.
        """
        if self.state is None or any(tensor._version != version for tensor, version in self._live):
            return False
        self.busy = True
        try:
            trainer.strategy.checkpoint_io.save_checkpoint(self.state, path)
        finally:
            self.busy = False
        self._written[_known_as(path)] = self._version()
        self.saved = str(path), int(self.state["global_step"])
        return True

    def write_if_new(self, trainer: Trainer, path: str | Path) -> None:
        """Write the state unless the file holds it; where that fails, warn: the fit is ending anyway."""
        if self.step is None or self.is_saved(path):
            return
        try:
            self.write(trainer, path)
        except OSError as error:
            log.warning("the state of step %d is lost: %s", self.step, named_line(error))

    def _version(self) -> tuple[int, int]:
        """What tells two states apart: a validation changes what callbacks have counted."""
        assert self.state is not None
        return int(self.state["global_step"]), self._counted

    def _decide_on_copies(self, found: dict[str, Any]) -> None:
        """Copy from now on, or not; decided again when the state has grown (Adam's begins empty)."""
        have = sum(_bytes(buffer) for buffer in self._buffers.values())
        size = sum(_bytes(tensor) for tensor in _tensors(found))
        if self._copies is not False and size > have:
            self._copies = self._can_copy(size - have)
            if not self._copies:
                self._buffers.clear()

    def _can_copy(self, size: int) -> bool:
        if size * SHARE <= memory.free_bytes(torch.device("cpu")):
            return True
        log.warning(
            "a step's state takes %.1f GB, too much to keep a copy in memory: an error during an update "
            "loses the steps since the last checkpoint (checkpoint.every_n_train_steps)",
            size / 1e9,
        )
        return False

    def _kept(self, value: Any, place: str) -> Any:
        """A copy of a value; tensors go into the buffers of the step before."""
        if isinstance(value, torch.Tensor):
            if not self._copies:
                self._live.append((value, value._version))
                return value
            buffer = self._buffers.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                on_gpu = value.device.type == "cuda"
                self._pinned |= on_gpu
                buffer = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=on_gpu)
                self._buffers[place] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._kept(inner, f"{place}/{key}") for key, inner in value.items()}
        # Long lists are of plain values, such as the ids of an epoch: these are copied as a whole.
        if type(value) in (list, tuple) and any(isinstance(one, _NESTING) for one in value):
            return type(value)(self._kept(inner, f"{place}/{i}") for i, inner in enumerate(value))
        return copy.deepcopy(value)


_NESTING = (torch.Tensor, dict, list, tuple)
_LAST: WeakKeyDictionary[Trainer, LastStep] = WeakKeyDictionary()


def _known_as(path: str | Path) -> str:
    """One name for a file, whichever way it is called; a URL is its own."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if type(value) in (list, tuple) else ()
    return [tensor for one in inner for tensor in _tensors(one)]


def _drop_ended_loaders(loop: dict[str, Any]) -> None:
    """Leave out the places of loaders whose epoch has ended, unless their sampler goes on by itself.

    Such a loader has no batch left, and the next epoch, of the resumed run, would be empty.
    """
    states = loop.get("combined_loader", [])
    if not any((state.get("_sampler_iter_state") or {}).get("sampler_state") for state in states):
        loop.pop("combined_loader", None)
