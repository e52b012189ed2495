"""Checkpoint of the weights that validated best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coderl.algorithms import PolicyGradient, PolicyModule
from coderl.callbacks.checkpoint import Checkpoint
from coderl.errors import UsageError
from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer


class BestCheckpoint(Checkpoint):
    """Keeps the weights that validated best, in ``checkpoints/best.ckpt``; the fit ends with them.

    :class:`PostFit` saves and evaluates these weights in place of the last ones.

    Args:
        monitor: The validation metric: ``val/pass@1``, ``val/test_pass_rate``, ``val/success_rate`` ...
        mode: Whether more of it is better (``max``) or less (``min``).
    """

    def __init__(self, monitor: str = "val/pass@1", mode: str = "max") -> None:
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename="best",
            save_top_k=1,
            every_n_epochs=1,
            # At each validation, not at the epoch's end: an epoch may hold several validations, or none.
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write beside the other checkpoints; refuse a fit without validation.

        Raises:
            UsageError: Validation is switched off, or logs another metric.
            UserError: There are no problems to validate on.
        """
        # Before super().setup, which would choose Lightning's own folder.
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
            module.datamodule.problems("validation")  # raises UserError with the reason of an empty split

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score; paths in the state are taken to lie in the present run folder."""
        assert self.dirpath is not None

        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        # Lightning drops the best score where the state names another folder than `dirpath`, and would keep
        # worse weights as best in a run folder that was moved.
        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {name: here(state_dict[name]) for name in paths}
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"best_k_models": kept, "dirpath": self.dirpath})
