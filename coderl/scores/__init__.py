"""Scores of evaluations: result files, pass@k and its statistics, two evaluations compared and drawn.

Counts come from :mod:`coderl.evaluation` or from files. Needs numpy and, for figures, matplotlib; nothing
here samples, runs a program or loads torch.
"""

from coderl.scores.results import Evaluation, logged_scores, results_name, save_results, summary_text

__all__ = ["Evaluation", "logged_scores", "results_name", "save_results", "summary_text"]
