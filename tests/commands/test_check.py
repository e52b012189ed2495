"""``coderl check``, called as on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coderl.cli import main

GOOD = {
    "text": "Add one.",
    "test_list": ["assert f(1) == 2", "assert f(5) == 6"],
    "code": "def f(x): return x + 1",
}
ROWS: list[dict[str, Any]] = [
    GOOD,
    GOOD | {"code": "def f(x): return x"},
    GOOD | {"test_list": ["assert f(1) == f(1)"], "code": ""},
    GOOD | {"test_list": "assert f(1) == 2"},
    GOOD | {"task_id": "own/1"},
    GOOD | {"test_list": ["assert f(3) == 4"]},
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, on whatever isolation this machine has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    write("own.jsonl", ROWS)


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def checked(*args: str) -> int:
    return main(["check", *args, "--workers", "2"])


def test_each_row_has_a_line_and_faults_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("own.jsonl") == 1
    out, err = capsys.readouterr()
    states = [line.split()[:2] for line in out.splitlines() if "own.jsonl:" in line and "->" not in line]
    assert states == [
        ["ok", "own.jsonl:1"],
        ["FAULT", "own.jsonl:2"],
        ["ok", "own.jsonl:3"],
        ["FAULT", "own.jsonl:4"],
        ["FAULT", "own.jsonl:5"],
        ["ok", "own.jsonl:6"],
    ]
    for words in (
        "its own solution does not pass, failed (test 1: wrong answer 1)",
        "graded inline; no stronger way will do (sealed: both of its sides are the program's: f(1) == f(1)",
        "'test_list' is to be a list",
        "its task_id was used in own.jsonl:1",
        "6 rows in",
        "3 can be used; graded: 3 sealed, 1 inline",
    ):
        assert words in out, words
    assert err.strip() == (
        "coderl: error: 3 of 6 rows cannot be used: training leaves 1 out and refuses files with the other 2"
    )


def test_good_files_exit_with_0_and_each_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", [GOOD])
    write("b.jsonl", [GOOD, GOOD])
    assert checked("a.jsonl", "b.jsonl", "a.jsonl") == 0, "files may share ids"
    assert "4 rows in" in capsys.readouterr().out


def test_names_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", [GOOD | {"task_id": "\x1b[31mred\nnext"}])
    assert checked("a.jsonl") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[31mred\\nnext" in out


def test_mutants_show_what_the_tests_let_through(capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", [GOOD, ROWS[5]])
    assert checked("a.jsonl", "--mutants", "5") == 0
    out = capsys.readouterr().out
    assert "weak   a.jsonl:2" in out and "passes as well: return 4" in out
    assert "return the first expected value in 1" in out and "rows let one through" in out


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert checked("own.jsonl", "--json", "--mutants", "2") == 1
    body = json.loads(capsys.readouterr().out)
    assert (body["rows"], body["usable"], body["gradings"]) == (6, 3, {"sealed": 3, "inline": 1})
    first, wrong, *_ = body["found"]
    assert (first["where"], first["id"], first["outcome"], first["fault"]) == (
        "own.jsonl:1",
        "own/1",
        "passed",
        "",
    )
    assert first["changes"]["caught"] + len(first["changes"]["survivors"]) == first["changes"]["total"] == 2
    assert wrong["outcome"] == "failed" and wrong["fault"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["missing.jsonl"], 1, "missing.jsonl does not exist"),
        (["empty.jsonl"], 1, "empty.jsonl holds no problems; a row is"),
        (["broken.jsonl"], 1, "broken.jsonl:2: malformed JSON"),
        (["own.jsonl", "--mutants", "-1"], 2, "--mutants is -1"),
        ([], 2, "files"),
    ],
)
def test_bad_input_gets_one_line(
    args: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.jsonl").write_text("\n")
    Path("broken.jsonl").write_text(json.dumps(GOOD) + "\n{\n")
    assert checked(*args) == code
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_mbpp_is_as_its_authors_say(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 974 published solutions pass, 367 and 927 by their set-up code."""
    # Which programs are right is asked here, not how fast: on a slow machine one computes for over 3 s.
    assert main(["check", str(data_dir / "mbpp.jsonl"), "--timeout", "15"]) == 0
    out = capsys.readouterr().out
    assert "974 can be used; graded: 973 sealed, 1 inline" in out
    assert "solutions: 974 pass, 0 do not" in out
