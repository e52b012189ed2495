"""Memory for decoding: how much is free, and how many sequences fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from coderl.model.policy import Policy

CACHE_SHARE = 0.6
"""Share of the free memory for key-value caches; activations and logits need the rest."""


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, in bytes: the GPU's, or the machine's for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def cache_bytes(policy: Policy, length: int) -> int:
    """Bytes of the key-value cache of one sequence.

    Args:
        policy: Its weights are loaded.
        length: Length of the sequence, in tokens.
    """
    config = policy.base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * policy.base.dtype.itemsize * length)


def largest_batch(policy: Policy, length: int, limit: int) -> int:
    """The largest batch whose key-value cache fits in memory: a power of two from 1 to ``limit``.

    Args:
        policy: Its weights are loaded, and so is the copy that is decoded from.
        length: Longest sequence, in tokens.
        limit: Most sequences.
    """
    count = int(CACHE_SHARE * free_bytes(policy.device)) // cache_bytes(policy, length)
    return min(limit, 1 << max(0, count.bit_length() - 1))
