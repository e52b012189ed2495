"""Scores of whole programs by problems alone: a task and its settings made up on the way."""

from __future__ import annotations

from collections.abc import Sequence

from coderl.evaluation import Evaluation, EvaluationSettings, Grader, Task
from coderl.sandbox import ProgramRunner
from coderl.types import Judging, Problem


def score(
    problems: Sequence[Problem],
    programs: Sequence[Sequence[str]],
    runner: ProgramRunner,
    *,
    n: int,
    ks: tuple[int, ...] = (1, 5, 10),
    grading: Judging = "inline",
    timeout: float | None = None,
) -> Evaluation:
    """The scores of ``n`` programs a problem, or none, under the name of the problems' source."""
    name = problems[0].id.partition("/")[0].lower() if problems else "problems"
    settings = EvaluationSettings(n=n, ks=ks, grading=grading)
    return Grader(runner, settings).grade(Task(name, tuple(problems), timeout), programs)
