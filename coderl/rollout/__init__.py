"""Engines that sample completions from the policy."""

from coderl.rollout.engine import RolloutEngine, Sampling
from coderl.rollout.generate import GenerateEngine

__all__ = ["GenerateEngine", "RolloutEngine", "Sampling"]
