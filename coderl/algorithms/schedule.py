"""The learning rate over the steps of a fit."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant_with_warmup", "linear", "cosine"]


def rate_factor(done: int, schedule: Schedule, warmup_steps: int, planned: int) -> float:
    """The share of the peak learning rate that an optimizer step is made with.

    The first step already has an effect: warm-up rises from ``1 / warmup_steps`` at step 1 to 1 at step
    ``warmup_steps``. After it, the formulas of transformers' schedules: linear and cosine reach 0 where all
    planned steps are done, so that the last step still has a part of the peak.

    Args:
        done: Optimizer steps before this one.
        schedule: What follows warm-up.
        warmup_steps: Steps of warm-up.
        planned: Optimizer steps of the whole fit; not read by a constant schedule.
    """
    if done < warmup_steps:
        return (done + 1) / warmup_steps
    if schedule == "constant_with_warmup":
        return 1.0
    falling = max(1, planned - warmup_steps)
    if schedule == "linear":
        return max(0.0, (planned - done) / falling)
    progress = (done - warmup_steps) / falling
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
