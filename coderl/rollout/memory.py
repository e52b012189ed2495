"""How much memory decoding takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from coderl.model.policy import Policy

SHARE = 0.6
"""Of the free memory that key-value caches may fill; activations and logits need the rest."""


def free_bytes(device: torch.device) -> int:
    """Memory that is free where the device computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def cache_bytes(policy: Policy, length: int) -> int:
    """Bytes that the keys and values of a sequence take.

    Args:
        policy: Its weights are loaded.
        length: Of the sequence, in tokens.
    """
    config = policy.base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * policy.base.dtype.itemsize * length)


def fitting(policy: Policy, length: int, most: int) -> int:
    """Sequences that can be decoded together: a power of two from 1 to ``most``.

    Args:
        policy: Its weights are loaded, the copy that is decoded from too.
        length: Longest sequence, in tokens.
        most: Not more than these.
    """
    count = int(SHARE * free_bytes(policy.device)) // cache_bytes(policy, length)
    return min(most, 1 << max(0, count.bit_length() - 1))
