"""The benchmarks that scores are published on, as bigcode-evaluation-harness asks and runs them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from coderl.errors import UsageError, UserError, did_you_mean
from coderl.problems import MBPP, HumanEval, HumanEvalPlus, JSONLProblems, MBPPPlus, ProblemSource
from coderl.problems.sources import jsonl_stem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coderl.types import Problem

log = logging.getLogger(__name__)

TIMEOUT = 3.0
"""Seconds for a program with all its tests, where a task names no other."""


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: What results call it, such as ``"mbpp"``.
        problems: What is asked, in the order of saved generations.
        timeout: Seconds of wall time for a program with all its tests. None: the runner's.
        base: EvalPlus' tasks: the same problems with the tests that they had before, judged besides.
    """

    name: str
    problems: tuple[Problem, ...]
    timeout: float | None = TIMEOUT
    base: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, problems: Sequence[Problem], timeout: float | None, source: str = "") -> Task:
        """Problems of any kind as a task.

        It has the name of their source where that is a benchmark's, else the first part of their ids.

        Args:
            problems: What is asked.
            timeout: Seconds of wall time for a program with all its tests. None: the runner's.
            source: Name of the source that they are from, where it is known.
        """
        prefix = problems[0].id.partition("/")[0].lower() if problems else "problems"
        return cls(source if source in TASKS else prefix, tuple(problems), timeout)


@dataclass(frozen=True)
class _Kind:
    source: Callable[[], ProblemSource]
    timeout: float = TIMEOUT
    base: Callable[[], ProblemSource] | None = None


_RAW = partial(HumanEval, strip_prompt=False)
TASKS = {
    "mbpp": _Kind(MBPP),
    "humaneval": _Kind(HumanEval),
    "humaneval-unstripped": _Kind(_RAW),
    "humanevalplus": _Kind(HumanEvalPlus, 20.0, HumanEval),
    "humanevalplus-unstripped": _Kind(partial(HumanEvalPlus, strip_prompt=False), 20.0, _RAW),
    "mbppplus": _Kind(MBPPPlus, 10.0, partial(MBPPPlus, plus=False)),
}
"""Tasks by the harness's names, with its time-outs."""


def load_task(name: str, limit: int | None = None) -> Task:
    """A task by name, or one's own problems by the path of their JSON-lines file.

    Args:
        name: One of :data:`TASKS`, or a path that ends in ``.jsonl`` or ``.jsonl.gz``.
        limit: Only the first so many problems. None: all.

    Raises:
        UsageError: There is no such task.
        UserError: Its data cannot be found or read, or there are no problems.
    """
    if ".jsonl" in Path(name).name:
        if not Path(name).expanduser().is_file():
            raise UserError(f"no file {name}: give --tasks a name, such as mbpp, or a JSON-lines file's path")
        source = JSONLProblems(train=name, test=name)
        return Task(jsonl_stem(name).lower(), _first(source, limit))
    kind = TASKS.get(name.lower())
    if kind is None:
        hint = did_you_mean(name.lower(), TASKS) or f"; there are {', '.join(TASKS)}."
        raise UsageError(f"no task {name!r}{hint} A .jsonl file of your own is given by its path")
    problems = _first(kind.source(), limit)
    return Task(name.lower(), problems, kind.timeout, _base(kind, problems) if kind.base else ())


def _first(source: ProblemSource, limit: int | None) -> tuple[Problem, ...]:
    problems = source.load("test")
    if not problems:
        raise UserError(f"{source.name}: there are no problems to evaluate on; {source.hint('test')}")
    return tuple(problems[:limit])


def _base(kind: _Kind, problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
    """The same problems with their original tests; none where those cannot be had."""
    assert kind.base is not None
    try:
        originals = {problem.id: problem for problem in kind.base().load("test")}
    except UserError as error:
        log.warning("the original tests are not judged besides: %s", error)
        return ()
    return tuple(originals[problem.id] for problem in problems if problem.id in originals)


def reference(problem: Problem) -> str:
    """What the harness runs after a program: its own form of the problem's tests."""
    if problem.tests:
        return "\n".join(problem.tests)
    call = f"\ncheck({problem.entry_point})" if problem.entry_point else ""
    return f"\n{problem.test}{call}"
