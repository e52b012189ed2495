"""``coderl evaluate``: pass@k of a model or of saved programs, and two evaluations side by side."""

from coderl.commands.evaluate.command import evaluate

__all__ = ["evaluate"]
