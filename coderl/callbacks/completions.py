"""Logs sampled programs with their rewards and verdicts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from coderl.algorithms import PolicyGradient
from coderl.files import append_json_lines
from coderl.runs.folder import RunFolder

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from coderl.algorithms.step import Rollout

COLUMNS = ("rollout_step", "problem", "prompt", "program", "outcome", "reward", "message")


class CompletionTable(Callback):
    """Logs sampled programs with verdicts: to ``completions.jsonl`` in the run folder, to W&B as a table.

    Args:
        every_n_steps: Rollout steps between two entries; the first step is always one.
        rows: Samples per entry: the worst and the best of the step, as many of each. Those without a verdict
            (infrastructure errors) are left out.
    """

    def __init__(self, every_n_steps: int = 10, rows: int = 8) -> None:
        self.every_n_steps, self.rows = every_n_steps, rows

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step's samples, every ``every_n_steps``."""
        step = trainer.fit_loop.total_batch_idx + 1
        rollout = pl_module.rollout if isinstance(pl_module, PolicyGradient) else None
        if (step - 1) % self.every_n_steps or rollout is None:
            return
        table = self._table(rollout, step)
        append_json_lines(
            RunFolder.of(trainer).completions, [dict(zip(COLUMNS, row, strict=True)) for row in table]
        )
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):  # CSV and TensorBoard have no tables
                import wandb

                # A row of its own in W&B's history, so with both step counters: Lightning logs the metrics of
                # this step, counters among them, only after this hook.
                entry: dict[str, Any] = {"completions": wandb.Table(columns=list(COLUMNS), data=table)}
                logger.log_metrics(entry | {"rollout_step": step, "global_step": trainer.global_step})

    def _table(self, rollout: Rollout, step: int) -> list[list[Any]]:
        rewards = rollout.rewards.flatten().tolist()
        known = [pair for pair in zip(rewards, rollout.samples, strict=True) if not math.isnan(pair[0])]
        # By reward alone: samples themselves have no order.
        ranked = sorted(known, key=lambda pair: pair[0])
        half = max(self.rows // 2, 1)
        chosen = ranked if len(ranked) <= 2 * half else ranked[:half] + ranked[-half:]
        return [
            [
                step,
                s.problem.id,
                s.problem.prompt,
                s.program,
                str(s.execution.outcome),
                reward,
                s.execution.message,
            ]
            for reward, s in chosen
        ]
