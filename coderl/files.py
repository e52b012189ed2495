"""Files that are whole or not there, JSON with errors that name the fix, JSON lines with ``file:line``."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import sys
import zlib
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, BinaryIO

from coderl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

STDIO = "-"
"""The path that stands for standard input or output."""


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that nobody ever sees half of it; what stood there stays where that fails.

    Args:
        path: The file; folders above it are made.
        data: Its content; text is written in UTF-8.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}){end}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON ({error}){end}") from error
    if kind is not None and not isinstance(body, kind):
        raise UserError(f"{path}: is damaged (it holds a JSON {type(body).__name__}){end}")
    return body


def read_json_or_none(path: Path) -> Any:
    """The content of a JSON file; None where it is missing or damaged, for what is good to know at most."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_json_lines(path: str | Path, forms: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its place ``file:line``, read no further than asked for.

    Args:
        path: A file, gzipped where its name ends in ``.gz``, or ``-`` for standard input.
        forms: The fields that a row has, for messages.

    Raises:
        UserError: The file cannot be read, or a line is not a JSON object.
    """
    name = name_of(path)
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{name}:{number}", _row(line, f"{name}:{number}", forms)
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: give a JSON-lines file") from None
    except (OSError, EOFError, zlib.error) as error:
        place = f" after line {number}" if number else ""
        raise UserError(f"{name} cannot be read{place}: {getattr(error, 'strerror', 0) or error}") from None


def name_of(path: str | Path) -> str:
    """A path as messages call it."""
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
        raise UserError(f"{where}: holds a JSON {type(row).__name__}, not an object{end}")
    return row


def free_path(path: Path) -> Path:
    """``path`` itself, or ``stem-2.suffix``, ``stem-3.suffix`` ... : the first one that nothing lies at."""
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())
