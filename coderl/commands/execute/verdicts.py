"""Writes verdicts, each as one whole line, and reads those of a stopped run for ``--resume``."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from coderl.errors import DISK_FULL, UsageError, UserError
from coderl.files import STDIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coderl.commands.execute.rows import Row
    from coderl.types import Execution

FIELDS = ("outcome", "passed", "total", "seconds", "grading", "tier", "message")
"""Fields of an output row, after ``id``."""


class Verdicts:
    """The output. Each verdict is one line, flushed before the next is waited for.

    Args:
        path: A file, gzipped where its name ends in ``.gz``, or ``-`` for standard output.
        kept: Bytes at the file's beginning that stay; the rest is overwritten.

    Raises:
        UserError: The file cannot be written.
    """

    def __init__(self, path: str, kept: int = 0) -> None:
        self.path = path
        self.size = kept
        self._open = contextlib.ExitStack()
        self._file: Any = None
        if path == STDIO:
            return
        try:
            self._file = self._open.enter_context(open(path, "ab" if kept else "wb"))  # noqa: SIM115
            if kept:
                self._file.truncate(kept)
        except OSError as error:
            raise self._unwritable(error) from None
        if path.endswith(".gz"):
            self._file = self._open.enter_context(gzip.open(self._file, "wb"))  # noqa: SIM115

    def write(self, row: Row, verdict: Execution) -> None:
        """Append a verdict.

        Raises:
            UserError: It cannot be written; the file ends with the last verdict that could.
        """
        values = {"id": row.id} | {name: getattr(verdict, name) for name in FIELDS}
        values["seconds"] = round(verdict.seconds, 6)
        line = json.dumps(values) + "\n"  # ASCII: no id can break the encoding of a terminal or pipe
        if self._file is None:
            sys.stdout.write(line)
            sys.stdout.flush()
            return
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            # Closing flushes what is left, so the part of a line that did get written is cut off after it.
            with contextlib.suppress(OSError):
                self._open.close()
            if not self.path.endswith(".gz"):
                with contextlib.suppress(OSError):  # a pipe or a device
                    os.truncate(self.path, self.size)
            raise self._unwritable(error) from None
        self.size += len(line)

    def _unwritable(self, error: OSError) -> UserError:
        if error.errno in DISK_FULL:
            return UserError(f"{self.path} cannot be written: the disk is full")
        folder = os.path.dirname(self.path) or "."
        if not os.path.isdir(folder):
            return UserError(f"{self.path} cannot be written: the folder {folder} does not exist, make it")
        return UserError(f"{self.path} cannot be written: {error.strerror or error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


@dataclass(frozen=True, slots=True)
class EarlierVerdict:
    """A verdict of an earlier run.

    Attributes:
        end: Bytes of the file up to the end of its line.
        outcome: See :class:`~coderl.types.Execution`, as are the others.
    """

    end: int
    outcome: str
    grading: str
    tier: str


def check_output(source: str, output: str, resume: bool) -> None:
    """Refuse an output that would destroy the input, or that cannot be resumed.

    Args:
        source: Path of the input.
        output: Path of the output.
        resume: Whether to go on where an earlier run left off.

    Raises:
        UsageError: It is one of these.
    """
    if resume and (output == STDIO or output.endswith(".gz")):
        raise UsageError("--resume needs an --output that is a plain file, neither - nor .gz")
    if os.path.isfile(output) and os.path.exists(source) and os.path.samefile(source, output):
        raise UsageError(f"--output {output} is the input itself: name another file")


def earlier_verdicts(path: str, rows: Iterator[Row]) -> Iterator[EarlierVerdict]:
    """The verdicts in an earlier run's output. Each takes its row from ``rows``.

    A last line without its newline is left out: the run was killed while it wrote it.

    Raises:
        UserError: The file is not the output for these rows.
    """
    end = 0
    try:  # not around the loop: an OSError of `rows` is about another file
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path} cannot be read to go on from it: {error.strerror or error}") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            found, row = _parsed(line), next(rows, None)
            if found is None or row is None or found.get("id") != row.id:
                expected = f"a verdict on {row.id!r}" if row else "nothing more"
                raise UserError(
                    f"{path}:{number}: cannot go on from here: the input asks for {expected}; give the "
                    "input it was made from, or leave --resume out to write over it"
                )
            yield EarlierVerdict(end, *(str(found.get(name)) for name in ("outcome", "grading", "tier")))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of verdicts; None where it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() >= set(FIELDS) else None
