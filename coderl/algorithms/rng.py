"""Saves, restores and seeds the random generators of Python, NumPy and torch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """The state of all generators, in types that ``torch.load(weights_only=True)`` reads."""
    # Such a load refuses NumPy arrays, so the keys of its generator become a tensor.
    numpy = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": keys}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Restore what :func:`state` returned."""
    numpy = state["numpy"]
    keys = numpy["state"]["key"].numpy().astype(np.uint32)
    random.setstate(state["python"])
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": keys}})
    torch.set_rng_state(state["torch"].cpu())  # torch takes its state on the CPU only
    # With another number of GPUs the states belong to none of them: CUDA's generators stay as they are.
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def seed_all(text: str) -> None:
    """Seed all generators from a text, the same on every machine."""
    # Not by `hash`, which differs from process to process.
    seed = random.Random(text).getrandbits(63)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
