"""Errors that a user can mend. Each message is one line: what is wrong, where, and the way out."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong: a file, a setting, a model. Exit code 1."""


class UsageError(UserError):
    """The command was called wrongly: an unknown name, a value out of range. Exit code 2."""
