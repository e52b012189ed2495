"""Reads programs from JSON lines, one at a time; errors name the line."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coderl.errors import UserError
from coderl.files import STDIO, read_json_lines
from coderl.problems.prompts import is_python
from coderl.problems.rows import unindented
from coderl.sandbox import Program
from coderl.sandbox.checks.base import BadTests, parse

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMS = 'a row is {"id", "code", "tests"[, "setup"]} or {"id", "code", "test", "entry_point"[, "prompt"]}'


@dataclass(frozen=True, slots=True)
class Row:
    """One program of the input.

    Attributes:
        where: ``file:line``, for messages.
        id: Its id in the input; its verdict has the same.
        program: The candidate and its tests.
    """

    where: str
    id: str | int
    program: Program


def read_rows(path: str) -> Iterator[Row]:
    """The programs of a JSON-lines file; lines are read as they are asked for.

    Args:
        path: A file, gzipped where its name ends in ``.gz``, or ``-`` for standard input.

    Raises:
        UserError: The file cannot be read, or a line is no valid row.
    """
    for where, fields in read_json_lines(path, FORMS, "name a file of programs, or - for standard input"):
        yield Row(where, _id(fields, where), _program(fields, where))


def count_lines(path: str) -> int | None:
    """Lines of a plain file, for a progress bar; None for gzip, pipes and devices."""
    if path == STDIO or path.endswith(".gz") or not stat.S_ISREG(os.stat(path).st_mode):
        return None
    with open(path, "rb", buffering=0) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


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
        tests = tuple(map(unindented, tests))
        _require_python(where, setup, *tests)
        return Program(code, tests, setup, reference=_text(fields, "reference", where, ""))
    if fields.get("test") is None:
        raise UserError(f"{where}: there is neither 'tests' nor 'test'; {FORMS}")
    test = unindented(_text(fields, "test", where))
    _require_python(where, test)
    return Program(
        code,
        setup=setup,
        test=test,
        entry_point=_text(fields, "entry_point", where),
        helpers=_text(fields, "prompt", where, ""),
        reference=_text(fields, "reference", where, ""),
    )


def _require_python(where: str, *tests: str) -> None:
    try:
        for test in tests:
            if not is_python(test):  # remembered, as many programs have the same tests
                parse(test)
    except BadTests as error:
        raise UserError(f"{where}: {error}") from None


def _text(fields: dict[str, Any], name: str, where: str, default: str | None = None) -> str:
    value = fields.get(name)
    if value is None:
        if default is None:
            raise UserError(f"{where}: field '{name}' is missing; {FORMS}")
        return default
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{name}' is {type(value).__name__}, not a string; {FORMS}")
    return value
