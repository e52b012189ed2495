"""Errors that a user can fix, and the one line that each is told in."""

from __future__ import annotations

import difflib
import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the system's errors for a full disk and a used up quota."""


class UserError(Exception):
    """Something outside the program is wrong: a file, a setting, a model. Exit code 1.

    The message is one line: what is wrong, where, and how to fix it.
    """


class UsageError(UserError):
    """The command was called wrongly: an unknown name, a value out of range. Exit code 2."""


def first_line(error: object, limit: int = 200) -> str:
    """The first line of an error's text that says anything; the name of its class where none does.

    Args:
        error: An exception, or a text.
        limit: Characters, at most.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:limit] for line in lines if line), type(error).__name__)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """``; did you mean NAME?`` for the option that is nearest to a word; empty where none is near."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def exit_line(error: BaseException) -> str | None:
    """What the command line prints of an error that ends it; None where only a traceback will do.

    An interrupt carries the ways to go on as its arguments.
    """
    if isinstance(error, UserError):
        return f"coderl: error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "coderl: interrupted" + "".join(f"; {way}" for way in error.args)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f" at {error.filename}" if error.filename else ""
        return f"coderl: error: the disk is full{where}: make room, then go on (a fit with --ckpt_path)"
    return None
