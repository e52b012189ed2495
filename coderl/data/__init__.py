"""Problems in batches: the data module, its samplers, and the curriculum.

Problems come from a source (:mod:`coderl.problems`) and go to the algorithms as lists of text; the algorithms
report back how many samples of each passed. Tokens and tensors are made there, not here.
"""

from coderl.data.curriculum import Curriculum, CurriculumSampler, PassHistory
from coderl.data.module import CodeDataModule

# Configs and modules written before the packages import these from here.
from coderl.embedded.source import EmbeddedSFT
from coderl.problems import (
    MBPP,
    Embedded,
    HumanEval,
    HumanEvalPlus,
    JSONLProblems,
    MBPPPlus,
    ProblemSource,
)

__all__ = [
    "MBPP",
    "CodeDataModule",
    "Curriculum",
    "CurriculumSampler",
    "Embedded",
    "EmbeddedSFT",
    "HumanEval",
    "HumanEvalPlus",
    "JSONLProblems",
    "MBPPPlus",
    "PassHistory",
    "ProblemSource",
]
