"""What a fit was worth: held-out pass@k before and after, the models, and a summary in plain words."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from coderl.algorithms import PolicyGradient, PolicyModule
from coderl.callbacks.checkpoint import BestCheckpoint
from coderl.callbacks.order import run_last
from coderl.callbacks.summary import (
    figures,
    limits_reached,
    percent,
    say,
    summarized_steps,
    versions,
)
from coderl.callbacks.summary import summary_text as fit_summary_text
from coderl.errors import UsageError
from coderl.evaluation import TASKS, Store, Task, load_task
from coderl.model.provenance import prior_training
from coderl.publish.artifacts import check_push, push_models, save_models, write_cards
from coderl.runs.folder import RunFolder, short_name
from coderl.scores import Evaluation, logged_scores, results_name, save_results, summary_text

if TYPE_CHECKING:
    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


class PostFit(Callback):
    """Saves adapter and merged model, measures held-out pass@k, and says what happened.

    Where :class:`BestCheckpoint` has kept better weights than the last ones, it is those.

    Args:
        evaluate: Measure pass@k before and after the fit, as ``model.evaluation`` says.
        split: Of which problems.
        tasks: Benchmarks to measure after the fit besides, such as mbpp and humaneval (see
            ``coderl evaluate --help``); with ``data.limit_test`` only so many problems of each.
        merge: Save the merged model, in ``{run folder}-merged``.
        next_command: What to suggest at the end.
        push_to_hub: Push adapter and merged model to the hub when all is done. What fails there is told, and
            the fit ends well.
        hub_model_id: The adapter's id there, ``owner/name``; the merged model's has ``-merged`` behind it. By
            default one's own name and the run's.
    """

    def __init__(
        self,
        evaluate: bool = True,
        split: str = "test",
        tasks: tuple[str, ...] = (),
        merge: bool = True,
        next_command: str | None = None,
        push_to_hub: bool = False,
        hub_model_id: str | None = None,
    ) -> None:
        self.evaluate, self.split, self.merge, self.next_command = evaluate, split, merge, next_command
        self.push_to_hub, self.hub_model_id = push_to_hub, hub_model_id
        self.tasks = tuple(tasks)
        self._loaded: list[Task] = []
        self.before: dict[str, Any] | None = None
        self.before_path: Path | None = None
        self.started = time.monotonic()
        self._resumed_at = 0
        self._reached: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock, and read the benchmarks: what is wrong with them is told before the fit."""
        self.started, self._resumed_at, self._reached = time.monotonic(), 0, {}
        if isinstance(pl_module, PolicyModule):
            prior_training(pl_module.policy)  # a damaged list is told now
        if stage == "fit":
            check_push(self.push_to_hub, self.hub_model_id)
        if stage == "fit" and self.tasks:
            self._load_tasks(trainer, pl_module)

    def _load_tasks(self, trainer: Trainer, module: LightningModule) -> None:
        """Read the benchmarks.

        Raises:
            UsageError: Nothing would be measured on them, or two have one name.
            UserError: One cannot be read, or is trained on.
        """
        if not (self.evaluate and isinstance(module, PolicyGradient)):
            why = f"{type(module).__name__} samples nothing" if self.evaluate else "evaluate is false"
            raise UsageError(
                f"PostFit: tasks are not measured, {why}: leave them out, and use coderl evaluate"
            )
        data = module.datamodule
        limit = data.limits["test"] if data is not None else None
        self._loaded = [load_task(name, limit) for name in self.tasks]
        names = [task.name for task in self._loaded]
        if len(set(names)) < len(names):
            raise UsageError(f"PostFit: two of the tasks have one name ({', '.join(names)}): rename a file")
        if data is not None:
            for task in self._loaded:
                data.guard(task.problems, f"the benchmark {task.name}")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note where the run is taken up, and whether it was at its end there."""
        self._resumed_at = checkpoint["global_step"]
        self._reached = limits_reached(trainer, checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conclude a fit that was killed between its last step and its summary.

        Where no step is left, Lightning calls no later hook before it takes the model off its device.
        """
        run_last(trainer, self)  # an evaluation that is killed finds last.ckpt written, and Ctrl-C heard
        if not self._reached:
            return
        limits = " and ".join(f"{name} {limit}" for name, limit in self._reached.items())
        flags = " ".join(f"--trainer.{name} N" for name in self._reached)
        say(f"training was already complete ({limits}); to train on, resume with a higher {flags}")
        summarized = summarized_steps(RunFolder.of(trainer).summary) >= self._resumed_at
        if not trainer.strategy.broadcast(summarized):
            self._finish(trainer, pl_module, self._resumed_at)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the policy as it is; a resumed run has that figure in its checkpoint."""
        if self.evaluate and self.before is None and isinstance(pl_module, PolicyGradient):
            split = self._split(trainer, pl_module)
            found = self._measure(trainer, pl_module, "before", split)
            self.before_path = self._save(trainer, pl_module, found, "before")
            self.before = figures(found[split.name])
            say(f"held-out pass@1 before training: {percent(self.before['pass@1'])}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Conclude."""
        self._finish(trainer, pl_module, trainer.global_step)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, steps: int) -> None:
        """Save first, then measure: an evaluation that fails costs no training."""
        assert isinstance(pl_module, PolicyModule), "PostFit needs a coderl algorithm"
        _take_best(trainer, pl_module)
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        paths: dict[str, str] = {}
        if trainer.is_global_zero:
            paths |= save_models(pl_module.policy, root, pl_module.training_record(), self.merge)
        found: dict[str, Evaluation] = {}
        if self.evaluate and isinstance(pl_module, PolicyGradient):
            found = self._measure_all(trainer, pl_module)
            path = self._save(trainer, pl_module, found, type(pl_module).__name__.lower())
            paths["evaluation"] = str(path)
            logged = list(logged_scores(found)) if _logs_to_wandb(trainer) else []
            say(summary_text(found, path, logged))
            for logger in trainer.loggers:
                logger.log_metrics(logged_scores(found) | {"global_step": float(steps)}, step=steps)
        for logger in trainer.loggers:
            logger.save()
        if before := _still_there(self.before_path, root):
            paths["before"] = str(before)
        metrics = Path(trainer.log_dir or root) / "metrics.csv"
        if metrics.is_file():
            paths["metrics"] = str(metrics)
        self._conclude(pl_module, RunFolder.of(trainer).summary, steps, paths, found)

    def _measure_all(self, trainer: Trainer, module: PolicyGradient) -> dict[str, Evaluation]:
        """The split's scores first, then the benchmarks' that ask anything else."""
        split = self._split(trainer, module)
        found = self._measure(trainer, module, "after", split)
        for task in self._loaded:
            if task != split:
                found |= self._measure(trainer, module, "after", task)
        return found

    def _split(self, trainer: Trainer, module: PolicyGradient) -> Task:
        """The split as a task, under a benchmark's name only if it is that benchmark."""
        data = module.datamodule
        assert data is not None, "PostFit measures a split of a CodeDataModule"
        problems = tuple(data.problems(self.split))
        source = data.source.name
        name = source if source in TASKS else problems[0].id.partition("/")[0].lower()
        task = Task(name, problems, module.sandbox.timeout)
        known = next((known for known in self._loaded if known.name == name), task)
        return task if known == task else replace(task, name=f"{name}_{self.split}")

    def _measure(
        self, trainer: Trainer, module: PolicyGradient, when: str, task: Task
    ) -> dict[str, Evaluation]:
        evaluator = module.evaluator()
        record = module.training_record() if when == "after" else prior_training(module.policy)
        contaminated = None if record is None else record.among(task.problems)
        with self._store(trainer, module, when, task) as store:
            label = f"pass@k {task.name} {when}"
            found = evaluator.run(task, store=store, contaminated=contaminated, progress=label)
            if store is not None:
                store.remove()
        return found

    def _store(
        self, trainer: Trainer, module: PolicyGradient, when: str, task: Task
    ) -> AbstractContextManager[Store | None]:
        """Keeps the answers, so that a resumed fit need not draw them again; none where ranks share the work.

        They follow from the weights and from how they are drawn, and so does the file's name.
        """
        if trainer.world_size > 1:
            return nullcontext()
        policy = module.policy
        asked = asdict(module.evaluation) | {
            "base": [policy.source, policy.quantization, str(policy.base.dtype), str(policy.device)],
            "longest": module.sampling.max_new_tokens,
            "samples_from_copy": module.engine.samples_from_copy,
            "prompts": [policy.encode(problem) for problem in task.problems],
        }
        digest = hashlib.sha256(json.dumps(asked).encode())
        for name, weight in policy.trainable().items():
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        key = digest.hexdigest()[:12]
        folder = Path(trainer.default_root_dir)
        return Store(folder / f".{task.name}_{when}_{key}.jsonl", {"key": key}, module.engine.batch_size)

    def _save(
        self, trainer: Trainer, module: PolicyGradient, found: dict[str, Evaluation], which: str
    ) -> Path:
        """Write results and programs, on the first process; ``which`` stands in the files' names."""
        root = Path(trainer.default_root_dir)
        path = root / results_name(short_name(module.policy.model), which)
        if trainer.is_global_zero:
            save_results(found, path)
        return path

    @rank_zero_only
    def _conclude(
        self,
        module: PolicyModule,
        target: Path,
        steps: int,
        paths: dict[str, str],
        found: dict[str, Evaluation],
    ) -> None:
        seconds = time.monotonic() - self.started
        scored = {name: figures(evaluation) for name, evaluation in found.items()}
        summary = {
            "method": type(module).__name__.lower(),
            "model": module.policy.model,
            "steps": steps,
            "seconds": round(seconds, 1),
            "before": self.before,
            "after": next(iter(scored.values()), None),
            "tasks": scored,
            "paths": paths,
            "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": versions(),
        }
        target.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_cards(paths, target.parent)
        pushed = push_models(paths, self.hub_model_id) if self.push_to_hub else {}
        say(fit_summary_text(summary | {"paths": paths | pushed}, target, self.next_command))

    def state_dict(self) -> dict[str, Any]:
        """The figures before training, and their file."""
        return {"before": self.before, "before_path": self.before_path and str(self.before_path)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The figures before training, which a resumed run can no longer measure."""
        self.before, path = state_dict["before"], state_dict.get("before_path")  # older checkpoints have none
        self.before_path = Path(path) if path else None


def _take_best(trainer: Trainer, module: PolicyModule) -> None:
    """Give the policy the weights that validated best, where they were kept."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, BestCheckpoint) or not callback.best_model_path:
            continue
        if not Path(callback.best_model_path).is_file():
            log.warning("%s is gone: the fit ends with the last weights", callback.best_model_path)
            continue
        checkpoint = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        score = f"{callback.monitor} {float(callback.best_model_score or 0):.3f}"
        step = checkpoint["global_step"]
        say(f"the weights of step {step} validated best ({score}): the fit ends with them")


def _still_there(path: Path | None, folder: Path) -> Path | None:
    """The file, or the one of its name in the run folder if that was moved since; None if it is gone."""
    places = (folder / path.name, path) if path else ()
    return next((place for place in places if place.is_file()), None)


def _logs_to_wandb(trainer: Trainer) -> bool:
    return any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
