"""pass@k by execution, after bigcode-evaluation-harness: sample, cut, run, count, and write down.

What makes scores compare with other people's is settled in :mod:`coderl.prompts` (prompt, stops, program)
and here (what counts as a sample, the estimator, re-runs). How samples are drawn is the caller's.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from coderl.errors import UserError
from coderl.metrics import bootstrap_interval, pass_at_k
from coderl.prompts import PromptForm, program
from coderl.sandbox import Program

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from coderl.types import Execution, Problem

INFRA_RETRIES = 2


class Runner(Protocol):
    """Anything that runs programs, such as :class:`coderl.sandbox.Sandbox`."""

    def run(self, programs: Sequence[Program]) -> list[Execution]:
        """One execution per program, in order."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one task, with what they rest on.

    Attributes:
        task: Name, such as ``"mbpp"``.
        pass_at_k: From k to the mean over problems, 0 to 1; None where it cannot be told (k is above ``n``).
        interval: Bootstrap interval over problems of pass@1, 95 %; None where pass@1 cannot be told.
        accuracy: Share of problems whose first sample passes.
        success_rate: Share of problems with a sample that passes, that is, of positive reward.
        test_pass_rate: Share of single tests that held, over all samples.
        n: Samples asked for per problem.
        problems: Number of problems.
        outcomes: How many samples ended in each way, after the re-runs.
        timeouts_rerun: Time-outs of the first run; each was run once more.
        infra_errors: Samples that could not be judged even when retried. They are left out, not called wrong.
        seconds: Wall time of sampling and running.
        settings: Sampling, prompt form, isolation and processor: what must stand beside the scores.
        ids: The problems, in order.
        correct: Per problem, samples that pass.
        counted: Per problem, samples that could be judged.
        generations: Per problem, the whole programs, as the harness saves and loads them.
    """

    task: str
    pass_at_k: dict[int, float | None]
    interval: tuple[float, float] | None
    accuracy: float | None
    success_rate: float | None
    test_pass_rate: float | None
    n: int
    problems: int
    outcomes: dict[str, int]
    timeouts_rerun: int
    infra_errors: int
    seconds: float
    settings: dict[str, Any]
    ids: list[str]
    correct: list[int]
    counted: list[int]
    generations: list[list[str]] = field(repr=False)

    def scores(self) -> dict[str, float | None]:
        """``{"pass@1": x, ...}``; None where a k cannot be told."""
        return {f"pass@{k}": value for k, value in self.pass_at_k.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything but the generations, for ``json.dump``. The pass@k stand first, each under its name."""
        rest = {k: v for k, v in asdict(self).items() if k not in {"task", "pass_at_k", "generations"}}
        return self.scores() | rest


def evaluate(
    problems: Sequence[Problem],
    sample: Callable[[Sequence[Problem], int], list[list[str]]],
    sandbox: Runner,
    *,
    n: int = 15,
    ks: Sequence[int] = (1, 5, 10),
    form: PromptForm = "completion",
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Sample answers to ``problems`` and score them.

    Args:
        problems: What is asked; at least one.
        sample: Given problems and ``n``, the answers' texts: a list per problem, in order, of ``n`` texts
            each (or none at all, which counts as not solved).
        sandbox: Runs the programs.
        n: Samples per problem.
        ks: The k of pass@k. One above ``n`` is reported as missing.
        form: How the problems were asked; it decides how programs are made of answers.
        task: Name of the task. None: the first part of the first problem's id.
        settings: Temperature, top_p and what else should stand beside the scores.
    """
    started = time.monotonic()
    texts = sample(problems, n)
    if len(texts) != len(problems):
        raise ValueError(f"{len(texts)} lists of samples for {len(problems)} problems")
    programs = [[program(p, text, form) for text in row] for p, row in zip(problems, texts, strict=True)]
    noted = {"form": form, **(settings or {})}
    return score(problems, programs, sandbox, n=n, ks=ks, task=task, settings=noted, started=started)


def score(
    problems: Sequence[Problem],
    programs: Sequence[Sequence[str]],
    sandbox: Runner,
    *,
    n: int,
    ks: Sequence[int] = (1, 5, 10),
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    started: float | None = None,
) -> Evaluation:
    """Score whole programs, such as the harness's saved generations.

    Args:
        problems: What was asked; at least one.
        programs: Per problem, ``n`` whole programs, or none at all.
        sandbox: Runs them.
        n: Samples per problem.
        ks: The k of pass@k.
        task: Name of the task. None: the first part of the first problem's id.
        settings: What should stand beside the scores.
        started: Monotonic time, in seconds, from which the wall time counts. None: now.
    """
    started = time.monotonic() if started is None else started
    if not problems:
        raise UserError("nothing to evaluate: there are no problems; choose a split that has some")
    for problem, row in zip(problems, programs, strict=True):
        if len(row) not in (0, n):
            raise ValueError(f"{problem.id}: {len(row)} samples, {n} were asked for")
    jobs = [job(p, code) for p, row in zip(problems, programs, strict=True) for code in row]
    executions, reran = run_fairly(jobs, sandbox)
    remaining = iter(executions)
    rows = [[next(remaining) for _ in row] for row in programs]
    counts = [_count(row) for row in rows]
    values = {k: _estimates(counts, n, k) for k in {1, *ks}}
    return Evaluation(
        task=task or problems[0].id.partition("/")[0].lower(),
        pass_at_k={k: _mean(values[k]) for k in ks},
        interval=bootstrap_interval(values[1]) if values[1] else None,
        accuracy=_mean(_estimates([_count(row[:1]) for row in rows], 1, 1)),
        success_rate=_mean([float(c > 0) for m, c in counts if m is not None]),
        test_pass_rate=_test_pass_rate(problems, rows),
        n=n,
        problems=len(problems),
        outcomes=dict(Counter(e.outcome for e in executions).most_common()),
        timeouts_rerun=reran,
        infra_errors=sum(e.outcome == "infra_error" for e in executions),
        seconds=time.monotonic() - started,
        settings={**(settings or {}), **_circumstances(executions)},
        ids=[problem.id for problem in problems],
        correct=[c for _, c in counts],
        counted=[m or 0 for m, _ in counts],
        generations=[list(row) for row in programs],
    )


def run_fairly(jobs: Sequence[Program], sandbox: Runner) -> tuple[list[Execution], int]:
    """Run programs so that a busy machine is not held against them.

    Infrastructure errors are retried. Then time-outs are run once more by themselves, and that verdict holds.

    Returns:
        The executions, in order, and how many programs timed out at first.
    """
    executions = list(sandbox.run(jobs))

    def again(outcome: str) -> int:
        places = [i for i, e in enumerate(executions) if e.outcome == outcome]
        if places:
            for i, e in zip(places, sandbox.run([jobs[i] for i in places]), strict=True):
                executions[i] = e if e.outcome != "infra_error" else executions[i]
        return len(places)

    for _ in range(INFRA_RETRIES):
        again("infra_error")
    return executions, again("timeout")


def results_name(model: str, method: str, when: datetime | None = None) -> str:
    """The mission's file name: ``evaluation_results_{model}_{method}_{YYYYMMDD_HHMMSS}.json``."""
    name = re.sub(r"[^\w.-]+", "-", f"{model}_{method}")
    return f"evaluation_results_{name}_{when or datetime.now():%Y%m%d_%H%M%S}.json"


def save_results(
    evaluations: Mapping[str, Evaluation], path: Path, config: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write the scores to ``path`` in the harness's layout, and each task's generations beside it.

    Args:
        evaluations: From task to evaluation.
        path: The JSON file, see :func:`results_name`.
        config: What goes under ``"config"``. None: the settings of each task.

    Returns:
        The files written: ``path``, then ``generations_..._{task}.json``: lists of whole programs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = {name.lower(): evaluation for name, evaluation in evaluations.items()}
    settings = dict(config) if config is not None else {name: e.settings for name, e in tasks.items()}
    body = {name: e.to_json() for name, e in tasks.items()} | {"config": settings}
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    stem = path.stem.removeprefix("evaluation_results_")
    files = {path.with_name(f"generations_{stem}_{name}.json"): e.generations for name, e in tasks.items()}
    for file, generations in files.items():
        # Samples may hold lone surrogates, which UTF-8 cannot: leave JSON's escapes on.
        file.write_text(json.dumps(generations) + "\n", encoding="utf-8")
    return [path, *files]


def logged_scores(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """The scores that can be told, under the mission's logging keys: ``final_eval/mbpp_pass@1`` and so on."""
    return {
        f"final_eval/{name.lower()}_{metric}": value
        for name, evaluation in evaluations.items()
        for metric, value in evaluation.scores().items()
        if value is not None
    }


def summary_text(evaluations: Mapping[str, Evaluation], path: Path | str, logged: Sequence[str] = ()) -> str:
    """The mission's console summary.

    Args:
        evaluations: From task to evaluation.
        path: Where the results were saved.
        logged: The keys that were logged to W&B. Empty: that line is left out.
    """
    lines = ["🎯 Automatic evaluation completed! Results summary:", "=" * 60, ""]
    for name, evaluation in evaluations.items():
        lines += [f"📊 {name.upper()} Results:"]
        lines += [
            f"   {metric}: {_shown(metric, x, evaluation)}" for metric, x in evaluation.scores().items()
        ]
        lines += [f"   {_footing(evaluation)}", ""]
    lines.append(f"📁 Complete evaluation results saved to: {path}")
    if logged:
        lines.append(f"📊 Evaluation results logged to WandB: {list(logged)}")
    return "\n".join(lines)


def _shown(metric: str, value: float | None, evaluation: Evaluation) -> str:
    if value is not None:
        return f"{value:.3f}"
    return f"missing (needs {metric.removeprefix('pass@')} judged samples per problem, n is {evaluation.n})"


def _footing(evaluation: Evaluation) -> str:
    """One line on what the scores rest on."""
    parts = [f"{evaluation.problems} problems, n {evaluation.n}"]
    if evaluation.interval:
        low, high = evaluation.interval
        parts.insert(0, f"95% interval of pass@1 {low:.3f} to {high:.3f}")
    chosen = [f"{k} {evaluation.settings[k]}" for k in ("temperature", "top_p") if k in evaluation.settings]
    timeouts = evaluation.outcomes.get("timeout", 0)
    parts += [*chosen, f"{timeouts} time-outs", f"{evaluation.infra_errors} infrastructure errors"]
    return f"({', '.join(parts)})"


def job(problem: Problem, code: str) -> Program:
    """What the sandbox runs for the whole program ``code`` as an answer to ``problem``."""
    helpers = "" if problem.tests else problem.prompt
    return Program(code, problem.tests, problem.setup, problem.test, problem.entry_point, helpers)


def _count(row: Sequence[Execution]) -> tuple[int | None, int]:
    """How many samples of a problem could be judged, and how many of them pass.

    None where all were lost to the infrastructure: that says nothing. No samples at all is 0: not solved.
    """
    judged = [e for e in row if e.outcome != "infra_error"]
    return (len(judged) if judged or not row else None), sum(e.outcome == "passed" for e in judged)


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


def _circumstances(executions: Sequence[Execution]) -> dict[str, Any]:
    return {
        "tier": sorted({e.tier for e in executions}),
        "grading": dict(Counter(e.grading for e in executions).most_common()),
        "cpu": _cpu_model(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
