from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from coderl.errors import UserError
from coderl.evaluation import reference, run_with_retries
from coderl.problems.prompts import MBPP_STOP, mbpp_prompt
from coderl.sandbox import Program, ProgramRunner, Sandbox
from coderl.scores import Evaluation, logged_scores, results_name, save_results, summary_text
from coderl.scores.statistics import pass_at_k
from coderl.types import Execution, Outcome, Problem
from tests.support.scoring import score

TESTS = ("assert f() == 1", "assert f() > 0")


def problems(count: int) -> list[Problem]:
    return [
        Problem(f"mbpp/{i}", mbpp_prompt(f"Task {i}.", TESTS[0]), tests=TESTS, stop=MBPP_STOP)
        for i in range(count)
    ]


class Fake(ProgramRunner):
    """Judges a program by the outcomes it spells, such as ``timeout>passed``: the next one each run."""

    def __init__(self) -> None:
        self.runs: list[list[Program]] = []
        self.times: dict[str, int] = {}

    def run(self, programs: Sequence[Program]) -> list[Execution]:
        self.runs.append(list(programs))
        return [self.verdict(p.code.splitlines()[-1]) for p in programs]

    def verdict(self, word: str) -> Execution:
        turn = self.times[word] = self.times.get(word, -1) + 1
        words: list[Any] = word.split("#")[0].split(">")
        outcome: Outcome = words[min(turn, len(words) - 1)]
        held = {"passed": 2, "failed": 1}.get(outcome, 0)
        return Execution(outcome, passed=held, total=2 if held else 0, tier="B")


def scored(*rows: str, n: int | None = None, ks: tuple[int, ...] = (1, 2)) -> Evaluation:
    """Scores rows of outcomes, such as ``"passed failed"``; ``#i`` tells samples of one outcome apart."""
    number = itertools.count()
    programs = [[f"{word}#{next(number)}" for word in row.split()] for row in rows]
    return score(problems(len(rows)), programs, Fake(), n=n or len(programs[0]), ks=ks)


# --- counting


def test_scores_of_known_samples() -> None:
    result = scored("passed failed failed failed", "passed passed syntax_error error", "failed " * 4)
    assert result.task == "mbpp"
    assert result.pass_at_k == {
        1: pytest.approx((1 / 4 + 2 / 4 + 0) / 3),
        2: pytest.approx((pass_at_k(4, 1, 2) + pass_at_k(4, 2, 2)) / 3),
    }
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.success_rate == pytest.approx(2 / 3)
    # A syntax error counts against both tests, though the sandbox got to neither.
    assert result.test_pass_rate == pytest.approx((2 + 3 + 4 + 4) / 24)
    assert result.outcomes == {"failed": 7, "passed": 3, "syntax_error": 1, "error": 1}
    assert (result.correct, result.counted) == ([1, 2, 0], [4, 4, 4])
    assert result.interval is not None
    low, high = result.interval
    assert 0 <= low < 0.25 < high <= 0.5
    assert result.settings["tier"] == ["B"]


def test_a_k_above_n_is_missing_not_dropped() -> None:
    result = scored("passed failed", ks=(1, 5))
    assert result.pass_at_k == {1: 0.5, 5: None}
    assert result.to_json()["pass@5"] is None
    assert "pass@5: missing (needs 5" in summary_text({"mbpp": result}, "x.json")
    assert logged_scores({"mbpp": result}) == {"final_eval/mbpp_pass@1": 0.5}


def test_infrastructure_errors_count_neither_way() -> None:
    result = scored(
        "passed infra_error failed", "infra_error infra_error infra_error", "failed failed failed"
    )
    assert result.pass_at_k == {1: pytest.approx((1 / 2 + 0) / 2), 2: pytest.approx((1 + 0) / 2)}
    assert (result.correct, result.counted) == ([1, 0, 0], [2, 0, 3])
    assert result.infra_errors == 4
    assert result.accuracy == 0.5
    assert result.success_rate == 0.5


def test_a_problem_short_of_judged_samples_is_left_out_of_the_larger_k_only() -> None:
    result = scored("failed infra_error", "passed passed")
    assert result.pass_at_k == {1: 0.5, 2: 1.0}


def test_nothing_judged_is_no_score() -> None:
    result = scored("infra_error")
    assert result.pass_at_k == {1: None, 2: None}
    assert result.interval is None
    assert (result.accuracy, result.success_rate, result.test_pass_rate) == (None, None, None)
    json.dumps(result.to_json())


def test_no_candidates_count_as_not_solved() -> None:
    result = scored("passed passed", "", n=2)
    assert result.pass_at_k == {1: 0.5, 2: 0.5}
    assert (result.accuracy, result.success_rate) == (0.5, 0.5)


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="mbpp/1: 1 samples, 2 were asked for"):
        scored("passed passed", "passed")
    with pytest.raises(UserError, match="nothing to evaluate"):
        score([], [], Fake(), n=1)


# --- fairness


def test_timeouts_alone_are_run_once_more() -> None:
    result = scored("timeout>passed timeout>timeout>passed failed>passed passed>failed")
    assert result.outcomes == {"passed": 2, "timeout": 1, "failed": 1}
    assert result.timeouts_rerun == 2


def test_infrastructure_errors_are_retried_first() -> None:
    result = scored("infra_error>passed infra_error>infra_error>failed infra_error>timeout>passed")
    assert result.outcomes == {"passed": 2, "failed": 1}
    assert (result.timeouts_rerun, result.infra_errors) == (1, 0)


def test_a_timeout_whose_second_run_is_lost_stays_a_timeout() -> None:
    executions, again = run_with_retries([Program("timeout>infra_error")], Fake())
    assert ([e.outcome for e in executions], again) == (["timeout"], 1)


def test_one_run_is_enough_where_nothing_went_wrong() -> None:
    fake = Fake()
    run_with_retries([Program("passed"), Program("failed")], fake)
    assert len(fake.runs) == 1


# --- what is written


def test_results_are_saved_in_the_layout_of_the_harness(tmp_path: Path) -> None:
    result = replace(scored("passed failed", "failed failed"), generations=[["x\ud800"], ["é"]])
    asked = problems(2)
    path = tmp_path / "run" / "evaluation_results_m_grpo_20241201_143022.json"
    written = save_results({"MBPP": result}, path, {"model": "m"})
    body = json.loads(path.read_text(encoding="utf-8"))
    assert body["mbpp"]["pass@1"] == 0.25
    assert body["mbpp"]["n"] == 2
    assert "generations" not in body["mbpp"]
    assert body["config"] == {"model": "m"}
    names = [f"{kind}_m_grpo_20241201_143022_mbpp.json" for kind in ("generations", "references")]
    assert written == [path, *(tmp_path / "run" / name for name in names)]
    assert json.loads(written[1].read_text()) == [["x\ud800"], ["é"]]
    assert json.loads(written[2].read_text()) == [reference(problem) for problem in asked]


def test_file_name_is_the_original_recipes() -> None:
    when = datetime(2024, 12, 1, 14, 30, 22)
    name = results_name("codellama-7b-python", "ppo", when)
    assert name == "evaluation_results_codellama-7b-python_ppo_20241201_143022.json"
    assert results_name("org/name with space", "ppo", when) == (
        "evaluation_results_org-name-with-space_ppo_20241201_143022.json"
    )
    assert re.fullmatch(r"evaluation_results_m_ppo_\d{8}_\d{6}\.json", results_name("m", "ppo"))


def test_console_summary_is_the_original_recipes() -> None:
    mbpp = replace(
        scored("passed failed"), pass_at_k={1: 0.4232, 5: 0.578, 10: 0.647}, interval=(0.38, 0.4666)
    )
    mbpp.settings.update(temperature=0.2, top_p=0.95)
    human = replace(mbpp, pass_at_k={1: 0.387}, problems=164, interval=None)
    both = {"mbpp": mbpp, "humaneval": human}
    assert summary_text(both, "results.json", list(logged_scores(both))[:2]).splitlines() == [
        "🎯 Automatic evaluation completed! Results summary:",
        "============================================================",
        "",
        "📊 MBPP Results:",
        "   pass@1: 0.423",
        "   pass@5: 0.578",
        "   pass@10: 0.647",
        "   (95 % interval of pass@1 0.380 to 0.467, 1 problems, n 2, temperature 0.2, top_p 0.95, "
        "0 time-outs, 0 infrastructure errors)",
        "   tests passed 75.0 %, accuracy 100.0 %, success rate 100.0 %, passed 1, failed 1",
        "",
        "📊 HUMANEVAL Results:",
        "   pass@1: 0.387",
        "   (164 problems, n 2, temperature 0.2, top_p 0.95, 0 time-outs, 0 infrastructure errors)",
        "   tests passed 75.0 %, accuracy 100.0 %, success rate 100.0 %, passed 1, failed 1",
        "",
        "📁 Complete evaluation results saved to: results.json",
        "📊 Evaluation results logged to WandB: ['final_eval/mbpp_pass@1', 'final_eval/mbpp_pass@5']",
    ]


# --- with the real sandbox


def test_real_programs_are_judged() -> None:
    programs = ["def f():\n    return 1", "def f():\n    return 2", "def f(:", "assert f() == 1"]
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        result = score(problems(1), [programs], sandbox, n=4, ks=(1, 4))
    assert result.pass_at_k == {1: 0.25, 4: 1.0}
    assert result.outcomes["passed"] == 1
    assert result.outcomes["syntax_error"] == 1
    assert result.test_pass_rate == pytest.approx(3 / 8)
    assert result.settings["grading"] == {"inline": 4}


CHEAT = """class Anything:
    def __eq__(self, other): return other == 1
    def __gt__(self, other): return True
def f(): return Anything()"""


def test_samples_that_two_gradings_judge_otherwise_are_named() -> None:
    """An object that equals the answer, and not the canaries' baits, passes inline alone."""
    with Sandbox(workers=1, allow_weak_isolation=True) as sandbox:
        programs = [["def f():\n    return 1", CHEAT]]
        auto = score(problems(1), programs, sandbox, n=2, ks=(1,), grading="auto")
        inline = score(problems(1), programs, sandbox, n=2, ks=(1,))
    assert inline.disagreements == []
    assert (inline.pass_at_k[1], auto.pass_at_k[1]) == (1.0, 0.5)
    (found,) = auto.disagreements
    assert (found["id"], found["sample"], found["inline"], found["grading"]) == (
        "mbpp/0",
        1,
        "passed",
        "sealed",
    )
    assert "mbpp/0#1 passed inline, sealed failed" in summary_text({"mbpp": auto}, "x.json")


@pytest.mark.slow
def test_each_program_has_its_tasks_time(tmp_path: Path) -> None:
    slow = "import time\ndef f():\n    time.sleep(1)\n    return 1"
    with Sandbox(workers=1, timeout=10, allow_weak_isolation=True) as sandbox:
        kept, cut = (score(problems(1), [[slow]], sandbox, n=1, ks=(1,), timeout=t) for t in (9.0, 0.5))
    assert (kept.pass_at_k[1], cut.pass_at_k[1]) == (1.0, 0.0)
    assert (cut.outcomes, cut.timeouts_rerun, cut.settings["timeout"]) == ({"timeout": 1}, 1, 0.5)


def test_training_problems_are_told_loudly() -> None:
    result = replace(scored("passed failed", "failed failed"), contaminated=["mbpp/0", "mbpp/1"])
    assert "NOT HELD OUT: 2 of 2 problems were in the training data (mbpp/0, mbpp/1)" in summary_text(
        {"mbpp": result}, "x.json"
    )
    assert "NOT HELD OUT" not in summary_text({"mbpp": scored("passed failed")}, "x.json")
