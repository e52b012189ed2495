"""Atomic writes of files and folders; JSON and JSON lines, with errors that name the place and the fix."""

from __future__ import annotations

import fcntl
import glob
import gzip
import itertools
import json
import os
import shutil
import sys
import tempfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from coderl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

STDIO = "-"
"""The path that stands for standard input or output."""


def cache_folder() -> Path:
    """Where things are kept that can be made again: ``$CODERL_CACHE_DIR``, else ``~/.cache/coderl``.

    Raises:
        RuntimeError: This user has no home.
    """
    if given := os.environ.get("CODERL_CACHE_DIR"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coderl"


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file atomically: it holds the old content or all of the new, never a part.

    Args:
        path: The file; folders above it are made.
        data: Its content; text is written in UTF-8.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within a file system. With the process id, since two
    # processes may write the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_output(path: Path, data: str | bytes) -> None:
    """:func:`write_atomic` for a file that the user asked for, with an error that the user can act on.

    Raises:
        UserError: It cannot be written.
    """
    try:
        write_atomic(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path}: cannot be written ({reason}); choose another folder or make room"
        ) from error


def read_json(path: Path, fix: str = "", kind: type | tuple[type, ...] | None = None) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        fix: What to do about a file that cannot be used, for the error's end.
        kind: What it must hold, such as ``dict``. None: anything.

    Raises:
        UserError: It cannot be read, is not JSON, or holds something else.
    """
    end = f"; {fix}" if fix else ""
    try:
        body = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}){end}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON ({error}){end}") from error
    if kind is not None and not isinstance(body, kind):
        raise UserError(f"{path}: is damaged (it holds a JSON {type(body).__name__}){end}")
    return body


def read_json_or_none(path: Path) -> Any:
    """The content of a JSON file that coderl can do without; None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_json_lines(
    path: str | Path, forms: str = "", fix: str = "give a JSON-lines file", unfinished: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its ``file:line``; lines are read as they are asked for.

    Args:
        path: A file, gzipped where its name ends in ``.gz``, or ``-`` for standard input.
        forms: The fields that a row has, for messages.
        fix: What to do about a file that does not exist, for the error's end.
        unfinished: Whether a last line without a line break is read; False leaves it out, since another
            process may be writing it.

    Raises:
        UserError: The file cannot be read, or a line is not a JSON object.
    """
    name = name_of(path)
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip() and (unfinished or line.endswith(b"\n")):
                    yield f"{name}:{number}", _row(line, f"{name}:{number}", forms)
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: {fix}") from None
    except (OSError, EOFError, zlib.error) as error:
        place = f" after line {number}" if number else ""
        raise UserError(f"{name} cannot be read{place}: {getattr(error, 'strerror', 0) or error}") from None


def name_of(path: str | Path) -> str:
    """The name of a path in messages."""
    return "standard input" if path == STDIO else str(path)


def _opened(path: str | Path) -> AbstractContextManager[BinaryIO]:
    if path == STDIO:
        return nullcontext(sys.stdin.buffer)
    return gzip.open(path) if str(path).endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _row(line: bytes, where: str, forms: str) -> dict[str, Any]:
    end = f"; {forms}" if forms else ""
    try:
        row = json.loads(line.strip().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON ({error}); each line is to hold one JSON object") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no JSON object (it holds a JSON {type(row).__name__}){end}")
    return row


def free_path(path: Path) -> Path:
    """``path`` itself, or ``stem-2.suffix``, ``stem-3.suffix`` ... : the first that does not exist."""
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


@contextmanager
def replacing_folder(
    target: Path, owned: Sequence[str], errors: tuple[type[Exception], ...] = (), fix: str = ""
) -> Iterator[Path]:
    """Replace a folder as a whole: yields an empty one, which becomes ``target`` unless the block raises.

    If it raises, ``target`` is as it was. Files in ``target`` that are not ``owned`` stay in any case. The
    next replacement of the same target clears up what a killed process has left.

    The work folder is ``.NAME.*.partial`` beside the target, locked while its process lives. In it, ``new``
    is what is written and ``old`` is what the target held.

    Args:
        target: The folder to replace; folders above it are made.
        owned: Patterns of the files that are replaced with the folder, such as ``*.safetensors``.
        errors: Further exceptions of the block that mean that it could not write.
        fix: What to do about a target that cannot be written, for the error's end.

    Yields:
        The folder to write into.

    Raises:
        UserError: The target could not be written.
    """
    parent, lock = target.parent, -1
    end = f": {fix}" if fix else ""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent):
            for left in parent.glob(f".{glob.escape(target.name)}.*.partial"):
                _clear_up(left, target, owned)
        work = type(target)(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=parent))
        # The system lets go of this lock when the process ends, however it ends: so others see that it died.
        lock = os.open(work, os.O_RDONLY)
        with suppress(OSError):  # some network disks cannot lock
            fcntl.flock(lock, fcntl.LOCK_EX)
        new = work / "new"
        new.mkdir()  # not `work` itself: mkdtemp closes it to other users, this one follows the umask
        complete = False
        try:
            yield new
            complete = True
        finally:
            with _locked(parent):
                try:
                    if complete:
                        # No rename replaces a folder that has files, so there are two. After a crash between
                        # them there is no target, and _restore gives it back from `old`.
                        if target.exists():
                            target.rename(work / "old")
                        new.rename(target)
                finally:
                    _restore(work, target, owned)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error.strerror or error}{end}") from error
    except Exception as error:
        # Writers in Rust, such as that of tokenizers, report a full disk as an Exception with these words.
        if isinstance(error, errors) or "os error " in str(error):
            raise UserError(f"{target} could not be written: {error}{end}") from error
        raise
    finally:
        if lock >= 0:
            os.close(lock)


def is_partial(path: Path) -> bool:
    """Whether it is a work folder of :func:`replacing_folder`, or left by one that was killed."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other replacements in it, of other processes, inside the block."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks cannot lock
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _restore(work: Path, target: Path, owned: Sequence[str]) -> None:
    """Move back what the target held: all of it if nothing took its place, else the files not ``owned``."""
    old = work / "old"
    if old.exists() and not target.exists():
        old.rename(target)
    for path in old.glob("*"):
        is_owned = any(fnmatch(path.name, pattern.partition("/")[0]) for pattern in owned)
        if not is_owned and not is_partial(path) and not (target / path.name).exists():
            path.rename(target / path.name)
    shutil.rmtree(work, ignore_errors=True)


def _clear_up(left: Path, target: Path, owned: Sequence[str]) -> None:
    """Restore the target from a work folder whose process has died, and remove it."""
    with suppress(OSError):  # it is another user's, or its process lives and holds the lock
        if not any(left.iterdir()):
            return  # its process is between mkdtemp and the lock
        lock = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _restore(left, target, owned)
        finally:
            os.close(lock)
