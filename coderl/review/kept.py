"""Remembers which problems were found to be right, so that the same data are not run before each fit."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from coderl.files import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from coderl.sandbox.program import Program

_AT_A_TIME = 500
"""Keys in one question: fewer than SQLite takes."""

log = logging.getLogger(__name__)


class KeptPasses:
    """Hashes of problems' programs that had the verdicts they should have, in one SQLite file.

    Faults are not kept: they are few, and the user is about to mend them. A file that cannot be used costs
    time and no more: everything is run again. A damaged one is written anew.

    Args:
        path: The file. None: ``passes.sqlite`` in :func:`~coderl.files.cache_folder`.
    """

    def __init__(self, path: Path | None = None) -> None:
        try:
            self.path: Path | None = path or cache_folder() / "passes.sqlite"
        except RuntimeError as error:  # there is no home
            log.debug("nothing is kept: %s", error)
            self.path = None

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that are kept."""
        found: set[str] = set()
        try:
            if self.path is not None and self.path.is_file():
                with closing(sqlite3.connect(self.path)) as base:
                    for at in range(0, len(keys), _AT_A_TIME):
                        part = keys[at : at + _AT_A_TIME]
                        marks = ",".join("?" * len(part))
                        rows = base.execute(f"SELECT key FROM passes WHERE key IN ({marks})", part)
                        found.update(key for (key,) in rows)
        except (sqlite3.Error, OSError) as error:
            log.debug("%s cannot be read (%s): all solutions are run", self.path, error)
            if self.path is not None and isinstance(error, sqlite3.DatabaseError) and _damaged(error):
                self.path.unlink(missing_ok=True)
        return found

    def add(self, keys: Iterable[str]) -> None:
        """Keep the keys."""
        rows = [(key,) for key in keys]
        if not rows or self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path)) as base, base:
                base.execute("CREATE TABLE IF NOT EXISTS passes (key TEXT PRIMARY KEY)")
                base.executemany("INSERT OR IGNORE INTO passes VALUES (?)", rows)
        except (sqlite3.Error, OSError) as error:
            log.debug("%s cannot be written (%s): solutions are run again next time", self.path, error)


def _damaged(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorname", "") in ("SQLITE_NOTADB", "SQLITE_CORRUPT")


def key_of(programs: Iterable[Program], identity: str) -> str:
    """The hash of programs with their tests and all that their verdicts depend on, 64 hexadecimal digits."""
    return hashlib.sha256(repr((identity, *programs)).encode("utf-8", "surrogatepass")).hexdigest()
