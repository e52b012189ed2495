"""What of a machine's cores, and of its processes, this process may use: affinity, container, other ranks."""

from __future__ import annotations

import math
import os
from pathlib import Path

from coderl.launcher import local_ranks

TASKS = 64
"""Processes and threads of one run, where nothing else limits them."""
_FEWEST_TASKS = 4
ROOT = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""


def usable() -> int:
    """Cores that this process may use, at least one.

    That is the scheduler's affinity, cut to the CPU quota of the control group (a container's limit), and
    shared out among the ranks that a launcher started on this machine.
    """
    cores = math.ceil(min(len(os.sched_getaffinity(0)), _quota()))
    return max(1, cores // local_ranks())


def _quota(root: Path = ROOT) -> float:
    """Cores' worth of time that the control groups above this process grant; infinite without a limit."""
    granted = math.inf
    for folder in _groups("cpu", root):
        try:
            if (folder / "cpu.max").exists():
                limit, period = (folder / "cpu.max").read_text().split()
            else:  # version 1, in which -1 is no limit
                limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            granted = min(granted, int(limit) / int(period) if int(limit) >= 0 else math.inf)
        except (OSError, ValueError, ZeroDivisionError):  # no such control here, or "max"
            continue
    return granted


def tasks_each(lanes: int, root: Path = ROOT) -> int:
    """Processes and threads that a run in one of so many lanes may have.

    Half of what the control groups above this process leave is kept for others.
    """
    left = math.inf
    for folder in _groups("pids", root):
        try:
            left = min(
                left, int((folder / "pids.max").read_text()) - int((folder / "pids.current").read_text())
            )
        except (OSError, ValueError):  # no such control here, or "max"
            continue
    return max(_FEWEST_TASKS, int(min(TASKS, left / (2 * lanes))))


def _groups(controller: str, root: Path, of: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """This process's control groups with a controller, each before the one above it.

    In version 2 all controllers share one tree, in version 1 each has a tree of its own; some machines have
    both.
    """
    try:
        lines = of.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    found = []
    for line in lines:
        _, names, own = line.split(":", 2)
        if not names or controller in names.split(","):
            tree = root / controller if names else root
            group = tree / own.lstrip("/")
            found += [group, *(parent for parent in group.parents if parent.is_relative_to(tree))]
    return found
