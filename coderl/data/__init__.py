"""Problems as text: where they come from, and the data module that serves them in batches."""

from __future__ import annotations

from coderl.data.contamination import Overlap, Trained
from coderl.data.curriculum import Curriculum, CurriculumSampler, PassHistory
from coderl.data.evalplus import HumanEvalPlus, MBPPPlus
from coderl.data.module import CodeDataModule
from coderl.data.sources import MBPP, Embedded, EmbeddedSFT, HumanEval, JSONLProblems, ProblemSource

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
    "Overlap",
    "PassHistory",
    "ProblemSource",
    "Trained",
]
