"""Programming tasks as text: where they come from, how a model is asked, and which of them are the same.

Files and hub data sets come in as rows and leave as :class:`~coderl.types.Problem`. Nothing here knows torch,
a model, or how a program is run.
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
