"""Engines that sample completions from the policy.

Problems and a way of sampling come in, :class:`~coderl.types.Completion` with ids, log-probs and text go out.
What a completion is worth, and what is learned from it, is decided elsewhere. A further engine is one file
here.
"""

from coderl.rollout.engine import RolloutEngine, Sampling
from coderl.rollout.generate import GenerateEngine


def default_engine() -> RolloutEngine:
    """What samples where nobody says otherwise."""
    return GenerateEngine()


__all__ = ["GenerateEngine", "RolloutEngine", "Sampling", "default_engine"]
