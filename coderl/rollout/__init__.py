"""Engines that sample completions from the policy.

Problems and sampling settings come in; :class:`~coderl.types.Completion` with ids, log-probs and text go
out. Rewards and losses are :mod:`coderl.algorithms`'. A further engine is one file here.
"""

from coderl.rollout.engine import RolloutEngine, Sampling
from coderl.rollout.generate import GenerateEngine


def default_engine() -> RolloutEngine:
    """The engine of a run whose configuration names none."""
    return GenerateEngine()


__all__ = ["GenerateEngine", "RolloutEngine", "Sampling", "default_engine"]
