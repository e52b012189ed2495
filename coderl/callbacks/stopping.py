"""Early stopping on the reward or on the divergence from the reference."""

from __future__ import annotations

import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch.callbacks import Callback

from coderl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)

POINTS = 12
"""Means that the trend is a line through.

With 10 steps in each, a reward that rises by 0.2 in 320 steps under a step noise of 0.095, that of
``quickstart.yaml``, is 2.5 standard errors over a flat line. With 10 points it is 1.9, and four times as many
fits end too early.
"""


class Trend(NamedTuple):
    """A least-squares line through means of rewards.

    Attributes:
        rise: What the line rises by from its first point to its last, in units of the reward.
        error: Standard error of that, from the points' distances to the line.
    """

    rise: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float], window: int) -> Trend:
        """The line through the means of ``window`` values each; these are neighbours, and all are used.

        A point is the mean of a whole window, as single steps are no independent draws: neighbours share
        their weights, and the problems of an epoch.
        """
        points = np.reshape(values, (-1, window)).mean(axis=1)
        points -= points[0]  # so that rounding makes no rise of a constant
        x = np.arange(len(points)) - (len(points) - 1) / 2
        slope = float(x @ points / (x @ x))
        squares = float(np.square(points - points.mean() - slope * x).sum())
        error = math.sqrt(squares / (len(points) - 2) / float(x @ x))
        length = len(points) - 1
        return cls(slope * length, error * length)


class RewardStopping(Callback):
    """Ends the fit when the reward no longer rises, or the policy has moved too far from its reference.

    A step's reward is so noisy that one mean says little of another. So a straight line is fitted through the
    last 12 means of ``window`` steps each, by least squares, at each step. The reward rises where the line's
    rise, less ``min_delta``, is more than the standard error of that rise. After ``patience`` steps in a row
    without one the fit ends. With the defaults this takes 169 steps at least: fewer cannot tell a slow rise
    from none.

    Simulated with the step noise of ``quickstart.yaml`` (standard deviation 0.095) and the defaults: of fits
    whose reward rises evenly by 0.2 in 320 steps, 1 % end early. A rise by 0.2 in 100 steps that is followed
    by a plateau ends 152 steps after it begins (median; 251 in 95 % of fits), and one that is followed by a
    fall as steep after 103 (112). For a rise half as steep, or twice the noise (a quarter of the samples a
    step), a ``window`` of 16 is as safe.

    The limit on the KL divergence acts at once, on a single step: such a policy seldom recovers. The best
    mean of ``window`` steps, and the steps in a row without a rise, are logged as ``early_stopping/best`` and
    ``early_stopping/waited``.

    Args:
        monitor: The metric that should rise.
        window: Steps in a mean. The line covers 12 times as many.
        patience: Steps in a row without a rise before the fit ends. Null: no limit.
        min_delta: What the line must rise by, in units of the metric over its 12 windows.
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
        self.recent: deque[float] = deque(maxlen=POINTS * window)
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
        """Take in a step's value. Returns the reason to stop; empty to go on."""
        # NaN: no sample of the step got a verdict, which says nothing about the policy.
        if self.patience is None or math.isnan(value):
            return ""
        self.recent.append(value)
        if len(self.recent) >= self.window:  # a mean of fewer steps is noisier, and would set too high a best
            self.best = max(self.best, float(np.mean(list(self.recent)[-self.window :])))
        if not self._full:
            return ""
        trend = Trend.of(self.recent, self.window)
        self.waited = 0 if trend.rise - self.min_delta > trend.error else self.waited + 1
        if self.waited < self.patience:
            return ""
        return (
            f"{self.monitor} has not risen in {self.waited} steps: over the last {len(self.recent)} it went "
            f"by {trend.rise:+.3g} (standard error {trend.error:.2g})"
        )

    @property
    def _full(self) -> bool:
        """Whether there are values for the whole line."""
        return len(self.recent) == self.recent.maxlen

    def state_dict(self) -> dict[str, Any]:
        """The values below the line, the best mean and its window, and the steps in a row without a rise."""
        recent = list(self.recent)
        return {"recent": recent, "best": self.best, "waited": self.waited, "window": self.window}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what a checkpoint knows, under the settings of the present run."""
        self.recent.clear()
        self.recent.extend(state_dict["recent"])
        self.best = state_dict["best"]
        if state_dict.get("window", self.window) != self.window:  # a mean of other length is no best one
            values, window = list(self.recent), self.window
            means = [float(np.mean(values[i : i + window])) for i in range(len(values) - window + 1)]
            self.best = max(means, default=-math.inf)
        # Without values for a whole line nothing can have been waited for: the state is an older one, which
        # counted since the best mean, or this run's window is longer.
        self.waited = state_dict["waited"] if self._full else 0
