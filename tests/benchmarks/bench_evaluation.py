"""Seconds for scoring 500 MBPP problems of 15 canned generations, beside bigcode-evaluation-harness's scorer.

    CODERL_DATA_DIR=... python -m tests.benchmarks.bench_evaluation [--rounds 3] [--endless 0.01]

The generations are made from the solutions: four in fifteen are right, the others wrong in eleven ways, from
a changed constant to prose. They go through ``coderl.evaluation.score`` in inline grading, as the harness
does it, and in auto grading (which also has inline's say, for the disagreements). The harness's
``compute_code_eval`` takes turns with it, on one problem in so many, in a small process of its own and in two
threads; its seconds for the whole set are reckoned from its rate. Problem 123, seconds of honest work, is
given wrong answers only, which do none of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from coderl.evaluation import load_task, reference
from coderl.sandbox import Program, Sandbox
from coderl.scores import Evaluation
from coderl.types import Judging, Problem
from tests.support import harness, mutants
from tests.support.scoring import score

SLOW = "mbpp/123"
WORKING = ("right", "chatty", "twice", "guarded", "constant", "boxed")
"""Answers that may do what the right one does."""
GRADINGS: tuple[Judging, ...] = ("inline", "auto")
HARNESS_WORKERS = 2


@dataclass(frozen=True)
class Figures:
    """What several turns come to.

    Attributes:
        runs: Programs in a turn.
        runs_per_second: The median turn's.
        seconds: For the whole set, at that rate.
        rounds: Seconds of each turn.
    """

    runs: int
    runs_per_second: float
    seconds: float
    rounds: list[float]

    @classmethod
    def of(cls, runs: int, rounds: list[float], whole: int) -> Figures:
        rate = runs / statistics.median(rounds)
        return cls(runs, rate, whole / rate, rounds)


def canned(problem: Problem, samples: int) -> list[str]:
    """A problem's generations, as whole programs."""
    code = problem.prompt + problem.solution
    answers = mutants.answers(code, mutants.function_of(problem.solution, reference(problem)))
    if problem.id == SLOW:
        answers = {name: answer for name, answer in answers.items() if name not in WORKING}
    return list(islice(cycle(answers.values()), samples))


def generations(problems: list[Problem], samples: int, endless: float, part: slice) -> list[list[str]]:
    """All generations; a share of them is endless, in the harness's part as in the rest."""
    rows = [canned(problem, samples) for problem in problems]
    places = range(len(problems))
    order = [*places[part], *sorted(set(places) - set(places[part]))]
    for number in range(int(len(order) * samples * endless)):
        row, sample = divmod(int((number + 0.5) / endless), samples)
        rows[order[row]][sample] = mutants.endless(problems[order[row]].solution)
    return rows


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns."""
    problems = list(load_task("mbpp", chosen.problems).problems)
    part = slice(chosen.fewer // 2, None, chosen.fewer)
    rows = generations(problems, chosen.samples, chosen.endless, part)
    seconds: dict[str, list[float]] = {name: [] for name in (*GRADINGS, "harness")}
    load_before = os.getloadavg()[0]
    with Sandbox(chosen.workers, allow_weak_isolation=True) as pool:
        pool.run([Program("x = 1", ("assert x == 1",))] * 4 * pool.workers)  # all lanes up
        for _ in range(chosen.rounds):
            found = {grading: scored(problems, rows, pool, grading) for grading in GRADINGS}
            for grading, evaluation in found.items():
                seconds[grading].append(evaluation.seconds)
            theirs = harness.score(
                rows[part], [reference(p) for p in problems[part]], ks=(1,), workers=HARNESS_WORKERS
            )
            seconds["harness"].append(theirs.seconds)
            agree(found["inline"].correct[part], [sum(row) for row in theirs.passed])
        about: dict[str, Any] = {"tier": pool.tier, "lanes": pool.workers}
    whole = len(rows) * chosen.samples
    runs = dict.fromkeys(GRADINGS, whole) | {"harness": len(rows[part]) * chosen.samples}
    figures: dict[str, Any] = {n: asdict(Figures.of(runs[n], seconds[n], whole)) for n in seconds}
    about |= {"cpu": found["inline"].settings["cpu"], "load": [load_before, os.getloadavg()[0]]}
    about |= {"outcomes": found["inline"].outcomes, "disagreements": len(found["auto"].disagreements)}
    return figures | about | {"endless": chosen.endless, "programs": whole}


def scored(problems: list[Problem], rows: list[list[str]], pool: Sandbox, grading: Judging) -> Evaluation:
    """One turn of ours, which must mean something."""
    found = score(problems, rows, pool, n=len(rows[0]), ks=(1,), grading=grading)
    if found.infra_errors:
        sys.exit(f"{found.infra_errors} programs could not be judged: the figures would mean nothing")
    return found


def agree(ours: list[int], theirs: list[int]) -> None:
    """Both must have found the same."""
    if ours != theirs:
        apart = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        sys.exit(f"the two disagree on problems {apart[:10]} of the part: is the machine too busy?")


def table(figures: dict[str, Any]) -> None:
    """All of it on one screen."""
    print(f"{figures['cpu']}, tier {figures['tier']}, {figures['lanes']} lanes, ", end="")
    print(f"load {figures['load'][0]:.1f} at the start")
    print(f"{figures['programs']} programs, {figures['endless']:.1%} endless: {figures['outcomes']}")
    print(f"{figures['disagreements']} judged otherwise by auto grading\n")
    print(f"{'':28}{'programs':>10}{'runs/s':>10}{'s for all':>12}{'ratio':>8}")
    base = figures["harness"]["runs_per_second"]
    for name in (*GRADINGS, "harness"):
        one = figures[name]
        label = f"coderl, {name}" if name != "harness" else f"harness, {HARNESS_WORKERS} threads"
        ratio = one["runs_per_second"] / base
        print(f"{label:28}{one['runs']:10}{one['runs_per_second']:10.1f}{one['seconds']:12.1f}{ratio:8.1f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="turns that each side takes (default %(default)s)")
    add(
        "--problems",
        type=int,
        default=500,
        help="the first so many of MBPP's test split (default %(default)s)",
    )
    add("--samples", type=int, default=15, help="generations of a problem (default %(default)s)")
    add("--fewer", type=int, default=20, help="the harness gets one problem in so many (default %(default)s)")
    add("--endless", type=float, default=0.0, help="share of endless programs, 0 to 1 (default %(default)g)")
    add("--workers", type=int, default=None, help="lanes (default: one for each usable core)")
    add("--json", type=Path, metavar="FILE", help="keep the figures: rates in runs/s, times in seconds")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if not os.environ.get("CODERL_DATA_DIR"):
        sys.exit("set CODERL_DATA_DIR to the folder that holds mbpp.jsonl")
    if importlib.util.find_spec("bigcode_eval") is None:
        sys.exit("the harness is not installed: pip install --no-deps nvidia-bigcode-eval")
    figures = measure(chosen)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table(figures)


if __name__ == "__main__":
    main()
