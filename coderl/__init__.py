"""Reinforcement learning for code models. Names load on first use: ``import coderl`` costs nothing."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coderl.algorithms import GRPO, PPO, SFT
    from coderl.algorithms.rewards import Reward
    from coderl.cli import run
    from coderl.model import Policy
    from coderl.rollout import RolloutEngine
    from coderl.sandbox import Program, Sandbox
    from coderl.types import Problem

__version__ = "0.1.0"

__all__ = [
    "GRPO",
    "PPO",
    "SFT",
    "Policy",
    "Problem",
    "Program",
    "Reward",
    "RolloutEngine",
    "Sandbox",
    "run",
]

_MODULES = {
    "GRPO": "coderl.algorithms",
    "PPO": "coderl.algorithms",
    "SFT": "coderl.algorithms",
    "Policy": "coderl.model",
    "Problem": "coderl.types",
    "Program": "coderl.sandbox",
    "Reward": "coderl.algorithms.rewards",
    "RolloutEngine": "coderl.rollout",
    "Sandbox": "coderl.sandbox",
    "run": "coderl.cli",
}

# The modules in earlier/ are imported as if they lay here, such as `coderl.rewards`: configs that runs
# saved before the packages name classes by these paths.
__path__.append(os.path.join(__path__[0], "earlier"))


def __getattr__(name: str) -> object:
    """Import a public name on first use: most commands need neither torch nor Lightning."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
