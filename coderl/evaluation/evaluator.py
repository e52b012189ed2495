"""From a policy and a task to scores: what `coderl evaluate`, PostFit and validation all call."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from coderl.errors import UsageError
from coderl.evaluation.grading import Judging, score
from coderl.evaluation.sampling import Store, draw
from coderl.problems.prompts import program
from coderl.rollout import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coderl.evaluation.grading import Runner
    from coderl.evaluation.tasks import Task
    from coderl.problems.prompts import PromptForm
    from coderl.rollout import RolloutEngine
    from coderl.scores.results import Evaluation


@dataclass
class EvaluationSettings:
    """How held-out pass@k is measured (the original recipe's values).

    Args:
        n: Samples per problem.
        ks: The k of pass@k. A k over n is reported as missing.
        temperature: Of sampling; 0 is greedy.
        top_p: Nucleus sampling, allowed here since nothing is trained on it.
        max_length_generation: Longest prompt with its completion, in tokens, as the harness counts; null
            takes the training's longest completion.
        seed: Of the samples, so that before and after are drawn alike.
        grading: inline is the harness's way; auto reaches verdicts that cannot be forged, and names the
            samples that inline grading judges otherwise.
    """

    n: int = 15
    ks: tuple[int, ...] = (1, 5, 10)
    temperature: float = 0.2
    top_p: float = 0.95
    max_length_generation: int | None = None
    seed: int = 0
    grading: Judging = "inline"

    def __post_init__(self) -> None:
        counts = {
            "n": self.n,
            "max_length_generation": self.max_length_generation,
            "k": min(self.ks, default=1),
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise UsageError(f"evaluation: {name} is {count}; give 1 or more")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UsageError(
                f"evaluation: temperature is {self.temperature} and top_p {self.top_p}; give 0 or more, and "
                "above 0 up to 1"
            )

    def sampling(self, max_new_tokens: int) -> Sampling:
        """How completions are drawn.

        Args:
            max_new_tokens: Longest completion, in tokens, where no ``max_length_generation`` says it.
        """
        longest = self.max_length_generation
        return Sampling(self.temperature, self.top_p, longest or max_new_tokens, longest)


def evaluate(
    task: Task,
    engine: RolloutEngine,
    sandbox: Runner,
    settings: EvaluationSettings,
    sampling: Sampling,
    *,
    form: PromptForm = "completion",
    noted: Mapping[str, Any] | None = None,
    contaminated: Sequence[str] | None = None,
    store: Store | None = None,
    progress: str | None = None,
    rank: int = 0,
    gathered: Callable[[Any], list[Any]] | None = None,
) -> dict[str, Evaluation]:
    """Sample answers to a task's problems, run them, and score them.

    Where several processes call it, each samples a part, and the first runs all programs. Every process gets
    the scores, which are those of one process alone.

    Args:
        task: What is asked.
        engine: What samples; a policy is bound to it.
        sandbox: Runs the programs.
        settings: How much is sampled, and how it is judged.
        sampling: How completions are drawn.
        form: How the policy asks; it decides how programs are made of answers.
        noted: What else should stand beside the scores.
        contaminated: Ids of problems that the policy was trained on. None: nobody knows.
        store: Keeps the answers under way, so that a killed evaluation can go on.
        progress: Label of a progress bar; None shows none.
        rank: Number of this process.
        gathered: Gives the values of every process, in order. None: this one is alone.

    Returns:
        By the task's name; EvalPlus' tasks also have ``{name}_base``, scores by the original tests.
    """
    started = time.monotonic()
    texts = draw(
        task.problems,
        settings.n,
        sampling,
        engine,
        seed=settings.seed,
        store=store,
        progress=progress,
        rank=rank,
        gathered=gathered,
    )
    drawn = asdict(sampling) | {"seed": settings.seed, "form": form, **(noted or {})}
    scores: dict[str, Evaluation] = {}
    if rank == 0:
        programs = [
            [program(p, text, form) for text in row] for p, row in zip(task.problems, texts, strict=True)
        ]
        scores = score_task(
            task, programs, sandbox, settings, noted=drawn, contaminated=contaminated, started=started
        )
    return gathered(scores)[0] if gathered else scores


def score_task(
    task: Task,
    programs: Sequence[Sequence[str]],
    sandbox: Runner,
    settings: EvaluationSettings,
    *,
    noted: Mapping[str, Any] | None = None,
    contaminated: Sequence[str] | None = None,
    started: float | None = None,
) -> dict[str, Evaluation]:
    """Score whole programs by a task's tests, and by its original ones where it has both.

    Args:
        task: What was asked.
        programs: Per problem of the task, ``settings.n`` whole programs, or none at all.
        sandbox: Runs them.
        settings: How they are judged.
        noted: What should stand beside the scores.
        contaminated: Ids of problems that the policy was trained on. None: nobody knows.
        started: Monotonic time, in seconds, from which the wall time counts. None: now.

    Returns:
        By the task's name, and ``{name}_base``.
    """
    ks = sorted({1, *settings.ks})  # pass@1 is what summaries speak of
    parts = {task.name: {p.id: p for p in task.problems}}
    if task.base:
        parts[f"{task.name}_base"] = {p.id: p for p in task.base}
    rows = {p.id: row for p, row in zip(task.problems, programs, strict=True)}
    return {
        name: score(
            list(problems.values()),
            [rows[key] for key in problems],
            sandbox,
            n=settings.n,
            ks=ks,
            task=name,
            grading=settings.grading,
            timeout=task.timeout,
            settings=noted,
            contaminated=None if contaminated is None else [key for key in contaminated if key in problems],
            started=started,
        )
        for name, problems in parts.items()
    }
