"""The look at problems before they are used."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from coderl.algorithms import GRPO
from coderl.data import CodeDataModule
from coderl.errors import UserError
from coderl.model import LoRA, Policy
from coderl.problems import JSONLProblems
from coderl.problems.rows import problem_from_row
from coderl.review import KeptPasses, look, summary_lines
from coderl.sandbox import Program, ProgramRunner, Sandbox
from coderl.types import Execution, Problem
from tests.support import tiny

RIGHT = "def f(x):\n    return x + 1"


def problem(number: int = 1, code: str = RIGHT, **fields: Any) -> Problem:
    row = {"text": "Add one.", "test_list": ["assert f(1) == 2", "assert f(5) == 6"], "code": code}
    return problem_from_row(row | fields, f"own.jsonl:{number}", source="own", split="train")


def in_humaneval_form(number: int = 1, **fields: Any) -> Problem:
    row = {
        "prompt": 'def f(x):\n    """One more."""\n',
        "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        "entry_point": "f",
        "canonical_solution": "    return x + 1\n",
    }
    return problem_from_row(row | fields, f"own.jsonl:{number}", source="own", split="train")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2, timeout=1.0, allow_weak_isolation=True) as pool:
        yield pool


@pytest.mark.parametrize("made", [problem(), in_humaneval_form(), problem(code=""), in_humaneval_form(2)])
def test_what_is_right_has_no_fault(made: Problem, sandbox: Sandbox) -> None:
    (found,) = look([made], sandbox)
    assert not found.fault
    assert (found.solution.outcome if found.solution else "") == ("passed" if made.solution else "")


FAULTS = {
    "a test is not valid Python: .*'assert f\\('": problem(test_list=["assert f(1) == 2", "assert f("]),
    "its set-up code or imports are not Python: ": problem(test_setup_code="x = ("),
    "its set-up code or imports are": problem(test_imports=["import math as"]),
    "check nothing": problem(test_list=[""]),
    "its tests check nothing": problem(test_list=["assert True", "pass"]),
    "its tests check nothing: write": problem(test_list=["f(1) == 2", "print(f(1))"]),
    "check nothing: write": problem(test_list=["assert (f(1) == 3, 'x')"]),
    "nothing: a program passes": problem(test_list=["def test():\n    assert f(1) == 2"]),
    "a program passes that only raises": problem(
        test_list=["try:\n    assert f(1) == 2\nexcept Exception:\n    pass"]
    ),
    "passes that only raises": in_humaneval_form(
        test="def check(candidate):\n    return\n    assert candidate(1) == 2"
    ),
    "only raises": in_humaneval_form(test="async def check(candidate):\n    assert candidate(1) == 2"),
    "does not define check": in_humaneval_form(test="assert f(1) == 2"),
    "tests check nothing: ": in_humaneval_form(test="def check(candidate):\n    pass"),
    "prompt is not Python": in_humaneval_form(prompt="Add one.", canonical_solution=RIGHT),
    "does not pass, failed .*wrong answer 10": problem(code="def f(x):\n    return x * 2"),
    "does not pass, syntax_error": problem(code="def f(x:"),
    "needs the package pandas": problem(code=f"import pandas as pd\n{RIGHT}"),
    "package yaml": problem(code=f"from yaml.nodes import Node\n{RIGHT}"),
    "takes more than 1 s": problem(code="def f(x):\n    while True: pass"),
}


@pytest.mark.parametrize("words", FAULTS)
def test_what_is_at_fault_is_said(words: str, sandbox: Sandbox) -> None:
    found = look([FAULTS[words]], sandbox)
    (line,) = summary_lines(found)
    assert line.startswith("own.jsonl:1: ")
    with pytest.raises(UserError, match=words):
        raise UserError(line)


@pytest.mark.parametrize(
    "made",
    [
        problem(test_list=["    assert f(1) == 2\n    assert f(2) == 3\n"]),
        in_humaneval_form(test="  def check(candidate):\n      assert candidate(1) == 2\n"),
        problem(test_list=['assert f() == """a\n   \nb"""'], code="def f(): return 'a\\n   \\nb'"),
    ],
)
def test_a_test_that_is_indented_as_a_whole_is_read_and_others_stay_as_they_are(
    made: Problem, sandbox: Sandbox
) -> None:
    (found,) = look([made], sandbox)
    assert not found.fault and found.solution is not None and found.solution.outcome == "passed"


def test_two_problems_with_one_id_are_both_looked_at(sandbox: Sandbox) -> None:
    first, second = look([problem(), problem(code="def f(x): return x")], sandbox)
    assert not first.fault and second.fault


def test_plain_words_are_a_prompt_in_chat_form(sandbox: Sandbox) -> None:
    made = in_humaneval_form(prompt="Write f, which adds one.", canonical_solution=RIGHT)
    (found,) = look([made], sandbox, "chat")
    assert not found.fault and found.solution is not None and found.solution.outcome == "passed"


def test_what_several_problems_share_is_said_once(sandbox: Sandbox) -> None:
    lacking = [problem(n, code=f"import pandas\n{RIGHT}") for n in range(1, 6)]
    lines = summary_lines(look([*lacking, problem(9, code="x = 1")], sandbox))
    assert lines[0].startswith(
        "own.jsonl:1, own.jsonl:2, own.jsonl:3 and 2 more: it needs the package pandas"
    )
    assert len(lines) == 2
    many = [problem(n, code=f"def f(x): return {n}") for n in range(10, 15)]
    assert summary_lines(look(many, sandbox), limit=3)[-1].startswith("and 2 further faults")


class Counting(ProgramRunner):
    """Lets everything pass but what only raises, and counts."""

    timeout = 1.0

    def __init__(self, identity: str, outcome: Any = "passed") -> None:
        self.ran, self.outcome, self._identity = 0, outcome, identity

    @property
    def identity(self) -> str:
        return self._identity

    def run(self, programs: Sequence[Program]) -> list[Execution]:
        self.ran += len(programs)
        raises = ["raise Nothing" in program.code for program in programs]
        return [Execution("error" if only else self.outcome, 1, 1) for only in raises]


def test_what_passed_is_not_run_again_unless_something_changed(tmp_path: Path) -> None:
    kept = KeptPasses(tmp_path / "deep" / "passes.sqlite")
    problems = [problem(n, task_id=n) for n in range(3)]

    def ran(runner: Counting, problems: list[Problem] = problems) -> int:
        look(problems, runner, kept=kept)
        return runner.ran

    assert ran(Counting("a")) == 3
    assert ran(Counting("a")) == 0
    assert ran(Counting("b")) == 3, "other limits"
    assert ran(Counting("a"), [problem(code=RIGHT + "\n"), problem(2)]) == 1, "another solution"
    assert ran(Counting("a"), [problem(code="")]) == 1, "without a solution one runs that only raises"
    assert ran(Counting("a"), [problem(code="")]) == 0
    assert ran(Counting("a"), [in_humaneval_form()]) == 2, "its solution and one that only raises"
    assert ran(Counting("")) == 3, "a runner that does not say what it depends on"
    assert ran(Counting("c", "failed")) == ran(Counting("c", "failed")) == 3, "failures are tried again"
    assert ran(Counting("a")) == 0


def test_a_damaged_file_of_passes_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "passes.sqlite"
    path.write_bytes(b"no database" * 500)
    runner = Counting("a")
    for _ in range(4):
        look([problem()], runner, kept=KeptPasses(path))
    assert runner.ran == 1, "the damaged file is removed at once"


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODERL_CACHE_DIR", "~nobody-of-this-name/cache")
    runner = Counting("a")
    for _ in range(2):
        look([problem()], runner, kept=KeptPasses())
    assert runner.ran == 2


@pytest.mark.parametrize("spoil", ["folder", "unreadable"])
def test_a_file_of_passes_that_cannot_be_used_costs_only_time(spoil: str, tmp_path: Path) -> None:
    path = tmp_path / "passes.sqlite"
    if spoil == "folder":
        path.mkdir()
    else:
        path = Path("/proc/nothing/passes.sqlite")
    runner = Counting("a")
    look([problem()], runner, kept=KeptPasses(path))
    look([problem()], runner, kept=KeptPasses(path))
    assert runner.ran == 2


def test_the_file_of_passes_is_a_database_of_hashes(tmp_path: Path) -> None:
    path = tmp_path / "passes.sqlite"
    look([problem()], Counting("a"), kept=KeptPasses(path))
    assert [len(key) for (key,) in sqlite3.connect(path).execute("SELECT key FROM passes")] == [64]


@pytest.mark.parametrize("code", ["def f(x): return 1", ""])
def test_a_grading_that_a_problem_does_not_allow_names_its_line(code: str) -> None:
    with (
        Sandbox(workers=1, grading="sealed", allow_weak_isolation=True) as sealed,
        pytest.raises(UserError, match=r"own.jsonl:7: .*f\(1\) == f\(2\).*use grading: auto"),
    ):
        look([problem(3), problem(7, code=code, test_list=["assert f(1) == f(2)"])], sealed)


def test_an_infrastructure_error_is_no_fault_and_is_not_kept(tmp_path: Path) -> None:
    kept = KeptPasses(tmp_path / "passes.sqlite")
    (found,) = look([problem()], Counting("a", "infra_error"), kept=kept)
    assert not found.fault
    runner = Counting("a")
    look([problem()], runner, kept=kept)
    assert runner.ran == 1


# --- under load, what decides how programs are graded must not change

OBJECTS = """import time

class Same:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return other == self.x

def f(x):
    until = time.process_time() + 0.4
    while time.process_time() < until: pass
    return Same(x)
"""


def test_a_busy_machine_does_not_change_how_programs_are_graded() -> None:
    """Eight lanes on few cores: each solution needs 0.4 s of processor time and has 1 s on the clock."""
    problems = [problem(n, code=OBJECTS + f"# {n}", test_list=[f"assert f({n}) == {n}"]) for n in range(12)]
    with Sandbox(workers=8, timeout=1.0, allow_weak_isolation=True) as crowded:
        found = look(problems, crowded)
    assert [one.fault for one in found] == [""] * 12


# --- before a fit


def rows(path: Path, *codes: str, tests: str = '["assert f(1) == 2"]') -> JSONLProblems:
    lines = (f'{{"text": "Add one.", "test_list": {tests}, "code": "{code}"}}\n' for code in codes)
    path.write_text("".join(lines))
    return JSONLProblems(str(path))


def fitted(llama: Path, source: JSONLProblems, sandbox: Sandbox) -> CodeDataModule:
    data = CodeDataModule(source, batch_size=2)
    policy = Policy(str(llama), quantization="none", lora=LoRA(r=2, alpha=4))
    module = GRPO(policy, sandbox=sandbox, group_size=2, max_new_tokens=4)
    tiny.trainer(max_steps=1).fit(module, datamodule=data)
    return data


@pytest.mark.slow
def test_a_fit_leaves_out_what_cannot_be_used_and_says_so(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = "def f(x): return x + 1", "def f(x): return x"
    source = rows(tmp_path / "own.jsonl", good, bad, good)
    with caplog.at_level(logging.WARNING):
        data = fitted(llama, source, Sandbox(workers=1, allow_weak_isolation=True))
    assert [one.id for one in data.problems("train")] == ["own/1", "own/3"]
    assert f"{tmp_path}/own.jsonl:2: its own solution does not pass" in caplog.text
    assert "1 of 3 train problems left out" in caplog.text


@pytest.mark.slow
def test_a_fit_does_not_start_where_nothing_can_be_used(llama: Path, tmp_path: Path) -> None:
    source = rows(tmp_path / "own.jsonl", "", "", tests='[""]')
    with pytest.raises(UserError, match="none of the 2 train problems is left: their tests or solutions"):
        fitted(llama, source, Sandbox(workers=1, allow_weak_isolation=True))
