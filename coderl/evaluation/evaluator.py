"""From a policy and a task to scores: one way for `coderl evaluate`, PostFit and validation."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from coderl.evaluation.grading import Grader
from coderl.evaluation.sampling import Answers, Store, groups
from coderl.problems.prompts import program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coderl.evaluation.settings import EvaluationSettings
    from coderl.evaluation.tasks import Task
    from coderl.problems.prompts import PromptForm
    from coderl.rollout.engine import RolloutEngine
    from coderl.sandbox import ProgramRunner
    from coderl.scores import Evaluation
    from coderl.types import Problem


def _single_process(value: Any, patience: float = 0.0) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """The processes that share the sampling of an evaluation; by default this one alone.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
        gather: Collective: takes this process's value, returns those of all, in order. Its second argument
            is by how many seconds the work before it may differ from process to process.
    """

    rank: int = 0
    count: int = 1
    gather: Callable[..., list[Any]] = _single_process


class Evaluator:
    """Samples answers to a task's problems, runs them, and scores them.

    Where several processes share it, each samples a part of the problems, and the first runs all programs.
    Every process gets the scores, which are those of one process alone.

    Args:
        engine: What samples; a policy is bound to it.
        runner: Runs the programs.
        settings: How much is sampled, and how it is judged.
        max_new_tokens: Longest completion, in tokens, where the settings say nothing of it.
        form: How the policy is asked; it decides how programs are made of answers.
        ranks: The processes that share the work.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        runner: ProgramRunner,
        settings: EvaluationSettings,
        max_new_tokens: int,
        form: PromptForm = "completion",
        ranks: Ranks = Ranks(),
    ) -> None:
        self.engine, self.settings = engine, settings
        self.sampling = settings.sampling(max_new_tokens)
        self.form, self.ranks = form, ranks
        self.grader = Grader(runner, settings)

    def run(
        self,
        task: Task,
        *,
        store: Store | None = None,
        contaminated: Sequence[str] | None = None,
        notes: Mapping[str, Any] | None = None,
        progress: str | None = None,
    ) -> dict[str, Evaluation]:
        """Evaluate a task.

        Args:
            task: The problems.
            store: Saves answers as they come, so that a killed evaluation can go on.
            contaminated: Ids of problems that the policy was trained on. None: not known.
            notes: Further settings to save beside the scores.
            progress: Label of a progress bar; None shows none.

        Returns:
            By the task's name; EvalPlus' tasks also have ``{name}_base``, scores by the original tests.
        """
        started = time.monotonic()
        texts = self.sample(task.problems, store=store, progress=progress)
        scores: dict[str, Evaluation] = {}
        if self.ranks.rank == 0:
            pairs = zip(task.problems, texts, strict=True)
            programs = [[program(problem, text, self.form) for text in row] for problem, row in pairs]
            settings = asdict(self.sampling) | {
                "seed": self.settings.seed,
                "form": self.form,
                "merged_copy": self.engine.samples_from_copy,
                **(notes or {}),
            }
            scores = self.grader.grade_task(
                task, programs, notes=settings, contaminated=contaminated, started=started
            )
        # The first runs all programs while the others wait: each may take its time limit.
        limit = (task.timeout or self.grader.runner.timeout) * len(task.problems) * self.settings.n
        return self.ranks.gather(scores, limit)[0]  # type: ignore[no-any-return]

    def sample(
        self, problems: Sequence[Problem], *, store: Store | None = None, progress: str | None = None
    ) -> list[list[str]]:
        """Sample ``settings.n`` answers to each problem. The caller's own random stream is left as it was.

        Args:
            problems: What to answer.
            store: Where groups are saved; those it holds are not drawn again.
            progress: Label of a progress bar with the time left; None shows none.

        Returns:
            Per problem, in order, ``n`` texts.
        """
        n, ranks, began = self.settings.n, self.ranks, time.monotonic()
        # Ranks must cut alike, and may have unequally much memory.
        size = store.size if store else min(ranks.gather(self.engine.sequences(problems, self.sampling)))
        parts = groups(problems, n, size)
        found: Answers = store.read(problems, n) if store else {}
        bar = tqdm(
            total=len(problems) * n,
            initial=len(found) * n,
            desc=progress,
            unit="sample",
            leave=False,
            disable=progress is None or ranks.rank > 0,
        )
        with bar:
            for number, members in enumerate(parts):
                if number % ranks.count != ranks.rank or all(i in found for i in members):
                    continue
                # The seed follows from the group's number alone: whichever rank samples it, before or after a
                # kill, the samples are the same.
                seed = random.Random(f"evaluation {self.settings.seed} {number}").getrandbits(63)
                drawn = self.engine.generate([problems[i] for i in members], n, self.sampling, seed=seed)
                texts = [completion.text for completion in drawn]
                new = {i: texts[place * n : (place + 1) * n] for place, i in enumerate(members)}
                found |= new
                if store:
                    store.add({problems[i].id: row for i, row in new.items()})
                bar.update(len(members) * n * ranks.count)
        for others in ranks.gather(found, 10 * (time.monotonic() - began)):
            found |= others
        return [found[i] for i in range(len(problems))]
