"""Evaluation one can publish: sample a benchmark's problems, run the programs, count as the harness does.

Problems come in as a :class:`Task`, samples from any rollout engine, verdicts from any sandbox; an
:class:`~coderl.scores.Evaluation` goes out. Files and comparisons of scores are :mod:`coderl.scores`'
business.
"""

from coderl.evaluation.evaluator import Evaluator, Ranks
from coderl.evaluation.grading import Grader, run_with_retries
from coderl.evaluation.sampling import Store
from coderl.evaluation.settings import EvaluationSettings
from coderl.evaluation.tasks import TASKS, Task, load_task, reference
from coderl.scores import Evaluation

__all__ = [
    "TASKS",
    "Evaluation",
    "EvaluationSettings",
    "Evaluator",
    "Grader",
    "Ranks",
    "Store",
    "Task",
    "load_task",
    "reference",
    "run_with_retries",
]
