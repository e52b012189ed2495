"""The model under training: loading in 4 bits or not, tokenizer, adapters, log-probabilities of a batch.

Hub ids, folders and GGUF files come in, a :class:`Policy` goes out: to engines, which sample from it, and to
algorithms, which train it. Nothing here samples, runs a program, or computes a reward.
"""

from coderl.model.adapters import LoRA
from coderl.model.policy import Policy

__all__ = ["LoRA", "Policy"]
