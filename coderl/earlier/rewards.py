"""The name to import rewards by; they live in :mod:`coderl.algorithms.rewards`."""

from coderl.algorithms.rewards import ExecutionReward, Reward, Sample, quality, total

__all__ = ["ExecutionReward", "Reward", "Sample", "quality", "total"]
