"""Turns rows of JSON lines and hub data sets into :class:`~coderl.types.Problem`; errors name the line."""

from __future__ import annotations

import textwrap
from typing import Any

from coderl.errors import UserError
from coderl.problems.prompts import (
    HUMANEVAL_STOP,
    MBPP_STOP,
    humaneval_instruction,
    humaneval_prompt,
    is_python,
    mbpp_instruction,
    mbpp_prompt,
)
from coderl.types import Problem

Row = dict[str, Any]

FORMS = (
    'a row is {"text" or "prompt", "test_list"} (MBPP form) '
    'or {"prompt", "test", "entry_point"} (HumanEval form)'
)


def problem_from_row(row: Row, where: str, *, source: str, split: str, strip: bool = True) -> Problem:
    """A problem from a row in MBPP or HumanEval form.

    Args:
        row: Its fields; unknown ones are ignored.
        where: ``file:line`` of the row, for messages.
        source: Prefix of ids that are numbers, as in ``mbpp/601``.
        split: The split that the problem belongs to.
        strip: Whether to strip white space around a HumanEval prompt.

    Raises:
        UserError: A field is missing or is of the wrong type.
    """
    # A string is an id as it is. A number, or the line where there is none, gets the source as its prefix.
    task = row.get("task_id")
    name = task if isinstance(task, str) else f"{source}/{where.rpartition(':')[2] if task is None else task}"
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a character, which no file can hold
        raise UserError(f"{where}: field 'task_id' is {task!r}, which is no text; give it another") from None
    if "test_list" not in row and ("entry_point" in row or "test" in row):
        return _humaneval_form(row, where, name, split, strip)
    return _mbpp_form(row, where, name, split)


def _mbpp_form(row: Row, where: str, name: str, split: str) -> Problem:
    text = text_field(row, "text" if "text" in row else "prompt", where)
    tests = row.get("test_list")
    if not isinstance(tests, (list, tuple)) or not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{where}: 'test_list' is to be a list with at least one test, as strings; {FORMS}")
    tests = tuple(map(unindented, tests))
    return Problem(
        id=name,
        prompt=mbpp_prompt(text, tests[0]),
        instruction=mbpp_instruction(text, tests[0]),
        tests=tests,
        setup=_setup(row, where),
        solution=_unix_newlines(text_field(row, "code", where, "")),
        stop=MBPP_STOP,
        split=split,
        where=where,
    )


def _setup(row: Row, where: str) -> str:
    """What runs before the tests: the imports that sanitized MBPP lists, and setup code."""
    imports = row.get("test_imports") or []
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
        raise UserError(f"{where}: 'test_imports' is to be a list of strings, each an import; {FORMS}")
    return "\n".join([*imports, _unix_newlines(text_field(row, "test_setup_code", where, ""))]).strip("\n")


def _humaneval_form(row: Row, where: str, name: str, split: str, strip: bool) -> Problem:
    prompt = text_field(row, "prompt", where)
    solution = text_field(row, "canonical_solution", where, "")
    return Problem(
        id=name,
        prompt=humaneval_prompt(prompt) if strip else prompt,
        instruction=humaneval_instruction(prompt),
        test=unindented(text_field(row, "test", where)),
        entry_point=text_field(row, "entry_point", where),
        # The prompt's final newline is stripped, so the solution that continues it begins with one.
        solution="\n" + solution if solution and strip else solution,
        stop=HUMANEVAL_STOP,
        split=split,
        where=where,
    )


def unindented(test: str) -> str:
    """A test without the indentation that all its lines have, as where it was cut out of a function.

    Anything else stays as it is: in a string of several lines, blanks count.
    """
    return test if is_python(test) else textwrap.dedent(test)


def text_field(row: Row, field: str, where: str, default: str | None = None) -> str:
    """A field that holds a string; the default where it is missing.

    Raises:
        UserError: It holds something else, or it is missing and has no default.
    """
    value = row.get(field)
    if value is None and default is not None:
        return default
    if value is None or (value == "" and default is None):
        raise UserError(f"{where}: field '{field}' is missing or empty; {FORMS}")
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{field}' is {type(value).__name__}, not a string; {FORMS}")
    return value


def _unix_newlines(code: str) -> str:
    # MBPP's code has Windows newlines, and a few lone "\r", which no model should learn.
    return code.replace("\r\n", "\n").replace("\r", "\n")
