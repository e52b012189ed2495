"""Problems in batches: the data module, the order it serves them in, and the curriculum.

Problems come from a source (:mod:`coderl.problems`) and go, as lists of text, to the algorithms, which tell
the curriculum how they fared. Tokens and tensors are made there, not here.
"""

from coderl.data.curriculum import Curriculum, CurriculumSampler, PassHistory
from coderl.data.module import CodeDataModule

# Configs and modules written for coderl 0.1 look for these here.
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
