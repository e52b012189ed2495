"""A model through one or more tasks: loaded once, its answers kept on disk until the results are."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from coderl.errors import UsageError, UserError
from coderl.evaluation import Evaluator, Store
from coderl.model.provenance import prior_training
from coderl.rollout import GenerateEngine
from coderl.rollout.memory import largest_batch
from coderl.scores import Evaluation, results_name

if TYPE_CHECKING:
    from coderl.evaluation import EvaluationSettings, Task
    from coderl.model.policy import Policy
    from coderl.runs.model_ref import ModelRef
    from coderl.sandbox import Sandbox

Conclude = Callable[[dict[str, Evaluation], Path], None]
MOST_SEQUENCES = 128


class ModelRun:
    """A loaded model and how it is to be evaluated (see :func:`coderl.commands.evaluate.evaluate`).

    Args:
        named: Where its weights are.
        policy: The policy, not loaded yet.
        settings: How much is sampled, and how it is judged.
        device: Where the model goes.
        batch_size: Sequences decoded together. None: as many as free memory holds.

    Raises:
        UserError: The model cannot be loaded.
    """

    def __init__(
        self,
        named: ModelRef,
        policy: Policy,
        settings: EvaluationSettings,
        device: torch.device,
        batch_size: int | None = None,
    ) -> None:
        self.named, self.policy, self.settings, self.batch_size = named, policy, settings, batch_size
        self.sampling = settings.sampling(settings.max_length_generation or 0)
        if policy.prompt_form == "chat":
            _ = policy.tokenizer  # a chat template that is missing is said before weights are read
        policy.load(device, for_training=False)
        _require_positions(policy, settings.max_length_generation or 0)
        self.engine = GenerateEngine()
        self.engine.bind(policy)
        self.trained = prior_training(policy)

    def evaluate(self, tasks: Sequence[Task], sandbox: Sandbox, output: Path, conclude: Conclude) -> None:
        """Sample and score the tasks one after the other.

        Args:
            tasks: What is asked.
            sandbox: Runs the programs.
            output: Folder for the results and, until they are there, for the answers.
            conclude: Takes all evaluations, and the path that their results go to.

        Raises:
            UserError: Memory does not suffice, or a file cannot be written.
        """
        size = self.batch_size or largest_batch(self.policy, self.sampling.max_new_tokens, MOST_SEQUENCES)
        found: dict[str, Evaluation] = {}
        with ExitStack() as stack:
            stores = [stack.enter_context(self._store(task, output, size)) for task in tasks]
            for task, store in zip(tasks, stores, strict=True):
                found |= self._evaluate(task, store, sandbox)
            conclude(found, output / results_name(self.named.label, self.named.method))
            for store in stores:
                store.remove()

    @property
    def noted(self) -> dict[str, Any]:
        """What stands beside the scores."""
        return {
            "model": self.named.base,
            "adapter": self.named.adapter,
            "quantization": self.policy.quantization,
            "dtype": str(self.policy.base.dtype).removeprefix("torch."),
            "device": self.policy.device.type,
            "merged_copy": self.engine.samples_from_copy,
        }

    def _store(self, task: Task, output: Path, size: int) -> Store:
        """Where the answers to a task are kept: a file whose name follows from all that they follow from."""
        asked = (
            self.noted
            | asdict(self.sampling)
            | {
                "files": self.named.files(),
                "commit": getattr(self.policy.base.config, "_commit_hash", None),
                "gguf_file": self.policy.gguf_file,
                "task": task.name,
                "prompts": _digest([p.prompt for p in task.problems]),
                "n": self.settings.n,
                "seed": self.settings.seed,
                "form": self.policy.prompt_form,
                "versions": [str(torch.__version__), transformers.__version__],
            }
        )
        store = Store(output / f".{self.named.label}_{task.name}_{_digest(asked)[:12]}.jsonl", asked, size)
        if self.batch_size not in (None, store.size) and len(store.rows) < len(task.problems):
            store.restart(size)  # groups of another size have other random streams
        kept = f"; {len(store.rows)} problems are answered already" if store.rows else ""
        print(
            f"{task.name}: {len(task.problems)} problems, {self.settings.n} samples each, {store.size} "
            f"sequences at a time, quantization {self.policy.quantization}{kept}",
            file=sys.stderr,
        )
        self._warn_of_long_prompts(task)
        return store

    def _warn_of_long_prompts(self, task: Task) -> None:
        rooms = [self.sampling.max_tokens(len(self.policy.encode(problem))) for problem in task.problems]
        if cramped := sum(room < 1 for room in rooms):
            print(
                f"{task.name}: {cramped} of {len(rooms)} prompts leave no room for an answer in "
                f"--max_length_generation {self.sampling.max_length}: theirs are empty",
                file=sys.stderr,
            )

    def _evaluate(self, task: Task, store: Store, sandbox: Sandbox) -> dict[str, Evaluation]:
        self.engine.batch_size = store.size
        try:
            evaluator = Evaluator(self.engine, sandbox, self.settings, self.sampling, self.policy.prompt_form)
            return evaluator.run(
                task,
                store=store,
                contaminated=self.trained.among(task.problems) if self.trained else None,
                notes=self.noted | {"batch_size": store.size},
                progress=task.name,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{task.name}: {store.size} sequences of {self.sampling.max_new_tokens} tokens do not fit on "
                f"the GPU; give --batch_size {max(1, store.size // 2)} or a smaller --max_length_generation"
            ) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt("give the same command again to go on from here") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _require_positions(policy: Policy, longest: int) -> None:
    """Refuse sequences that leave a model's table of learned positions; computed ones have no end."""
    tables = ("wpe", "embed_positions", "position_embeddings")
    for name, module in policy.base.named_modules():
        known = getattr(module, "num_embeddings", None)
        if name.rpartition(".")[2] in tables and known is not None and known < longest:
            raise UsageError(
                f"{policy.model} knows {known} positions: give --max_length_generation {known} or less"
            )
