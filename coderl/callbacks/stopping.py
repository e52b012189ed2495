"""Early stopping on the reward or on the divergence from the reference."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from coderl.errors import UsageError

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


class RewardStopping(Callback):
    """Ends the fit when the reward has stopped rising, or the policy has moved too far from its reference.

    A step's reward is noisy, so means over ``window`` steps are compared. The limit on the KL divergence acts
    at once, on a single step: such a policy seldom recovers. The best mean and the steps since then are
    logged as ``early_stopping/best`` and ``early_stopping/waited``.

    Args:
        monitor: The metric that should rise.
        window: Steps in the running mean.
        patience: Steps without a better mean before the fit ends. Null: no limit.
        min_delta: By how much a mean must exceed the best one to count as better, in units of the metric.
        max_kl: The fit ends when a step's mean ``policy/kl`` is over this, nats per token. Null: no limit.
    """

    def __init__(
        self,
        monitor: str = "reward/mean",
        window: int = 10,
        patience: int | None = 50,
        min_delta: float = 0.0,
        max_kl: float | None = None,
    ) -> None:
        if window < 1 or (patience is not None and patience < 1):
            raise UsageError("RewardStopping: window and patience count steps: give 1 or more")
        self.monitor, self.window, self.patience = monitor, window, patience
        self.min_delta, self.max_kl = min_delta, max_kl
        self.recent: deque[float] = deque(maxlen=window)
        self.best, self.waited = -math.inf, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse ``max_kl`` where no divergence is measured."""
        if self.max_kl is not None and getattr(pl_module, "kl_coefficient", None) == 0:
            raise UsageError(
                "RewardStopping: max_kl needs policy/kl, which is not measured while model.kl_coefficient "
                "is 0: raise that, or leave max_kl out"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the step's metrics with the limits."""
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            known = ", ".join(sorted(k for k in metrics if "/" in k))
            raise UsageError(f"RewardStopping: no metric {self.monitor!r}; there are {known}")
        kl = float(metrics.get("policy/kl", math.nan))  # NaN is above no limit
        if self.max_kl is not None and kl > self.max_kl:
            reason = f"policy/kl {kl:.4g} is over max_kl {self.max_kl}"
        else:
            reason = self._update(float(metrics[self.monitor]))
        self._log(pl_module)
        # All ranks must leave the loop at the same step: one that went on would wait for the others forever.
        if trainer.strategy.reduce_boolean_decision(bool(reason), all=False):
            log.info("stopping early: %s", reason or "another rank's metrics")
            trainer.should_stop = True

    def _log(self, module: LightningModule) -> None:
        """Log ``early_stopping/waited``, and ``early_stopping/best`` once a whole window has a mean."""
        if self.patience is None:
            return
        known = {"best": self.best} if math.isfinite(self.best) else {}
        module.log_dict({f"early_stopping/{name}": v for name, v in {**known, "waited": self.waited}.items()})

    def _update(self, value: float) -> str:
        """Take a step's value into the running mean. Returns the reason to stop; empty to go on."""
        # NaN: no sample of the step got a verdict, which says nothing about the policy.
        if self.patience is None or math.isnan(value):
            return ""
        self.recent.append(value)
        if len(self.recent) < self.window:  # a mean of fewer steps is noisier, and would set too high a best
            return ""
        mean = sum(self.recent) / len(self.recent)
        if mean > self.best + self.min_delta:
            self.best, self.waited = mean, 0
            return ""
        self.waited += 1
        return f"{self.monitor} has not risen in {self.waited} steps" if self.waited >= self.patience else ""

    def state_dict(self) -> dict[str, Any]:
        """The running mean's values, the best mean, and the steps since then."""
        return {"recent": list(self.recent), "best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the running mean, the best one and the steps since then."""
        self.recent = deque(state_dict["recent"], maxlen=self.window)
        self.best, self.waited = state_dict["best"], state_dict["waited"]
