"""An error's text in one line, whatever its class put into it."""

from __future__ import annotations

import pytest

from coderl.errors import first_line, named_line

TEXT = "\n  Error(s) in loading:\n\n\tsize mismatch\n"


@pytest.mark.parametrize(
    ("error", "lines", "line"),
    [
        (ValueError(TEXT), 1, "Error(s) in loading:"),
        (ValueError(TEXT), 2, "Error(s) in loading: size mismatch"),
        (ValueError(TEXT), 3, "Error(s) in loading: size mismatch"),
        (ValueError(" \n"), 1, "ValueError"),
        (TEXT, 1, "Error(s) in loading:"),
    ],
)
def test_the_first_lines_with_text_stand_for_an_error(error: object, lines: int, line: str) -> None:
    assert first_line(error, lines=lines) == line


def test_a_named_line_begins_with_the_class_and_is_as_short_as_asked() -> None:
    assert named_line(KeyError("a")) == "KeyError: 'a'"
    assert named_line(OSError("x" * 500), limit=3) == "OSError: xxx"
