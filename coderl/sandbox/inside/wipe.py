"""Emptying a folder that hostile code has written in."""

from __future__ import annotations

import os
from itertools import count


def wipe(folder: str) -> bool:
    """Remove everything in the folder; links are removed, never followed. False if there is no such folder.

    Nested folders are moved up to the top before they are opened, so that no depth and no length of path is
    too much. Nothing may be running in the folder.
    """
    if os.path.islink(folder) or os.path.isfile(folder):
        os.unlink(folder)
    if not os.path.isdir(folder):
        return False
    numbers = count()
    _open_up(folder)
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            _open_up(entry.path)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    _open_up(inner.path)  # a folder without write permission cannot be moved
                    os.rename(inner.path, _free(folder, numbers))
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)
    return True


def _open_up(path: str) -> None:
    os.chmod(path, 0o700)


def _free(folder: str, numbers: count[int]) -> str:
    return next(path for number in numbers if not os.path.lexists(path := os.path.join(folder, f".{number}")))
