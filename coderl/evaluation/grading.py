"""pass@k by execution, after bigcode-evaluation-harness: run whole programs, count, and say what was found.

What makes scores compare with other people's is settled in :mod:`coderl.problems.prompts` (prompt, stops,
program), :mod:`coderl.evaluation.tasks` (problems, time-outs) and here (what counts as a sample, the
estimator, re-runs).
"""

from __future__ import annotations

import platform
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coderl.errors import UserError
from coderl.evaluation.tasks import Task, reference
from coderl.problems.prompts import to_program
from coderl.scores.results import Evaluation
from coderl.scores.statistics import bootstrap_interval, pass_at_k

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coderl.evaluation.settings import EvaluationSettings
    from coderl.sandbox import Program, ProgramRunner
    from coderl.types import Execution, Problem

INFRA_RETRIES = 2


class Grader:
    """Runs whole programs against a task's tests and scores them.

    Args:
        runner: Runs the programs.
        settings: Samples per problem, the k of pass@k, and how verdicts are reached. After ``auto``, the
            programs are judged inline as well, and samples that the two judge differently are listed.
    """

    def __init__(self, runner: ProgramRunner, settings: EvaluationSettings) -> None:
        self.runner, self.settings = runner, settings

    def grade_task(
        self,
        task: Task,
        programs: Sequence[Sequence[str]],
        *,
        notes: Mapping[str, Any] | None = None,
        contaminated: Sequence[str] | None = None,
        started: float | None = None,
    ) -> dict[str, Evaluation]:
        """Score programs by a task's tests, and by its original ones where it has both.

        Args:
            task: What was asked.
            programs: Per problem of the task, ``settings.n`` whole programs, or none at all.
            notes: Further settings to save beside the scores.
            contaminated: Ids of problems that the policy was trained on. None: not known.
            started: Monotonic time, in seconds, from which the wall time counts. None: now.

        Returns:
            By the task's name, and ``{name}_base``.
        """
        tasks = [task]
        rows = {p.id: row for p, row in zip(task.problems, programs, strict=True)}
        if task.base:
            tasks.append(Task(f"{task.name}_base", task.base, task.timeout))
        return {
            part.name: self.grade(
                part,
                [rows[problem.id] for problem in part.problems],
                notes=notes,
                contaminated=contaminated,
                started=started,
            )
            for part in tasks
        }

    def grade(
        self,
        task: Task,
        programs: Sequence[Sequence[str]],
        *,
        notes: Mapping[str, Any] | None = None,
        contaminated: Sequence[str] | None = None,
        started: float | None = None,
    ) -> Evaluation:
        """Score programs by the tests of ``task.problems``; see :meth:`grade_task`.

        Raises:
            UserError: There are no problems.
            ValueError: A problem has another number of programs than ``settings.n``, and not none.
        """
        started = time.monotonic() if started is None else started
        n, problems, timeout = self.settings.n, task.problems, task.timeout
        if not problems:
            raise UserError("nothing to evaluate: there are no problems; choose a split that has some")
        for problem, row in zip(problems, programs, strict=True):
            if len(row) not in (0, n):
                raise ValueError(f"{problem.id}: {len(row)} samples, {n} were asked for")
        pairs = zip(problems, programs, strict=True)
        samples = [(problem, i, code) for problem, row in pairs for i, code in enumerate(row)]
        judging = self.settings.grading
        executions, timeouts = run_with_retries(
            [to_program(p, code, judging, timeout) for p, _, code in samples], self.runner
        )
        other = self._disagreements(samples, executions, timeout) if judging == "auto" else []
        remaining = iter(executions)
        rows = [[next(remaining) for _ in row] for row in programs]
        counts = [_count(row) for row in rows]
        ks = sorted({1, *self.settings.ks})  # summaries are about pass@1
        values = {k: _estimates(counts, n, k) for k in ks}
        ids = [problem.id for problem in problems]
        return Evaluation(
            task=task.name,
            pass_at_k={k: _mean(values[k]) for k in ks},
            interval=bootstrap_interval(values[1]) if values[1] else None,
            accuracy=_mean(_estimates([_count(row[:1]) for row in rows], 1, 1)),
            success_rate=_mean([float(c > 0) for m, c in counts if m is not None]),
            test_pass_rate=_test_pass_rate(problems, rows),
            n=n,
            problems=len(problems),
            outcomes=dict(Counter(e.outcome for e in executions).most_common()),
            timeouts_rerun=timeouts,
            infra_errors=sum(e.outcome == "infra_error" for e in executions),
            seconds=time.monotonic() - started,
            settings={**(notes or {}), **_caveats(executions, timeout), "judging": judging},
            contaminated=None if contaminated is None else [name for name in contaminated if name in ids],
            disagreements=other,
            ids=ids,
            correct=[c for _, c in counts],
            counted=[m or 0 for m, _ in counts],
            first=[_first(row) for row in rows],
            generations=[list(row) for row in programs],
            references=[reference(problem) for problem in problems],
        )

    def _disagreements(
        self,
        samples: Sequence[tuple[Problem, int, str]],
        executions: Sequence[Execution],
        timeout: float | None,
    ) -> list[dict[str, Any]]:
        """The samples that inline grading judges differently, of those that were not judged inline."""
        both = [(s, e) for s, e in zip(samples, executions, strict=True) if e.grading != "inline"]
        inline = self.runner.run([to_program(p, code, "inline", timeout) for (p, _, code), _ in both])
        differ = [pair for pair, theirs in zip(both, inline, strict=True) if _disagree(pair[1], theirs)]
        # A time-out of a busy machine is worth a second run only where it decides.
        inline, _ = run_with_retries(
            [to_program(p, code, "inline", timeout) for (p, _, code), _ in differ], self.runner
        )
        return [
            {
                "id": problem.id,
                "sample": number,
                "inline": theirs.outcome,
                "grading": ours.grading,
                "outcome": ours.outcome,
                "message": (ours if ours.outcome != "passed" else theirs).message,
            }
            for ((problem, number, _), ours), theirs in zip(differ, inline, strict=True)
            if _disagree(ours, theirs)
        ]


def _disagree(ours: Execution, theirs: Execution) -> bool:
    """Whether one passes a program and the other fails it."""
    outcomes = (ours.outcome, theirs.outcome)
    return "infra_error" not in outcomes and outcomes.count("passed") == 1


def run_with_retries(jobs: Sequence[Program], runner: ProgramRunner) -> tuple[list[Execution], int]:
    """Run programs; retry infrastructure errors, and run time-outs once more alone.

    A busy machine is not held against a program: the verdict of a time-out's second run holds.

    Returns:
        The executions, in order, and how many programs timed out at first.
    """
    executions = list(runner.run(jobs))

    def again(outcome: str) -> int:
        places = [i for i, e in enumerate(executions) if e.outcome == outcome]
        if places:
            for i, e in zip(places, runner.run([jobs[i] for i in places]), strict=True):
                executions[i] = e if e.outcome != "infra_error" else executions[i]
        return len(places)

    for _ in range(INFRA_RETRIES):
        again("infra_error")
    return executions, again("timeout")


def _count(row: Sequence[Execution]) -> tuple[int | None, int]:
    """How many samples of a problem could be judged, and how many of them pass.

    None where all were lost to the infrastructure: that says nothing. No samples at all is 0: not solved.
    """
    judged = [e for e in row if e.outcome != "infra_error"]
    return (len(judged) if judged or not row else None), sum(e.outcome == "passed" for e in judged)


def _first(row: Sequence[Execution]) -> bool | None:
    """Whether the first sample passes; None where it is lost to the infrastructure."""
    if not row:
        return False
    return None if row[0].outcome == "infra_error" else row[0].outcome == "passed"


def _estimates(counts: Sequence[tuple[int | None, int]], n: int, k: int) -> list[float]:
    """pass@k of each problem for which it can be told."""
    if k > n:
        return []
    return [pass_at_k(m, c, k) for m, c in counts if m is not None and (m >= k or m == 0)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _test_pass_rate(problems: Sequence[Problem], rows: Sequence[Sequence[Execution]]) -> float | None:
    judged = [
        (p, e) for p, row in zip(problems, rows, strict=True) for e in row if e.outcome != "infra_error"
    ]
    # A program that never got as far as its tests failed all of them, however many the sandbox counted.
    total = sum(max(e.total, len(p.tests), 1) for p, e in judged)
    return sum(e.passed for _, e in judged) / total if total else None


def _caveats(executions: Sequence[Execution], timeout: float | None) -> dict[str, Any]:
    return {
        **({} if timeout is None else {"timeout": timeout}),
        "tier": sorted({e.tier for e in executions}),
        "grading": dict(Counter(e.grading for e in executions).most_common()),
        "cpu": _cpu_model(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
