"""The random generators of Python, NumPy and torch: their state, and a stream of one's own for each rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """The state of all of them, as ``torch.load`` reads it without pickle."""
    numpy = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": keys}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Go on from what :func:`state` returned."""
    numpy = state["numpy"]
    keys = numpy["state"]["key"].numpy().astype(np.uint32)
    random.setstate(state["python"])
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": keys}})
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def begin(stream: str) -> None:
    """Begin a stream that follows from its name alone."""
    seed = random.Random(stream).getrandbits(63)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
