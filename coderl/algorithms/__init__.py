"""Training algorithms as LightningModules: GRPO and its variants, PPO, and supervised fine-tuning.

Here belongs what turns samples into a gradient: rewards, advantages, losses, optimizer steps, and their
exchange between ranks. Problems come from the data module, completions from a rollout engine, verdicts from a
sandbox; gradients go to the policy, metrics to Lightning's loggers. Models, sampling and running programs are
elsewhere.
"""

from coderl.algorithms.base import PolicyModule
from coderl.algorithms.grpo import GRPO
from coderl.algorithms.policy_gradient import PolicyGradient
from coderl.algorithms.ppo import PPO
from coderl.algorithms.sft import SFT

__all__ = ["GRPO", "PPO", "SFT", "PolicyGradient", "PolicyModule"]
