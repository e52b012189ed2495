"""Saves the models of a fit, measures held-out pass@k before and after it, and writes ``summary.json``."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from coderl.algorithms import PolicyGradient, PolicyModule
from coderl.callbacks.best_checkpoint import BestCheckpoint
from coderl.callbacks.last_step import TO_FOLLOW, LastStep
from coderl.errors import UsageError
from coderl.evaluation import Store, Task, load_task
from coderl.files import write_atomic
from coderl.model.provenance import prior_training
from coderl.publish.artifacts import check_push, push_models, save_models, write_cards
from coderl.runs.folder import METRICS, RunFolder, short_name
from coderl.runs.summary import fit_summary_text, summarized_steps, summary_gain, summary_scores
from coderl.runs.versions import installed_versions
from coderl.scores import Evaluation, logged_scores, results_name, save_results, summary_text
from coderl.scores.gain import scored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning import LightningModule, Trainer

log = logging.getLogger(__name__)


class PostFit(Callback):
    """Saves adapter and merged model, measures held-out pass@k, and prints a summary.

    With :class:`BestCheckpoint` these are of the weights that validated best, otherwise of the last ones.

    Args:
        evaluate: Measure pass@k before and after the fit, as ``model.evaluation`` says.
        split: Whose problems: ``test``, ``validation`` or ``train``.
        tasks: Benchmarks to measure after the fit besides, such as mbpp and humaneval (see
            ``coderl evaluate --help``); with ``data.limit_test`` only so many problems of each.
        merge: Save the merged model, in ``{run folder}-merged``.
        next_command: A command to suggest at the end.
        push_to_hub: Push adapter and merged model to the hub at the end. A push that fails is reported, and
            does not fail the fit.
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
        self._benchmarks: list[Task] = []
        self.before: dict[str, Any] | None = None
        self.before_path: Path | None = None
        self.started = time.monotonic()
        self._resumed_at = 0
        self._limits_reached: dict[str, int] = {}
        self._stopped_early = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock, and check what the end of the fit will need, so that errors come before it.

        Raises:
            UsageError: A benchmark cannot be measured, or the push has bad settings.
            UserError: A benchmark cannot be read or is trained on, or a list of training problems is damaged.
        """
        self.started, self._resumed_at, self._limits_reached = time.monotonic(), 0, {}
        self._stopped_early = False
        if isinstance(pl_module, PolicyModule):
            prior_training(pl_module.policy)
        if stage == "fit":
            check_push(self.push_to_hub, self.hub_model_id)
        if stage == "fit" and self.tasks:
            self._load_benchmarks(trainer, pl_module)

    def _load_benchmarks(self, trainer: Trainer, module: LightningModule) -> None:
        if not (self.evaluate and isinstance(module, PolicyGradient)):
            why = f"{type(module).__name__} samples nothing" if self.evaluate else "evaluate is false"
            raise UsageError(
                f"PostFit: tasks are not measured, {why}: leave them out, and use coderl evaluate"
            )
        data = module.datamodule
        limit = data.limits["test"] if data is not None else None
        self._benchmarks = [load_task(name, limit) for name in self.tasks]
        names = [task.name for task in self._benchmarks]
        if len(set(names)) < len(names):
            raise UsageError(f"PostFit: two of the tasks have one name ({', '.join(names)}): rename a file")
        if data is not None:
            for task in self._benchmarks:
                data.guard(task.problems, f"the benchmark {task.name}")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the step that the run resumes from, and the trainer's limits that it had reached by then."""
        self._resumed_at = checkpoint["global_step"]
        self._stopped_early = bool(checkpoint.get(TO_FOLLOW, {}).get("stopped_early"))
        # Lightning restores its loops after on_fit_start, the last hook in which the policy can be evaluated
        # where no step is left. So the progress is read from the checkpoint.
        # The module has settled it: an epoch whose last step was made is counted.
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        done = {"max_steps": self._resumed_at, "max_epochs": epochs}
        limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
        self._limits_reached = {k: n for k, n in limits.items() if n is not None and 0 <= n <= done[k]}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a fit that was killed between its last step and its summary."""
        # Behind all others: should the evaluation at the end be killed, last.ckpt is written already, and
        # Ctrl-C has been acted on. A new list, not a changed one: Lightning is iterating over the old one.
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        # Rank 0 decides for all: evaluating is collective, and other machines may not see its disk.
        summarized = summarized_steps(RunFolder.of(trainer).summary) >= self._resumed_at
        summarized = trainer.strategy.broadcast(summarized)
        if not self._limits_reached and self._stopped_early and not summarized:
            rank_zero_print("training had been stopped early, and is summarized; to train on, resume again")
            trainer.should_stop = True  # Lightning then begins no step
            self._finish(trainer, pl_module, self._resumed_at)
        if not self._limits_reached:
            return
        limits = " and ".join(f"{name} {limit}" for name, limit in self._limits_reached.items())
        flags = " ".join(f"--trainer.{name} N" for name in self._limits_reached)
        rank_zero_print(
            f"training was already complete ({limits}); to train on, resume with a higher {flags}"
        )
        # Where no step is left, this is the last hook before Lightning takes the model off its device.
        if not summarized:
            trainer._checkpoint_connector.restore_training_state()  # Lightning does so after this hook
            LastStep.of(trainer).catch_up(trainer)
            self._finish(trainer, pl_module, self._resumed_at)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate before training; a resumed run has those scores in its checkpoint, or none."""
        if self.before is not None or self._resumed_at:
            return
        if self.evaluate and isinstance(pl_module, PolicyGradient):
            split = self._split_task(pl_module)
            found, self.before_path = self._measure(trainer, pl_module, "before", [split])
            self.before = summary_scores(found[split.name])
            rank_zero_print(f"held-out pass@1 before training: {scored(self.before)}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, evaluate and summarize the trained policy."""
        LastStep.of(trainer).release_if_saved()
        self._finish(trainer, pl_module, trainer.global_step)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, steps: int) -> None:
        assert isinstance(pl_module, PolicyModule), "PostFit needs a coderl algorithm"
        _load_best_weights(trainer, pl_module)
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        paths: dict[str, str] = {}
        # Save first, then evaluate: should the evaluation fail, the trained weights are there.
        if trainer.is_global_zero:
            paths |= save_models(pl_module.policy, root, pl_module.training_record(), self.merge)
        found: dict[str, Evaluation] = {}
        if self.evaluate and isinstance(pl_module, PolicyGradient):
            split = self._split_task(pl_module)
            # A split that is a benchmark is not sampled twice.
            tasks = [split, *(task for task in self._benchmarks if task != split)]
            found, path = self._measure(trainer, pl_module, "after", tasks)
            paths["evaluation"] = str(path)
            to_wandb = any(isinstance(logger, WandbLogger) for logger in trainer.loggers)
            rank_zero_print(summary_text(found, path, list(logged_scores(found)) if to_wandb else []))
            for logger in trainer.loggers:
                logger.log_metrics(logged_scores(found) | {"global_step": float(steps)}, step=steps)
        for logger in trainer.loggers:
            logger.save()  # Lightning does so only after this hook, and metrics.csv is looked for below
        if before := _find_moved(self.before_path, root):
            paths["before"] = str(before)
        metrics = Path(trainer.log_dir or root) / METRICS
        if metrics.is_file():
            paths["metrics"] = str(metrics)
        self._summarize(pl_module, RunFolder.of(trainer).summary, steps, paths, found)

    def _measure(
        self, trainer: Trainer, module: PolicyGradient, when: str, tasks: Sequence[Task]
    ) -> tuple[dict[str, Evaluation], Path]:
        """Evaluate the tasks one after the other, and save the results. Returns these and their file."""
        found: dict[str, Evaluation] = {}
        with ExitStack() as stack:
            stores = [stack.enter_context(self._answer_store(trainer, module, when, task)) for task in tasks]
            for task, store in zip(tasks, stores, strict=True):
                found |= self._evaluate(module, when, task, store)
            path = self._save(trainer, module, found, when)
            # Only now: a fit that was killed before finds the answers to all tasks again.
            for store in stores:
                if store is not None:
                    store.remove()
        return found, path

    def _split_task(self, module: PolicyGradient) -> Task:
        """The split as a task, renamed where one of the benchmarks has its name and other problems."""
        data = module.datamodule
        assert data is not None, "PostFit measures a split of a CodeDataModule"
        problems = tuple(data.problems(self.split))
        task = Task.of(problems, module.sandbox.timeout, data.source.name)
        benchmark = next((known for known in self._benchmarks if known.name == task.name), task)
        return task if benchmark == task else replace(task, name=f"{task.name}_{self.split}")

    def _evaluate(
        self, module: PolicyGradient, when: str, task: Task, store: Store | None
    ) -> dict[str, Evaluation]:
        record = module.training_record() if when == "after" else prior_training(module.policy)
        contaminated = None if record is None else record.among(task.problems)
        label = f"pass@k {task.name} {when}"
        return module.evaluator().run(task, store=store, contaminated=contaminated, progress=label)

    def _answer_store(
        self, trainer: Trainer, module: PolicyGradient, when: str, task: Task
    ) -> AbstractContextManager[Store | None]:
        """Keeps the answers on disk, so that a resumed fit need not sample again. None with several ranks."""
        module.bind()  # whether answers are from a copy of the weights is known once the engine has them
        if trainer.world_size > 1:
            return nullcontext()
        policy = module.policy
        # The file's name is a hash of everything that the answers depend on: weights, prompts, settings. So a
        # fit that was resumed with other ones does not take them for its own.
        asked = asdict(module.evaluation) | {
            "base": [policy.source, policy.quantization, str(policy.base.dtype), str(policy.device)],
            "longest": module.sampling.max_new_tokens,
            "samples_from_copy": module.engine.samples_from_copy,
            "prompts": [policy.encode(problem) for problem in task.problems],
        }
        digest = hashlib.sha256(json.dumps(asked).encode())
        for name, weight in policy.trainable().items():
            digest.update(name.encode())
            # As bytes: numpy has no bfloat16.
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        key = digest.hexdigest()[:12]
        path = RunFolder.of(trainer).unfinished_answers(task.name, when, key)
        sampling = module.evaluation.sampling(module.sampling.max_new_tokens)
        return Store(path, {"key": key}, module.engine.sequences(task.problems, sampling))

    def _save(
        self, trainer: Trainer, module: PolicyGradient, found: dict[str, Evaluation], when: str
    ) -> Path:
        """Write results and programs on rank 0, in files named after the algorithm or as ``before``."""
        root = Path(trainer.default_root_dir)
        which = when if when == "before" else type(module).__name__.lower()
        path = root / results_name(short_name(module.policy.model), which)
        if trainer.is_global_zero:
            save_results(found, path)
        return path

    @rank_zero_only
    def _summarize(
        self,
        module: PolicyModule,
        target: Path,
        steps: int,
        paths: dict[str, str],
        found: dict[str, Evaluation],
    ) -> None:
        """Write ``summary.json`` and the model cards, push, and print what was done."""
        seconds = time.monotonic() - self.started
        tasks = {name: summary_scores(evaluation) for name, evaluation in found.items()}
        earlier = Path(paths["before"]) if "before" in paths else None
        gain = summary_gain(self.before, earlier, next(iter(found.values()), None))
        summary = {
            "method": type(module).__name__.lower(),
            "model": module.policy.model,
            "steps": steps,
            "resumed_at": self._resumed_at,
            "seconds": round(seconds, 1),
            "before": self.before,
            "after": next(iter(tasks.values()), None),
            **gain,
            "tasks": tasks,
            "paths": paths,
            "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": installed_versions(),
        }
        write_atomic(target, json.dumps(summary, indent=2) + "\n")
        write_cards(paths, target.parent)  # after summary.json, which the cards quote
        pushed = push_models(paths, self.hub_model_id) if self.push_to_hub else {}
        rank_zero_print(fit_summary_text(summary | {"paths": paths | pushed}, target, self.next_command))

    def state_dict(self) -> dict[str, Any]:
        """The scores before training, and the path of their results file."""
        return {"before": self.before, "before_path": self.before_path and str(self.before_path)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores before training, which a resumed run can no longer measure."""
        self.before, path = state_dict["before"], state_dict.get("before_path")  # not in older checkpoints
        self.before_path = Path(path) if path else None


def _load_best_weights(trainer: Trainer, module: PolicyModule) -> None:
    """Load the weights that validated best into the policy, if there is a :class:`BestCheckpoint`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, BestCheckpoint) or not callback.best_model_path:
            continue
        if not Path(callback.best_model_path).is_file():
            log.warning("%s is gone: the fit ends with the last weights", callback.best_model_path)
            continue
        checkpoint = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
        # Not strict: checkpoints hold only the parameters that train.
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        score = f"{callback.monitor} {float(callback.best_model_score or 0):.3f}"
        step = checkpoint["global_step"]
        rank_zero_print(f"the weights of step {step} validated best ({score}): the fit ends with them")


def _find_moved(path: Path | None, folder: Path) -> Path | None:
    """The file, in the run folder (it may have been moved) or at its old path; None if it is gone."""
    places = (folder / path.name, path) if path else ()
    return next((place for place in places if place.is_file()), None)


@rank_zero_only
def rank_zero_print(text: str) -> None:
    """Print at once, on rank 0 only."""
    print(text, flush=True)
