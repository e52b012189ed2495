"""The model under training: loading (4-bit or not), tokenizer, adapters, and log-probabilities of a batch.

Hub ids, folders and GGUF files come in, a :class:`Policy` goes out: to engines, which sample from it, and to
algorithms, which train it. Nothing here samples, runs a program, or knows a reward.
"""

from coderl.model.adapters import LoRA
from coderl.model.policy import Policy

__all__ = ["LoRA", "Policy"]
