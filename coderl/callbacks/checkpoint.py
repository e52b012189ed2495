"""Checkpoints that end where the fit ends, and the one that validated best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from coderl.algorithms import PolicyGradient, PolicyModule
from coderl.errors import UsageError
from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose ``last.ckpt`` is also written when the fit ends.

    Lightning 2.6 leaves there what ``every_n_train_steps`` wrote last: later steps could not be resumed.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last state, between two steps like all others."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.dirpath is not None and trainer.global_step:
            name = f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            trainer.save_checkpoint(Path(self.dirpath, name), weights_only=False)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the weights that validated best, in ``checkpoints/best.ckpt``; the fit ends with them.

    :class:`PostFit` saves and measures these, where there are any, instead of the last ones.

    Args:
        monitor: What validation measures: ``val/pass@1``, ``val/test_pass_rate``, ``val/success_rate`` ...
        mode: Whether more of it is better (``max``) or less (``min``).
    """

    def __init__(self, monitor: str = "val/pass@1", mode: str = "max") -> None:
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename="best",
            save_top_k=1,
            every_n_epochs=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write where the other checkpoints are. Refuses a fit that validates nothing.

        Raises:
            UsageError: Validation is switched off, or measures something else.
            UserError: There are no problems to validate on.
        """
        if self.dirpath is None:
            self.dirpath = str(RunFolder.of(trainer).checkpoints)
        if stage == "fit":
            self._require_validation(trainer, pl_module)
        super().setup(trainer, pl_module, stage)

    def _require_validation(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.limit_val_batches == 0:
            raise UsageError(
                "BestCheckpoint: nothing is validated while trainer.limit_val_batches is 0: set it to 1.0"
            )
        if not isinstance(module, PolicyGradient) and self.monitor != "val/loss":
            raise UsageError(
                f"BestCheckpoint: {type(module).__name__} validates val/loss, not {self.monitor}: set "
                "monitor: val/loss and mode: min (and the same in EarlyStopping)"
            )
        if isinstance(module, PolicyModule) and module.datamodule is not None:
            module.datamodule.problems("validation")  # an empty split is refused with its reason

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, also in a run folder that was moved: the best weights are looked for where it is now."""
        assert self.dirpath is not None

        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {name: here(state_dict[name]) for name in paths}
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"best_k_models": kept, "dirpath": self.dirpath})
