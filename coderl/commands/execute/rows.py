"""Reading programs from JSON lines, one at a time, with errors that name the line."""

from __future__ import annotations

import gzip
import json
import os
import stat
import sys
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coderl.errors import UserError
from coderl.sandbox import Program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from typing import BinaryIO

STDIO = "-"
"""The path that stands for standard input or output."""

FORMS = 'a row is {"id", "code", "tests"[, "setup"]} or {"id", "code", "test", "entry_point"[, "prompt"]}'


@dataclass(frozen=True, slots=True)
class Row:
    """One program of the input.

    Attributes:
        where: ``file:line``, for messages.
        id: What the verdict is filed under, as it stands in the input.
        program: The candidate and its tests.
    """

    where: str
    id: str | int
    program: Program


def read_rows(path: str) -> Iterator[Row]:
    """The programs of a JSON-lines file, read no further than asked for.

    Args:
        path: A file, gzipped where its name ends in ``.gz``, or ``-`` for standard input.

    Raises:
        UserError: The file cannot be read, or a line is no valid row.
    """
    name = name_of(path)
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(line, f"{name}:{number}")
    except FileNotFoundError:
        raise UserError(f"{name} does not exist: name a file of programs, or - for standard input") from None
    except (OSError, EOFError, zlib.error) as error:
        place = f" after line {number}" if number else ""
        raise UserError(f"{name} cannot be read{place}: {getattr(error, 'strerror', 0) or error}") from None


def name_of(path: str) -> str:
    """A path as messages call it."""
    return "standard input" if path == STDIO else path


def count_lines(path: str) -> int | None:
    """Lines of a plain file, for a progress bar; None where counting would mean unpacking or waiting."""
    if path == STDIO or path.endswith(".gz") or not stat.S_ISREG(os.stat(path).st_mode):
        return None
    with open(path, "rb", buffering=0) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _opened(path: str) -> AbstractContextManager[BinaryIO]:
    if path == STDIO:
        return nullcontext(sys.stdin.buffer)
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _row(line: bytes, where: str) -> Row:
    try:
        fields = json.loads(line.strip().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON ({error}); each line is to hold one JSON object") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: is no JSON object; {FORMS}")
    return Row(where, _id(fields, where), _program(fields, where))


def _id(fields: dict[str, Any], where: str) -> str | int:
    found = fields.get("id")
    if found is None:
        raise UserError(f"{where}: field 'id' is missing; {FORMS}")
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise UserError(f"{where}: field 'id' is {type(found).__name__}, not a string or an integer")
    return found


def _program(fields: dict[str, Any], where: str) -> Program:
    code, setup = _text(fields, "code", where), _text(fields, "setup", where, "")
    tests = fields.get("tests")
    if tests is not None:
        if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
            raise UserError(f"{where}: field 'tests' is to be a list of strings, each an assert; {FORMS}")
        return Program(code, tuple(tests), setup)
    if fields.get("test") is None:
        raise UserError(f"{where}: there is neither 'tests' nor 'test'; {FORMS}")
    return Program(
        code,
        setup=setup,
        test=_text(fields, "test", where),
        entry_point=_text(fields, "entry_point", where),
        helpers=_text(fields, "prompt", where, ""),
    )


def _text(fields: dict[str, Any], name: str, where: str, default: str | None = None) -> str:
    value = fields.get(name)
    if value is None:
        if default is None:
            raise UserError(f"{where}: field '{name}' is missing; {FORMS}")
        return default
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{name}' is {type(value).__name__}, not a string; {FORMS}")
    return value
