"""The model under training: loading in 4 bits or not, tokenizer, adapters, log-probabilities of a batch.

Hub ids, folders and GGUF files come in, a :class:`Policy` goes out: to engines, which sample from it, and to
algorithms, which train it. Nothing here samples, runs a program, or computes a reward.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coderl.model.adapters import LoRA
    from coderl.model.policy import Policy

__all__ = ["LoRA", "Policy"]

_MODULES = {"LoRA": "coderl.model.adapters", "Policy": "coderl.model.policy"}


def __getattr__(name: str) -> object:
    """Import a public name on first use: files of adapters are read without torch."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
