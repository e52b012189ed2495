"""Now in :mod:`coderl.model.adapters`."""

from coderl.model.adapters import LoRA

__all__ = ["LoRA"]
