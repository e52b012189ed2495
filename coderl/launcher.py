"""What the launcher of several processes has put into the environment: torchrun, or SLURM's srun."""

from __future__ import annotations

import os


def launched() -> tuple[str, int] | None:
    """The launcher that started this process as one of several, and how many; None where there was none."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ["WORLD_SIZE"])
    # Unlike SLURM_NTASKS this is of the srun, not of the job.
    if tasks := os.environ.get("SLURM_STEP_NUM_TASKS"):
        return "srun", int(tasks)
    return None


def local_ranks() -> int:
    """Processes of one training run on this machine; 1 where no launcher says otherwise."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return 1
