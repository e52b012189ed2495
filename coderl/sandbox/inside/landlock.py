"""Landlock: a process gives up every file that no rule allows (``landlock(7)``; from Linux 5.13)."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on every processor
_LIBC = ctypes.CDLL(None, use_errno=True)

_WRITE, _READ, _LIST = 1 << 1, 1 << 2, 1 << 3
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights over files, by the version that brought the last of them."""
_EXECUTE, _DEVICES = 1 << 0, (1 << 6) | (1 << 11)
_ON_FILES = (1 << 0) | _WRITE | _READ | (1 << 14) | (1 << 15)
"""Rights that a rule for a file may name: the rest is about folders."""


def version() -> int:
    """The kernel's version of Landlock; 0 where it has none or has it switched off."""
    return max(0, int(_LIBC.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))))


def ruleset(read: Iterable[str], change: Iterable[str], use: Iterable[str] = ()) -> int:
    """A set of rules, as a descriptor that :func:`restrict` takes.

    Nothing may be executed, no device made, and (where the kernel can) no TCP port bound or connected, no
    abstract socket and no process outside reached.

    Args:
        read: Files and folders that may be read.
        change: Folders in which everything may be done.
        use: Files that may be read and written, such as ``/dev/null``.

    Raises:
        OSError: The kernel has no Landlock.
    """
    known = version()
    if not known:
        raise OSError("the kernel has no Landlock")
    rights = max(rights for since, rights in _RIGHTS.items() if since <= known)
    fields = [rights, 3 if known >= 4 else 0, 3 if known >= 6 else 0]
    attributes = struct.pack("=3Q", *fields)[: 8 if known < 4 else 16 if known < 6 else 24]
    rules = _call(_CREATE, ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    for paths, granted in (
        (read, _READ | _LIST),
        (change, rights & ~(_EXECUTE | _DEVICES)),
        (use, _READ | _WRITE),
    ):
        for path in paths:
            _allow(rules, path, granted & rights)
    return rules


def _allow(rules: int, path: str, granted: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        granted = granted if os.path.isdir(path) else granted & _ON_FILES
        rule = struct.pack("=Qi", granted, place)
        _call(_ADD, ctypes.c_int(rules), ctypes.c_int(1), ctypes.c_char_p(rule), ctypes.c_uint(0))
    finally:
        os.close(place)


def restrict(rules: int) -> None:
    """Put the rules on this process and all it will start. Needs ``PR_SET_NO_NEW_PRIVS``."""
    _call(_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))


def _call(number: int, *arguments: object) -> int:
    result = int(_LIBC.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"landlock: {os.strerror(error)}")
    return result
