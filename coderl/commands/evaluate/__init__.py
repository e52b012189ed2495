"""``coderl evaluate``: pass@k of a model or of saved programs, and comparisons of two results files.

``command`` reads the arguments, compares, saves and prints; ``run`` evaluates, for which it loads torch.
Sampling and grading are :mod:`coderl.evaluation`'s; pass@k and results files are :mod:`coderl.scores`'.
"""

from coderl.commands.evaluate.command import evaluate

__all__ = ["evaluate"]
