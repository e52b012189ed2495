"""Evaluates a model or saved programs on the tasks that the command line names."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from coderl.errors import UsageError, UserError
from coderl.evaluation import EvaluationSettings, Evaluator, Grader, Store, Task, load_task
from coderl.evaluation.tasks import TASKS
from coderl.files import read_json
from coderl.model.architectures import context_length
from coderl.model.loading import read_config
from coderl.model.provenance import prior_training
from coderl.review import KeptPasses, look, summary_lines
from coderl.rollout import default_engine
from coderl.scores import Evaluation, results_name

if TYPE_CHECKING:
    from coderl.model.policy import Policy
    from coderl.runs.model_ref import ModelRef
    from coderl.sandbox import ProgramRunner

LONGEST = 2048
"""Tokens of a prompt with its completion, at most, for a model that reads as many."""

Save = Callable[[dict[str, Evaluation], Path], None]
"""Saves the evaluations to the results file of that path, and prints them."""


def load_tasks(names: str, limit: int | None, timeout: float | None) -> list[Task]:
    """The tasks that are named, each once.

    Args:
        names: Names of tasks or paths of ``.jsonl`` files, with commas between.
        limit: Only the first so many problems of each. None: all.
        timeout: Seconds for a program with all its tests. None: the task's own.

    Raises:
        UsageError: No task is named, one does not exist, or two results would have the same name.
        UserError: A task's data cannot be read.
    """
    given = (name.strip() for name in names.split(","))
    once = dict.fromkeys(name.lower() if name.lower() in TASKS else name for name in given)
    loaded = [load_task(name, limit) for name in once if name]
    if not loaded:
        raise UsageError("no task: give --tasks a name, such as mbpp")
    results = ["config", *(name for t in loaded for name in (t.name, f"{t.name}_base")[: 2 if t.base else 1])]
    if twice := [name for name, count in Counter(results).items() if count > 1]:
        raise UsageError(f"two results would be called {twice[0]!r}: rename that .jsonl file")
    return loaded if timeout is None else [replace(task, timeout=timeout) for task in loaded]


def warn_of_faults(tasks: Sequence[Task], runner: ProgramRunner, chat: bool) -> None:
    """Name the problems of one's own files whose tests or solutions are at fault.

    They count like the others, so that scores are shares of the same problems for everybody.
    """
    for task in tasks:
        if task.name not in TASKS:
            found = look(task.problems, runner, "chat" if chat else "completion", KeptPasses(), task.name)
            for line in summary_lines(found):
                print(f"{task.name}: counted all the same: {line}", file=sys.stderr)


def score_generations(
    path: Path, tasks: Sequence[Task], runner: ProgramRunner, settings: EvaluationSettings
) -> dict[str, Evaluation]:
    """Score saved generations, of coderl or of bigcode-evaluation-harness.

    Args:
        path: JSON: a list with, per problem of the task, a list of whole programs.
        tasks: The one task that they answer.
        runner: Runs them.
        settings: How they are graded; the number of samples is taken from the file.

    Raises:
        UsageError: There is more than one task.
        UserError: The file cannot be read, or does not fit the task.
    """
    if len(tasks) != 1:
        raise UsageError("--load_generations_path scores one task: give --tasks its name")
    programs = _generations(path)
    task, count = tasks[0], len(programs)
    if count != len(task.problems):
        hint = f"; --limit {count} scores the first {count}" if count < len(task.problems) else ""
        raise UserError(
            f"{path} answers {count} problems, {task.name} has {len(task.problems)}: give the task that it "
            f"was made for{hint}"
        )
    sizes = sorted({len(row) for row in programs} - {0})
    if len(sizes) != 1:
        found = f"between {sizes[0]} and {sizes[-1]}" if sizes else "no"
        raise UserError(f"{path} has {found} programs for a problem: each is to have as many as the others")
    settings = replace(settings, n=sizes[0])
    print(f"{task.name}: running {count * sizes[0]} programs", file=sys.stderr)
    return Grader(runner, settings).grade_task(task, programs, notes={"generations": str(path)})


class ModelRun:
    """A loaded model and how it is to be evaluated (see :func:`coderl.commands.evaluate.evaluate`).

    Args:
        ref: Where its weights are.
        policy: The policy, not loaded yet.
        settings: How to sample and to grade.
        device: Where the model goes.
        batch_size: Sequences decoded together, at most. None: as many as free memory holds.

    Raises:
        UserError: The model cannot be loaded.
    """

    def __init__(
        self,
        ref: ModelRef,
        policy: Policy,
        settings: EvaluationSettings,
        device: torch.device,
        batch_size: int | None = None,
    ) -> None:
        self.ref, self.policy, self.batch_size = ref, policy, batch_size
        known = context_length(read_config(policy.source)) or LONGEST
        longest = settings.max_length_generation or min(LONGEST, known)
        policy.require_context(0, longest, "give --max_length_generation {known} or less")
        self.settings = replace(settings, max_length_generation=longest)
        self.sampling = self.settings.sampling(longest)
        if policy.prompt_form == "chat":
            _ = policy.tokenizer  # fails without a chat template, before weights are loaded
        policy.load(device, for_training=False)
        for line in policy.notes():
            print(line, file=sys.stderr)
        self.engine = default_engine()
        self.engine.bind(policy)
        self.training_record = prior_training(policy)

    def evaluate(self, tasks: Sequence[Task], runner: ProgramRunner, output: Path, save: Save) -> None:
        """Sample and score the tasks one after the other.

        Args:
            tasks: Their problems are sampled for.
            runner: Runs the programs.
            output: Folder for the results and, until these are saved, for the answers.
            save: Called with all evaluations and the path of their results file.

        Raises:
            UserError: Memory does not suffice, or a file cannot be written.
        """
        every = [problem for task in tasks for problem in task.problems]
        size = self.batch_size or self.engine.sequences(every, self.sampling)
        found: dict[str, Evaluation] = {}
        with ExitStack() as stack:
            stores = [stack.enter_context(self._store(task, output, size)) for task in tasks]
            for task, store in zip(tasks, stores, strict=True):
                found |= self._evaluate(task, store, runner)
            save(found, output / results_name(self.ref.label, self.ref.method))
            # Only now: where saving fails, the same command finds the answers again.
            for store in stores:
                store.remove()

    @property
    def notes(self) -> dict[str, Any]:
        """Facts about the model that are saved beside its scores."""
        return {
            "model": self.ref.base,
            "adapter": self.ref.adapter,
            "quantization": self.policy.quantization,
            "dtype": str(self.policy.base.dtype).removeprefix("torch."),
            "device": self.policy.device.type,
        }

    def _store(self, task: Task, output: Path, size: int) -> Store:
        """The file that keeps the answers to a task until its results are saved.

        Its name has a hash of everything that decides the answers: only the same evaluation goes on from it.
        """
        asked = (
            self.notes
            | asdict(self.sampling)
            | {
                "files": self.ref.files(),
                "commit": getattr(self.policy.base.config, "_commit_hash", None),
                "merged_copy": self.engine.samples_from_copy,
                "gguf_file": self.policy.gguf_file,
                "task": task.name,
                "prompts": _digest([p.prompt for p in task.problems]),
                "n": self.settings.n,
                "seed": self.settings.seed,
                "form": self.policy.prompt_form,
                "versions": [str(torch.__version__), transformers.__version__],
            }
        )
        store = Store(output / f".{self.ref.label}_{task.name}_{_digest(asked)[:12]}.jsonl", asked, size)
        if self.batch_size not in (None, store.size) and len(store.rows) < len(task.problems):
            store.restart(size)  # seeds are set for each group, so groups of another size have other samples
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

    def _evaluate(self, task: Task, store: Store, runner: ProgramRunner) -> dict[str, Evaluation]:
        self.engine.batch_size = store.size
        try:
            longest, form = self.sampling.max_new_tokens, self.policy.prompt_form
            evaluator = Evaluator(self.engine, runner, self.settings, longest, form)
            return evaluator.run(
                task,
                store=store,
                contaminated=self.training_record.among(task.problems) if self.training_record else None,
                notes=self.notes | {"batch_size": store.size},
                progress=task.name,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("give the same command again to go on from here") from None


def _generations(path: Path) -> list[list[str]]:
    form = "it is to be a list with a list of whole programs for each problem"
    found: list[list[str]] = read_json(path, form, list)
    for number, row in enumerate(found):
        if not isinstance(row, list) or not all(isinstance(program, str) for program in row):
            raise UserError(f"{path}: entry {number} is not a list of programs; {form}")
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
