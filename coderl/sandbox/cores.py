"""The number of cores that this process may use: affinity, container limit, share among ranks."""

from __future__ import annotations

import math
import os
from pathlib import Path

from coderl.launcher import local_ranks


def usable() -> int:
    """Cores that this process may use, at least one.

    That is the scheduler's affinity, cut to the CPU quota of the control group (a container's limit), and
    shared out among the ranks that a launcher started on this machine.
    """
    cores = math.ceil(min(len(os.sched_getaffinity(0)), _quota()))
    return max(1, cores // local_ranks())


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the control groups above this process grant; infinite without a limit."""
    granted = math.inf
    for folder in _groups(root):
        try:
            limit, period = (folder / "cpu.max").read_text().split()
            granted = min(granted, int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # no such control here, or "max"
            continue
    return granted


def _groups(root: Path) -> list[Path]:
    """This process's control group (version 2) and those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [root]
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / own.lstrip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
