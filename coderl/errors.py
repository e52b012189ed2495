"""Errors that a user can fix, and the one line that the command line prints for each."""

from __future__ import annotations

import difflib
import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""``errno`` of a full disk and of an exceeded quota."""


class UserError(Exception):
    """Something outside the program is wrong: a file, a setting, a model. Exit code 1.

    The message is one line: what is wrong, where, and how to fix it.
    """


class UsageError(UserError):
    """The command was called wrongly: an unknown name, a value out of range. Exit code 2."""


def first_line(error: object, limit: int = 200, lines: int = 1) -> str:
    """The first line of an error's text that is not blank; the name of its class where there is none.

    Args:
        error: An exception, or a text.
        limit: Characters, at most.
        lines: How many lines are taken, joined by spaces.
    """
    found = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(found[:lines])[:limit] or type(error).__name__


def named_line(error: Exception, limit: int = 200, lines: int = 1) -> str:
    """:func:`first_line` after the name of the error's class, which says what the text may leave out."""
    return f"{type(error).__name__}: {first_line(error, limit, lines)}"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """``; did you mean NAME?`` with the option nearest to a misspelt word; empty where none is near."""
    near = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def exit_line(error: BaseException) -> str | None:
    """The line that the command line prints for an error that ends it; None for bugs, which need a traceback.

    The arguments of a KeyboardInterrupt say how to resume.
    """
    if isinstance(error, UserError):
        return f"coderl: error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return "coderl: interrupted" + "".join(f"; {way}" for way in error.args)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f" at {error.filename}" if error.filename else ""
        return f"coderl: error: the disk is full{where}: make room, then go on (a fit with --ckpt_path)"
    return None
