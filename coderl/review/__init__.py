"""Looks at problems before they are used: can their tests be graded, does their own solution pass?

Problems come from a source, verdicts from a sandbox. What cannot be used goes to the training's filter, to
the warnings of an evaluation, and to ``coderl check``. No model and no torch; nothing is repaired here.
"""

from coderl.review.kept import KeptPasses
from coderl.review.look import Finding, look, summary_lines
from coderl.review.strength import Strength, measure

__all__ = ["Finding", "KeptPasses", "Strength", "look", "measure", "summary_lines"]
