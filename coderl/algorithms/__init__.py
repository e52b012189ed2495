"""Training algorithms as LightningModules with manual optimization."""

from coderl.algorithms.base import PolicyModule
from coderl.algorithms.grpo import GRPO
from coderl.algorithms.policy_gradient import PolicyGradient
from coderl.algorithms.ppo import PPO
from coderl.algorithms.sft import SFT

__all__ = ["GRPO", "PPO", "SFT", "PolicyGradient", "PolicyModule"]
