"""Checks of versions, cores, memory and disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from coderl.commands.doctor.check import Check
from coderl.runs.folder import ROOT
from coderl.runs.versions import PACKAGES, installed_versions
from coderl.sandbox import usable

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1 << 30
FEW_BYTES, MANY_BYTES = 1 * GIB, 20 * GIB
"""Free disk space below which the check fails (a run cannot save) or warns (a 7B model cannot be merged)."""
LITTLE_MEMORY = 4 * GIB
"""Usable memory below which the check warns: even small models may not fit."""


def checks() -> Iterator[Check]:
    """Checks of versions, cores, memory and disk."""
    yield versions()
    yield cores()
    yield memory()
    yield disk(ROOT)


def versions() -> Check:
    """Whether the packages that training needs are installed, and their versions."""
    found = installed_versions()
    missing = [name for name in PACKAGES if name not in found]
    detail = ", ".join(
        [f"{name} {version}" for name, version in found.items()] + [f"{name} missing" for name in missing]
    )
    if missing:
        data = found | dict.fromkeys(missing)
        return Check("versions", "fail", detail, f"pip install {' '.join(missing)}", data)
    return Check("versions", "ok", detail, data=found)


def cores() -> Check:
    """Cores that this process may use, by its affinity and its control group's quota."""
    present, affinity, granted = os.cpu_count() or 1, len(os.sched_getaffinity(0)), usable.cores()
    data = {"usable": granted, "present": present, "affinity": affinity}
    why = "CPU quota" if granted < affinity else "CPU affinity"
    detail = f"{granted} usable" + (
        f" of {present} (the rest is barred by {why})" if granted < present else ""
    )
    if granted < 2:
        fix = "give the machine, container or job two or more: programs run beside the training"
        return Check("cores", "warn", detail, fix, data)
    return Check("cores", "ok", detail, data=data)


def memory() -> Check:
    """Memory of the machine, or the control group's limit where that is less."""
    system = psutil.virtual_memory()
    limit = usable.memory_limit()
    granted = min(system.total, limit or system.total)
    data = {"usable": granted, "available": system.available, "limit": limit}
    why = "" if granted == system.total else f" (limit of the container, {system.total / GIB:.1f} in all)"
    detail = f"{granted / GIB:.1f} GiB{why}, {min(granted, system.available) / GIB:.1f} available"
    if granted < LITTLE_MEMORY:
        return Check("memory", "warn", detail, "give it 4 GiB or more; the quickstart needs about 2", data)
    return Check("memory", "ok", detail, data=data)


def disk(folder: Path) -> Check:
    """Free disk space where runs write, and whether it can be written to.

    Args:
        folder: The folder of runs, which need not exist yet.
    """
    path = folder.absolute()
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        detail = f"{place} cannot be written: {error.strerror or error}"
        return Check("disk", "fail", detail, "make room, or train from a folder that you may write in")
    free = shutil.disk_usage(place).free
    data = {"folder": str(path), "free": free}
    detail = f"{free / GIB:.1f} GiB free for {path}"
    fix = "make room, or name another folder with --trainer.default_root_dir; a merged 7B model takes 14 GiB"
    if free < MANY_BYTES:
        return Check("disk", "fail" if free < FEW_BYTES else "warn", detail, fix, data)
    return Check("disk", "ok", detail, data=data)
