"""Remembers which solutions have passed their tests, so that the same data are not run before each fit."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coderl.sandbox.program import Program

CACHE_DIR = "CODERL_CACHE_DIR"
_AT_A_TIME = 500
"""Keys in one question: fewer than SQLite takes."""

log = logging.getLogger(__name__)


class KeptPasses:
    """Hashes of programs that passed, with all that this depended on, in one SQLite file.

    Failures are not kept: they are few, and the user is about to mend them. A file that cannot be used costs
    time and no more: everything is run again.

    Args:
        path: The file. None: ``passes.sqlite`` in ``$CODERL_CACHE_DIR``, by default ``~/.cache/coderl``.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _cache_folder() / "passes.sqlite"

    def known(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys that are kept."""
        found: set[str] = set()
        try:
            if self.path.is_file():
                with closing(sqlite3.connect(self.path)) as base:
                    for at in range(0, len(keys), _AT_A_TIME):
                        part = keys[at : at + _AT_A_TIME]
                        marks = ",".join("?" * len(part))
                        rows = base.execute(f"SELECT key FROM passes WHERE key IN ({marks})", part)
                        found.update(key for (key,) in rows)
        except (sqlite3.Error, OSError) as error:
            log.debug("%s cannot be read (%s): all solutions are run", self.path, error)
        return found

    def add(self, keys: Iterable[str]) -> None:
        """Keep the keys."""
        rows = [(key,) for key in keys]
        if not rows:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path)) as base, base:
                base.execute("CREATE TABLE IF NOT EXISTS passes (key TEXT PRIMARY KEY)")
                base.executemany("INSERT OR IGNORE INTO passes VALUES (?)", rows)
        except (sqlite3.Error, OSError) as error:
            log.debug("%s cannot be written (%s): solutions are run again next time", self.path, error)


def key_of(program: Program, identity: str) -> str:
    """The hash of a program with its tests and all that its verdict depends on, 64 hexadecimal digits."""
    return hashlib.sha256(repr((identity, program)).encode("utf-8", "surrogatepass")).hexdigest()


def _cache_folder() -> Path:
    if given := os.environ.get(CACHE_DIR):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coderl"
