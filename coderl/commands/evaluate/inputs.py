"""What is evaluated: the tasks named on the command line, and programs saved earlier."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from coderl.errors import UsageError, UserError
from coderl.evaluation import EvaluationSettings, Grader, Task, load_task
from coderl.evaluation.tasks import TASKS
from coderl.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coderl.sandbox import ProgramRunner
    from coderl.scores import Evaluation


def load_tasks(names: str, limit: int | None, timeout: float | None) -> list[Task]:
    """The tasks named, each once.

    Args:
        names: With commas between.
        limit: Only the first so many problems of each. None: all.
        timeout: Seconds for a program with all its tests. None: the task's own.

    Raises:
        UsageError: There is none, no such task, or two results would have one name.
        UserError: A task's data cannot be read.
    """
    given = (name.strip() for name in names.split(","))
    once = dict.fromkeys(name.lower() if name.lower() in TASKS else name for name in given)
    loaded = [load_task(name, limit) for name in once if name]
    if not loaded:
        raise UsageError("no task: give --tasks a name, such as mbpp")
    results = ["config", *(name for t in loaded for name in (t.name, f"{t.name}_base")[: 2 if t.base else 1])]
    if twice := [name for name, count in Counter(results).items() if count > 1]:
        raise UsageError(f"two results would be called {twice[0]!r}: rename that .jsonl file")
    return loaded if timeout is None else [replace(task, timeout=timeout) for task in loaded]


def score_file(
    path: Path, tasks: Sequence[Task], runner: ProgramRunner, settings: EvaluationSettings
) -> dict[str, Evaluation]:
    """Score saved generations, ours or the harness's.

    Args:
        path: JSON: a list with, per problem of the task, a list of whole programs.
        tasks: The one task that they answer.
        runner: Runs them.
        settings: How they are judged; the number of samples is the file's.

    Raises:
        UsageError: There is more than one task.
        UserError: The file cannot be read, or does not fit the task.
    """
    if len(tasks) != 1:
        raise UsageError("--load_generations_path scores one task: give --tasks its name")
    programs = _generations(path)
    task, count = tasks[0], len(programs)
    if count != len(task.problems):
        hint = f"; --limit {count} scores the first {count}" if count < len(task.problems) else ""
        raise UserError(
            f"{path} answers {count} problems, {task.name} has {len(task.problems)}: give the task that it "
            f"was made for{hint}"
        )
    sizes = sorted({len(row) for row in programs} - {0})
    if len(sizes) != 1:
        found = f"between {sizes[0]} and {sizes[-1]}" if sizes else "no"
        raise UserError(f"{path} has {found} programs for a problem: each is to have as many as the others")
    settings = replace(settings, n=sizes[0])
    print(f"{task.name}: running {count * sizes[0]} programs", file=sys.stderr)
    return Grader(runner, settings).grade_task(task, programs, notes={"generations": str(path)})


def _generations(path: Path) -> list[list[str]]:
    form = "it is to be a list with a list of whole programs for each problem"
    found: list[list[str]] = read_json(path, form, list)
    for number, row in enumerate(found):
        if not isinstance(row, list) or not all(isinstance(program, str) for program in row):
            raise UserError(f"{path}: entry {number} is not a list of programs; {form}")
    return found
