"""Compares two results files problem by problem.

Problems are paired by id. How hard a problem is cancels out of a paired difference, so that far fewer
problems are needed to tell it from chance than with two separate scores.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from coderl.errors import UsageError, UserError
from coderl.files import read_json, write_output
from coderl.scores.caveats import caveats, common_ks
from coderl.scores.comparison import Comparison, Count, Score
from coderl.scores.plot import plot
from coderl.scores.results import RESULTS, comparison_stem, stem_of
from coderl.scores.statistics import bootstrap_interval, pass_at_k

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The tasks of a results file, by name.

    Raises:
        UserError: It cannot be read, is no results file, or lacks the counts per problem.
    """
    fix = f"give an {RESULTS}_*.json of `coderl evaluate`"
    body = read_json(path.expanduser(), fix)
    tasks = {k: v for k, v in body.items() if k != "config"} if isinstance(body, dict) else {}
    are_tasks = (
        isinstance(task, dict) and ("ids" in task or any(key.startswith("pass@") for key in task))
        for task in tasks.values()
    )
    if not tasks or not all(are_tasks):
        raise UserError(f"{path}: is no results file; {fix}")
    for name, task in tasks.items():
        if fault := _fault(task):
            raise UserError(f"{path}: {name} {fault}; evaluate again with `coderl evaluate`")
    return tasks


def _fault(task: Mapping[str, Any]) -> str:
    """Why a task cannot be compared; empty where it can."""
    if missing := [key for key in ("ids", "correct", "counted") if key not in task]:
        return f"has no counts per problem ({', '.join(missing)} missing): an older file, or another tool's"
    columns = [task[key] for key in ("ids", "correct", "counted")]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return "has ids, correct and counted that are not lists of one length"
    for name, c, m in zip(*columns, strict=True):
        if not (isinstance(name, str) and type(c) is int and type(m) is int and 0 <= c <= m):
            return f"has {c!r} correct of {m!r} samples of problem {name!r}, which are no counts"
    twice = [name for name, times in Counter(columns[0]).items() if times > 1]
    return f"has problem {twice[0]!r} twice" if twice else ""


def compare(a: Path, b: Path) -> list[Comparison]:
    """Compare the tasks that both results files have, B with A.

    Raises:
        UsageError: Both are one file.
        UserError: A file cannot be used, or they have nothing in common.
    """
    a, b = a.expanduser(), b.expanduser()
    first, second = read_results(a), read_results(b)
    if a.samefile(b):
        raise UsageError(f"{a} and {b} are one file; give two results files")
    shared = [task for task in first if task in second]
    if not shared:
        have = f"{a} has {', '.join(first)} and {b} has {', '.join(second)}"
        raise UserError(f"no task in common: {have}; evaluate one task with both")
    skipped = [f"{task}: only {a} has it" for task in first if task not in second]
    skipped += [f"{task}: only {b} has it" for task in second if task not in first]
    comparisons, names = [], _names(a, b)
    for task in shared:
        try:
            comparisons.append(compare_task(task, first[task], second[task], names))
        except UserError as error:
            if task == shared[-1] and not comparisons:
                raise
            skipped.append(str(error))
    comparisons[0].warnings.extend(f"{reason}; not compared" for reason in skipped)
    return comparisons


def compare_task(
    task: str, a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str] = ("A", "B")
) -> Comparison:
    """Compare two results of one task.

    Args:
        task: Name of the task.
        a: The task in the first results file, as :func:`read_results` returns it.
        b: The task in the second results file.
        names: What the two files are called.

    Raises:
        UserError: No problem has a judged sample on both sides.
    """
    first, second = (
        dict(zip(side["ids"], zip(side["correct"], side["counted"], strict=True), strict=True))
        for side in (a, b)
    )
    if empty := [name for name, side in zip(names, (first, second), strict=True) if not side]:
        raise UserError(f"{task}: {empty[0]} holds no problems")
    both = sorted(first.keys() & second.keys(), key=_natural)
    if not both:
        raise UserError(f"{task}: {names[0]} and {names[1]} have no problem in common")
    # With n = 0 nothing was sampled: no problem is solved. With n > 0 and no verdict the outcome is unknown.
    unjudged = {name for name in both if not first[name][1] and a.get("n") != 0}
    unjudged |= {name for name in both if not second[name][1] and b.get("n") != 0}
    pairs = {name: (first[name], second[name]) for name in both if name not in unjudged}
    if not pairs:
        raise UserError(f"{task}: no problem was judged on both sides")
    shares = {name: (pass_at_k(x[1], x[0], 1), pass_at_k(y[1], y[0], 1)) for name, (x, y) in pairs.items()}
    comparison = Comparison(
        task,
        *names,
        ids=tuple(pairs),
        a=tuple(x for x, _ in pairs.values()),
        b=tuple(y for _, y in pairs.values()),
        scores={k: score for k in common_ks(a, b) if (score := _score(list(pairs.values()), k))},
        won=tuple(name for name, (x, y) in shares.items() if y > x),
        lost=tuple(name for name, (x, y) in shares.items() if y < x),
        only_a=tuple(sorted(first.keys() - second.keys(), key=_natural)),
        only_b=tuple(sorted(second.keys() - first.keys(), key=_natural)),
        unjudged=tuple(name for name in both if name in unjudged),
    )
    comparison.warnings.extend(f"{task}: {line}" for line in caveats(comparison, a, b))
    return comparison


def _score(pairs: Sequence[tuple[Count, Count]], k: int) -> Score | None:
    """pass@k of both sides over the problems with ``k`` judged samples on both; None without any."""
    # Here 0 samples means that none was asked for: the others were left out as unjudged.
    enough = [(a, b) for a, b in pairs if all(judged >= k or judged == 0 for _, judged in (a, b))]
    if not enough:
        return None
    x, y = ([pass_at_k(judged, correct, k) for correct, judged in side] for side in zip(*enough, strict=True))
    return Score(
        fmean(x),
        fmean(y),
        bootstrap_interval(x),
        bootstrap_interval(y),
        bootstrap_interval([b - a for a, b in zip(x, y, strict=True)]),
        problems=len(enough),
        won=sum(b > a for a, b in zip(x, y, strict=True)),
        lost=sum(b < a for a, b in zip(x, y, strict=True)),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key with ``mbpp/2`` before ``mbpp/11``."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _names(a: Path, b: Path) -> tuple[str, str]:
    """Names of the two files, with as many of their folders as make them different."""
    # A file name may hold bytes that are not UTF-8, which cannot be printed.
    a, b = (Path(str(path.absolute()).encode(errors="replace").decode()) for path in (a, b))
    short = [stem_of(path) for path in (a, b)]
    if short[0] != short[1]:
        return short[0], short[1]
    x, y = a.parts, b.parts
    depth = next(depth for depth in count(1) if x[-depth:] != y[-depth:])
    return "/".join(x[-depth:]), "/".join(y[-depth:])


def save(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write everything as ``comparison_{A}_vs_{B}.json`` and draw it as a PNG of that name.

    Returns:
        The two files.

    Raises:
        UserError: The folder cannot be written to.
    """
    name_a, name_b = comparisons[0].name_a, comparisons[0].name_b
    stem = comparison_stem(name_a, name_b)
    files = [folder / f"{stem}.json", folder / f"{stem}.png"]
    tasks = {comparison.task: comparison.to_json() for comparison in comparisons}
    write_output(files[0], json.dumps({"a": name_a, "b": name_b, "tasks": tasks}, indent=2) + "\n")
    plot(comparisons, files[1])
    return files
