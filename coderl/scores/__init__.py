"""Scores once they are there: result files, pass@k and its statistics, two evaluations compared and drawn.

Counts come from :mod:`coderl.evaluation` or from files, and go to the console, to files and to reports. Needs
numpy, and nothing that samples or runs a program.
"""

from coderl.scores.results import Evaluation, logged_scores, results_name, save_results, summary_text

__all__ = ["Evaluation", "logged_scores", "results_name", "save_results", "summary_text"]
