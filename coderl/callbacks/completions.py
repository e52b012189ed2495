"""Logs what was sampled: all to a compressed file, and some, of some steps, to a table for the eye."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from coderl.algorithms import PolicyGradient
from coderl.errors import first_line
from coderl.runs.folder import RunFolder
from coderl.runs.samples import STEP, append_samples, append_whole, drop_samples

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

    from coderl.algorithms.step import Rollout

log = logging.getLogger(__name__)

COLUMNS = (STEP, "problem", "prompt", "program", "outcome", "reward", "message", "shown")


class CompletionTable(Callback):
    """Logs all samples to ``samples.jsonl.gz`` in the run folder, and some to ``completions.jsonl`` and W&B.

    A line of ``samples.jsonl.gz`` is a sample: its step, rank, group (those of a refill come after the
    batch's), problem, reward and what each reward gave, advantage (mean over its tokens, as trained on; 0
    where it was left out, null where its reward is unknown), length in tokens, whether it finished, outcome,
    message and text. Further ranks write ``samples-rank1.jsonl.gz`` and so on. A resumed fit cuts off the
    steps that it repeats.

    Args:
        every_n_steps: Rollout steps between two entries of the table; the first step is always one.
        rows: Samples per entry: the worst and the best of the step, as many of each, beside its first, which
            nobody has chosen. Those without a verdict (infrastructure errors) are left out.
        keep_all: Whether all samples are logged. The embedded model's, of 86 characters, took 20 bytes each.
    """

    def __init__(self, every_n_steps: int = 10, rows: int = 8, keep_all: bool = True) -> None:
        self.every_n_steps, self.rows, self.keep_all = every_n_steps, rows, keep_all
        self._has_written = self._has_warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew: the file may hold steps that this fit repeats."""
        self._has_written = self._has_warned = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the step's samples, and every ``every_n_steps`` an entry of the table."""
        if not isinstance(pl_module, PolicyGradient) or pl_module.rollout is None:
            return
        step = trainer.fit_loop.total_batch_idx + 1
        folder = RunFolder.of(trainer)
        table = []
        if trainer.is_global_zero and (step - 1) % self.every_n_steps == 0:
            table = _table(pl_module.rollout, step, self.rows)
        try:
            if self.keep_all:
                self._log_all(folder, pl_module, step)
            if table:
                lines = "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in table)
                append_whole(folder.completions, lines.encode("ascii"))
        except OSError as error:
            if not self._has_warned:
                log.warning(
                    "samples cannot be written to %s (%s): the fit goes on, and steps will be missing there; "
                    "make room, or set the CompletionTable's keep_all: false",
                    folder.path,
                    error.strerror or first_line(error),
                )
            self._has_warned = True
        for logger in trainer.loggers if table else ():
            if isinstance(logger, WandbLogger):  # CSV and TensorBoard have no tables
                import wandb

                # A row of its own in W&B's history, so with both step counters: Lightning logs the metrics of
                # this step, counters among them, only after this hook.
                entry: dict[str, Any] = {"completions": wandb.Table(columns=list(COLUMNS), data=table)}
                logger.log_metrics(entry | {STEP: step, "global_step": trainer.global_step})

    def _log_all(self, folder: RunFolder, module: PolicyGradient, step: int) -> None:
        """Append the step's samples of this rank; the first time, steps that the fit repeats go before."""
        rank, ranks = module.trainer.global_rank, module.trainer.world_size
        path = folder.samples(rank)
        if not self._has_written:
            # Now, and not when the fit begins: a fit that fails before has repeated nothing.
            dropped = drop_samples(path, step)
            # Files of ranks that an earlier start had and this one has not.
            further = folder.further_samples(ranks) if rank == 0 else []
            dropped += sum(drop_samples(one, step) for one in further)
            if dropped:
                log.info("%s: steps from %d on are sampled again, and replaced", path, step)
            self._has_written = True
        assert module.rollout is not None
        rows, group = [], 0
        for rollout in (module.rollout, *module.refilled):
            rows += _rows(rollout, step, rank, group)
            group += len(rollout.groups)
        append_samples(path, rows)


def _rows(rollout: Rollout, step: int, rank: int, first_group: int) -> list[dict[str, Any]]:
    """All samples of a rollout; its groups are counted from ``first_group``."""
    size, rewards = rollout.rewards.shape[1], rollout.rewards.flatten().tolist()
    advantages = rewards if rollout.advantages is None else rollout.advantages.flatten().tolist()
    return [
        {
            STEP: step,
            "rank": rank,
            "group": first_group + i // size,
            "problem": sample.problem.id,
            "reward": _figure(rewards[i]),
            "rewards": {name: _figure(values[i]) for name, values in rollout.terms.items()},
            "advantage": None if rollout.advantages is None else _figure(advantages[i]),
            "length": len(sample.completion.ids),
            "finished": sample.completion.finished,
            "outcome": sample.execution.outcome,
            "message": sample.execution.message,
            "text": sample.completion.text,
        }
        for i, sample in enumerate(rollout.samples)
    ]


def _figure(value: float) -> float | None:
    """A value with six digits, as float32 has no more; None for NaN, which JSON does not know."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def _table(rollout: Rollout, step: int, rows: int) -> list[list[Any]]:
    """The first, the worst and the best samples of known reward, in rows of :data:`COLUMNS`."""
    known = [
        (reward, s)
        for reward, s in zip(rollout.rewards.flatten().tolist(), rollout.samples, strict=True)
        if not math.isnan(reward)
    ]
    ranked = sorted(range(len(known)), key=lambda i: known[i][0])
    half = max(rows // 2, 1)
    worst, best = ranked[: min(half, (len(ranked) + 1) // 2)], ranked[-half:]
    chosen = dict.fromkeys([0] if known else [], "first")
    for places, shown in ((worst, "worst"), (best, "best")):
        for place in places:
            chosen.setdefault(place, shown)
    return [
        [
            step,
            s.problem.id,
            s.problem.prompt,
            s.program,
            s.execution.outcome,
            reward,
            s.execution.message,
            how,
        ]
        for (reward, s), how in ((known[place], how) for place, how in chosen.items())
    ]
