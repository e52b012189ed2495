"""Programming tasks as text: data sets, prompts, and copies in training and evaluation (contamination).

Rows of files and hub data sets come in; :class:`~coderl.types.Problem` goes out, to batches and benchmarks.
Models, tokens and running programs do not belong here: nothing imports torch.
"""

from coderl.problems.contamination import Overlap, TrainingRecord
from coderl.problems.evalplus import HumanEvalPlus, MBPPPlus
from coderl.problems.sources import MBPP, Embedded, HumanEval, JSONLProblems, ProblemSource

__all__ = [
    "MBPP",
    "Embedded",
    "HumanEval",
    "HumanEvalPlus",
    "JSONLProblems",
    "MBPPPlus",
    "Overlap",
    "ProblemSource",
    "TrainingRecord",
]
