"""What of a machine's cores, and of its processes, this process may use: affinity, container, other ranks."""

from __future__ import annotations

import math
import os
from pathlib import Path

from coderl.launcher import local_ranks

TASKS = 64
"""Processes and threads of one run, where nothing else limits them."""
_FEWEST_TASKS = 4


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


def tasks_each(lanes: int, root: Path = Path("/sys/fs/cgroup")) -> int:
    """Processes and threads that a run in one of so many lanes may have.

    Half of what the control groups above this process leave is kept for others.
    """
    left = math.inf
    for folder in _groups(root):
        try:
            left = min(
                left, int((folder / "pids.max").read_text()) - int((folder / "pids.current").read_text())
            )
        except (OSError, ValueError):  # no such control here, or "max"
            continue
    return max(_FEWEST_TASKS, int(min(TASKS, left / (2 * lanes))))


def _groups(root: Path) -> list[Path]:
    """This process's control group (version 2) and those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [root]
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / own.lstrip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(root))]
