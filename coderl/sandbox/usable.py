"""What of a machine this process may use: its cores, processes and memory."""

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
_UNLIMITED = 1 << 60
"""Control groups of version 1 write "no limit" as a number of bytes near 2**63: from here on it is that."""


def cores() -> int:
    """Cores that this process may use, at least one.

    That is the scheduler's affinity, cut to the CPU quota of the control group (a container's limit), and
    shared out among the ranks that a launcher started on this machine.
    """
    granted = math.ceil(min(len(os.sched_getaffinity(0)), _quota()))
    return max(1, granted // local_ranks())


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


def memory() -> int:
    """Bytes of memory that this process can still take: the machine's, or what its control groups leave.

    Ranks that a launcher started on this machine get equal shares.
    """
    import psutil  # not at the top: a sandbox needs nothing that is not Python's own

    free: int = psutil.virtual_memory().available
    for limit, folder in _memory_limits(ROOT):
        free = min(free, limit - _in_use(folder))
    return max(0, free) // local_ranks()


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory that the control groups allow this process, None where they set no limit."""
    return min((limit for limit, _ in _memory_limits(root)), default=None)


def _memory_limits(root: Path) -> list[tuple[int, Path]]:
    found = []
    for folder in _groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                word = (folder / name).read_text().strip()
            except OSError:
                continue
            if word.isdigit() and int(word) < _UNLIMITED:
                found.append((int(word), folder))
    return found


def _in_use(folder: Path) -> int:
    """Bytes that a control group uses, without files in the cache that the kernel can drop."""
    try:
        names = ("memory.current", "memory.usage_in_bytes")
        used = next(int((folder / name).read_text()) for name in names if (folder / name).exists())
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return used - int(entries.get("total_inactive_file", entries.get("inactive_file", 0)))
    except (OSError, ValueError, StopIteration):
        return 0


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
