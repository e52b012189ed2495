"""Evaluation one can publish: sample a benchmark's problems, run the programs, count as the harness does.

Problems come in as a :class:`Task`, samples from any rollout engine, verdicts from any sandbox; an
:class:`~coderl.scores.Evaluation` goes out. Files and comparisons of scores are :mod:`coderl.scores`'
business.
"""

from coderl.evaluation.evaluator import EvaluationSettings, evaluate, score_task
from coderl.evaluation.grading import job, run_fairly, score
from coderl.evaluation.sampling import Store
from coderl.evaluation.tasks import TASKS, Task, load_task, reference

__all__ = [
    "TASKS",
    "EvaluationSettings",
    "Store",
    "Task",
    "evaluate",
    "job",
    "load_task",
    "reference",
    "run_fairly",
    "score",
    "score_task",
]
