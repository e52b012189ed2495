"""Environment variables of torchrun and SLURM's srun, which start one process for each rank."""

from __future__ import annotations

import os


def launched() -> tuple[str, int] | None:
    """The launcher that started this process, and its number of processes; None without a launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ["WORLD_SIZE"])
    # SLURM_NTASKS would not do: it is the job's, and set in a batch script that starts coderl without srun.
    if tasks := os.environ.get("SLURM_STEP_NUM_TASKS"):
        return "srun", int(tasks)
    return None


def local_ranks() -> int:
    """Processes of this training run on this machine; 1 without a launcher."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return 1
