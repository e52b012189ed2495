"""Evaluation one can publish: pass@k after bigcode-evaluation-harness, and what it takes to compare two."""

from coderl.evaluation.evaluator import EvaluationSettings, evaluate, score_task
from coderl.evaluation.results import Evaluation, logged_scores, results_name, save_results, summary_text
from coderl.evaluation.sampling import Store
from coderl.evaluation.scoring import job, run_fairly, score
from coderl.evaluation.tasks import TASKS, Task, load_task, reference

__all__ = [
    "TASKS",
    "Evaluation",
    "EvaluationSettings",
    "Store",
    "Task",
    "evaluate",
    "job",
    "load_task",
    "logged_scores",
    "reference",
    "results_name",
    "run_fairly",
    "save_results",
    "score",
    "score_task",
    "summary_text",
]
