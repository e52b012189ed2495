"""The groups in which answers are sampled, and the file they are saved in to resume bit for bit.

A group is sampled whole, from a seed that follows from the evaluation's seed and the group's number alone. So
an evaluation that was killed goes on with the group it was in, and ends like one that was not.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from coderl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coderl.types import Problem

Answers = dict[int, list[str]]
"""From the number of a problem to the texts of its samples."""


def groups(problems: Sequence[Problem], n: int, size: int) -> list[list[int]]:
    """Numbers of the problems that are sampled together.

    Problems of similar length go together, so that little is padding and a batch ends at about one time. The
    longest come first, so that a lack of memory shows at once and the time left is not underestimated.

    Args:
        problems: What to answer.
        n: Samples per problem.
        size: Sequences in a group, about; a group has at least one problem.
    """
    order = sorted(range(len(problems)), key=lambda i: (-len(problems[i].prompt), i))
    step = max(1, size // n)
    return [order[start : start + step] for start in range(0, len(order), step)]


class Store:
    """The answers of a running evaluation in a file: a header that identifies it, then a line a group.

    One process at a time writes it. A line that a kill has cut short is dropped.

    Args:
        path: The file; it is made where there is none.
        asked: Everything that the answers depend on. A file with another header is refused.
        size: Sequences in a group. An existing file keeps its own.

    Raises:
        UserError: Another process writes the file, it holds something else, or it cannot be written.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any], size: int) -> None:
        self.path, self.size = path, size
        self._asked = json.loads(json.dumps(asked))
        self.rows: dict[str, list[str]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)  # what a full disk refused is not tried again
        except OSError as error:
            raise UserError(f"{path} could not be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._take_up(self._asked)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{path} is being written: the same evaluation runs already; wait for it"
            ) from None
        except BaseException:
            self._file.close()
            raise

    def _take_up(self, asked: dict[str, Any]) -> None:
        """Read the answers that the file holds; write the header where it is empty.

        Raises:
            UserError: The file is damaged, or holds answers with other settings.
        """
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]
        whole = sum(len(line) + 1 for line in lines)
        self._file.truncate(whole)
        if not lines:
            self._write({"asked": asked, "size": self.size})
            return
        try:
            head, *rest = map(json.loads, lines)
            self.size, was = int(head["size"]), dict(head["asked"])
            for row in rest:
                self.rows |= {name: list(map(_text, texts)) for name, texts in row.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: remove it to begin again") from error
        if was != asked:
            odd = sorted(k for k in was.keys() | asked.keys() if was.get(k) != asked.get(k))
            raise UserError(f"{self.path} holds answers with other settings ({', '.join(odd)}): remove it")

    def restart(self, size: int) -> None:
        """Drop all answers, and begin again with groups of another size."""
        self.rows, self.size = {}, size
        self._file.truncate(0)
        self._write({"asked": self._asked, "size": size})

    def read(self, problems: Sequence[Problem], n: int) -> Answers:
        """The answers that the file holds, by the problems' numbers."""
        known = {i: self.rows[p.id] for i, p in enumerate(problems) if p.id in self.rows}
        if any(len(row) != n for row in known.values()):
            raise UserError(f"{self.path} is damaged: remove it to begin again")
        return known

    def add(self, rows: Mapping[str, list[str]]) -> None:
        """Keep the answers of a group, by problem id; they are on disk when this returns."""
        self.rows |= rows
        self._write(dict(rows))

    def _write(self, value: dict[str, Any]) -> None:
        try:
            rest = memoryview(json.dumps(value).encode("ascii") + b"\n")
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} could not be written: {error.strerror or error}; what it holds is kept: run "
                "the same command again to go on"
            ) from error

    def remove(self) -> None:
        """Delete the file, once the results are saved."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file, and release its lock to other processes."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} is no text")
    return value
